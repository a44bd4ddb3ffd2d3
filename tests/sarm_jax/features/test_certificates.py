"""Certificates: Holm by hand, exact sign flips, matched controls, planted effects."""

import itertools

import numpy as np
import pytest

from sarm_jax.features.certificates import (
    CertificateConfig,
    certify,
    matched_controls,
    sign_flip,
)
from sarm_jax.features.probing import ProbeConfig, probe
from sarm_jax.io.errors import InputError
from tests.closeness import assert_close

CONFIG = CertificateConfig(controls=4, flips=9999)


@pytest.mark.parametrize("two_sided", [True, False])
def test_sign_flip_estimates_the_share_of_all_sign_patterns(two_sided):
    x = np.array([0.5, 1.0, 2.0, -0.25, 0.0, 3.0, 1.0])
    sums = np.array([np.dot(s, x) for s in itertools.product((-1, 1), repeat=7)])
    exact = ((np.abs(sums) if two_sided else sums) >= x.sum() - 1e-9).mean()
    assert sign_flip(x, CONFIG, two_sided) == pytest.approx(exact, abs=0.01)
    assert sign_flip(np.zeros(4), CONFIG, two_sided) == 1.0


def test_controls_resemble_their_feature_and_are_seeded():
    rate = np.repeat([0.01, 0.5, 0.0], 30)
    config = CertificateConfig(controls=5)
    drawn = matched_controls([0, 30], rate, rate, config=config)
    assert all(0 < i < 30 for i in drawn[0]) and all(30 < i < 60 for i in drawn[30])
    assert len({*drawn[0]}) == 5
    assert drawn == matched_controls([0, 30], rate, rate, config=config)


def test_planted_effect_is_certified_and_noise_is_not():
    rng = np.random.default_rng(0)
    effects = {i: rng.normal(0, 1, 80) for i in range(10)}
    effects[0] = rng.normal(4, 1, 80)
    controls = {0: [2, 3, 4], 1: [5, 6, 7], 8: []}
    planted, noise, alone = certify(CONFIG, effects, controls, cluster_n=np.arange(80), signed=True)
    assert planted["certified"] and planted["p_holm"] == pytest.approx(3 / 10_000)
    assert planted["effect"]["low"] > 3 and planted["excess"]["low"] > 2
    assert not noise["certified"] and "p =" in noise["reason"]
    assert not alone["certified"] and "no other active" in alone["reason"]


def test_rows_of_one_prompt_count_once():
    effects = {0: np.full(60, 2.0), 1: np.full(60, 0.1)}
    (row,) = certify(CONFIG, effects, {0: [1]}, cluster_n=np.zeros(60, int), signed=True)
    assert row["prompts"] == 1 and row["p"] == 1.0 and not row["certified"]


@pytest.mark.parametrize("mode", ["pairs", "bestofn"])
def test_effects_are_those_of_the_clamped_model(reward_model, mode):
    rows = [{"prompt": f"p{i}", "candidates": [f"one {i}", "two" * (i + 1)]} for i in range(9)]
    if mode == "pairs":
        rows = [
            {"prompt": r["prompt"], "chosen": r["candidates"][0], "rejected": r["candidates"][1]}
            for r in rows
        ]
    config = ProbeConfig((3, 5), 9.0, mode=mode, certificate=CONFIG)
    probes, certificates = probe(config, reward_model, rows)
    for result, row in zip(probes, certificates, strict=True):
        key = "delta_margin" if mode == "pairs" else "changed"
        scores = [r["reward_base"] for r in result.rows] if mode == "pairs" else 0.0
        assert_close(row["effect"]["mean"], result.summary[key]["mean"], 1e-6, terms=scores)
        assert len(row["controls"]) == 4 and not {*row["controls"]} & {3, 5}
        clamp, effect = {row["controls"][0]: 9.0}, row["control_effects"][0]
        if mode == "pairs":
            margins = []
            for change in (clamp, None):
                sides = [
                    reward_model.score(
                        [r["prompt"] for r in rows], [r[side] for r in rows], clamp=change
                    )[0]
                    for side in ("chosen", "rejected")
                ]
                margins.append(sides[0] - sides[1])
            assert_close(effect, (margins[0] - margins[1]).mean(), 2e-6, terms=scores)


def test_bad_options_are_named():
    with pytest.raises(InputError, match="probe.controls=0"):
        CertificateConfig(controls=0)
    with pytest.raises(InputError, match="probe.level=1"):
        CertificateConfig(level=1.0)


def test_controls_with_opposite_effects_do_not_cancel():
    effects = {0: np.full(40, 1.0), 1: np.full(40, 3.0), 2: np.full(40, -3.0)}
    config = CertificateConfig(flips=999)
    (row,) = certify(config, effects, {0: [1, 2]}, cluster_n=np.arange(40), signed=True)
    assert row["excess"]["mean"] == pytest.approx(-2.0) and not row["certified"]
    assert row["p"] == max(row["p_effect"], row["p_excess"]) > 0.9
