"""Bradley–Terry training: what each mode trains, its losses and gradients, and its batches."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.training import head_training, preference_loss, preference_training
from sarm_jax.training.activations import Conversation
from sarm_jax.training.preference_training import PreferenceTraining
from sarm_jax.training.train_sarm import assemble, truncate
from tests import oracles
from tests.closeness import assert_close

OPTIONS = PreferenceTraining(
    mode=3, reconstruction_weight=0.5, epochs=2, batch_size=2, learning_rate=1e-3,
    head_learning_rate=1e-2, warmup_fraction=0.03, weight_decay=0.1, seed=0,
)  # fmt: skip


def tiny_sarm(policy, use_topk=True):
    sae_config = SAEConfig(32, 64, 8, activation="topk" if use_topk else "identity")
    sarm = assemble(truncate(policy, 2), SAE(sae_config, rngs=nnx.Rngs(3)))
    sarm.sae.pre_bias[...] = 0.1 * jax.random.normal(jax.random.key(5), (32,))
    sarm.score[...] = jax.random.normal(jax.random.key(4), (64,))
    return sarm


def tiny_rows(count=6):
    rng = np.random.default_rng(0)
    return [
        Conversation(rng.integers(1, 200, n).tolist(), int(rng.integers(1, n)))
        for n in rng.integers(8, 33, count)  # one bucket, one compilation
    ]


PAIRS = np.asarray([[0, 1], [2, 3], [4, 5], [0, 3]])


def tiny_batch():
    rng = np.random.default_rng(0)
    return next(preference_training.pair_batches(tiny_rows(), PAIRS, batch_size=2, rng=rng))


def test_bradley_terry_by_hand():
    chosen, rejected = jnp.asarray([1.0, 0.0, 2.0]), jnp.asarray([0.0, 0.0, 5.0])
    expected = np.mean([np.log(1 + np.exp(-d)) for d in (1.0, 0.0, -3.0)])
    loss = preference_loss.bradley_terry_loss(chosen, rejected)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(preference_loss.accuracy(chosen, rejected), 0.5)
    huge = preference_loss.bradley_terry_loss(jnp.asarray([-1e4]), jnp.asarray([1e4]))
    np.testing.assert_allclose(huge, 2e4)


CHOSEN, REJECTED = np.asarray([1.0, 0.0, 2.0, -0.5]), np.asarray([0.0, 0.0, 5.0, 1.0])
KINDS = {
    "preferences": [False] * 4,
    "ties": [True] * 4,
    "both": [True, False, True, False],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_ties_by_hand_and_in_torch(kind, weight):
    """A tie has the gradient weight · (σ(Δ) − ½), a preference −σ(−Δ)."""
    tie_b = np.asarray(KINDS[kind])
    value_and_grad = jax.value_and_grad(preference_loss.bradley_terry_loss, argnums=(0, 1))
    loss, (of_chosen, of_rejected) = value_and_grad(
        jnp.asarray(CHOSEN), jnp.asarray(REJECTED), jnp.asarray(tie_b), weight
    )
    margin = CHOSEN - REJECTED
    sigma = 1 / (1 + np.exp(-margin))
    tied = weight * (-0.5 * np.log(sigma) - 0.5 * np.log(1 - sigma))
    np.testing.assert_allclose(loss, np.where(tie_b, tied, -np.log(sigma)).mean(), rtol=1e-6)
    expected = np.where(tie_b, weight * (sigma - 0.5), sigma - 1) / 4
    np.testing.assert_allclose(of_chosen, expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(of_rejected, -expected, rtol=1e-5, atol=1e-8)

    logits = torch.tensor(margin, requires_grad=True)
    oracle = torch.nn.functional.binary_cross_entropy_with_logits(
        logits,
        torch.tensor(np.where(tie_b, 0.5, 1.0)),
        weight=torch.tensor(np.where(tie_b, weight, 1.0)),
    )
    oracle.backward()
    np.testing.assert_allclose(loss, oracle.item(), rtol=1e-6)
    np.testing.assert_allclose(of_chosen, logits.grad.numpy(), rtol=1e-5, atol=1e-8)
    if kind == "preferences":
        assert loss == preference_loss.bradley_terry_loss(
            jnp.asarray(CHOSEN), jnp.asarray(REJECTED)
        )


def test_a_tie_of_equal_scores_is_least_and_huge_scores_stay_finite():
    tie = jnp.asarray([True])
    losses = [
        float(preference_loss.bradley_terry_loss(jnp.asarray([d]), jnp.zeros(1), tie))
        for d in (-1e4, -1.0, 0.0, 1.0, 1e4)
    ]
    assert losses[2] == min(losses) == pytest.approx(np.log(2)) and losses[1] == losses[3]
    assert losses[0] == losses[4] == pytest.approx(5e3)


def test_metrics_are_of_their_own_kind_of_pairs():
    chosen, rejected = jnp.asarray(CHOSEN), jnp.asarray(REJECTED)

    def metrics(kind):
        tie_b = jnp.asarray(KINDS[kind])
        return preference_loss.pair_metrics(chosen, rejected, tie_b)

    assert metrics("both")["accuracy"] == 0.25 and metrics("both")["tie_margin"] == 2.0
    assert metrics("preferences")["accuracy"] == 0.375
    assert np.isnan(metrics("preferences")["tie_margin"]) and np.isnan(metrics("ties")["accuracy"])
    assert preference_loss.pair_metrics(chosen, rejected, None).keys() == {"accuracy"}


def test_ties_take_the_shortcut_out_of_the_head(policy):
    """Chosen sides have dimensions 0 and 1; ties say that dimension 1 is worth nothing."""
    sarm, rng = tiny_sarm(policy, use_topk=False), np.random.default_rng(0)
    x_rd = rng.normal(size=(120, 32)).astype(np.float32)
    x_rd[:30, :2] += 2
    x_rd[90:] = x_rd[60:90]
    x_rd[90:, 1] += 4
    pairs_p2 = np.arange(120).reshape(2, 2, 30).transpose(0, 2, 1).reshape(60, 2)
    options = dataclasses.replace(OPTIONS, mode=0, epochs=60, batch_size=10)
    margins, log = {}, []
    for weight in (None, 1.0, 20.0):
        tie_p = None if weight is None else np.arange(60) >= 30
        log = []
        weights_m = head_training.train_head(
            sarm.sae, x_rd, pairs_p2[: 30 if weight is None else 60],
            options=dataclasses.replace(options, tie_weight=weight or 1.0), log=log.append,
            tie_p=tie_p,
        )  # fmt: skip
        score_r = np.asarray(sarm.sae.encode(jnp.asarray(x_rd))) @ np.asarray(weights_m)
        assert np.mean(score_r[:30] > score_r[30:60]) > 0.9
        margins[weight] = np.abs(score_r[90:] - score_r[60:90]).mean()
    assert margins[20.0] < margins[1.0] / 2 < margins[None] / 8
    assert log[-1]["tie_margin"] == pytest.approx(margins[20.0], abs=0.2)


@partial(jax.jit, static_argnames=("graphdef", "mode"))
def _gradients(graphdef, state, mode, weight, batch):
    def loss_fn(state):
        tokens_bt, mask_bt, turn_bt, _ = batch
        loss, _ = preference_loss.preference_loss(
            nnx.merge(graphdef, state),
            tokens_bt,
            mask_bt,
            turn_bt=turn_bt,
            mode=mode,
            reconstruction_weight=weight,
        )
        return loss

    return jax.grad(loss_fn)(state)


def gradients(sarm, mode, weight):
    """Computes the gradient of a mode's loss with respect to every parameter, trained or not."""
    graphdef, state = nnx.split(sarm)
    grads = _gradients(graphdef, state, mode=mode, weight=weight, batch=tiny_batch())
    return {
        ".".join(map(str, path)): np.asarray(value[...]) for path, value in nnx.to_flat_state(grads)
    }


