"""Differential activation by hand, identify end to end, and the lists in flags."""

import json

import numpy as np
import pytest

from sarm_jax.features.contrast_statistics import differential
from sarm_jax.features.feature_lists import parse_bounds, parse_features, parse_values
from sarm_jax.features.identify import IdentifyConfig, identify, verbose_features
from sarm_jax.io.errors import InputError
from tests.closeness import assert_close


def test_differential_activation_by_hand():
    chosen = np.array([[4.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
    rejected = np.array([[1.0, 2.0, 1.0], [1.0, 2.0, 1.0]])
    # c = (3, 0, 1), j = (1, 2, 1), C = mean(4, 2, 2) = 8/3
    expected = [2 / (4 + 8 / 3), -2 / (2 + 8 / 3), 0.0]
    np.testing.assert_allclose(differential_of(chosen, rejected), expected, rtol=1e-6)


def test_differential_activation_of_negative_latents_keeps_its_sign():
    chosen = np.array([[-1.0, -3.0, 1.0], [-1.0, -3.0, -1.0]])
    rejected = np.array([[-3.0, -1.0, 1.0], [-3.0, -1.0, -1.0]])
    # c = (−1, −3, 0), j = (−3, −1, 0), means of |z| on both (4, 4, 2), C = 10/3
    expected = [2 / (4 + 10 / 3), -2 / (4 + 10 / 3), 0.0]
    np.testing.assert_allclose(differential_of(chosen, rejected), expected, rtol=1e-6)


def differential_of(chosen, rejected):
    """Computes s from the latents of both sides."""
    activity = np.abs(chosen) + np.abs(rejected)
    return differential(chosen.mean(axis=0), rejected.mean(axis=0), activity.mean(axis=0))


def latents(reward_model, rows):
    """Scores pairs: (latents of the chosen responses, latents of the rejected responses)."""
    prompts = [row["prompt"] for row in rows]
    _, chosen = reward_model.score(prompts, [row["chosen"] for row in rows])
    _, rejected = reward_model.score(prompts, [row["rejected"] for row in rows])
    return chosen, rejected


def pairs(count=12):
    return [
        {"prompt": f"p{i}", "chosen": f"a fine answer {i}", "rejected": "zzz" * (i % 3 + 1)}
        for i in range(count)
    ]


def test_identify_finds_what_separates_the_sides(reward_model):
    config = IdentifyConfig(
        top_k=5, method="differential", tau_quantile=0.9, false_alarm_budget=0.2, seed=0
    )
    result = identify(config, reward_model, pairs())
    analysis, selected, scores = result.analysis, result.selected, result.scores
    rows = pairs()
    chosen, rejected = latents(reward_model, rows)
    assert_close(scores["differential"], differential_of(chosen, rejected), 1e-6)
    weight = np.asarray(reward_model.model.score[...])
    carried = [
        w * np.mean([j - c for c, j in zip(chosen[:, i], rejected[:, i], strict=True)])
        for i, w in enumerate(weight)
    ]
    assert_close(scores["carried_reward"], carried, 2e-6)
    assert selected["carriers"][0] == int(np.argmax(scores["carried_reward"]))
    assert selected["safety_promoting"][0] == int(np.argmax(scores["differential"]))
    assert selected["safety_harming"][0] == int(np.argmin(scores["differential"]))
    first = analysis["harming"][0]
    fired = chosen[:, first["feature"]] > first["tau"]
    assert first["above_tau_chosen"] == pytest.approx(fired.mean())
    assert first["above_tau_chosen"] <= 0.2
    for name in ("detection_held_out", "false_alarms_held_out"):
        assert 0 <= analysis["detectors"][name] <= 1
    control = selected["random_control"]
    assert len(control) == len(selected["detectors"]) and not {*control} & {*selected["detectors"]}
    tau = np.quantile(chosen[:, control], 0.9, axis=0)
    np.testing.assert_allclose(selected["tau_random_control"], tau, rtol=1e-6)


def test_head_weight_method(reward_model):
    config = IdentifyConfig(
        top_k=3, method="head_weight", tau_quantile=0.9, false_alarm_budget=0.2, seed=0
    )
    selected = identify(config, reward_model, pairs()).selected
    weights = np.asarray(reward_model.model.score[...])
    assert selected["safety_harming"] == np.argsort(weights)[:3].tolist()
    assert selected["safety_promoting"] == np.argsort(weights)[::-1][:3].tolist()


def test_lists_by_hand(tmp_path):
    assert parse_features("f", " 3, 5,48659") == (3, 5, 48659)
    assert parse_features("f", "") == ()
    assert parse_values("v", "0.1,2") == (0.1, 2.0)
    assert parse_bounds("b", "none,1.5") == (None, 1.5)
    path = tmp_path / "selected.json"
    path.write_text(json.dumps({"safety_harming": [9, 8, 7], "tau": [0.5, 1, 2], "method": "x"}))
    assert parse_features("f", f"@{path}:safety_harming") == (9, 8, 7)
    assert parse_features("f", f"@{path}:safety_harming[:2]") == (9, 8)
    assert parse_values("v", f"@{path}:tau[:2]") == (0.5, 1.0)
    both = f"@{path}:safety_harming[:2], 4,@{path}:safety_harming"
    assert parse_features("f", both) == (9, 8, 4, 9, 8, 7)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_features, "1,x", "opt: found 'x'"),
        (parse_features, "1,,2", "opt: found ''"),
        (parse_features, "-4", "opt: found '-4'"),
        (parse_features, "1.5", "opt: found '1.5'"),
        (parse_values, "a", "opt: found 'a'"),
        (parse_values, "nan", "opt: found 'nan'"),
        (parse_values, "inf", "opt: found 'inf'"),
        (parse_bounds, "no", "opt: found 'no'"),
        (parse_features, "@nowhere", "expected @FILE:key"),
        (parse_features, "@nowhere.json:key", "No such file"),
        (parse_features, "@{file}:missing", "no list 'missing'"),
        (parse_features, "@{file}:good[:9]", "lists only 2"),
        (parse_features, "@{file}:floats", "found 1.5"),
        (parse_features, "@{text}:good", "not JSON"),
        (parse_features, "@{list}:good", "expected a JSON object"),
    ],
)
def test_bad_lists(tmp_path, parse, text, message):
    (tmp_path / "file.json").write_text(json.dumps({"good": [1, 2], "floats": [1.5]}))
    (tmp_path / "text.json").write_text("hello")
    (tmp_path / "list.json").write_text("[1]")
    paths = {name: tmp_path / f"{name}.json" for name in ("file", "text", "list")}
    with pytest.raises(InputError, match=message):
        parse("opt", text.format(**paths))


