"""Steering against a second run of the model; specificity by hand and by simulation."""

import json

import numpy as np
import pytest

from sarm_jax.evaluation.controls import Controls
from sarm_jax.evaluation.figures import before_after
from sarm_jax.evaluation.steering import (
    Answer,
    choose_answers,
    evaluate_steering,
    read_answers,
    specificity,
)
from sarm_jax.io.errors import InputError
from sarm_jax.models.sarm import intervention
from sarm_jax.reporting.statistics import mean_interval
from tests.closeness import assert_close
from tests.evaluations import steering_config

OPTIONS = steering_config(steering_targets=("rejected",), resamples=400)
ANSWERS = [
    Answer(f"p{n % 5}", f"{kind} answer {n} " + "so " * (n % 4), kind)
    for n in range(10)
    for kind in ("chosen", "rejected", "complement")
]


@pytest.fixture
def steered(reward_model):
    """Returns two features that are active on some of the answers, and controls that steer them."""
    _, z = reward_model.score([a.prompt for a in ANSWERS], [a.response for a in ANSWERS])
    share = (z != 0).mean(axis=0)
    ids = np.argsort(np.abs(share - 0.5))[:2].tolist()
    assert all(0 < share[i] < 1 for i in ids)
    return ids, Controls(intervention(64, steer={ids[0]: ("*", 0.0), ids[1]: ("*", 3.0)}))


def test_scores_after_steering_match_those_of_the_steered_model(reward_model, steered):
    ids, controls = steered
    result = evaluate_steering(OPTIONS, reward_model, ANSWERS, controls=controls)
    prompts, responses = [a.prompt for a in ANSWERS], [a.response for a in ANSWERS]
    before, z = reward_model.score(prompts, responses)
    after, _ = reward_model.score(prompts, responses, clamp=controls.intervention)
    rows = result.rows
    assert_close([row["reward"] for row in rows], before, 1e-6)
    assert_close([row["reward_steered"] for row in rows], after, 2e-6)
    for row, z_f in zip(rows, z, strict=True):
        assert row["activated_latents"] == [i for i in sorted(ids) if z_f[i] != 0]
    for kind, content in result.summary["sets"].items():
        of_kind = np.array([a.kind == kind for a in ANSWERS])
        assert content["responses"] == 10 and content["prompts"] == 5
        assert_close(content["change"]["mean"], (after - before)[of_kind].mean(), 2e-6, before)
        assert_close(content["scores"]["after"], after[of_kind], 2e-6)
        assert content["active"][str(ids[0])] == pytest.approx((z[of_kind, ids[0]] != 0).mean())
        assert before_after(kind, content)[:8] == b"\x89PNG\r\n\x1a\n"
    assert result.summary["specificity"]["others"] == ["chosen", "complement"]
    json.dumps(result.summary, allow_nan=False)


def test_specificity_by_hand():
    prompts = ["a", "a", "b", "b", "c", "c"]
    target = np.array([True, False] * 3)
    size = np.array([3.0, 1.0, 2.0, 0.0, 1.0, 1.0])  # means: 6/3 on the target, 2/3 elsewhere
    result = specificity(OPTIONS, prompts, size_b=size, target_b=target)
    assert result["mean"] == pytest.approx(0.75) and result["prompts"] == 3
    assert result["low"] <= 0.75 <= result["high"]
    assert result["low"] == pytest.approx(0.5) and result["high"] == pytest.approx(1.0)
    on_target = np.where(target, size, 0)
    result = specificity(OPTIONS, prompts, size_b=on_target, target_b=target)
    assert [result[x] for x in ("mean", "low", "high")] == [1.0, 1.0, 1.0]


def test_the_interval_of_specificity_covers_the_truth():
    """Prompts differ in how strongly they react; the true specificity is 2 / 3."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scale = np.repeat(rng.gamma(2.0, 1.0, 80), 4)
        target = np.tile([True, True, False, False], 80)
        size = scale * np.where(target, 2.0, 1.0) * rng.gamma(2.0, 0.5, 320)
        prompts = [str(i // 4) for i in range(320)]
        result = specificity(OPTIONS, prompts, size_b=size, target_b=target)
        covered += result["low"] <= 2 / 3 <= result["high"]
    assert 52 <= covered <= 60


def test_specificity_is_undefined_without_a_comparison():
    target = np.array([True, False])
    unchanged = specificity(OPTIONS, ["a", "b"], size_b=np.zeros(2), target_b=target)
    assert unchanged["why"] == "no score changed"
    for one in (np.array([True, True]), np.array([False, False])):
        result = specificity(OPTIONS, ["a", "b"], size_b=np.ones(2), target_b=one)
        assert result["mean"] is None and "meant to change" in result["why"]


def test_num_example_answers_of_every_type_are_chosen():
    config = steering_config(num_example=3, seed=5)
    chosen = choose_answers(config, ANSWERS)
    assert [sum(a.kind == k for a in chosen) for k in ("chosen", "rejected", "complement")] == [
        3
    ] * 3
    assert chosen == choose_answers(config, ANSWERS) == sorted(chosen, key=ANSWERS.index)
    assert chosen != choose_answers(steering_config(num_example=3, seed=6), ANSWERS)


def test_a_set_without_spread_has_a_figure(reward_model, steered):
    same = [Answer("p", "same", "rejected")] * 3
    result = evaluate_steering(OPTIONS, reward_model, same, controls=steered[1])
    assert before_after("rejected", result.summary["sets"]["rejected"])


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
    with pytest.raises(InputError, match="no feature is steered"):
        evaluate_steering(OPTIONS, reward_model, ANSWERS, controls=Controls())
    config = steering_config(steering_targets=("harmful",))
    with pytest.raises(InputError, match="no answers of type 'harmful', there are chosen"):
        evaluate_steering(config, reward_model, ANSWERS, controls=steered[1])


@pytest.mark.parametrize(("field", "value"), [("num_example", -1), ("resamples", 5), ("seed", -1)])
def test_bad_options(field, value):
    with pytest.raises(InputError, match=f"evaluate.{field}={value}"):
        steering_config(**{field: value})


def test_intervals_of_steering_count_prompts_once(reward_model):
    answers = [Answer("p0", f"x {n}", "rejected") for n in range(5)] + [
        Answer("p1", "y", "rejected"),
        Answer("p2", "z z", "rejected"),
    ]
    controls = Controls(intervention(64, steer={3: ("+", 2.0), 5: ("*", 3.0)}))
    result = evaluate_steering(steering_config(), reward_model, answers, controls=controls)
    prompts, responses = [a.prompt for a in answers], [a.response for a in answers]
    before, _ = reward_model.score(prompts, responses)
    after, _ = reward_model.score(prompts, responses, clamp=controls.intervention)
    values = {"before": before, "after": after, "absolute_change": np.abs(after - before)}
    for name, x in values.items():
        expected = mean_interval([x[:5].mean(), x[5], x[6]])
        measured = result.summary["sets"]["rejected"][name]
        assert measured.keys() == expected.keys()
        assert_close([*measured.values()], [*expected.values()], 2e-6, before, name)
