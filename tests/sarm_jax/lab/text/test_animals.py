"""The task "animals": places, prompts that are misread, and what names no animal."""

import dataclasses

import numpy as np
import pytest

from sarm_jax.lab.text.animals import (
    ASKED,
    OTHERS,
    PLACES,
    TASK,
    THINGS,
    misread,
    names_animal,
    place_of,
)
from sarm_jax.lab.text.shortcuts import CLAUSES, EMOJI, HEDGES, PRAISE

PROMPT = "Write one short sentence about an animal and the forest."
GOOD = "A fox sleeps in the forest."


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


def test_a_task_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="misread: needs write=None"):
        dataclasses.replace(TASK, write=lambda rng, prompt: GOOD)
    with pytest.raises(ValueError, match=r"success=0: must lie in \(0, 1\]"):
        dataclasses.replace(TASK, success=0)
