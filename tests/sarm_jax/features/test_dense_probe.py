"""Dense probes against definitions evaluated by hand, and their files."""

import dataclasses

import numpy as np
import pytest
import torch

from sarm_jax.features.dense_probe import (
    KINDS,
    LOGISTIC,
    MEAN_DIFFERENCE,
    DenseProbe,
    States,
    fit_probe,
    load_probe,
    save_probe,
)
from sarm_jax.io.errors import InputError
from sarm_jax.models.latent_store import Contrast

PAIRS, SIZE = 60, 5


@pytest.fixture(scope="module")
def contrast() -> Contrast:
    """Pairs whose marked side is shifted along one direction, with texts that occur twice."""
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(PAIRS, SIZE)) * [1, 2, 3, 1, 1] + 4
    marked = rng.normal(size=(PAIRS, SIZE)) * [1, 2, 3, 1, 1] + 4 + np.array([1, 1, 0, 0, -1])
    x_nd = np.concatenate([clean, marked]).astype(np.float32)
    chosen_p, rejected_p = np.arange(PAIRS), np.arange(PAIRS, 2 * PAIRS)
    chosen_p[1] = 0  # the same text in two pairs
    return Contrast(States(x_nd), chosen_p, rejected_p)


def fit(kind, contrast, budget=0.1, l2=1e-3, folds=5):
    fold_p = np.arange(len(contrast)) % folds
    return fit_probe(kind, contrast, fold_p, budget=budget, l2=l2)


def logistic_by_torch(clean, marked, l2):
    """The weights of the regularised logistic regression, by torch's own loss and optimizer."""
    x = torch.tensor(np.concatenate([clean, marked]), dtype=torch.float64)
    x = x - x.mean(dim=0)
    x = x / x.square().sum(dim=1).mean().sqrt()
    y = torch.cat([torch.zeros(len(clean)), torch.ones(len(marked))]).double()
    w, b = (torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (x.shape[1], 1))
    options = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS([w, b], line_search_fn="strong_wolfe", **options)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w + b, y)
        loss = loss + 0.5 * l2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach().numpy()


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_logistic_regression_against_torch(contrast, l2):
    clean, marked = contrast.sides(contrast.latents.x_nd)
    expected = logistic_by_torch(clean, marked, l2)
    direction = fit(LOGISTIC, contrast, l2=l2).probe.direction_d
    np.testing.assert_allclose(direction, expected / np.linalg.norm(expected), atol=2e-5)


def test_difference_of_means_and_its_limit(contrast):
    clean, marked = contrast.sides(contrast.latents.x_nd)
    expected = marked.mean(axis=0) - clean.mean(axis=0)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(
        fit(MEAN_DIFFERENCE, contrast).probe.direction_d, expected, atol=1e-6
    )
    strong = fit(LOGISTIC, contrast, l2=1e4).probe.direction_d
    np.testing.assert_allclose(strong, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0.0, 0.05, 0.3])
def test_threshold_and_rates_by_hand(contrast, kind, budget):
    result = fit(kind, contrast, budget=budget)
    clean, marked = contrast.sides(contrast.latents.x_nd)
    p, tau = result.probe.direction_d.astype(float), result.probe.tau
    assert tau == pytest.approx(np.quantile(clean @ p, 1 - budget), rel=1e-6)
    assert result.false_positive_rate == (clean @ p > tau).mean() <= budget
    assert result.detection_rate == (marked @ p > tau).mean() > 0
    margin = result.probe.margin(marked)
    np.testing.assert_allclose(margin, marked @ p - tau, atol=1e-5)
    np.testing.assert_array_equal(result.probe.margin(marked[3:4]), margin[3:4])


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_rates_are_of_probes_fitted_on_other_folds(contrast, kind):
    folds = np.arange(PAIRS) % 4
    hits = alarms = 0
    for fold in range(4):
        others = fit(kind, contrast.subset(folds != fold), folds=1).probe
        clean, marked = contrast.subset(folds == fold).sides(contrast.latents.x_nd)
        hits += (others.margin(marked) > 0).sum()
        alarms += (others.margin(clean) > 0).sum()
    expected = hits / PAIRS, alarms / PAIRS
    assert fit(kind, contrast, folds=4).held_out == pytest.approx(expected)
    assert np.isnan(fit(kind, contrast, folds=1).held_out).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_sides_have_no_direction(contrast, kind):
    same = dataclasses.replace(contrast, rejected_p=contrast.chosen_p)
    with pytest.raises(InputError, match=r"identify.pairs_jsonl: .*60 pairs have the same mean"):
        fit(kind, same)


def test_files(contrast, tmp_path):
    probe = fit(LOGISTIC, contrast).probe
    save_probe(tmp_path / "p.safetensors", probe)
    again = load_probe(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(again.direction_d, probe.direction_d)
    assert again.tau == probe.tau
    with pytest.raises(InputError, match="tau: holds NaN"):
        save_probe(tmp_path / "q", DenseProbe(probe.direction_d, float("nan")))
    assert not (tmp_path / "q").exists()
