"""Screened responses: the update is the one that the others alone would make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo.group_advantages import group_normalised, has_no_spread, leave_one_out
from ppo.learner import Learner
from ppo.objectives import Batch
from ppo.update import Updater, batch_metrics
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig
from tests.closeness import assert_close
from tests.further import further
from tests.tiny_models import scale_matrices

PROMPT, RESPONSE, ROWS = 5, 6, 8
SCREENED = [2, 6]  # one of each group of four, and of each minibatch
KEPT = [row for row in range(ROWS) if row not in SCREENED]
OPTIONS = {
    "ppo": {},
    "rloo": {},
    "grpo": {"kl_coef": 0.3},
    "grpo responses": {"loss_average": "responses", "scale_advantages": False, "kl_coef": 0.3},
    "grpo constant": {"loss_average": "constant", "kl_coef": 0.3},
}
CUT = [
    *(("ppo", 2), ("grpo", 1), ("grpo responses", 2)),
    *(further("rloo", 1), further("grpo constant", 1)),
]


@pytest.fixture(scope="module")
def batch(architecture):
    """Eight responses of different lengths, two of them with tokens and rewards of no sense."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, architecture.vocab_size, size=(ROWS, PROMPT + RESPONSE))
    lengths = np.array([6, 2, 4, 1, 3, 5, 6, 2])
    response = np.arange(RESPONSE)[None] < lengths[:, None]
    mask = np.concatenate([np.ones((ROWS, PROMPT), bool), response], axis=1)
    reference = rng.normal(-5, 1, size=(ROWS, RESPONSE)).astype(np.float32)
    reward = rng.normal(size=ROWS).astype(np.float32)
    reward[SCREENED] = [1e4, -1e4]
    return Batch(*map(jnp.asarray, (tokens.astype(np.int32), mask, response, reference, reward)))


@pytest.fixture
def make_setup(architecture, ppo_config):
    """Returns a function that makes (updater, state that is not fresh, base)."""

    def make(variant, copies, rows, **changes):
        algorithm = variant.split()[0]
        options = {"batch_size": rows, "algorithm": algorithm, **OPTIONS[variant], **changes}
        if algorithm != "ppo":
            options["samples_per_prompt"] = copies
        policy = scale_matrices(Llama(architecture, rngs=nnx.Rngs(0), stop_ids=(3,)))
        learner, state, base = Learner.attach(
            ppo_config(**options), LoRAConfig(rank=4), policy=policy, pad=1
        )
        return Updater(learner, screens=rows == ROWS), noisy(state), base

    return make


def noisy(state):
    """Returns a copy whose parameters and moments are not 0."""
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    changed = [
        leaf + 0.05 * jnp.abs(jax.random.normal(key, leaf.shape)) if leaf.ndim else leaf + 1
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, changed)


@pytest.mark.parametrize(("variant", "minibatches"), CUT)
def test_the_update_without_the_screened_rows(make_setup, batch, variant, minibatches):
    """For groups it is that of k − 1 samples; in several epochs, and in minibatches."""
    options = {"num_minibatches": minibatches, "ppo_epochs": 2}
    keep_b = jnp.asarray(np.isin(np.arange(ROWS), KEPT))
    results = []
    for copies, rows, given in (
        (4, ROWS, batch.replace(keep_b=keep_b)),
        (3, len(KEPT), jax.tree.map(lambda x: x[np.asarray(KEPT)], batch)),
    ):
        updater, state, base = make_setup(variant, copies, rows, **options)
        order = np.tile(np.arange(rows), (2, 1))
        state, targets, metrics = updater.update(state, base, given, order=order)
        sampled = jnp.zeros_like(given.ref_logp_br)
        more = batch_metrics(updater.config, given, targets, sampled)
        results.append((state, metrics, more))
    (ours, metrics, more), (theirs, expected, more_expected) = results
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(a, b, 2e-5)
    assert metrics.pop("screened_updates") == 0 and metrics["skipped_updates"] == 0
    del expected["entropy"]  # is that of all responses, see below
    for name, value in expected.items():
        assert_close(metrics[name], value, 1e-4, terms=1e-2, name=name)
    for name in ("advantage_mean", "advantage_std", "zero_spread_groups"):
        if name in more_expected:
            assert_close(more[name], more_expected[name], 1e-4, terms=1e-2, name=name)


