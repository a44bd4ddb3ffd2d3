"""Steering before and after against the model run again; specificity by hand and by simulation."""

import json

import numpy as np
import pytest

from sarm_jax.evaluation.controls import Controls
from sarm_jax.evaluation.figures import before_after
from sarm_jax.evaluation.steering import (
    Answer,
    SteeringConfig,
    choose_answers,
    evaluate_steering,
    read_answers,
    specificity,
)
from sarm_jax.io.errors import InputError
from sarm_jax.models.sarm import intervention
from sarm_jax.reporting.statistics import mean_interval
from tests.closeness import assert_close

OPTIONS = SteeringConfig(num_example=0, steering_targets=("rejected",), resamples=400, seed=0)
ANSWERS = [
    Answer(f"p{n % 5}", f"{kind} answer {n} " + "so " * (n % 4), kind)
    for n in range(10)
    for kind in ("chosen", "rejected", "complement")
]


@pytest.fixture
def steered(reward_model):
    """Two features, one of them active on some of the answers only."""
    _, z = reward_model.score([a.prompt for a in ANSWERS], [a.response for a in ANSWERS])
    share = (z != 0).mean(axis=0)
    ids = np.argsort(np.abs(share - 0.5))[:2].tolist()
    assert all(0 < share[i] < 1 for i in ids)
    return ids, Controls(intervention(64, steer={ids[0]: ("*", 0.0), ids[1]: ("*", 3.0)}))


def test_before_and_after_are_what_the_steered_model_says(reward_model, steered):
    ids, controls = steered
    found = evaluate_steering(OPTIONS, reward_model, ANSWERS, controls)
    texts = [a.prompt for a in ANSWERS], [a.response for a in ANSWERS]
    before, z = reward_model.score(*texts)
    after, _ = reward_model.score(*texts, clamp=controls.change)
    rows = found.rows
    assert_close([row["reward"] for row in rows], before, 1e-6)
    assert_close([row["reward_steered"] for row in rows], after, 2e-6)
    for row, z_f in zip(rows, z, strict=True):
        assert row["activated_latents"] == [i for i in sorted(ids) if z_f[i] != 0]
    for kind, content in found.summary["sets"].items():
        of_kind = np.array([a.kind == kind for a in ANSWERS])
        assert content["responses"] == 10 and content["prompts"] == 5
        assert_close(content["change"]["mean"], (after - before)[of_kind].mean(), 2e-6, before)
        assert_close(content["scores"]["after"], after[of_kind], 2e-6)
        assert content["active"][str(ids[0])] == pytest.approx((z[of_kind, ids[0]] != 0).mean())
        assert before_after(kind, content)[:8] == b"\x89PNG\r\n\x1a\n"
    assert found.summary["specificity"]["others"] == ["chosen", "complement"]
    json.dumps(found.summary, allow_nan=False)


def test_specificity_by_hand():
    prompts = ["a", "a", "b", "b", "c", "c"]
    target = np.array([True, False] * 3)
    size = np.array([3.0, 1.0, 2.0, 0.0, 1.0, 1.0])  # 6/3 on the target, 2/3 elsewhere
    found = specificity(OPTIONS, prompts, size, target)
    assert found["mean"] == pytest.approx(0.75) and found["prompts"] == 3
    assert found["low"] <= 0.75 <= found["high"]
    assert found["low"] == pytest.approx(0.5) and found["high"] == pytest.approx(1.0)
    whole = specificity(OPTIONS, prompts, np.where(target, size, 0), target)
    assert [whole[x] for x in ("mean", "low", "high")] == [1.0, 1.0, 1.0]


