"""Detectors against hand-made latents whose best cover is known, and carriers by hand."""

import numpy as np
import pytest

from sarm_jax.features.detectors import (
    find_detectors,
    firing_rate,
    held_out_rates,
    random_control,
    taus_of,
)
from tests.dense_latents import dense_contrast


def latents():
    """100 clean and 100 marked rows of 5 latents.

    0 fires on the first 60 marked rows, 1 on the last 50, 2 on all of either side, 3 on 90 marked
    and 20 clean rows, 4 never.
    """
    clean, marked = np.zeros((100, 5)), np.zeros((100, 5))
    marked[:60, 0] = 1.0
    marked[50:, 1] = 2.0
    clean[:, 2] = marked[:, 2] = 1.0
    marked[:90, 3] = 3.0
    clean[:20, 3] = 3.0
    return clean, marked


def detect(clean, marked, quantile, budget, most):
    contrast = dense_contrast(clean, marked)
    return find_detectors(contrast, taus_of(contrast, quantile), budget, most)


def control(clean, marked, quantile, avoid, seed):
    contrast = dense_contrast(clean, marked)
    return random_control(contrast, taus_of(contrast, quantile), avoid, seed)


def test_greedy_cover_within_the_budget():
    found = detect(*latents(), quantile=0.5, budget=0.05, most=5)
    assert found.features == (0, 1)  # 3 would be the best single one, but raises 20 % alarms
    assert found.tau == (0.0, 0.0)
    assert found.detection == 1.0 and found.false_alarms == 0.0


def test_a_larger_budget_takes_the_stronger_feature_first():
    found = detect(*latents(), quantile=0.5, budget=0.3, most=5)
    assert found.features[0] == 3
    assert found.detection == 1.0 and found.false_alarms == pytest.approx(0.2)


def test_most_limits_the_list():
    found = detect(*latents(), quantile=0.5, budget=0.05, most=1)
    assert found.features == (0,) and found.detection == pytest.approx(0.6)


def test_threshold_is_the_clean_quantile():
    clean = np.linspace(0, 1, 101)[:, None]
    marked = np.full((101, 1), 0.96)
    found = detect(clean, marked, quantile=0.955, budget=0.06, most=1)
    assert found.features == (0,) and found.tau[0] == pytest.approx(0.955)
    assert found.false_alarms == pytest.approx(5 / 101)


def test_nothing_to_find():
    same = np.ones((20, 3))
    found = detect(same, same, quantile=0.98, budget=0.1, most=3)
    assert found.features == () and found.detection == found.false_alarms == 0.0
    assert firing_rate(same, found) == 0.0


def test_firing_rate_counts_rows_once():
    clean, marked = latents()
    found = detect(clean, marked, quantile=0.5, budget=0.05, most=5)
    assert firing_rate(marked[40:], found) == 1.0
    assert firing_rate(clean, found) == 0.0


def test_the_random_control_is_active_and_no_detector():
    drawn = [control(*latents(), quantile=0.5, avoid=(0, 1), seed=s) for s in range(20)]
    assert {found.features for found in drawn} == {(2, 3), (3, 2)}  # 4 never fires
    first = control(*latents(), quantile=0.5, avoid=(0, 1), seed=3)
    assert first == drawn[3]
    place = first.features.index(3)
    assert first.tau[place] == 0.0 and first.tau[1 - place] == 1.0
    assert first.detection == pytest.approx(0.9) and first.false_alarms == pytest.approx(0.2)


def test_on_noise_detectors_do_elsewhere_what_noise_does():
    rng = np.random.default_rng(0)
    clean, marked = (np.maximum(rng.normal(-1, 1, (100, 2000)), 0) for _ in range(2))
    found = detect(clean, marked, quantile=0.98, budget=0.05, most=10)
    assert found.detection > 0.3 and found.false_alarms <= 0.05
    contrast, fold = dense_contrast(clean, marked), np.arange(100) % 5
    detection, alarms = held_out_rates(contrast, fold, 0.98, 0.05, 10)
    assert alarms > 0.1 and abs(detection - alarms) < 0.15


def test_held_out_rates_by_hand():
    clean, marked = latents()
    contrast, fold = dense_contrast(clean, marked), np.arange(100) // 50
    # On rows 50 to 99 latent 1 alone covers all, on rows 0 to 49 latent 0: that one fires on ten of
    # the first kind, and latent 1 on none of the second.
    assert held_out_rates(contrast, fold, 0.5, 0.05, 1) == (pytest.approx(0.1), 0.0)
    assert np.isnan(held_out_rates(contrast, np.zeros(100), 0.5, 0.05, 1)).all()


def cover(clean, marked, budget):
    contrast = dense_contrast(clean, marked)
    return find_detectors(contrast, taus_of(contrast, 0.5), budget, 5)


def test_the_budget_is_for_all_detectors_together():
    clean, marked = np.zeros((2, 100, 2))
    marked[:50, 0] = marked[50:, 1] = 1.0
    clean[:4, 0] = clean[4:8, 1] = 1.0  # 4 % each, 8 % together
    assert cover(clean, marked, 0.05).features == (0,)
    assert cover(clean, marked, 0.08).features == (0, 1)


def test_false_alarms_count_against_a_detector():
    clean, marked = np.zeros((2, 100, 2))
    marked[:60, 0] = marked[:55, 1] = 1.0
    clean[:10, 0] = 1.0
    assert cover(clean, marked, 0.5).features[0] == 1