@pytest.mark.parametrize("pieces", [1, 4])
def test_entropy_is_that_of_all_responses(make_setup, batch, pieces):
    entropies = []
    for keep_b in (np.isin(np.arange(ROWS), KEPT), np.ones(ROWS, bool)):
        options = {"num_minibatches": 1, "gradient_accumulation_steps": pieces}
        updater, state, base = make_setup("ppo", 4, ROWS, **options)
        given = batch.replace(keep_b=jnp.asarray(keep_b))
        *_, metrics = updater.update(state, base, given, order=np.arange(ROWS)[None])
        entropies.append(metrics["entropy"])
    assert_close(*entropies, 1e-5)


@pytest.mark.parametrize("variant", ["ppo", "grpo responses"])
def test_accumulation_changes_only_the_order_of_summation(make_setup, batch, variant):
    screened = batch.replace(keep_b=jnp.asarray(np.isin(np.arange(ROWS), [0, 1, 3, 7])))
    states = []
    for pieces in (1, 4):
        updater, state, base = make_setup(variant, 4, ROWS, gradient_accumulation_steps=pieces)
        order = np.arange(ROWS)[None]  # one microbatch has no row that is kept
        states.append(updater.update(state, base, screened, order=order)[0])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        assert_close(a, b, 2e-5)


@pytest.mark.parametrize("variant", ["ppo", "rloo", "grpo responses"])
def test_nothing_is_updated_if_all_are_screened(make_setup, batch, variant):
    """Neither by Adam's moments, which are not 0 here, nor with NaN in a metric."""
    updater, state, base = make_setup(variant, 4, ROWS, ppo_epochs=2)
    before = jax.tree.map(np.asarray, state)
    screened = batch.replace(keep_b=jnp.zeros(ROWS, bool))
    order = np.tile(np.arange(ROWS), (2, 1))
    state, targets, metrics = updater.update(state, base, screened, order=order)
    for a, b in zip(*map(jax.tree.leaves, (before, state)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics["screened_updates"] == 2 and metrics["skipped_updates"] == 0
    metrics |= batch_metrics(updater.config, screened, targets, batch.ref_logp_br)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["ppo_loss"] == 0 and metrics["grad_norm"] == 0 and metrics["ref_kl"] > 0


def test_a_minibatch_of_screened_rows_alone_is_passed_over(make_setup, batch):
    screened = batch.replace(keep_b=jnp.asarray(np.arange(ROWS) < 4))
    updater, state, base = make_setup("rloo", 4, ROWS, num_minibatches=2, ppo_epochs=1)
    _, _, metrics = updater.update(state, base, screened, order=np.arange(ROWS)[None])
    assert metrics["screened_updates"] == 1 and metrics["skipped_updates"] == 0


def test_advantages_within_what_is_left_of_a_group():
    reward = jnp.array([1.0, 3.0, 99.0, 8.0, 5.0, 7.0, 7.0, 99.0, 9.0, 9.0, 9.0, 9.0])
    keep = jnp.array([1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)  # three, one and none of four
    np.testing.assert_allclose(
        leave_one_out(reward, 4, keep), [-4.5, -1.5, 0, 6, *[0] * 8], rtol=1e-6
    )
    std = np.std([1, 3, 8], ddof=1)
    expected = np.array([-3, -1, 0, 4]) / (std + 1e-4)
    ours = group_normalised(reward, 4, scale=True, keep_b=keep)
    np.testing.assert_allclose(ours, [*expected, *[0] * 8], rtol=1e-6)
    spread = has_no_spread(reward.reshape(3, 4), keep.reshape(3, 4))
    assert spread.tolist() == [False, True, True]
    for function, more in ((leave_one_out, {}), (group_normalised, {"scale": True})):
        poisoned = function(reward.at[0].set(jnp.nan), 4, **more, keep_b=keep)
        assert np.isnan(poisoned[np.array([0, 1, 3])]).all() and not np.isnan(poisoned[4:]).any()
        unread = function(reward.at[2].set(jnp.nan), 4, **more, keep_b=keep)
        np.testing.assert_array_equal(unread, function(reward, 4, **more, keep_b=keep))
    everything = jnp.ones(12, bool)
    for function, more in ((leave_one_out, {}), (group_normalised, {"scale": True})):
        np.testing.assert_allclose(
            function(reward, 4, **more, keep_b=everything), function(reward, 4, **more), rtol=1e-6
        )
