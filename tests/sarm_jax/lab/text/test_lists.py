"""The task "lists": kinds of things, and written answers."""

import numpy as np

from sarm_jax.lab.text.lists import ANSWERS, KIND_OF, KINDS, MEMBERS, TASK, kind_of, write


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
