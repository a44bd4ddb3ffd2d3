"""Plurals of the names that the tasks know."""

import pytest

from sarm_jax.lab.text.animals import ANIMALS, is_animal
from sarm_jax.lab.text.lists import MEMBERS, named
from sarm_jax.lab.text.plurals import singular

NAMES = ("apple", "bus", "cherry", "fox", "goose", "mouse", "potato", "wolf")
PLURALS = ("apples", "buses", "cherries", "foxes", "geese", "mice", "potatoes", "wolves")


@pytest.mark.parametrize(("name", "plural"), zip(NAMES, PLURALS, strict=True))
def test_a_name_and_its_plural(name: str, plural: str):
    assert singular(name, NAMES) == singular(plural, NAMES) == name
    assert singular(plural, {plural: 0}) == plural  # a name that looks like a plural


@pytest.mark.parametrize(
    "word", ["appl", "appless", "es", "s", "", "cherrys ", "goo", "pineapple", "mousees"]
)
def test_other_words_are_no_name(word: str):
    assert singular(word, NAMES) is None


@pytest.mark.parametrize(
    ("word", "name"), [("stages", "stag"), ("rates", "rat"), ("cubes", "cub"), ("codes", "cod")]
)
def test_es_is_an_ending_after_a_hiss_or_an_o_alone(word: str, name: str):
    assert singular(word, {name}) is None and singular(f"{name}s", {name}) == name


def test_the_tasks_know_the_plurals_of_their_names():
    assert all(is_animal(name) and is_animal(f"{name}s") for name in ANIMALS)
    for members in MEMBERS.values():
        for name in members:
            plural = f"{name[:-1]}ies" if name[-1] == "y" else f"{name}s"
            assert named(plural) == [name.lower()]
