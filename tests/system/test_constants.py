"""Everything that is divided by a spread, on constants: of many sizes, in batches of many sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pipeline.report.curves import _limits
from ppo.advantages import whiten
from ppo.comparison.latent_map import principal_plane
from ppo.comparison.response_metrics import correlations
from sarm_jax.evaluation import figures
from sarm_jax.evaluation.controls import Controls, penalties
from sarm_jax.features.certificates import CertificateConfig, certify
from sarm_jax.features.contrast_statistics import differential
from sarm_jax.features.identify import _neighbours
from sarm_jax.features.neighbours import decoder_directions
from sarm_jax.io.errors import InputError
from sarm_jax.lab.gates import linear_probe_r2
from sarm_jax.lab.results import in_deviations_of
from sarm_jax.models.latent_store import TopKLatents
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.reporting.spread import is_constant, standard_deviation
from sarm_jax.reporting.statistics import mean_interval, stratified_interval
from sarm_jax.rewards.compound import ScoreScale
from sarm_jax.rewards.density_ratio import _deviations
from sarm_jax.training.activations import Activations
from sarm_jax.training.sae_training import explained_variance, initialise

CONSTANTS = [0.0, 1e-30, -3e-6, 0.1, -0.7, 1 / 3, 12.34, -4321.1, 1e5 / 7, 3e30]
SIZES = [2, 3, 5, 7, 8, 16, 31, 64, 100, 1000]
NOT_CONSTANT = [  # values whose spread is real, however small or far from 0
    [0.0, 1e-6],
    [1.0, 1.0001],
    [1e4, 1e4 + 0.1],
    [-1e-30, 1e-30],
    [1e-42, 0.0],
    [3e30, 2.9e30],
    [0.0, 0.0, 0.0, 1e-20],
]
both = pytest.mark.parametrize("rounded", [False, True], ids=["equal", "rounded"])


def constants(rounded: bool):
    """Yields float32 constants, or values that differ in their last place."""
    for value in CONSTANTS:
        for size in SIZES:
            x = np.full(size, value, np.float32)
            if rounded:
                x[::3] = np.nextafter(x[::3], np.float32(np.inf), dtype=np.float32)
                if value == 0:
                    continue  # any step from 0 is a real one
            yield x


@both
def test_a_constant_has_no_spread(rounded):
    for x in constants(rounded):
        assert is_constant(x)
        assert standard_deviation(x) == 0.0


@pytest.mark.parametrize("values", NOT_CONSTANT, ids=str)
def test_a_real_spread_is_measured(values):
    x = np.asarray(values, np.float32)
    assert not is_constant(x)
    expected = np.std(x.astype(np.float64))
    np.testing.assert_allclose(standard_deviation(x), expected, rtol=2e-4)


def test_the_spread_of_ordinary_values_keeps_every_bit():
    rng = np.random.default_rng(0)
    for size in SIZES:
        x = rng.normal(rng.normal(), 0.05, size).astype(np.float32)
        assert standard_deviation(x) == float(np.std(x))


@both
def test_constant_scores_are_refused_by_ppo(rounded):
    for x in constants(rounded):
        with pytest.raises(InputError, match="standard deviation of 0"):
            ScoreScale.estimate(x, x)


@both
def test_constant_scores_have_no_unit_and_no_cap_in_an_evaluation(rounded):
    for x in constants(rounded):
        options = {"penalize_features": (3,), "tau_values": (0.5,), "alpha_values": (0.25,)}
        z = np.ones((len(x), 1), np.float32)
        std = standard_deviation(x)
        _, taken = penalties(Controls(**options, penalty_cap=4.0), z, std)
        np.testing.assert_array_equal(taken, np.float32(0.25))
        with pytest.raises(InputError, match=r"reward\.unit='sd': .*all equal"):
            penalties(Controls(**options, unit="sd"), z, std)
        assert penalties(Controls(unit="sd"), z, std)[1].shape == (len(x),)


@both
def test_scores_in_deviations_of_constants_are_refused(rounded):
    for x in constants(rounded):
        with pytest.raises(InputError, match="are all equal"):
            in_deviations_of(x, np.ones(len(x), bool))


@both
def test_whitened_constants_are_0(rounded):
    compiled = jax.jit(whiten)
    for x in constants(rounded):
        rows = jnp.asarray(np.resize(x, (4, 250)))
        mask = np.arange(1000).reshape(4, 250) < len(x)
        np.testing.assert_array_equal(compiled(rows, mask), 0.0)


@both
def test_a_latent_that_is_constant_in_human_responses_has_no_deviation(rounded):
    compiled = jax.jit(_deviations)
    varied = np.random.default_rng(0).normal(size=(1000, 1)).astype(np.float32)
    for x in constants(rounded):
        z = np.concatenate([x[:, None], varied[: len(x)]], axis=1)
        deviation = compiled(z)
        typical = np.std(varied[: len(x)].astype(np.float64))
        np.testing.assert_allclose(deviation, typical, rtol=1e-4, atol=2e-6)


@both
def test_a_correlation_with_a_constant_is_undefined(rounded):
    for x in constants(rounded):
        other = np.arange(len(x), dtype=float)
        assert np.isnan(correlations(x.astype(np.float64), other))
        assert np.isnan(correlations(other, x.astype(np.float64)))


@both
def test_constant_latents_have_no_principal_plane(rounded):
    for x in (x for x in constants(rounded) if len(x) <= 16):
        index = np.tile(np.arange(2), (len(x), 1))
        latents = TopKLatents(np.stack([x, 2 * x], axis=1), index, 12)
        xy, shares = principal_plane(latents)
        assert shares == [0.0, 0.0]
        np.testing.assert_array_equal(xy, 0.0)


@both
def test_the_explained_variance_of_constants_is_undefined(rounded):
    for x in constants(rounded):
        rows = np.stack([x, -x, 0 * x], axis=1)
        assert explained_variance(rows, rows) is None
        assert explained_variance(rows, rows + 1) is None


@both
def test_an_sae_of_constant_activations_is_refused(rounded):
    sae = SAE(SAEConfig(3, 8, 2), rngs=nnx.Rngs(0))
    for x in constants(rounded):
        activations = Activations(np.stack([x, -x, x], axis=1), np.ones(len(x), bool))
        with pytest.raises(InputError, match="are all equal"):
            initialise(sae, activations, np.random.default_rng(0))


@both
def test_the_r2_of_constants_is_0(rounded):
    fit = np.random.default_rng(0).normal(size=(50, 2))
    for x in constants(rounded):
        test = np.resize(fit, (len(x), 2))
        assert linear_probe_r2(fit, fit[:, 0], test_nd=test, test_n=x) == 0.0


@both
def test_equal_effects_are_no_excess(rounded):
    config = CertificateConfig(controls=10, flips=99)
    for x in constants(rounded):
        own = np.full(len(x), x[-1], np.float64)
        effects = {i: x.astype(np.float64) if i else own for i in range(11)}
        (row,) = certify(
            config, effects, {0: list(range(1, 11))}, cluster_n=np.arange(len(x)), signed=True
        )
        assert row["p_excess"] == 1.0
        assert not row["certified"]
        assert row["controls_above"] == 0


@both
def test_intervals_of_constants_have_ends(rounded):
    for x in constants(rounded):
        for result in (mean_interval(x), stratified_interval([x, x], [0.5, 0.5])):
            np.testing.assert_allclose(list(result.values()), float(x[-1]), rtol=1e-6)


@both
def test_axes_of_constants_are_not_a_picture_of_rounding(rounded):
    for x in constants(rounded):
        low, high = _limits([{"a": x}])
        assert high - low >= 0.05 * max(abs(float(x[0])), 1e-30)
    curve = {"before": x.tolist(), "after": x.tolist()}
    change = {"mean": 0.0}
    figures.before_after("set", {"scores": curve, "change": change, "responses": len(x)})


def test_a_figure_of_no_finite_value_is_drawn():
    assert _limits([{"a": np.full(3, np.nan)}]) == (-1.0, 1.0)


@both
def test_the_differential_of_constants_is_0(rounded):
    for x in constants(rounded):
        activity = np.abs(x) + np.abs(x)
        np.testing.assert_array_equal(differential(x, x, activity), 0.0)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_cosines_do_not_depend_on_the_size_of_decoder_rows(size):
    sae = SAE(SAEConfig(8, 6, 2), rngs=nnx.Rngs(0))
    decoder = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    decoder[5] = 0

    def neighbours(sae):
        return _neighbours(
            [0], decoder_directions(sae), differential_f=np.zeros(6), weight_f=np.ones(6)
        )

    sae.decoder[...] = jnp.asarray(decoder)
    expected = neighbours(sae=sae)
    power = np.float32(2.0 ** np.round(np.log2(size)))  # which changes no digit
    sae.decoder[...] = jnp.asarray(decoder * power)
    assert neighbours(sae=sae) == expected