def test_the_interval_of_specificity_covers_the_truth():
    """Prompts differ in how strongly they react; the true share is 2 / 3."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scale = np.repeat(rng.gamma(2.0, 1.0, 80), 4)
        target = np.tile([True, True, False, False], 80)
        size = scale * np.where(target, 2.0, 1.0) * rng.gamma(2.0, 0.5, 320)
        found = specificity(OPTIONS, [str(i // 4) for i in range(320)], size, target)
        covered += found["low"] <= 2 / 3 <= found["high"]
    assert 52 <= covered <= 60


def test_no_specificity_where_there_is_nothing_to_compare():
    target = np.array([True, False])
    assert specificity(OPTIONS, ["a", "b"], np.zeros(2), target)["why"] == "no score changed"
    for one in (np.array([True, True]), np.array([False, False])):
        found = specificity(OPTIONS, ["a", "b"], np.ones(2), one)
        assert found["mean"] is None and "meant to change" in found["why"]


def test_so_many_answers_of_every_type():
    config = SteeringConfig(3, (), 100, 5)
    chosen = choose_answers(config, ANSWERS)
    assert [sum(a.kind == k for a in chosen) for k in ("chosen", "rejected", "complement")] == [
        3
    ] * 3
    assert chosen == choose_answers(config, ANSWERS) == sorted(chosen, key=ANSWERS.index)
    assert chosen != choose_answers(SteeringConfig(3, (), 100, 6), ANSWERS)


def test_a_set_without_spread_has_a_figure(reward_model, steered):
    same = [Answer("p", "same", "rejected")] * 3
    found = evaluate_steering(OPTIONS, reward_model, same, steered[1])
    assert before_after("rejected", found.summary["sets"]["rejected"])


def test_answers_of_several_layouts(tmp_path):
    rows = [
        {"question": "q", "answer": "a", "type": "rejected"},
        {"question": "q", "answer": "a", "label": "chosen"},
        {"prompt": "q", "response": "a"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert [a.kind for a in read_answers(path)] == ["rejected", "chosen", "own"]
    path.write_text('{"question": "q", "answer": 3}\n')
    with pytest.raises(InputError, match=r"own.jsonl:1: field 'answer' must be text, found 3"):
        read_answers(path)


def test_nothing_steered_and_unknown_targets_are_refused(reward_model, steered):
    with pytest.raises(InputError, match="nothing is steered"):
        evaluate_steering(OPTIONS, reward_model, ANSWERS, Controls())
    config = SteeringConfig(0, ("harmful",), 100, 0)
    with pytest.raises(InputError, match="no answers of type 'harmful', there are chosen"):
        evaluate_steering(config, reward_model, ANSWERS, steered[1])


@pytest.mark.parametrize(
    "values, field",
    [
        ((-1, (), 100, 0), "num_example=-1"),
        ((0, (), 5, 0), "resamples=5"),
        ((0, (), 100, -1), "seed=-1"),
    ],
)
def test_bad_options(values, field):
    with pytest.raises(InputError, match=f"evaluate.{field}"):
        SteeringConfig(*values)


def test_intervals_of_steering_count_prompts_once(reward_model):
    answers = [Answer("p0", f"x {n}", "rejected") for n in range(5)] + [
        Answer("p1", "y", "rejected"),
        Answer("p2", "z z", "rejected"),
    ]
    controls = Controls(intervention(64, steer={3: ("+", 2.0), 5: ("*", 3.0)}))
    found = evaluate_steering(SteeringConfig(0, (), 100, 0), reward_model, answers, controls)
    texts = [a.prompt for a in answers], [a.response for a in answers]
    before, after = (
        reward_model.score(*texts)[0],
        reward_model.score(*texts, clamp=controls.change)[0],
    )
    per = {
        name: mean_interval([x[:5].mean(), x[5], x[6]])
        for name, x in {
            "before": before,
            "after": after,
            "absolute_change": np.abs(after - before),
        }.items()
    }
    for name, expected in per.items():
        measured = found.summary["sets"]["rejected"][name]
        assert measured.keys() == expected.keys()
        assert_close([*measured.values()], [*expected.values()], 2e-6, before, name)
