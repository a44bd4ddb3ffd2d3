"""Detectors on hand-made latents whose best cover is known."""

import numpy as np
import pytest

from sarm_jax.features.detectors import (
    contrast_tau,
    find_detectors,
    firing_rate,
    held_out_rates,
    random_control,
)
from tests.dense_latents import dense_contrast


def latents():
    """Makes 100 clean and 100 marked rows of 5 latents.

    Latent 0 fires on the first 60 marked rows, 1 on the last 50, 2 on all rows of both sides, 3 on
    90 marked and 20 clean rows, and 4 never.
    """
    clean, marked = np.zeros((100, 5)), np.zeros((100, 5))
    marked[:60, 0] = 1.0
    marked[50:, 1] = 2.0
    clean[:, 2] = marked[:, 2] = 1.0
    marked[:90, 3] = 3.0
    clean[:20, 3] = 3.0
    return clean, marked


def detect(clean, marked, quantile, budget, max_features):
    contrast = dense_contrast(clean, marked)
    tau = contrast_tau(contrast, quantile)
    return find_detectors(contrast, tau, budget=budget, max_features=max_features)


def control(clean, marked, quantile, exclude, seed):
    contrast = dense_contrast(clean, marked)
    tau = contrast_tau(contrast, quantile)
    return random_control(contrast, tau, exclude=exclude, seed=seed)


def test_greedy_cover_within_the_budget():
    detectors = detect(*latents(), quantile=0.5, budget=0.05, max_features=5)
    assert detectors.features == (0, 1)  # 3 is the best one alone, but has 20 % false positives
    assert detectors.tau == (0.0, 0.0)
    assert detectors.detection_rate == 1.0 and detectors.false_positive_rate == 0.0


def test_a_larger_budget_takes_the_stronger_feature_first():
    detectors = detect(*latents(), quantile=0.5, budget=0.3, max_features=5)
    assert detectors.features[0] == 3
    assert detectors.detection_rate == 1.0 and detectors.false_positive_rate == pytest.approx(0.2)


def test_max_features_limits_the_list():
    detectors = detect(*latents(), quantile=0.5, budget=0.05, max_features=1)
    assert detectors.features == (0,) and detectors.detection_rate == pytest.approx(0.6)


def test_threshold_is_the_clean_quantile():
    clean = np.linspace(0, 1, 101)[:, None]
    marked = np.full((101, 1), 0.96)
    detectors = detect(clean, marked, quantile=0.955, budget=0.06, max_features=1)
    assert detectors.features == (0,) and detectors.tau[0] == pytest.approx(0.955)
    assert detectors.false_positive_rate == pytest.approx(5 / 101)


def test_equal_sides_have_no_detectors():
    same = np.ones((20, 3))
    detectors = detect(same, same, quantile=0.98, budget=0.1, max_features=3)
    assert detectors.features == ()
    assert detectors.detection_rate == detectors.false_positive_rate == 0.0
    assert firing_rate(same, detectors) == 0.0


def test_firing_rate_counts_rows_once():
    clean, marked = latents()
    detectors = detect(clean, marked, quantile=0.5, budget=0.05, max_features=5)
    assert firing_rate(marked[40:], detectors) == 1.0
    assert firing_rate(clean, detectors) == 0.0


def test_the_random_control_is_active_and_no_detector():
    drawn = [control(*latents(), quantile=0.5, exclude=(0, 1), seed=s) for s in range(20)]
    assert {detectors.features for detectors in drawn} == {(2, 3), (3, 2)}  # 4 never fires
    first = control(*latents(), quantile=0.5, exclude=(0, 1), seed=3)
    assert first == drawn[3]
    index = first.features.index(3)
    assert first.tau[index] == 0.0 and first.tau[1 - index] == 1.0
    assert first.detection_rate == pytest.approx(0.9)
    assert first.false_positive_rate == pytest.approx(0.2)


def test_held_out_rates_on_noise_are_those_of_noise():
    rng = np.random.default_rng(0)
    clean, marked = (np.maximum(rng.normal(-1, 1, (100, 2000)), 0) for _ in range(2))
    detectors = detect(clean, marked, quantile=0.98, budget=0.05, max_features=10)
    assert detectors.detection_rate > 0.3 and detectors.false_positive_rate <= 0.05
    contrast, fold = dense_contrast(clean, marked), np.arange(100) % 5
    detection, false_positives = held_out_rates(
        contrast, fold, quantile=0.98, budget=0.05, max_features=10
    )
    assert false_positives > 0.1 and abs(detection - false_positives) < 0.15


def test_held_out_rates_by_hand():
    clean, marked = latents()
    contrast, fold = dense_contrast(clean, marked), np.arange(100) // 50
    # Latent 1 covers rows 50 to 99, and latent 0 covers rows 0 to 49. On the other half latent 0
    # fires on ten rows and latent 1 on none.
    options = {"quantile": 0.5, "budget": 0.05, "max_features": 1}
    assert held_out_rates(contrast, fold, **options) == (pytest.approx(0.1), 0.0)
    assert np.isnan(held_out_rates(contrast, np.zeros(100), **options)).all()


def cover(clean, marked, budget):
    return detect(clean, marked, quantile=0.5, budget=budget, max_features=5)


def test_the_budget_applies_to_all_detectors_together():
    clean, marked = np.zeros((2, 100, 2))
    marked[:50, 0] = marked[50:, 1] = 1.0
    clean[:4, 0] = clean[4:8, 1] = 1.0  # 4 % each, 8 % together
    assert cover(clean, marked, 0.05).features == (0,)
    assert cover(clean, marked, 0.08).features == (0, 1)


def test_false_positives_count_against_a_detector():
    clean, marked = np.zeros((2, 100, 2))
    marked[:60, 0] = marked[:55, 1] = 1.0
    clean[:10, 0] = 1.0
    assert cover(clean, marked, 0.5).features[0] == 1
