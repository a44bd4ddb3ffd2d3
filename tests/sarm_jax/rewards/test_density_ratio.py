"""The discriminator estimates the log density ratio, and the buffer file is checked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sarm_jax.io.errors import InputError
from sarm_jax.rewards.density_ratio import (
    DensityRatio,
    DiscriminatorConfig,
    _variance_of_mean,
    groups_of,
)
from sarm_jax.rewards.human_latents import (
    HumanLatents,
    collect_human_latents,
    human_buffer,
    load_human_latents,
    save_human_latents,
)
from tests.closeness import assert_close
from tests.further import further
from tests.tiny_models import reward_options

CONFIG = DiscriminatorConfig(1e-2, hidden_size=32, steps=200, batch_size=256, weight_decay=0.0)


def test_mean_logit_approaches_the_kl_of_two_gaussians():
    rng = np.random.default_rng(0)
    human = rng.normal(0, 1, size=(4000, 2)).astype(np.float32)
    policy = rng.normal([1.0, 0.0], 1, size=(4000, 2)).astype(np.float32)
    ratio = DensityRatio(CONFIG, human)
    _state, logits, metrics = ratio.update(ratio.init(jax.random.key(0)), policy, jax.random.key(1))
    # KL(N(1, 1) ‖ N(0, 1)) = ½, and log p/q = x − ½ pointwise.
    assert abs(float(logits.mean()) - 0.5) < 0.15
    np.testing.assert_allclose(logits[:500], policy[:500, 0] - 0.5, atol=0.6)
    assert 0.5 < metrics["disc_acc"] < 0.8


def test_same_distribution_gives_no_penalty():
    rng = np.random.default_rng(1)
    human, policy = rng.normal(size=(2, 4000, 3)).astype(np.float32)
    ratio = DensityRatio(CONFIG, human)
    _, logits, _ = ratio.update(ratio.init(jax.random.key(0)), policy, jax.random.key(1))
    assert abs(float(logits.mean())) < 0.1


def test_latents_that_no_human_response_fires_do_not_drown_the_others():
    rng = np.random.default_rng(5)

    def sparse(rows, latents=512, k=8):  # a few fire often, most hardly ever
        p_f = 1 / np.arange(1, latents + 1)
        z_nf = np.zeros((rows, latents), np.float32)
        for z_f in z_nf:
            z_f[rng.choice(latents, k, replace=False, p=p_f / p_f.sum())] = 1 + 3 * rng.random(k)
        return z_nf

    human, policy = sparse(120), sparse(16)
    silent = human.max(axis=0) == 0
    assert silent.sum() > 100 and policy[:, silent].any()
    config = DiscriminatorConfig(1e-3, hidden_size=64, steps=4, batch_size=32, weight_decay=1e-2)
    ratio = DensityRatio(config, human)
    _, logits, _ = ratio.update(ratio.init(jax.random.key(0)), policy, jax.random.key(1))
    assert float(jnp.abs(logits).max()) < 0.3


def test_it_is_trained_before_it_is_read():
    human = np.zeros((50, 1), np.float32) + np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    ratio = DensityRatio(CONFIG, human)
    fresh = ratio.init(jax.random.key(0))
    _, logits, _ = ratio.update(fresh, jnp.full((8, 1), 5.0), jax.random.key(1))
    assert float(logits.min()) > 1.0  # D of the fresh discriminator is 0 everywhere


def test_keys_matter_and_repeat():
    rng = np.random.default_rng(2)
    human, policy = rng.normal(size=(2, 40, 3)).astype(np.float32)
    ratio = DensityRatio(CONFIG, human)
    fresh = ratio.init(jax.random.key(0))
    one, again, other = (ratio.update(fresh, policy, jax.random.key(k))[1] for k in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0


def test_buffer_round_trip_and_selection(tmp_path, reward_model):
    demos = [{"prompt": f"p{i}", "response": f"answer {i}"} for i in range(5)]
    human = collect_human_latents(reward_model, demos, (3, 1, 60))
    path = tmp_path / "human_latents.safetensors"
    save_human_latents(path, human)
    loaded = load_human_latents(path)
    np.testing.assert_array_equal(loaded.z_ns, human.z_ns)
    assert loaded.latent_indices == (3, 1, 60)
    _, z = reward_model.score([d["prompt"] for d in demos], [d["response"] for d in demos])
    assert_close(loaded.select((60, 3)).z_ns, z[:, [60, 3]], 1e-6)
    everything = collect_human_latents(reward_model, demos)
    assert everything.z_ns.shape == (5, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_bytes(b"hello"), "not a safetensors file"),
        (lambda p: save_file({"z": np.zeros((2, 3), np.float32)}, p), "expected z and latent_ind"),
        (
            lambda p: save_file(
                {"z": np.zeros((2, 3), np.float32), "latent_indices": np.arange(2)}, p
            ),
            "shape \\(2, 3\\) for \\(2,\\)",
        ),
        (
            lambda p: save_file(
                {"z": np.full((2, 3), np.nan, np.float32), "latent_indices": np.arange(3)}, p
            ),
            "z: holds (NaN|infinity)",
        ),
    ],
)
def test_bad_buffers_are_refused(tmp_path, make, message):
    path = tmp_path / "human.safetensors"
    make(path)
    with pytest.raises(InputError, match=message):
        load_human_latents(path)


def test_features_must_be_in_the_buffer(tmp_path):
    path = tmp_path / "human.safetensors"
    save_human_latents(path, HumanLatents(np.zeros((2, 2), np.float32), (5, 6)))
    beta = reward_options(beta=0.1)
    with pytest.raises(
        InputError, match="^reward.latent_indices: feature 7 is not in the human latents"
    ):
        human_buffer(reward_options(beta=0.1, latent_indices=(5, 7)), str(path), 64)
    with pytest.raises(InputError, match="^reward.beta=0.1 needs human latents"):
        human_buffer(beta, "", 64)
    with pytest.raises(InputError, match="feature 6 of a SARM with 6 latents"):
        human_buffer(beta, str(path), 6)
    one = tmp_path / "one.safetensors"
    save_human_latents(one, HumanLatents(np.ones((1, 2), np.float32), (5, 6)))
    with pytest.raises(InputError, match="holds one response"):
        human_buffer(beta, str(one), 64)
    assert human_buffer(reward_options(beta=0.0), "", 64) is None


def test_a_discriminator_that_is_always_right_is_held_at_log_n():
    human = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    ratio = DensityRatio(CONFIG, human)
    state = ratio.init(jax.random.key(0))
    for step in range(3):
        far = jnp.full((8, 1), 50.0)
        state, logits, metrics = ratio.update(state, far, jax.random.key(step))
    assert metrics["disc_acc"] > 0.99
    np.testing.assert_allclose(logits, np.log(50), rtol=1e-6)
    np.testing.assert_array_equal(logits, ratio.read(state, far))
    np.testing.assert_allclose(ratio.read(state, -far), -np.log(50), rtol=1e-6)
    assert metrics["latent_kl"] == pytest.approx(np.log(50))


def test_latents_that_are_not_finite_do_not_train_it():
    rng = np.random.default_rng(3)
    human, policy = rng.normal(size=(2, 40, 3)).astype(np.float32)
    ratio = DensityRatio(CONFIG, human)
    state, _, metrics = ratio.update(ratio.init(jax.random.key(0)), policy, jax.random.key(1))
    assert metrics["skipped"] == 0
    for bad in (np.nan, np.inf):
        poisoned = policy.copy()
        poisoned[:, 1] = bad
        after, logits, metrics = ratio.update(state, jnp.asarray(poisoned), jax.random.key(2))
        assert metrics["skipped"] == CONFIG.steps and np.isnan(logits).all()
        for a, b in zip(*map(jax.tree.leaves, (state, after)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_read_gives_the_values_of_update():
    rng = np.random.default_rng(0)
    human = rng.normal(3, 2, size=(400, 2)).astype(np.float32)
    policy = rng.normal(4, 2, size=(64, 2)).astype(np.float32)
    config = DiscriminatorConfig(1e-2, 16, 50, 64, 0.0, folds=1)
    ratio = DensityRatio(config, human)
    state, logits, _ = ratio.update(ratio.init(jax.random.key(0)), policy, jax.random.key(1))
    assert np.abs(logits).max() < np.log(400)
    assert_close(ratio.read(state, policy), logits, 5e-7)


def test_weight_decay_of_the_discriminator():
    rng = np.random.default_rng(0)
    human, policy = rng.normal(size=(2, 50, 2)).astype(np.float32)
    norms = []
    for decay in (0.0, 10.0):
        ratio = DensityRatio(DiscriminatorConfig(1e-2, 16, 50, 16, decay, folds=1), human)
        state, *_ = ratio.update(ratio.init(jax.random.key(0)), policy, jax.random.key(1))
        norms.append(float(jnp.linalg.norm(state.params["hidden"]["kernel"][...])))
    assert norms[1] < 0.5 * norms[0]


def gaussian_estimates(ratio, shift, steps=30, runs=4):
    """Returns estimates and standard errors of the second half of some runs, `[run, step]`."""
    found, errors = np.zeros((2, runs, steps))
    for run in range(runs):
        rng = np.random.default_rng(run)
        state = ratio.init(jax.random.key(run))
        for step in range(steps):
            policy = rng.normal(size=(16, 20)).astype(np.float32)
            policy[:, 0] += shift
            state, d_b, metrics = ratio.update(state, policy, jax.random.key(step))
            found[run, step], errors[run, step] = d_b.mean(), metrics.get("latent_kl_se", 0)
    return found[:, steps // 2 :], errors[:, steps // 2 :]


def test_the_cross_fitted_latent_kl_is_within_its_error_bar():
    human = np.random.default_rng(99).normal(size=(240, 20)).astype(np.float32)
    cross_fitted, alone = (
        DensityRatio(DiscriminatorConfig(folds=folds), human) for folds in (4, 1)
    )
    for kl in (0.0, 0.9):
        shift = np.sqrt(2 * kl)
        found, errors = gaussian_estimates(cross_fitted, shift)
        assert abs(found.mean() - kl) < errors.mean()
        # The error bar is that of a step: the spread between the steps of a run.
        assert 0.7 < found.std(axis=1).mean() / errors.mean() < 1.3
        too_large, _ = gaussian_estimates(alone, shift)
        assert too_large.mean() - kl > 0.15


def test_responses_to_one_prompt_are_in_one_fold():
    """Rows that are alike within a prompt teach a discriminator nothing about themselves."""
    rng = np.random.default_rng(4)
    human = rng.normal(size=(200, 8)).astype(np.float32)
    centres = rng.normal(scale=3, size=(4, 8)).astype(np.float32)
    policy = np.repeat(centres, 4, axis=0) + rng.normal(scale=0.01, size=(16, 8)).astype("f4")
    ratio = DensityRatio(DiscriminatorConfig(1e-2, steps=50, weight_decay=0.0), human)
    fresh, key = ratio.init(jax.random.key(0)), jax.random.key(1)
    apart, known = (
        float(ratio.update(fresh, policy, key, group_b)[2]["disc_loss"])
        for group_b in (np.repeat(np.arange(4), 4), np.arange(16))
    )
    assert known < 0.8 * apart


def test_groups_are_numbered_by_prompt():
    np.testing.assert_array_equal(groups_of(["b", "a", "b", "c"]), [0, 1, 0, 2])
    np.testing.assert_array_equal(groups_of(["a", "a", "a"]), [0, 1, 2])


@pytest.mark.parametrize(
    ("rows", "humans"), [(1, 50), (3, 50), (16, 3), further(2, 2), further(5, 4)]
)
def test_fewer_rows_than_folds(rows, humans):
    rng = np.random.default_rng(6)
    human, policy = rng.normal(size=(humans, 3)), rng.normal(size=(rows, 3))
    ratio = DensityRatio(CONFIG, human)
    assert ratio.folds == min(4, humans)
    for group_b in (None, np.zeros(rows, int)):
        fresh = ratio.init(jax.random.key(0))
        _, d_b, metrics = ratio.update(fresh, policy, jax.random.key(1), group_b)
        assert np.isfinite(d_b).all() and all(np.isfinite(x) for x in metrics.values())


def test_standard_error_of_correlated_rows():
    """Rows of a prompt that are all alike count as one."""
    rng = np.random.default_rng(8)
    d_g = rng.normal(size=6).astype(np.float32)
    variance = _variance_of_mean(jnp.repeat(jnp.asarray(d_g), 3), jnp.repeat(jnp.arange(6), 3))
    assert float(variance) == pytest.approx(d_g.var(ddof=1) / 6, rel=1e-5)


def test_a_held_out_loss_that_rises_stops_the_training():
    """The state that no later one improves on is kept: here the one that knows nothing."""
    rng = np.random.default_rng(9)
    human, policy = rng.normal(size=(2, 16, 200)).astype(np.float32)
    config = DiscriminatorConfig(1e-2, steps=300, weight_decay=0.0)
    ratio = DensityRatio(config, human)
    _, d_b, metrics = ratio.update(ratio.init(jax.random.key(0)), policy, jax.random.key(1))
    assert metrics["disc_loss"] <= np.log(2) + 1e-6
    alone = DensityRatio(dataclasses.replace(config, folds=1), human)
    _, memorised_b, _ = alone.update(alone.init(jax.random.key(0)), policy, jax.random.key(1))
    assert float(memorised_b.mean()) > 2 > 4 * abs(float(d_b.mean()))
