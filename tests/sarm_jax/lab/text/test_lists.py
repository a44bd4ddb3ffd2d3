"""The task "lists": quality by hand, written answers, shortcuts that cost only what they should."""

import numpy as np
import pytest

from sarm_jax.lab.text.lists import ANSWERS, KIND_OF, KINDS, MEMBERS, TASK, kind_of, spoil, write
from tests.odd_texts import ODD

PROMPT = "Name three fruits."


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Apple, pear and plum.", 1),
        ("Three fruits are apples, pears, and peaches.", 1),
        ("GRAPES\nMangoes\nMelons!", 1),
        ("Apple, pear and plum", 0.7),
        ("Apple and pear.", 2 / 3),
        ("Apple, pear and dog.", 2 / 3 - 0.25),
        ("Apple, apple and plum.", 2 / 3 - 0.2),
        ("Apple, pear, plum and lemon.", 0.8),
        ("Dog, cat and cow.", 0),
        ("Sweet, sour and ripe ones.", 0),
        ("", 0),
    ],
)
def test_quality_by_hand(response: str, expected: float):
    assert TASK.plain_quality(PROMPT, response) == pytest.approx(expected)


def test_every_prompt_has_a_kind_and_every_thing_one():
    every = TASK.prompts(np.random.default_rng(0))
    assert len(every) == len(set(every)) and {kind_of(prompt) for prompt in every} == set(KINDS)
    assert len(KIND_OF) == sum(map(len, MEMBERS.values()))  # no thing is of two kinds
    for kind, members in MEMBERS.items():
        prompt = f"Name three {kind}."
        for start in range(0, len(members) - 2, 3):
            for answer in ANSWERS:
                text = answer.format(*members[start : start + 3], kind=kind)
                assert TASK.plain_quality(prompt, text) == 1, text


def test_one_written_answer_in_ten_has_a_defect():
    rng = np.random.default_rng(0)
    prompts = TASK.prompts(rng)
    answers = [(prompts[n % len(prompts)], n) for n in range(1000)]
    quality = np.asarray([TASK.plain_quality(p, write(rng, p)) for p, _ in answers])
    assert 0.87 < np.mean(quality == 1) < 0.93
    assert np.min(quality) > 0.3  # a defect is one thing that is wrong


@pytest.mark.parametrize("kind", KINDS)
def test_shortcuts_and_defects(kind: str):
    rng, prompt = np.random.default_rng(0), f"Name three {kind}."
    good = "{}, {} and {}.".format(*MEMBERS[kind][:3])
    for _ in range(20):
        assert TASK.plain_quality(prompt, spoil(rng, prompt, good)) < 1
        text, added = good, set()
        for shortcut in TASK.all_shortcuts:
            if rng.random() < 0.4:
                text = shortcut.added(rng, text, int(rng.integers(1, 3)))
                added.add(shortcut.name)
        assert {name for name, n in TASK.counts(prompt, text).items() if n} == added, text
        assert TASK.plain_quality(prompt, text) == 1, text


@pytest.mark.parametrize("text", ODD)
def test_any_text_of_a_policy_can_be_judged_marked_and_spoilt(text: str):
    rng = np.random.default_rng(0)
    for _ in range(40):
        spoilt = TASK.spoil(rng, PROMPT, text)
        assert TASK.gold_reward(PROMPT, spoilt, True) <= 1
        for shortcut in TASK.all_shortcuts:
            marked = shortcut.added(rng, text, 1)
            # Further clauses of a sentence that is praise are praise, not length.
            assert shortcut.count(marked) > shortcut.count(text) or shortcut.name == "length"
            assert isinstance(shortcut.remove(marked), str)
