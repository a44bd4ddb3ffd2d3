"""The update: a first ratio of 1, losses against loops, and invariance to microbatches."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ppo.learner import Learner, TrainState, make_optimizer
from ppo.losses import kl_k3
from ppo.objectives import Batch
from ppo.update import Updater, batch_metrics
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.parallel.sharding import MeshConfig, Placement, make_mesh
from tests.closeness import assert_close, assert_same_metrics
from tests.further import further
from tests.oracles import gae_loop, masked_whiten_loop, ppo_loss_loop
from tests.tiny_models import ALGORITHMS, scale_matrices

PROMPT, RESPONSE, ROWS = 5, 6, 4


class Setup(NamedTuple):
    learner: Learner
    state: TrainState
    base: nnx.State

    def evaluate(self, state, batch):
        return self.learner.evaluate(state.params, self.base, batch.tokens_bt, batch.mask_bt)

    def update(self, state, batch, permutations):
        return Updater(self.learner).update(state, self.base, batch, order=permutations)


@pytest.fixture
def make_setup(architecture, ppo_config):
    """Returns a function that makes a learner with the given fields of PPOConfig changed."""

    def make(**changes):
        policy = scale_matrices(Llama(architecture, rngs=nnx.Rngs(0), stop_ids=(3,)))
        return Setup(
            *Learner.attach(ppo_config(**changes), LoRAConfig(rank=4), policy=policy, pad=1)
        )

    return make


@pytest.fixture
def batch(architecture):
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, architecture.vocab_size, size=(ROWS, PROMPT + RESPONSE))
    mask = np.ones((ROWS, PROMPT + RESPONSE), bool)
    mask[1, :3] = False  # a shorter prompt, padded on the left
    lengths = np.array([6, 2, 4, 1])
    response = np.arange(RESPONSE)[None] < lengths[:, None]
    mask[:, PROMPT:] = response
    reference = rng.normal(-5, 1, size=(ROWS, RESPONSE)).astype(np.float32)
    reward = rng.normal(size=ROWS).astype(np.float32)
    return Batch(*map(jnp.asarray, (tokens.astype(np.int32), mask, response, reference, reward)))


def orders(epochs):
    return np.random.default_rng(1).permuted(np.tile(np.arange(ROWS), (epochs, 1)), axis=1)


def moved(state):
    """Returns a state whose adapter and value head are not at their initial zeros."""
    leaves, tree = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    noisy = [
        leaf + 0.05 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)
    ]
    copied = jax.tree.map(jnp.copy, state.opt_state)  # an update donates its state
    return TrainState(jax.tree.unflatten(tree, noisy), copied)


def test_zero_adapter_is_the_reference_policy(make_setup, batch):
    setup = make_setup()
    reference = setup.learner.reference_logp(setup.base, batch.tokens_bt, batch.mask_bt)
    now = setup.evaluate(setup.state, batch)
    assert_close(now.logp_br, reference, 2e-7)
    np.testing.assert_array_equal(now.values_br, 0)


@pytest.mark.parametrize(
    ("minibatches", "accumulation"), [(2, 2), further(1, 1), further(2, 1), further(1, 2)]
)
def test_first_ratio_is_one(make_setup, batch, minibatches, accumulation):
    setup = make_setup(num_minibatches=minibatches, gradient_accumulation_steps=accumulation)
    state = moved(setup.state)
    _, _, metrics = setup.update(state, batch, orders(2))
    assert metrics["ratio_0_max_dev"] <= 1e-5
    assert metrics["approx_kl"] > 0
    assert metrics["skipped_updates"] == 0


def test_targets_and_losses_against_loops(make_setup, batch):
    setup = make_setup()
    state = moved(setup.state)
    now = setup.evaluate(state, batch)
    config = setup.learner.config
    mask = np.asarray(batch.mask_br)
    rewards = -config.kl_coef * np.asarray(now.logp_br - batch.ref_logp_br)
    for b in range(ROWS):
        rewards[b, mask[b].sum() - 1] += batch.reward_b[b]
    values = np.asarray(now.values_br)
    advantages, returns = gae_loop(rewards, values, mask, config.gamma, config.gae_lambda)
    whitened = masked_whiten_loop(advantages, mask)
    expected = ppo_loss_loop(
        now.logp_br, now.logp_br, whitened, values, values, returns, mask, 0.2, 0.2
    )
    _, targets, metrics = setup.update(state, batch, orders(1))
    assert_close(targets.advantages_br, whitened, 2e-6)
    assert_close(np.where(mask, targets.returns_br, 0), returns, 2e-6)
    assert_close(metrics["policy_loss"], expected["policy_loss"], 2e-6, terms=whitened)
    np.testing.assert_allclose(metrics["value_loss"], expected["value_loss"], rtol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_accumulation_changes_only_the_order_of_summation(make_setup, batch, algorithm):
    results = []
    for accumulation in (1, 4) if algorithm != "ppo" else (1, 2, 4):
        options = {"gradient_accumulation_steps": accumulation, "ppo_epochs": 1}
        setup = make_setup(**options, **ALGORITHMS[algorithm])
        state = moved(setup.state)
        state, _, metrics = setup.update(state, batch, np.arange(ROWS)[None])
        results.append((state.params, metrics))
    for params, metrics in results[1:]:
        for a, b in zip(*map(jax.tree.leaves, (results[0][0], params)), strict=True):
            assert_close(a, b)
        names = [name for name in ("policy_loss", "value_loss", "grad_norm") if name in metrics]
        names += ["ppo_loss", "entropy", "clip_fraction"]
        assert_same_metrics([metrics], [results[0][1]], names)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_minibatches_split_the_token_sum(make_setup, batch, algorithm):
    # With a learning rate of almost 0 the mean over minibatches is the whole batch's loss.
    losses = []
    for minibatches in (1, 2):
        options = {"num_minibatches": minibatches, "learning_rate": 1e-20, "ppo_epochs": 1}
        setup = make_setup(**options, **ALGORITHMS[algorithm])
        state = moved(setup.state)
        losses.append(setup.update(state, batch, orders(1))[2]["ppo_loss"])
    # The advantages of a group sum to 0, and so does its loss before the first step.
    atol = 1e-6 if algorithm == "rloo" else 0.0
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_only_adapter_and_value_head_move(make_setup, batch, algorithm):
    setup = make_setup(ppo_epochs=2, **ALGORITHMS[algorithm])
    assert ("value_head" in setup.state.params) == (algorithm == "ppo")
    base_before = jax.tree.map(np.asarray, setup.base)
    start = setup.state
    before = jax.tree.map(np.asarray, start.params)
    state, _, _ = setup.update(start, batch, orders(2))
    for a, b in zip(*map(jax.tree.leaves, (base_before, setup.base)), strict=True):
        np.testing.assert_array_equal(a, b)
    changed = [
        np.abs(a - b).max() > 0
        for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True)
    ]
    assert all(changed)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_update_raises_the_likelihood_of_rewarded_responses(make_setup, batch, algorithm):
    options = {"learning_rate": 1e-3, "ppo_epochs": 4, "kl_coef": 0.0}
    setup = make_setup(**options, **ALGORITHMS[algorithm])
    batch = batch.replace(reward_b=jnp.array([1.0, -1.0, 1.0, -1.0]))
    before = setup.evaluate(setup.state, batch)
    state, _, _ = setup.update(setup.state, batch, orders(4))
    after = setup.evaluate(state, batch)
    gain = np.where(batch.mask_br, after.logp_br - before.logp_br, 0).sum(axis=1)
    assert gain[0] > 0 and gain[2] > 0
    assert gain[1] < 0 and gain[3] < 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_non_finite_update_is_not_applied(make_setup, batch, algorithm):
    setup = make_setup(**ALGORITHMS[algorithm])
    state = moved(setup.state)
    before = jax.tree.map(np.asarray, state.params)
    poisoned = batch.replace(reward_b=batch.reward_b.at[0].set(jnp.nan))
    state, _, metrics = setup.update(state, poisoned, orders(2))
    assert metrics["skipped_updates"] == 2
    for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_padded_positions_change_nothing(make_setup, batch, algorithm):
    setup = make_setup(**ALGORITHMS[algorithm])
    other = batch.replace(
        tokens_bt=jnp.where(batch.mask_bt, batch.tokens_bt, 9),
        ref_logp_br=jnp.where(batch.mask_br, batch.ref_logp_br, jnp.nan),
    )
    one = setup.update(moved(setup.state), batch, orders(2))[0]
    two = setup.update(moved(setup.state), other, orders(2))[0]
    for a, b in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reference_and_policy_share_the_temperature(make_setup, batch):
    setup = make_setup(temperature=0.7)
    now = setup.evaluate(setup.state, batch)
    reference = setup.learner.reference_logp(setup.base, batch.tokens_bt, batch.mask_bt)
    assert_close(now.logp_br, reference, 1e-6)
    generation = setup.learner.rollout(
        setup.state.params,
        setup.base,
        batch.tokens_bt[:, :PROMPT],
        batch.mask_bt[:, :PROMPT],
        jax.random.key(0),
    )
    tokens = jnp.concatenate([batch.tokens_bt[:, :PROMPT], generation.tokens_br], axis=1)
    mask = jnp.concatenate([batch.mask_bt[:, :PROMPT], generation.mask_br], axis=1)
    sampled = np.where(generation.mask_br, generation.logp_br, 0)
    trained = np.where(
        generation.mask_br, setup.learner.reference_logp(setup.base, tokens, mask), 0
    )
    assert_close(sampled, trained, 2e-6)


@pytest.mark.parametrize("pack", [False, True])
def test_a_prompt_is_prefilled_once_for_its_samples(make_setup, batch, pack):
    """The copies of its cache give what running it once per sample gives."""
    prompts, mask = batch.tokens_bt[:2, :PROMPT], batch.mask_bt[:2, :PROMPT]
    results = []
    for copies in (2, 1):
        setup = make_setup(samples_per_prompt=copies)
        rows = jnp.repeat(prompts, 2 // copies, axis=0), jnp.repeat(mask, 2 // copies, axis=0)
        slots = int(rows[1].sum()) if pack else None
        results.append(
            setup.learner.rollout(setup.state.params, setup.base, *rows, jax.random.key(0), slots)
        )
    np.testing.assert_array_equal(results[0].tokens_br, results[1].tokens_br)
    assert_close(results[0].logp_br, results[1].logp_br, 1e-6)
    assert len(np.unique(results[0].tokens_br, axis=0)) == ROWS  # samples of a prompt differ


def test_a_rollout_is_compiled_for_its_rows_on_each_gpu(make_setup, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    setup = make_setup(batch_size=64)
    on_gpu = dataclasses.replace(setup.learner, platform="gpu")
    assert setup.learner.decoding_options == ()
    assert [name for name, _ in on_gpu.decoding_options] == ["xla_gpu_experimental_force_split_k"]
    halved = Placement(make_mesh(MeshConfig(data=2)))
    assert dataclasses.replace(on_gpu, placement=halved).decoding_options == ()
    tokens = jax.random.randint(jax.random.key(0), (64, PROMPT), 3, 100)
    mask, key = jnp.ones_like(tokens, bool), jax.random.key(1)
    ours, theirs = (
        learner.rollout(setup.state.params, setup.base, tokens, mask, key)
        for learner in (on_gpu, setup.learner)
    )
    np.testing.assert_array_equal(ours.tokens_br, theirs.tokens_br)


def test_batch_metrics_by_hand(make_setup, batch):
    setup = make_setup()
    state = moved(setup.state)
    _, targets, _ = setup.update(state, batch, orders(1))
    mask = np.asarray(batch.mask_br)
    metrics = batch_metrics(setup.learner.config, batch, targets, targets.logp_br + 0.25)
    k3 = kl_k3(jnp.clip(targets.logp_br - batch.ref_logp_br, -20, 20))
    expected = np.where(mask, k3, 0).sum() / ROWS
    np.testing.assert_allclose(metrics["ref_kl"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler_drift"], 0.25, rtol=1e-4)
    advantages = np.asarray(targets.returns_br - targets.values_br)[mask]
    np.testing.assert_allclose(metrics["advantage_std"], advantages.std(), rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1.0] * 8),
        ("linear", 0, [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", 2, [0.25, 0.5, 0.75, 1.0, 1, 1, 1, 1]),
        ("cosine", 0, [0.5 * (1 + np.cos(np.pi * k / 8)) for k in range(8)]),
    ],
)
def test_learning_rate_schedules(ppo_config, schedule, warmup, expected):
    config = ppo_config(
        total_steps=4, ppo_epochs=2, lr_schedule=schedule, warmup_steps=warmup, learning_rate=1e-2
    )
    optimizer = make_optimizer(config)
    params = {"w": jnp.ones(())}
    state = optimizer.init(params)
    sizes = []
    for _ in range(8):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        sizes.append(-float(updates["w"]))
    # Adam's step on a constant gradient g is lr · g / (|g| + ε); clipping leaves g = 1.
    np.testing.assert_allclose(sizes, 1e-2 * np.asarray(expected) / (1 + 1e-5), rtol=1e-3)


def test_gradients_are_clipped_by_their_global_norm(ppo_config):
    optimizer = make_optimizer(ppo_config(max_grad_norm=0.5))
    clipper = optax.clip_by_global_norm(0.5)
    grads = {"a": jnp.full((4,), 3.0), "b": jnp.full((9,), -4.0)}
    clipped, _ = clipper.update(grads, clipper.init(grads))
    np.testing.assert_allclose(optax.global_norm(clipped), 0.5, rtol=1e-6)
    state = optimizer.init(grads)
    _, after = optimizer.update(grads, state, grads)
    moments = optax.tree_utils.tree_get(after, "mu")
    np.testing.assert_allclose(moments["a"], 0.1 * clipped["a"], rtol=1e-5)


OPTIONS = {"clip_range": 0.02, "value_clip_range": 0.3, "vf_coef": 0.5, "learning_rate": 1e-3}


def test_second_epoch_against_loops(make_setup, batch):
    one, two = (make_setup(ppo_epochs=n, **OPTIONS) for n in (1, 2))
    state, targets, first = one.update(moved(one.state), batch, orders(1))
    now = one.evaluate(state, batch)
    expected = ppo_loss_loop(
        *map(
            np.asarray,
            (
                now.logp_br,
                targets.logp_br,
                targets.advantages_br,
                now.values_br,
                targets.values_br,
                targets.returns_br,
                batch.mask_br,
            ),
        ),
        0.02,
        0.3,
    )
    _, _, both = two.update(moved(two.state), batch, orders(2))
    assert 0.2 < expected["clip_fraction"] < 1
    names = ("policy_loss", "value_loss", "approx_kl", "clip_fraction")
    second = {name: 2 * both[name] - first[name] for name in names}
    assert_same_metrics([second], [expected], names)
    for metrics in (first, both):
        total = metrics["policy_loss"] + 0.5 * metrics["value_loss"]
        np.testing.assert_allclose(metrics["ppo_loss"], total, rtol=1e-5)


def test_values_train_the_adapter(make_setup, batch):
    setup = make_setup()

    def total(params):
        now = setup.learner.evaluate(params, setup.base, batch.tokens_bt, batch.mask_bt)
        return now.values_br.sum()

    grads = jax.grad(total)(moved(setup.state).params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads["lora"]))


def test_a_gradient_that_overflows_is_not_applied(make_setup, batch):
    setup = make_setup(vf_coef=1e10, value_clip_range=1e30)
    state = moved(setup.state)
    before = jax.tree.map(np.asarray, state.params)
    huge = batch.replace(reward_b=jnp.full(ROWS, 1e10))
    state, _, metrics = setup.update(state, huge, orders(1))
    assert np.isfinite(metrics["ppo_loss"]) and not np.isfinite(metrics["grad_norm"])
    assert metrics["skipped_updates"] == 1
    for a, b in zip(*map(jax.tree.leaves, (before, state.params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_advantages_are_whitened_only_if_so_configured(make_setup, batch):
    setup = make_setup(whiten_advantages=False)
    _, targets, _ = setup.update(moved(setup.state), batch, orders(1))
    mask = np.asarray(batch.mask_br)
    assert_close(
        np.asarray(targets.advantages_br)[mask],
        np.asarray(targets.returns_br - targets.values_br)[mask],
        1e-6,
        terms=np.asarray(targets.returns_br)[mask],
    )


def test_minibatches_follow_the_permutation(make_setup, batch):
    kernels = []
    for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
        setup = make_setup(num_minibatches=2, ppo_epochs=1, learning_rate=1e-2)
        state, _, _ = setup.update(moved(setup.state), batch, np.array([order]))
        kernels.append(state.params["value_head"]["kernel"])
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-5


def test_weight_decay(ppo_config):
    optimizer = make_optimizer(ppo_config(weight_decay=0.1, learning_rate=1e-2))
    params = {"w": jnp.ones(())}
    updates, _ = optimizer.update({"w": jnp.zeros(())}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -1e-3, rtol=1e-5)


def test_linear_after_warmup(ppo_config):
    config = ppo_config(
        total_steps=4, ppo_epochs=2, lr_schedule="linear", warmup_steps=2, learning_rate=1e-2
    )
    optimizer, params = make_optimizer(config), {"w": jnp.ones(())}
    state, sizes = optimizer.init(params), []
    for _ in range(8):
        updates, state = optimizer.update({"w": jnp.ones(())}, state, params)
        sizes.append(-float(updates["w"]))
    expected = [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(sizes, 1e-2 * np.array(expected) / (1 + 1e-5), rtol=1e-3)


def test_the_mean_of_the_advantages_is_before_whitening(make_setup, batch):
    setup = make_setup()
    _, targets, _ = setup.update(moved(setup.state), batch, orders(1))
    mask = np.asarray(batch.mask_br)
    metrics = batch_metrics(setup.learner.config, batch, targets, targets.logp_br)
    raw = np.asarray(targets.returns_br - targets.values_br)[mask]
    np.testing.assert_allclose(metrics["advantage_mean"], raw.mean(), rtol=1e-4)
