"""Causal probes against the whole model run again with the feature clamped."""

import csv
import re

import numpy as np
import pytest
from scipy import stats

from pipeline.stages.probe import validate
from sarm_jax.features.certificates import CertificateConfig
from sarm_jax.features.probing import ProbeConfig, probe, write_probes
from sarm_jax.io.errors import InputError
from sarm_jax.models.sarm import intervention
from tests.closeness import assert_close

PAIRS = [
    {"prompt": f"p{i}", "chosen": f"a fine answer {i}", "rejected": "zzz" * (i % 3 + 1)}
    for i in range(9)
]
CANDIDATES = [
    {"prompt": f"p{i}", "candidates": [f"one {i}", "two" * (i + 1), f"{i} three"]} for i in range(8)
]


@pytest.fixture
def active(reward_model):
    """Returns the feature that is active most often, and one that is never active."""
    _, z = reward_model.score([p["prompt"] for p in PAIRS], [p["rejected"] for p in PAIRS])
    return int(np.argmax((z > 0).mean(axis=0))), int(np.argmin((z > 0).mean(axis=0)))


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_pairs_agree_with_the_clamped_model(reward_model, active, value, tmp_path):
    probes, _ = probe(ProbeConfig(active, value, "pairs"), reward_model, PAIRS)
    write_probes(tmp_path, probes)
    for feature, result in zip(active, probes, strict=True):
        with (tmp_path / f"probe_f{feature}.csv").open() as file:
            rows = list(csv.DictReader(file))
        columns = "idx prompt response reward_base reward_intervene delta".split()
        assert list(rows[0]) == columns and [int(r["idx"]) for r in rows] == list(range(18))
        assert [r["response"] for r in rows[:2]] == [PAIRS[0]["chosen"], PAIRS[0]["rejected"]]
        prompts, responses = [r["prompt"] for r in rows], [r["response"] for r in rows]
        base, _ = reward_model.score(prompts, responses)
        clamped, _ = reward_model.score(prompts, responses, clamp={feature: value})
        assert_close([float(r["reward_base"]) for r in rows], base, 2e-6)
        assert_close([float(r["reward_intervene"]) for r in rows], clamped, 2e-6)
        delta = clamped - base
        summary = result.summary
        assert_close(summary["delta"]["mean"], delta.mean(), 2e-6, terms=base)
        assert_close(summary["delta_rejected"]["mean"], delta[1::2].mean(), 2e-6, terms=base)
        margin = summary["delta_margin"]
        assert_close(margin["mean"], (delta[::2] - delta[1::2]).mean(), 2e-6, terms=base)
        assert margin["low"] <= margin["mean"] <= margin["high"]
    assert abs(probes[0].summary["delta"]["mean"]) > 1e-3


def test_rows_of_one_prompt_count_once(reward_model, active):
    data = [PAIRS[0] | {"rejected": f"zz {n}"} for n in range(5)] + PAIRS[1:4]
    result = probe(ProbeConfig(active[:1], 0.0, "pairs"), reward_model, data)[0][0]
    delta = np.array([row["delta"] for row in result.rows])
    chosen, rejected = delta[::2], delta[1::2]
    for name, rows in (
        ("delta", (chosen + rejected) / 2),
        ("delta_chosen", chosen),
        ("delta_rejected", rejected),
        ("delta_margin", chosen - rejected),
    ):
        prompts = np.array([rows[:5].mean(), *rows[5:]])
        half = stats.t.ppf(0.975, 3) * prompts.std(ddof=1) / 2
        expected = [prompts.mean(), prompts.mean() - half, prompts.mean() + half]
        assert_close(list(result.summary[name].values()), expected, 1e-6)


def test_single_responses(reward_model, active):
    rows = [{"prompt": p["prompt"], "response": p["chosen"]} for p in PAIRS]
    result = probe(ProbeConfig(active[:1], 0.0, "pairs"), reward_model, rows)[0][0]
    assert len(result.rows) == 9 and "delta_margin" not in result.summary