def reach(grads):
    """Returns the modules with a gradient somewhere, and the parameters without any."""
    nonzero = {name for name, gradient in grads.items() if np.any(gradient)}
    return {name.split(".")[0] for name in nonzero}, set(grads) - nonzero


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_parameters_with_a_gradient_in_each_mode(policy, mode):
    sarm = tiny_sarm(policy)
    modules, untouched = reach(gradients(sarm, mode, weight=0.5))
    sae = {f"sae.{n}" for n in ("encoder", "decoder", "pre_bias", "latent_bias")}
    assert modules == {"trunk", "score"} | ({"sae"} if mode > 1 else set())
    assert untouched == {"trunk.norm.scale"} | (sae if mode == 1 else set())


def test_mode_3_separates_the_two_losses_exactly(policy):
    sarm = tiny_sarm(policy)
    alone, both = gradients(sarm, 1, 0.0), gradients(sarm, 3, 0.5)
    doubled = gradients(sarm, 3, 1.0)
    for name in alone:
        if name.startswith("sae"):
            assert_close(doubled[name], 2 * both[name], 1e-6)
        else:  # the reconstruction loss has no gradient in trunk and head
            assert_close(both[name], alone[name], 2e-6)
    modules, _ = reach(gradients(sarm, 3, 0.0))
    assert modules == {"trunk", "score"}  # Bradley–Terry has no gradient in the SAE