def identified(reward_model, rows, **changes):
    """Runs identify: (analysis, selected, scores, chosen latents, rejected latents)."""
    options = {
        "top_k": 4,
        "method": "differential",
        "tau_quantile": 0.7,
        "false_alarm_budget": 0.3,
        "seed": 0,
    } | changes
    result = identify(IdentifyConfig(**options), reward_model, rows)
    chosen, rejected = latents(reward_model, rows)
    return result.analysis, result.selected, result.scores, chosen, rejected


def rows_of(count=24):
    return [
        {
            "prompt": f"p{i}",
            "chosen": f"a fine answer {i}",
            "rejected": "zzz" * (i % 3 + 1),
            "source": "one" if i < 18 else "two",
        }
        for i in range(count)
    ]


def test_thresholds_belong_to_the_features_of_their_list(reward_model):
    analysis, selected, _, chosen, _ = identified(reward_model, rows_of())
    for side in ("promoting", "harming"):
        ids, taus = selected[f"safety_{side}"], selected[f"tau_{side}"]
        expected = np.maximum(np.quantile(chosen[:, ids], 0.7, axis=0), 0)
        np.testing.assert_allclose(taus, expected, rtol=1e-6)
        assert taus == [row["tau"] for row in analysis[side]]
    assert selected["tau_promoting"] != selected["tau_harming"]


def by_hand(sources, weights, count):
    """Computes {method: (harming, promoting, scores)} from the formulas, number by number.

    `sources` are (chosen, rejected) latents. Among equal scores the lower id comes first.
    """
    by_source = []
    for chosen, rejected in sources:
        c, j = (
            [sum(column) / len(side) for column in side.T.tolist()] for side in (chosen, rejected)
        )
        constant = sum(a + b for a, b in zip(c, j, strict=True)) / len(c) + 1e-9
        by_source.append([(a - b) / (a + b + constant) for a, b in zip(c, j, strict=True)])
    means = [sum(scores) / len(by_source) for scores in zip(*by_source, strict=True)]
    lists = {}
    for name, scores in (("differential", means), ("head_weight", weights.tolist())):
        ids = range(len(scores))
        harming = sorted(ids, key=lambda i: (scores[i], i))[:count]
        promoting = sorted(ids, key=lambda i: (-scores[i], i))[:count]
        lists[name] = harming, promoting, scores
    return lists