def test_best_of_n_agrees_with_the_clamped_model(reward_model, active):
    value = 30.0  # far above any activation, so that some selections change
    result = probe(ProbeConfig(active[:1], value, "bestofn"), reward_model, CANDIDATES)[0][0]
    for row, data in zip(result.rows, CANDIDATES, strict=True):
        prompts, candidates = [data["prompt"]] * 3, data["candidates"]
        base, _ = reward_model.score(prompts, candidates)
        clamped, _ = reward_model.score(prompts, candidates, clamp={active[0]: value})
        assert row["n_candidates"] == 3
        assert row["selected_base"] == np.argmax(base)
        assert row["selected_intervene"] == np.argmax(clamped)
        assert row["changed"] == (np.argmax(base) != np.argmax(clamped))
        assert_close(row["reward_selected_base"], base.max(), 2e-6, terms=base)
        assert_close(row["reward_selected_intervene"], clamped.max(), 2e-6, terms=clamped)
    changed = np.mean([row["changed"] for row in result.rows])
    assert result.summary["changed"]["mean"] == pytest.approx(changed)


BOUNDS = [(None, 0.5), (2.0, None), (1.0, 1.5), (-1.0, 0.0)]


@pytest.mark.parametrize("mode", ["pairs", "bestofn"])
@pytest.mark.parametrize("low, high", BOUNDS)
def test_bounds_agree_with_the_clamped_model(reward_model, active, mode, low, high):
    """Checks the probed features and their controls, with either bound open."""
    data = PAIRS if mode == "pairs" else CANDIDATES
    certificate = CertificateConfig(controls=2, flips=99)
    config = ProbeConfig(
        active, None, mode=mode, certificate=certificate, min_value=low, max_value=high
    )
    probes, certificates = probe(config, reward_model, data)
    groups = [
        row["candidates"] if mode == "bestofn" else [row["chosen"], row["rejected"]] for row in data
    ]
    prompts = [row["prompt"] for row, group in zip(data, groups, strict=True) for _ in group]
    responses = [text for group in groups for text in group]
    base = reward_model.score(prompts, responses)[0].reshape(len(data), -1)

    def clamped(feature):
        bounds = {"minimum": low, "maximum": high}
        closed = {name: {feature: x} for name, x in bounds.items() if x is not None}
        score, _ = reward_model.score(prompts, responses, clamp=intervention(64, **closed))
        return score.reshape(len(data), -1)

    def effect(feature):
        after = clamped(feature)
        if mode == "bestofn":
            return (after.argmax(axis=1) != base.argmax(axis=1)).mean()
        return ((after - base) @ [1, -1]).mean()

    for feature, result, row in zip(active, probes, certificates, strict=True):
        after = clamped(feature)
        if mode == "pairs":
            values = [r["reward_intervene"] for r in result.rows]
            np.testing.assert_allclose(values, after.ravel(), atol=1e-4)
            assert result.summary["delta"]["mean"] == pytest.approx((after - base).mean(), abs=1e-4)
        else:
            assert [r["selected_intervene"] for r in result.rows] == after.argmax(axis=1).tolist()
        assert result.summary["set_value"] is None
        assert (result.summary["min_value"], result.summary["max_value"]) == (low, high)
        assert row["effect"]["mean"] == pytest.approx(effect(feature), abs=1e-4)
        expected = [effect(control) for control in row["controls"]]
        assert len(expected) == 2 and row["control_effects"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, (0.0, None, None)),
        ({"set_value": 2}, (2.0, None, None)),
        ({"min_value": 1.0}, (None, 1.0, None)),
        ({"max_value": 0.0}, (None, None, 0.0)),
        ({"min_value": 0.0, "max_value": 1}, (None, 0.0, 1.0)),
    ],
)
def test_features_are_set_to_0_unless_a_bound_is_given(base_config, fields, expected):
    base_config.probe.update({"feature": "3", "data_jsonl": "a.jsonl"} | fields)
    base_config.sarm_model = "sarm"
    config = validate(base_config)
    assert (config.set_value, config.min_value, config.max_value) == expected
    base_config.probe.set_value = base_config.probe.min_value = base_config.probe.max_value = None
    assert validate(base_config).set_value == 0.0