def test_both_losses_reach_all_modules_in_mode_2(policy):
    sarm = tiny_sarm(policy)
    sarm.score[...] = jnp.zeros_like(sarm.score[...])  # a head of zeros blocks Bradley–Terry
    modules, _ = reach(gradients(sarm, 2, 0.5))
    assert modules == {"trunk", "sae", "score"}
    modules, _ = reach(gradients(tiny_sarm(policy), 2, 0.0))
    assert modules == {"trunk", "sae", "score"}


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_fine_tuning_changes_only_what_the_mode_trains(policy, mode):
    sarm = tiny_sarm(policy)
    before = jax.tree.map(np.array, nnx.state(sarm))
    options = dataclasses.replace(OPTIONS, mode=mode, tie_weight=3.0)
    log, tie_p = [], np.asarray([False, True, True, True])
    trained = preference_training.fine_tune(
        sarm, tiny_rows(), PAIRS, options=options, log=log.append, tie_p=tie_p
    )
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, nnx.state(sarm)))
    after = dict(nnx.to_flat_state(nnx.state(trained)))
    for path, value in nnx.to_flat_state(before):
        moved = not np.array_equal(value[...], after[path][...])
        frozen = path[:2] == ("trunk", "norm") or (mode == 1 and path[0] == "sae")
        assert moved != frozen, path
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in log)
    # Of the two batches of an epoch one has two ties, and one a tie and a preference.
    for epoch in (log[:2], log[2:]):
        assert sorted(row["accuracy"] is None for row in epoch) == [False, True]
    for row in log:
        if row["accuracy"] is None:  # hardly apart, the loss of ties is their weight · log 2
            least = 3 * np.log(2)
            assert least <= row["bradley_terry"] <= least + 3 * row["tie_margin"] / 2


def test_half_precision_computes_in_half_and_learns_in_float32(policy):
    sarm = tiny_sarm(policy)
    sarm.trunk = preference_training.cast(sarm.trunk, jnp.bfloat16)
    options = dataclasses.replace(OPTIONS, mode=1, learning_rate=1e-5)
    trained = preference_training.fine_tune(
        sarm, tiny_rows(), PAIRS, options=options, log=lambda row: None
    )
    before, after = (s.trunk.layers.mlp.up_proj.kernel[...] for s in (sarm, trained))
    assert after.dtype == jnp.float32
    moved = np.abs(np.asarray(after) - np.asarray(before.astype(jnp.float32)))
    assert 0 < moved.max() < 1e-4  # far below the resolution of these weights in half precision


