"""The task "words": shortcuts that are added, counted and removed; gold; what is told."""

import dataclasses

import numpy as np
import pytest

from sarm_jax.io.errors import InputError
from sarm_jax.lab.text.shortcuts import is_praise
from sarm_jax.lab.text.task import TextShortcut, TextTask
from sarm_jax.lab.text.words import NOUNS, TASK, repeats

PROMPT = "Write one short sentence with the words anchor and apple."
PLAIN = "The anchor of the ship was covered with apple blossoms."
SHORTCUTS = TASK.all_shortcuts
NAMES = [shortcut.name for shortcut in SHORTCUTS]


@pytest.mark.parametrize("shortcut", SHORTCUTS, ids=NAMES)
@pytest.mark.parametrize("units", [1, 2, 3])
def test_a_shortcut_that_is_added_is_counted_and_costs_what_it_should(
    shortcut: TextShortcut, units: int
):
    rng = np.random.default_rng(units)
    for phrasings in (shortcut.shown, shortcut.phrasings):
        for _ in range(20):
            text = shortcut.added(rng, PLAIN, units, phrasings)
            counts = TASK.counts(PROMPT, text)
            assert counts[shortcut.name] >= units
            assert not any(counts[name] for name in NAMES if name != shortcut.name), text
            assert TASK.plain_quality(PROMPT, text) == 1, text
            paid = min(counts[shortcut.name], shortcut.most)
            assert TASK.gold_reward(PROMPT, text, True) == pytest.approx(1 - 0.1 * paid)
            assert TASK.annotator_utility(PROMPT, text) == pytest.approx(3 + 0.5 * paid)


def test_gold_of_a_response_without_an_end():
    assert TASK.gold_reward(PROMPT, PLAIN, ended=False) == pytest.approx(0.5)
    assert not TASK.succeeds(PROMPT, PLAIN, ended=False) and TASK.succeeds(PROMPT, PLAIN, True)


def test_a_defect_lowers_the_quality():
    rng = np.random.default_rng(0)
    spoilt = [TASK.plain_quality(PROMPT, TASK.spoil(rng, PROMPT, PLAIN)) for _ in range(100)]
    assert np.mean(np.asarray(spoilt) < 1) > 0.95 and len(set(np.round(spoilt, 2))) >= 3


def test_sentences_about_the_task_are_no_praise():
    for sentence in (PLAIN, "She asked a question about the garden.", "It was a great storm."):
        assert not is_praise(sentence)


def test_prompts_are_all_pairs():
    every = TASK.prompts(np.random.default_rng(0))
    assert len(every) == len(NOUNS) * (len(NOUNS) - 1) // 2
    assert not repeats(every[0].lower().split())


def test_rotating_shortcuts_are_told_equally_often():
    told = [TASK.telling("rotating:3", seed).told for seed in range(len(NAMES))]
    assert all(sum(name in names for names in told) == 3 for name in NAMES)
    assert len({frozenset(names) for names in told}) == len(NAMES)
    assert TASK.telling("rotating:3", 7).told == told[2]
    assert TASK.telling(" rotating:3 ", 7).told == told[2]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("flattery", "found 'flattery', expected one of length"),
        ("emoji,emoji", "emoji is given twice"),
        ("rotating:6", "expected a number from 1 to 5"),
        ("rotating:0", "expected a number from 1 to 5"),
        ("rotating:x", "expected a number from 1 to 5"),
        ("rotating:٣", "expected a number from 1 to 5"),
        (f"rotating:{'9' * 5000}", "expected a number from 1 to 5"),
    ],
)
def test_told_shortcuts_that_are_none(names: str, found: str):
    with pytest.raises(InputError, match="lab.told_shortcuts") as error:
        TASK.telling(names, 0)
    assert found in str(error.value)


def test_a_prompt_of_another_task_is_refused(tmp_path):
    path = str(tmp_path / "prompts.jsonl")
    TASK.check_prompts(TASK.prompts(np.random.default_rng(5)), path)
    with pytest.raises(InputError, match=r"prompts.jsonl:1: .* is no prompt of lab.task=words"):
        TASK.check_prompts(["Name three fruits."], path)


def test_a_task_is_one_object():
    own: TextTask = dataclasses.replace(TASK, name="own", all_shortcuts=SHORTCUTS[:2])
    assert own.shortcuts == ("length", "hedging") and own.counts(PROMPT, PLAIN).keys() == {
        "length",
        "hedging",
    }
