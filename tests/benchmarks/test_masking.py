"""The texts of the benchmark that asks whether one shortcut hides another."""

import itertools

import numpy as np
import pytest

from benchmarks.masking import ALONE, texts_with
from sarm_jax.lab.shortcuts import SHORTCUTS
from sarm_jax.lab.world import MAX_WORDS

PROMPTS = ["France Peru Italy", "Japan Kenya Cuba", "Iraq Spain Ghana"] * 20


@pytest.mark.parametrize(
    ("told", "other"), [p for p in itertools.permutations((*SHORTCUTS, ALONE), 2) if p[0] != ALONE]
)
def test_a_text_has_the_shortcuts_that_it_is_to_have(told, other):
    prompts, texts = texts_with(np.random.default_rng(0), PROMPTS, told, other)
    assert len(texts) > len(PROMPTS) / 2
    present = {told, other} - {ALONE}
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text.split()) <= MAX_WORDS
        for name in present:
            assert SHORTCUTS[name].count(prompt, text) >= 1, (name, prompt, text)
    if other == ALONE:  # as in the contrast pairs
        assert all(SHORTCUTS[told].count(p, t) == 1 for p, t in zip(prompts, texts, strict=True))
