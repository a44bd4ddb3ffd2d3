"""The distance from human states against the dense formulas, and its file."""

import dataclasses

import numpy as np
import pytest

from sarm_jax.io.errors import InputError
from sarm_jax.rewards.human_states import (
    fit_human_states,
    load_human_states,
    save_human_states,
)


def states(count, size, seed=0):
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(size, size))
    return (rng.normal(size=(count, size)) @ mixing + rng.normal(size=size)).astype(np.float32)


def ledoit_wolf_by_loops(x_nd):
    """The shrunk covariance and its intensity, from the definition."""
    x_nd = x_nd.astype(np.float64) - x_nd.mean(axis=0, dtype=np.float64)
    count, size = x_nd.shape
    s_dd = sum(np.outer(x, x) for x in x_nd) / count
    target_dd = np.trace(s_dd) / size * np.eye(size)
    error = sum(np.sum((np.outer(x, x) - s_dd) ** 2) for x in x_nd) / count**2
    shrinkage = min(1.0, error / np.sum((s_dd - target_dd) ** 2))
    return (1 - shrinkage) * s_dd + shrinkage * target_dd, shrinkage


# Fewer responses than dimensions, as many, and more.
@pytest.mark.parametrize("count", [4, 8, 9, 200])
def test_distance_against_the_inverse_covariance(count):
    x_nd, other_nd = states(count, 8), states(5, 8, seed=1)
    covariance_dd, shrinkage = ledoit_wolf_by_loops(x_nd)
    assert 0 < shrinkage <= 1
    human = fit_human_states(x_nd, "x")
    for rows in (x_nd, other_nd):
        centred = rows - x_nd.mean(axis=0, dtype=np.float64)
        expected = np.sqrt(np.einsum("nd,de,ne->n", centred, np.linalg.inv(covariance_dd), centred))
        np.testing.assert_allclose(human.distance(rows), expected, rtol=1e-5)
    np.testing.assert_array_equal(human.distance(other_nd[2:3]), human.distance(other_nd)[2:3])


def test_files(tmp_path):
    human, other_nd = fit_human_states(states(20, 8), "x"), states(5, 8, seed=1)
    save_human_states(tmp_path / "h.safetensors", human)
    again = load_human_states(tmp_path / "h.safetensors")
    np.testing.assert_allclose(again.distance(other_nd), human.distance(other_nd), rtol=1e-5)


def test_a_file_with_an_axis_of_another_length_is_refused_with_that_length(tmp_path):
    human = fit_human_states(states(20, 8), "x")
    scales = np.ones(len(human.axes_rd))
    scales[1] = 2.0
    longer = dataclasses.replace(human, axes_rd=human.axes_rd * scales[:, None])
    save_human_states(tmp_path / "h.safetensors", longer)
    with pytest.raises(InputError, match="axes has a row of length 2, expected 1"):
        load_human_states(tmp_path / "h.safetensors")


@pytest.mark.parametrize(
    "x_nd",
    [np.ones((5, 3), np.float32), states(1, 3), states(2, 3), states(6, 3) * [1, np.nan, 1]],
    ids=["equal", "one", "two", "NaN"],
)
def test_states_without_a_covariance_are_refused(x_nd):
    with pytest.raises(InputError, match=r"demos: "):
        fit_human_states(x_nd.astype(np.float32), "demos")
