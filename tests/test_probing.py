"""Causal probes against the whole model run again with the feature clamped."""

import csv

import numpy as np
import pytest
from scipy import stats

from sarm_jax.certificates import CertificateConfig
from sarm_jax.errors import InputError
from sarm_jax.probing import ProbeConfig, probe, write_probes
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
    """A feature that is active on some of the responses, and one that never is."""
    _, z = reward_model.score([p["prompt"] for p in PAIRS], [p["rejected"] for p in PAIRS])
    return int(np.argmax((z > 0).mean(axis=0))), int(np.argmin((z > 0).mean(axis=0)))


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_pairs_are_what_the_clamped_model_says(reward_model, active, value, tmp_path):
    probes, _ = probe(ProbeConfig(active, value, "pairs"), reward_model, PAIRS)
    write_probes(tmp_path, probes)
    for feature, found in zip(active, probes, strict=True):
        with (tmp_path / f"probe_f{feature}.csv").open() as file:
            rows = list(csv.DictReader(file))
        columns = "idx prompt response reward_base reward_intervene delta".split()
        assert list(rows[0]) == columns and [int(r["idx"]) for r in rows] == list(range(18))
        assert [r["response"] for r in rows[:2]] == [PAIRS[0]["chosen"], PAIRS[0]["rejected"]]
        texts = [r["prompt"] for r in rows], [r["response"] for r in rows]
        base, _ = reward_model.score(*texts)
        clamped, _ = reward_model.score(*texts, clamp={feature: value})
        assert_close([float(r["reward_base"]) for r in rows], base, 2e-6)
        assert_close([float(r["reward_intervene"]) for r in rows], clamped, 2e-6)
        delta = clamped - base
        summary = found.summary
        assert_close(summary["delta"]["mean"], delta.mean(), 2e-6, base)
        assert_close(summary["delta_rejected"]["mean"], delta[1::2].mean(), 2e-6, base)
        margin = summary["delta_margin"]
        assert_close(margin["mean"], (delta[::2] - delta[1::2]).mean(), 2e-6, base)
        assert margin["low"] <= margin["mean"] <= margin["high"]
    assert abs(probes[0].summary["delta"]["mean"]) > 1e-3


def test_rows_of_one_prompt_count_once(reward_model, active):
    same = [PAIRS[0] | {"rejected": f"zz {n}"} for n in range(5)] + PAIRS[1:4]
    found = probe(ProbeConfig(active[:1], 0.0, "pairs"), reward_model, same)[0][0]
    delta = np.array([row["delta"] for row in found.rows])
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
        assert_close(list(found.summary[name].values()), expected, 1e-6)


def test_single_responses(reward_model, active):
    rows = [{"prompt": p["prompt"], "response": p["chosen"]} for p in PAIRS]
    found = probe(ProbeConfig(active[:1], 0.0, "pairs"), reward_model, rows)[0][0]
    assert len(found.rows) == 9 and "delta_margin" not in found.summary


def test_best_of_n_is_what_the_clamped_model_picks(reward_model, active):
    value = 30.0  # far more than it ever is, so that some selections change
    found = probe(ProbeConfig(active[:1], value, "bestofn"), reward_model, CANDIDATES)[0][0]
    for row, data in zip(found.rows, CANDIDATES, strict=True):
        texts = [data["prompt"]] * 3, data["candidates"]
        base, _ = reward_model.score(*texts)
        clamped, _ = reward_model.score(*texts, clamp={active[0]: value})
        assert row["n_candidates"] == 3
        assert row["selected_base"] == np.argmax(base)
        assert row["selected_intervene"] == np.argmax(clamped)
        assert row["changed"] == (np.argmax(base) != np.argmax(clamped))
        assert_close(row["reward_selected_base"], base.max(), 2e-6, base)
        assert_close(row["reward_selected_intervene"], clamped.max(), 2e-6, clamped)
    changed = np.mean([row["changed"] for row in found.rows])
    assert found.summary["changed"]["mean"] == pytest.approx(changed)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (((), 0.0, "pairs"), PAIRS, "probe.feature is empty"),
        (((3,), 0.0, "pears"), PAIRS, "probe.mode='pears'"),
        (((3,), float("nan"), "pairs"), PAIRS, "probe.set_value=nan"),
        (((3, 64), 0.0, "pairs"), PAIRS, "feature 64 of a SARM with 64"),
        (((3,), 0.0, "pairs"), [{"prompt": "p", "chosen": "a"}], "data_jsonl:1: expected"),
        (((3,), 0.0, "bestofn"), PAIRS[:1], "data_jsonl:1: 'candidates' must list"),
        (((3,), 0.0, "bestofn"), [{"prompt": "p", "candidates": ["a", 1]}], "must be texts"),
    ],
)
def test_bad_input_is_named(reward_model, options, data, message):
    with pytest.raises(InputError, match=message):
        probe(ProbeConfig(*options), reward_model, data)


def test_rows_of_one_prompt_are_one_in_a_probe(reward_model):
    rows = [
        {"prompt": f"p{i // 3}", "chosen": f"a fine answer {i}", "rejected": "zzz" * (i % 3 + 1)}
        for i in range(12)
    ]
    certificate = CertificateConfig(controls=2, flips=99)
    _, found = probe(ProbeConfig((3, 5), 1.0, "pairs", certificate), reward_model, rows)
    assert [row["prompts"] for row in found] == [4, 4]
    best = [{"prompt": f"p{i}", "candidates": [f"one {i}", "two"]} for i in range(6)]
    _, found = probe(ProbeConfig((3,), 9.0, "bestofn", certificate), reward_model, best)
    assert found[0]["p_effect"] is None and found[0]["p"] == found[0]["p_excess"]