def test_scales_and_biases_do_not_decay(policy):
    options = dataclasses.replace(OPTIONS, mode=2, warmup_fraction=0.0)
    _, params, _ = nnx.split(tiny_sarm(policy), preference_training.trainable(2), ...)
    optimizer = preference_training.make_optimizer(options, steps=10)
    state = optimizer.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):  # the first step of a schedule with warm-up has learning rate 0
        updates, state = optimizer.update(zeros, state, params)
    moved = {path: bool(np.any(value[...])) for path, value in nnx.to_flat_state(updates)}
    undecayed = {path for path, any_change in moved.items() if not any_change}
    names = {str(path[-1]) for path in undecayed}
    assert names == {"scale", "pre_bias", "latent_bias"}
    rate = np.asarray(updates["score"][...] / params["score"][...]).mean()
    body = updates["sae"]["encoder"][...] / params["sae"]["encoder"][...]
    np.testing.assert_allclose(rate / np.asarray(body).mean(), 1e-2 / 1e-3, rtol=1e-3)


def test_reconstruction_loss_agrees_with_the_oracle(tmp_path):
    torch.manual_seed(0)
    oracle = oracles.save_tiny_sarm(tmp_path, oracles.tiny_tokenizer())
    ids = torch.randint(1, 200, (1, 11))
    expected = oracle(ids).rec_loss_t.detach().numpy()
    sae = SAE(SAEConfig(32, 64, 8, activation="identity"), rngs=nnx.Rngs(0))
    weights = {name: value.detach().numpy() for name, value in oracle.sae.named_parameters()}
    sae.encoder[...] = jnp.asarray(weights["encoder.weight"].T)
    sae.decoder[...] = jnp.asarray(weights["decoder.weight"].T)
    sae.pre_bias[...] = jnp.asarray(weights["pre_bias"])
    sae.latent_bias[...] = jnp.asarray(weights["latent_bias"])
    h_td = oracle.model(input_ids=ids, use_cache=False).last_hidden_state.detach().numpy()
    x_btd = preference_loss.standardise(jnp.asarray(h_td))
    turn_bt = np.arange(11)[None] >= 7
    loss = preference_loss.turn_reconstruction_loss(sae, x_btd, jnp.asarray(turn_bt))
    np.testing.assert_allclose(loss, expected[7:].mean(), rtol=1e-4)


def test_batches_contain_each_pair_once_with_its_turns():
    rows = tiny_rows()
    seen = []
    tie_p = np.asarray([True, False, False, True])
    for tokens_bt, mask_bt, turn_bt, tie_b in preference_training.pair_batches(
        rows, PAIRS, batch_size=2, rng=np.random.default_rng(1), tie_p=tie_p
    ):
        assert tokens_bt.shape == mask_bt.shape == turn_bt.shape and len(tokens_bt) == 4
        numbers = []
        for tokens_t, mask_t, turn_t in zip(tokens_bt, mask_bt, turn_bt, strict=True):
            ids = tokens_t[mask_t].tolist()
            number = next(i for i, r in enumerate(rows) if r.ids == ids)
            assert turn_t.sum() == rows[number].turn_length and turn_t[: len(ids)].tolist()[-1]
            numbers.append(number)
        seen += [(*numbers[::2], tie_b[0]), (*numbers[1::2], tie_b[1])]
    expected = [(*pair, tie) for pair, tie in zip(PAIRS.tolist(), tie_p, strict=True)]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("use_topk", [True, False])