def test_bounds_that_already_hold_change_nothing(reward_model, active):
    config = ProbeConfig(active, None, "pairs", min_value=-1e6, max_value=1e6)
    assert all(
        row["delta"] == 0 and row["reward_intervene"] == row["reward_base"]
        for result in probe(config, reward_model, PAIRS)[0]
        for row in result.rows
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_candidate_of_a_rank_is_selected(reward_model, active, rank):
    tied = [{"prompt": "p", "candidates": ["same", "same", "other"]}]
    data, value = CANDIDATES + tied, 30.0
    result = probe(ProbeConfig(active[:1], value, "bestofn", rank=rank), reward_model, data)[0][0]
    assert result.summary["rank"] == rank

    def selected(scores):  # removes the best candidate rank − 1 times, the first one of equals
        remaining = dict(enumerate(scores))
        for _ in range(rank - 1):
            del remaining[max(remaining, key=lambda n: (remaining[n], -n))]
        return max(remaining, key=lambda n: (remaining[n], -n))

    for row, item in zip(result.rows, data, strict=True):
        prompts, candidates = [item["prompt"]] * 3, item["candidates"]
        base, _ = reward_model.score(prompts, candidates)
        after, _ = reward_model.score(prompts, candidates, clamp={active[0]: value})
        first, second = selected(base.tolist()), selected(after.tolist())
        assert (row["selected_base"], row["selected_intervene"]) == (first, second)
        assert row["changed"] == (first != second)
        assert row["reward_selected_base"] == pytest.approx(base[first], abs=1e-4)
        assert row["reward_selected_intervene"] == pytest.approx(after[second], abs=1e-4)


def test_certificates_use_the_rank_of_the_rows(reward_model, active):
    certificate = CertificateConfig(controls=2, flips=99)
    for rank in (1, 2, 3):
        config = ProbeConfig(active, 30.0, mode="bestofn", certificate=certificate, rank=rank)
        probes, certificates = probe(config, reward_model, CANDIDATES)
        for result, row in zip(probes, certificates, strict=True):
            assert row["effect"]["mean"] == pytest.approx(result.summary["changed"]["mean"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"set_value": 0.0, "min_value": 1.0}, "probe.set_value=0.0 and probe.min_value=1.0"),
        ({"set_value": 2.0, "max_value": 1.0}, "probe.set_value=2.0 and probe.max_value=1.0"),
        ({"min_value": 2.0, "max_value": 1.0}, "probe.min_value=2.0 exceeds probe.max_value=1.0"),
        ({}, "probe.set_value, probe.min_value and probe.max_value are empty"),
        *(
            ({name: value}, f"probe.{name}={value}: must be a finite number")
            for name in ("set_value", "min_value", "max_value")
            for value in (float("nan"), float("inf"), -float("inf"), 1e300)
        ),
        ({"set_value": 0.0, "rank": 0, "mode": "bestofn"}, "probe.rank=0: must be at least 1"),
        ({"set_value": 0.0, "rank": 2}, "probe.rank=2 with probe.mode=pairs"),
    ],
)
def test_bad_changes_are_named(changes, message):
    fields = {"features": (3,), "set_value": None, "mode": "pairs"} | changes
    with pytest.raises(InputError, match=re.escape(message)):
        ProbeConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "data", "message"),
    [
        ({"features": ()}, PAIRS, "probe.feature is empty"),
        ({"mode": "pears"}, PAIRS, "probe.mode='pears'"),
        ({"set_value": float("nan")}, PAIRS, "probe.set_value=nan"),
        ({"features": (3, 64)}, PAIRS, "probe.feature=64: the SARM has 64 latents"),
        ({}, [{"prompt": "p", "chosen": "a"}], "data_jsonl:1: expected"),
        ({"mode": "bestofn"}, PAIRS[:1], "data_jsonl:1: 'candidates' must list"),
        ({"mode": "bestofn"}, [{"prompt": "p", "candidates": ["a", 1]}], "must be texts"),
        (
            {"mode": "bestofn", "rank": 3},
            [{"prompt": "p", "candidates": ["a", "b"]}],
            "data_jsonl:1: 'candidates' lists 2, fewer than probe.rank=3",
        ),
    ],
)
def test_bad_input_is_named(reward_model, fields, data, message):
    config = {"features": (3,), "set_value": 0.0, "mode": "pairs"} | fields
    with pytest.raises(InputError, match=message):
        probe(ProbeConfig(**config), reward_model, data)


def test_rows_of_one_prompt_count_once_in_certificates(reward_model):
    rows = [
        {"prompt": f"p{i // 3}", "chosen": f"a fine answer {i}", "rejected": "zzz" * (i % 3 + 1)}
        for i in range(12)
    ]
    certificate = CertificateConfig(controls=2, flips=99)
    config = ProbeConfig((3, 5), 1.0, mode="pairs", certificate=certificate)
    _, certificates = probe(config, reward_model, rows)
    assert [row["prompts"] for row in certificates] == [4, 4]
    best = [{"prompt": f"p{i}", "candidates": [f"one {i}", "two"]} for i in range(6)]
    config = ProbeConfig((3,), 9.0, mode="bestofn", certificate=certificate)
    _, certificates = probe(config, reward_model, best)
    assert certificates[0]["p_effect"] is None
    assert certificates[0]["p"] == certificates[0]["p_excess"]
