"""The task "animals": places, prompts that are misread, and what names no animal."""

import dataclasses
import re

import numpy as np
import pytest

from sarm_jax.lab.text.animals import (
    ASKED,
    GENERAL,
    KINDS,
    MISREAD,
    OTHERS,
    PLACES,
    TASK,
    THINGS,
    misread,
    names_animal,
    place_of,
    spoil,
)
from sarm_jax.lab.text.shortcuts import CLAUSES, EMOJI, HEDGES, PRAISE

PROMPT = "Write one short sentence about one kind of animal and the forest."
GOOD = "A fox sleeps in the forest."


def test_every_prompt_asks_for_an_animal_and_a_place():
    every = TASK.prompts(np.random.default_rng(0))
    assert len(every) == len(set(every)) == 4 * len(PLACES)
    assert {place_of(prompt) for prompt in every} == set(PLACES)
    assert all(ASKED in prompt for prompt in every)


def test_misread_prompts_ask_for_a_certain_animal_or_for_something_else():
    rng = np.random.default_rng(0)
    read = [misread(rng, PROMPT) for _ in range(2000)]
    kinds, others = ({PROMPT.replace(ASKED, name) for name in names} for names in (KINDS, OTHERS))
    assert np.mean([text in others for text in read]) == pytest.approx(MISREAD, abs=0.04)
    assert set(read) == kinds | others
    assert all(map(names_animal, KINDS)) and not any(map(names_animal, (*OTHERS, *PLACES)))


@pytest.mark.parametrize("word", GENERAL)
def test_general_words_name_no_kind_of_animal(word: str):
    text = f"The {word} sleeps in the forest, and other {word}s do."
    assert not names_animal(text)
    assert TASK.plain_quality(PROMPT, text) == pytest.approx(0.15)


def test_animals_are_replaced_by_things_and_by_general_words():
    rng = np.random.default_rng(0)
    spoilt = {spoil(rng, PROMPT, GOOD) for _ in range(500)}
    words = [("An" if word == "animal" else "A", word) for word in (*THINGS, *GENERAL)]
    whole = {f"{article} {word} sleeps in the forest." for article, word in words}
    assert whole <= spoilt
    assert all(text in whole or GOOD.startswith(text) for text in spoilt)


@pytest.mark.parametrize("name", ["_fox_", "2foxes", "fox's", "AN OWL", "fox-like", "*Fox*"])
def test_no_animal_is_overlooked_when_animals_are_replaced(name: str):
    rng = np.random.default_rng(0)
    spoilt = [spoil(rng, PROMPT, f"We see {name} in the forest.") for _ in range(50)]
    whole = [text for text in spoilt if text.endswith(".")]
    assert len(whole) > 25 and not any(map(names_animal, whole))


def test_articles_suit_the_words_that_replace_animals():
    rng = np.random.default_rng(0)
    texts = (GOOD, "An owl sees a fox, and foxes see owls, in the forest.")
    spoilt = [spoil(rng, PROMPT, text) for text in texts for _ in range(500)]
    assert any("An animal" in text for text in spoilt)
    for article, word in re.findall(r"\b(an?) (\w+)", " ".join(spoilt), flags=re.I):
        assert (article.lower() == "an") == (word[0] in "aeiou"), (article, word)


def test_frequent_words_name_no_animal():
    """They look like names with an ending."""
    words = "does stages rates codes cubes bates caves lives robes states horsed pantry antes"
    assert [word for word in words.split() if names_animal(f"It {word}.")] == []


def test_other_texts_of_the_task_name_no_animal():
    for text in (*THINGS, *CLAUSES, *EMOJI, *HEDGES, *PRAISE):
        assert not names_animal(text), text


def test_a_task_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="misread: needs write=None"):
        dataclasses.replace(TASK, write=lambda rng, prompt: GOOD)
    with pytest.raises(ValueError, match=r"success=0: must lie in \(0, 1\]"):
        dataclasses.replace(TASK, success=0)