def test_the_head_learns_separable_pairs(policy, use_topk):
    sarm = tiny_sarm(policy, use_topk)
    rng = np.random.default_rng(0)
    x_rd = rng.normal(size=(60, 32)).astype(np.float32)
    x_rd[:30, 0] += 4
    pairs_p2 = np.stack([np.arange(30), np.arange(30, 60)], axis=1)
    options = dataclasses.replace(OPTIONS, mode=0, epochs=30, batch_size=10)
    log = []
    weights_m = head_training.train_head(sarm.sae, x_rd, pairs_p2, options=options, log=log.append)
    score_r = np.asarray(sarm.sae.encode(jnp.asarray(x_rd))) @ np.asarray(weights_m)
    assert np.mean(score_r[:30] > score_r[30:]) == 1.0
    assert len(log) == 30 and log[-1]["accuracy"] == 1.0
    values, indices = head_training.sparse_latents(sarm.sae, x_rd)
    assert_close((weights_m[indices] * values).sum(axis=1), score_r, 2e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_heads_are_those_that_are_trained_alone_on_their_pairs(policy, ties):
    sarm, rng = tiny_sarm(policy), np.random.default_rng(0)
    x_rd = rng.normal(size=(40, 32)).astype(np.float32)
    pairs_p2, tie_p = np.arange(40).reshape(20, 2), np.arange(20) >= 12 if ties else None
    options = dataclasses.replace(OPTIONS, mode=0, epochs=3, batch_size=4, seed=5)
    log: list[dict] = []
    weights_hm = head_training.train_heads(
        sarm.sae, x_rd, pairs_p2, options=options, log=log.append, heads=3, tie_p=tie_p
    )
    drawn = [head_training.resampled_pairs(20, 5, head) for head in range(3)]
    for head, drawn_p in enumerate(drawn):
        rows: list[dict] = []
        alone = head_training.train_head(
            sarm.sae,
            x_rd,
            pairs_p2[drawn_p],
            options=options,
            log=rows.append,
            tie_p=tie_p[drawn_p] if ties else None,
        )
        np.testing.assert_array_equal(weights_hm[head], alone)
        assert [row for row in log if row["head"] == head] == [r | {"head": head} for r in rows]
    assert len({tuple(drawn_p) for drawn_p in drawn}) == 3
    again = head_training.resampled_pairs(20, 5, 1)
    np.testing.assert_array_equal(again, drawn[1])
    assert not np.array_equal(head_training.resampled_pairs(20, 6, 1), again)
    # A bootstrap sample has about 1 − 1/e of the pairs.
    large = head_training.resampled_pairs(10_000, 0, 0)
    assert large.min() >= 0 and large.max() < 10_000
    assert abs(len(np.unique(large)) / 10_000 - 0.632) < 0.02


def test_no_mode_trains_the_unused_norm(policy):
    sarm = tiny_sarm(policy)
    for mode in range(4):
        _, params, _ = nnx.split(sarm, preference_training.trainable(mode), ...)
        trained = {path[:2] for path, _ in nnx.to_flat_state(params)}
        assert ("trunk", "norm") not in trained and ("score",) in trained
        assert (("trunk", "layers") in trained) == (mode > 0)
        assert (("sae", "encoder") in trained) == (mode > 1)


def test_mode_0_uses_the_learning_rate_of_the_head(policy):
    sarm = tiny_sarm(policy)
    x = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    options = dataclasses.replace(OPTIONS, mode=0, learning_rate=1e-30, epochs=1, batch_size=4)
    weights = head_training.train_head(
        sarm.sae, x, np.arange(8).reshape(4, 2), options=options, log=lambda row: None
    )
    assert np.abs(weights).max() > 1e-3


def test_the_first_step_of_a_warm_up_changes_nothing(policy):
    options = dataclasses.replace(OPTIONS, mode=1, warmup_fraction=0.5)
    _, params, _ = nnx.split(tiny_sarm(policy), preference_training.trainable(1), ...)
    optimizer = preference_training.make_optimizer(options, steps=10)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    assert all(not np.any(x) for x in jax.tree.leaves(updates))
