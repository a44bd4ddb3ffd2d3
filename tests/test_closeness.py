"""The comparison of floats accepts only rounding errors, at any scale."""

import numpy as np
import pytest

from tests.closeness import assert_close, assert_same_metrics

SCALES = [1e-6, 1e-3, 1.0, 23.4, 1e4]


@pytest.mark.parametrize("scale", SCALES)
def test_rounding_passes_and_a_wrong_number_fails_at_every_scale(scale):
    exact = scale * np.random.default_rng(0).normal(size=100)
    assert_close(exact.astype(np.float32), exact, 1e-6)
    assert_close(exact[0].astype(np.float32), exact[0], 1e-6)
    wrong = exact.copy()
    wrong[7] += 1e-4 * scale
    with pytest.raises(AssertionError, match="column"):
        assert_close(wrong, exact, name="column")
    with pytest.raises(AssertionError):
        assert_close(exact[0] * (1 + 1e-4), exact[0])


def test_a_small_entry_has_the_rounding_error_of_large_ones():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 64, 64)).astype(np.float32)
    exact = a.astype(np.float64) @ b
    difference = np.abs(a @ b - exact)
    assert (difference / np.abs(exact)).max() > 1e-5  # entries near 0
    assert_close(a @ b, exact, 1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_a_difference_has_the_rounding_error_of_its_terms(scale):
    first = scale * np.random.default_rng(0).uniform(1, 2, 100)
    second = first + 1e-5 * scale
    rounded = first.astype(np.float32) - second.astype(np.float32)
    with pytest.raises(AssertionError):
        assert_close(rounded, first - second)
    assert_close(rounded, first - second, 1e-6, terms=first)
    with pytest.raises(AssertionError):
        assert_close(rounded * 2, first - second, 1e-6, terms=first)


def test_zeros_and_empty_arrays_are_compared_exactly():
    assert_close([0.0, 0.0], [0.0, 0.0])
    assert_close([], [])
    with pytest.raises(AssertionError):
        assert_close([0.0, 1e-30], [0.0, 0.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_always_fail(bad):
    for actual, expected, terms in ((bad, 1.0, 0.0), (bad, bad, 0.0), (1.0, 1.0, bad)):
        with pytest.raises(AssertionError):
            assert_close([1.0, actual], [1.0, expected], terms=terms)


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        assert_close([1.0, 1.0], [1.0])


def test_columns_of_metrics_are_compared_separately():
    expected = [
        {"ref_kl": 1e-3 * n, "grad_norm": 20.0 + n, "policy_loss": 1e-8 * n} for n in range(4)
    ]
    rows = [{name: value * (1 + 1e-6) for name, value in row.items()} for row in expected]
    rows[0]["policy_loss"] = 1e-7
    assert_same_metrics(rows, expected, expected[0])
    for name, wrong in (("ref_kl", 1e-5), ("grad_norm", 20.01), ("policy_loss", 1e-4)):
        with pytest.raises(AssertionError, match=name):
            assert_same_metrics([rows[0] | {name: wrong}, *rows[1:]], expected, [name])
    with pytest.raises(AssertionError):
        assert_same_metrics(rows[:3], expected, ["ref_kl"])


@pytest.mark.parametrize("size", [1e-3, 0.1])
def test_a_kl_has_the_rounding_error_of_its_log_ratios(size):
    rng = np.random.default_rng(0)
    logp, reference = -5 + size * rng.normal(size=(2, 100))
    exact, rounded = (
        np.mean(np.expm1(-k) + k)
        for k in (
            logp - reference,
            (logp.astype(np.float32) - reference.astype(np.float32)).astype(np.float64),
        )
    )
    assert_same_metrics([{"ref_kl": rounded}], [{"ref_kl": exact}], ["ref_kl"])
    with pytest.raises(AssertionError):
        assert_same_metrics([{"ref_kl": 1.1 * exact}], [{"ref_kl": exact}], ["ref_kl"])
