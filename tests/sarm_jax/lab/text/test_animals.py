"""The task "animals": quality by hand, prompts that are misread, shortcuts that cost their cost."""

import dataclasses

import numpy as np
import pytest

from sarm_jax.lab.text.animals import (
    ANIMALS,
    ASKED,
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
from tests.odd_texts import ODD

PROMPT = "Write one short sentence about an animal and the forest."
GOOD = "A fox sleeps in the forest."


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, 1),
        ("Two wolves and three foxes live in Forests!", 1),
        ('"The forest is full of BUTTERFLIES."', 1),
        ("A fox sleeps all day.", 0.85),
        ("The forest is quiet.", 0.15),
        ("A fox sleeps in the forest", 0.7),
        ("A fox", 0.55),
        ("The forest", 0),
        ("It rains.", 0),
        ("The foxglove is a catalogue of forestry.", 0.15),
        ("", 0),
    ],
)
def test_quality_by_hand(response: str, expected: float):
    assert TASK.plain_quality(PROMPT, response) == pytest.approx(expected)
    assert TASK.succeeds(PROMPT, response, True) == (expected >= 0.85)
    assert not TASK.succeeds(PROMPT, response, False)


def test_every_prompt_asks_for_an_animal_and_a_place():
    every = TASK.prompts(np.random.default_rng(0))
    assert len(every) == len(set(every)) == 4 * len(PLACES)
    assert {place_of(prompt) for prompt in every} == set(PLACES)
    assert all(ASKED in prompt for prompt in every)


def test_misread_prompts_ask_for_something_else_at_the_same_place():
    rng = np.random.default_rng(0)
    read = [misread(rng, PROMPT) for _ in range(1000)]
    assert 0.35 < np.mean([text != PROMPT for text in read]) < 0.45
    assert set(read) == {PROMPT, *(PROMPT.replace(ASKED, other) for other in OTHERS)}
    assert not any(names_animal(text) for text in (*OTHERS, *PLACES))


def test_other_texts_of_the_task_name_no_animal():
    for text in (*THINGS, *CLAUSES, *EMOJI, *HEDGES, *PRAISE):
        assert not names_animal(text), text


@pytest.mark.parametrize("place", PLACES)
def test_shortcuts_and_defects(place: str):
    rng, prompt = (
        np.random.default_rng(0),
        f"Write one short sentence about an animal and the {place}.",
    )
    good = f"A fox and an owl saw the {place} one day."
    for _ in range(20):
        assert TASK.plain_quality(prompt, spoil(rng, prompt, good)) < 1
        text, added = good, set()
        for shortcut in TASK.all_shortcuts:
            if rng.random() < 0.4:
                text = shortcut.added(rng, text, int(rng.integers(1, 3)))
                added.add(shortcut.name)
        assert {name for name, n in TASK.counts(prompt, text).items() if n} == added, text
        assert TASK.plain_quality(prompt, text) == 1, text


@pytest.mark.parametrize("text", [*ODD, *sorted(ANIMALS)[:3]])
def test_any_text_of_a_policy_can_be_judged_marked_and_spoilt(text: str):
    rng = np.random.default_rng(0)
    for _ in range(40):
        assert 0 <= TASK.plain_quality(PROMPT, TASK.spoil(rng, PROMPT, text)) <= 1
        for shortcut in TASK.all_shortcuts:
            assert TASK.gold_reward(PROMPT, shortcut.added(rng, text, 1), True) <= 1


def test_a_task_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="misread: needs write=None"):
        dataclasses.replace(TASK, write=lambda rng, prompt: GOOD)
    with pytest.raises(ValueError, match=r"success=0: must lie in \(0, 1\]"):
        dataclasses.replace(TASK, success=0)