@pytest.mark.parametrize("combine", ["pooled", "sources"])
@pytest.mark.parametrize(
    "method, other", [("differential", "head_weight"), ("head_weight", "differential")]
)
@pytest.mark.parametrize("top_k", [4, 64, 70])
def test_both_methods_give_the_lists_of_their_formulas(reward_model, method, other, combine, top_k):
    """Covers weights that tie, features that never fire and tie at 0, and a top_k above M."""
    reward_model.model.score[...] = np.round(reward_model.model.score[...])
    rows = rows_of()
    analysis, selected, _, chosen, rejected = identified(
        reward_model, rows, method=method, combine=combine, top_k=top_k
    )
    sides = [(chosen, rejected)]
    if combine == "sources":
        sides = [(chosen[:18], rejected[:18]), (chosen[18:], rejected[18:])]
    weights = np.asarray(reward_model.model.score[...], np.float64)
    lists = by_hand([[x.astype(np.float64) for x in side] for side in sides], weights, top_k)
    silent = ~(chosen.any(axis=0) | rejected.any(axis=0))
    assert silent.sum() > 5 and len(set(weights)) < 12
    assert selected["method"] == method
    assert selected["safety_harming"] == lists[method][0]
    assert selected["safety_promoting"] == lists[method][1]
    assert selected["alternative_safety_harming"] == lists[other][0]
    assert selected["alternative_safety_promoting"] == lists[other][1]
    assert [row["feature"] for row in analysis["harming"]] == lists[method][0]
    for section, name, key in (
        ("method_1_value_head_weights", "head_weight", "weights"),
        ("method_2_differential_activation", "differential", "scores"),
    ):
        content, (harming, promoting, values) = analysis[section], lists[name]
        assert set(content) == {"description", "safety_harming", "safety_promoting", key}
        assert (content["safety_harming"], content["safety_promoting"]) == (harming, promoting)
        expected = {str(i): values[i] for i in (*harming, *promoting)}
        assert content[key] == pytest.approx(expected, abs=1e-5)


def test_combined_sources_have_equal_weight(reward_model):
    rows = rows_of()
    _, selected, scores, chosen, rejected = identified(reward_model, rows, combine="sources")
    sources = slice(0, 18), slice(18, 24)
    expected = np.mean([differential_of(chosen[s], rejected[s]) for s in sources], axis=0)
    assert_close(scores["differential"], expected, 1e-6)
    assert selected["safety_promoting"][0] == int(np.argmax(expected))


def test_examples_neighbours_and_stability(reward_model):
    rows = rows_of()
    analysis, _, _, chosen, rejected = identified(reward_model, rows)
    decoder = np.asarray(reward_model.model.sae.decoder[...])
    decoder = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    for row in (*analysis["harming"], *analysis["promoting"]):
        i = row["feature"]
        z = np.concatenate([chosen[:, i], rejected[:, i]])
        largest = np.sort(z)[::-1][0]
        if largest > 0:
            assert row["examples"][0]["z"] == pytest.approx(largest, rel=1e-5)
            values = [e["z"] for e in row["examples"]]
            assert values == sorted(values, reverse=True)
        cosine = decoder @ decoder[i]
        cosine[i] = -1
        assert [n["feature"] for n in row["neighbours"]] == np.argsort(-cosine)[:5].tolist()
    # A feature that separates nearly every pair is in the list of nearly every half.
    assert analysis["promoting"][0]["stability"] > 0.8
    assert analysis["harming"][0]["stability"] > 0.8


def test_verbose_features_fire_on_the_longer_version(reward_model):
    config = IdentifyConfig(
        top_k=3, method="head_weight", tau_quantile=0.9, false_alarm_budget=0.2, seed=0
    )
    result = verbose_features(config, reward_model, pairs())
    rows = pairs()
    chosen, rejected = latents(reward_model, rows)
    score_f = differential_of(chosen, rejected)
    assert result["verbosity_features"] == np.argsort(score_f, kind="stable")[:3].tolist()
    tau = np.quantile(chosen, 0.9, axis=0)[result["verbosity_features"]]
    np.testing.assert_allclose(result["tau_verbosity"], tau, rtol=1e-5, atol=1e-6)
