"""Packed programs compute the same results and gradients as padded ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo.slots import SlotPlan, Slots, copies_sharing_slots, largest_slots, order_of_rows
from sarm_jax.models.packing import Packing
from sarm_jax.sampling.decoding import prefill
from tests.closeness import assert_close
from tests.further import further

MASK = np.asarray([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 1, 0]], bool)


@pytest.mark.parametrize(("groups", "slots"), [(1, 9), (1, 12), (1, 99), (2, 6), (2, 8), (4, 4)])
def test_pack_and_unpack_against_a_loop(groups, slots):
    x = np.random.default_rng(0).normal(size=(*MASK.shape, 2, 3)).astype(np.float32)
    packing = Packing.from_mask(jnp.asarray(MASK), slots, groups)
    slots_s = packing.pack(jnp.asarray(x))
    packed = slots_s.reshape(groups, -1, 2, 3)
    per_group = np.split(np.arange(4), groups)
    for rows, tokens in zip(per_group, packed, strict=True):
        real = [x[b, t] for b in rows for t in range(4) if MASK[b, t]]
        np.testing.assert_array_equal(tokens[: len(real)], real)
        np.testing.assert_array_equal(tokens[len(real) :], 0)
    np.testing.assert_array_equal(packing.unpack(slots_s), np.where(MASK[..., None, None], x, 0))


def test_gradients_are_those_of_indexing():
    rng = np.random.default_rng(0)
    x, weight_gn = rng.normal(size=(4, 4)), rng.normal(size=(2, 7))
    packing = Packing.from_mask(jnp.asarray(MASK), 7, 2)
    gradient = jax.grad(lambda x: (packing.pack(x) * weight_gn.reshape(14)).sum())(jnp.asarray(x))
    expected = np.zeros((4, 4))
    for g, rows in enumerate(((0, 1), (2, 3))):
        real = [(b, t) for b in rows for t in range(4) if MASK[b, t]]
        for n, token in enumerate(real):
            expected[token] = weight_gn[g, n]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    weight_bt = rng.normal(size=(4, 4))
    gradient = jax.grad(lambda y: (packing.unpack(y) * weight_bt).sum())(jnp.zeros(14))
    np.testing.assert_allclose(gradient, packing.pack(jnp.asarray(weight_bt)), rtol=1e-6)


@pytest.mark.parametrize(("groups", "slots"), [(1, 11), (1, 20), (2, 6)])
def test_a_prefix_of_copies_has_slots_once(groups, slots):
    # Two prompts of 2 and 3 tokens, padded on the left, with two responses each.
    mask = np.asarray([[0, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)
    x = np.random.default_rng(0).normal(size=(4, 5, 2))
    x[[1, 3], :3] = x[[0, 2], :3]
    packing = Packing.from_mask(jnp.asarray(mask), slots, groups, copies=2, prefix=3)
    own = [[(0, 1), (0, 2), (0, 3), (0, 4), (1, 3)]]
    own += [[(2, 0), (2, 1), (2, 2), (2, 3), (3, 3), (3, 4)]]
    if groups == 1:
        own = [own[0] + own[1]]
    packed = packing.pack(jnp.asarray(x))
    expected = np.zeros((groups, packed.shape[0] // groups, 2))
    for g, tokens in enumerate(own):
        for n, token in enumerate(tokens):
            expected[g, n] = x[token]
    np.testing.assert_allclose(packed, expected.reshape(-1, 2), rtol=1e-6)
    rows = packing.unpack(packed)
    np.testing.assert_allclose(rows, np.where(mask[..., None], x, 0), rtol=1e-6)
    # The gradient of a token in a slot is summed over the rows that it is copied to.
    weight = np.random.default_rng(1).normal(size=x.shape)
    gradient = jax.grad(lambda y: (packing.unpack(y) * weight).sum())(jnp.zeros(packed.shape))
    summed = np.where(mask[..., None], weight, 0)
    summed[[0, 2], :3] += summed[[1, 3], :3]
    np.testing.assert_allclose(gradient, packing.pack(jnp.asarray(summed)), rtol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "side", "groups"),
    [
        *(("llama", side, groups) for side in ("left", "right", "middle") for groups in (1, 2)),
        ("qwen2", "left", 2),
        ("qwen3", "left", 2),
    ],
    indirect=["architecture"],
)
def test_packed_hidden_and_its_gradient_equal_those_with_padding(policy, batch_bt, side, groups):
    batch = getattr(batch_bt, side)
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.mask, bool)
    packing = Packing.from_mask(mask, 10 // groups, groups)
    graphdef, state = nnx.split(policy)

    def loss(state, packing):
        x_btd = nnx.merge(graphdef, state).hidden(tokens, mask, packing=packing)
        return jnp.square(jnp.where(mask[..., None], x_btd, 0)).sum(), x_btd

    (_, packed), ours = jax.value_and_grad(loss, has_aux=True)(state, packing)
    (_, padded), theirs = jax.value_and_grad(loss, has_aux=True)(state, None)
    assert_close(packed[mask], padded[mask], 3e-6)
    np.testing.assert_array_equal(packed[~mask], 0)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(a, b)


def test_prefill_fills_the_same_cache(policy, batch_bt):
    tokens, mask = jnp.asarray(batch_bt.left.tokens), jnp.asarray(batch_bt.left.mask, bool)
    packed, cache = prefill(policy, tokens, mask, 7, Packing.from_mask(mask, 8))
    padded, expected = prefill(policy, tokens, mask, 7)
    assert_close(packed[mask], padded[mask], 3e-6)
    real = np.pad(np.asarray(mask), ((0, 0), (0, 2)))[:, None, None]
    for a, b in zip(cache.k + cache.v, expected.k + expected.v, strict=True):
        assert_close(np.where(real, a, 0), np.where(real, b, 0), 3e-6)
    assert cache.column == expected.column
    np.testing.assert_array_equal(cache.position_b, expected.position_b)


@pytest.mark.parametrize("groups", [1, 2])
def test_responses_that_share_a_prompt_equal_separate_ones(policy, batch_bt, groups):
    tokens, mask = (np.repeat(x, 3, axis=0) for x in (batch_bt.left.tokens, batch_bt.left.mask))
    rng, (rows, columns) = np.random.default_rng(0), tokens.shape
    responses = rng.integers(3, 60, size=(rows, 4))
    tokens = jnp.asarray(np.concatenate([tokens, responses], axis=1))
    lengths = np.arange(rows) % 4 + 1
    mask = jnp.asarray(np.concatenate([mask, np.arange(4) < lengths[:, None]], axis=1), bool)
    graphdef, state = nnx.split(policy)
    weight = jnp.asarray(rng.normal(size=(rows, columns + 4, 1)), jnp.float32)
    slots = 2 * int(mask.sum())

    def loss(state, packing):
        x_btd = nnx.merge(graphdef, state).hidden(tokens, mask, packing=packing)
        return (jnp.sin(x_btd) * weight * mask[..., None]).sum(), x_btd

    shared = Packing.from_mask(mask, slots // groups, groups, copies=3, prefix=columns)
    assert shared.used_gn.sum() == np.sum(batch_bt.left.mask) + lengths.sum()
    (_, ours), our_gradient = jax.value_and_grad(loss, has_aux=True)(state, shared)
    (_, theirs), their_gradient = jax.value_and_grad(loss, has_aux=True)(state, None)
    assert_close(ours[mask], theirs[mask], 3e-6)
    for a, b in zip(*map(jax.tree.leaves, (our_gradient, their_gradient)), strict=True):
        assert_close(a, b)


SHARING = {"algorithm": "rloo", "samples_per_prompt": 2, "batch_size": 8, "num_minibatches": 2}


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        further({}, 1),
        ({"num_minibatches": 2, "logprob_chunk": 2}, 1),
        (SHARING, 2),
        (SHARING | {"gradient_accumulation_steps": 2}, 2),
    ],
)
def test_a_packed_run_equals_a_padded_run(make_trainer, tmp_path, options, copies):
    options = options | {"stop_ids": tuple(range(3, 70)), "total_steps": 2}
    runs = []
    for levels in (0, 3):
        trainer = make_trainer(tmp_path / str(levels), pack_levels=levels, **options)
        trainer.run()
        runs.append(trainer.state.train.params)
        sizes = [slots for plan in trainer._slot_plans.values() for slots in plan.all_slots()]
        assert {slots.copies for slots in sizes if slots} == ({copies} if levels else set())
    for padded, packed in zip(*map(jax.tree.leaves, runs), strict=True):
        assert_close(packed, padded, 5e-5)


def test_slots_by_hand(ppo_config):
    config = ppo_config(batch_size=4, max_new_tokens=20, pack_levels=4, num_minibatches=2)
    lengths = np.asarray([3, 5, 7, 9])
    order = np.asarray([[1, 3, 0, 2], [2, 3, 0, 1]])
    plan = SlotPlan(config, [lengths], [order])
    # The longest pair of prompts has 7 + 9 = 16 tokens, a pair of responses 40, and a level 16.
    assert plan.prefill == 24
    assert plan.all_slots() == [Slots(32, 16), Slots(48, 32), Slots(64, 48)]
    assert plan.slots_for(np.asarray([8, 8, 1, 2]), order) == Slots(32, 16)
    assert plan.slots_for(np.asarray([8, 1, 8, 10]), order) == Slots(
        48, 32
    )  # 8 + 10 in either order
    assert SlotPlan(config, [lengths], [order], parts=2).prefill == 16
    padded = SlotPlan(dataclasses.replace(config, pack_levels=0), [lengths], [order])
    assert padded.all_slots() == [None] and padded.prefill is None
    assert padded.slots_for(lengths, order) is None


def test_slots_hold_the_batchs_own_order(ppo_config):
    config = ppo_config(batch_size=4, max_new_tokens=20, pack_levels=4, num_minibatches=2)
    order, lengths = np.asarray([[0, 2, 1, 3]]), np.asarray([20, 20, 1, 1])
    assert SlotPlan(config, [lengths], [order]).slots_for(lengths, order).responses == 48


def test_slots_of_shared_prompts_by_hand(ppo_config):
    config = ppo_config(
        batch_size=8, samples_per_prompt=2, max_new_tokens=4, pack_levels=1, num_minibatches=2
    )
    lengths, own = np.asarray([20, 3, 1, 5]), np.arange(8)[None]
    # A minibatch has two prompts. In the batch's own order they have 20 + 3 or 1 + 5 tokens.
    assert SlotPlan(config, [lengths], [own]).all_slots() == [Slots(24 + 16, 16, 2)]
    order = np.asarray([[0, 1, 6, 7, 2, 3, 4, 5]])  # 20 + 5 and 3 + 1 tokens
    plan = SlotPlan(config, [lengths], [order])
    assert plan.all_slots() == [Slots(32 + 16, 16, 2)]
    assert plan.slots_for(np.full(8, 4), order) == Slots(32 + 16, 16, 2)
    with pytest.raises(AssertionError, match="not together"):
        SlotPlan(config, [lengths], [np.asarray([[0, 2, 1, 3, 4, 5, 6, 7]])])
    assert largest_slots(config, prompt_length=20) == Slots(2 * 20 + 16, 16, 2)
    assert largest_slots(dataclasses.replace(config, pack_levels=0), prompt_length=20) is None
    # On four parts a minibatch has one row in each, whose prompt no other row there has.
    assert largest_slots(config, prompt_length=20, parts=4) == Slots(20 + 4, 4, 1)
    assert SlotPlan(config, [lengths], [order], parts=4).all_slots() == [Slots(24 + 8, 8, 1)]


def test_responses_share_their_prompt_as_far_as_they_are_together(ppo_config):
    config = ppo_config(batch_size=24, samples_per_prompt=6, num_minibatches=2, pack_levels=1)
    assert copies_sharing_slots(config) == 6
    assert copies_sharing_slots(config, parts=3) == 2  # of 4 rows
    accumulated = dataclasses.replace(config, gradient_accumulation_steps=4)
    assert copies_sharing_slots(accumulated) == 3  # of 3 rows
    cut = dataclasses.replace(config, num_minibatches=6)  # of 4 rows
    assert copies_sharing_slots(cut) == 1


def test_rows_of_a_prompt_stay_together_in_a_minibatch(ppo_config):
    config = ppo_config(batch_size=24, samples_per_prompt=6, num_minibatches=2)
    order = order_of_rows(config, step=3)
    assert order.shape == (config.ppo_epochs, 24)
    for rows in order:
        assert sorted(rows) == list(range(24))
        for minibatch in np.split(rows, 2):
            assert len(set(minibatch // 6)) == 2
    for pieces in (2, 4):
        accumulated = dataclasses.replace(config, gradient_accumulation_steps=pieces)
        np.testing.assert_array_equal(order_of_rows(accumulated, step=3), order)
    # Minibatches that cut a group: the rows of all groups are shuffled one by one.
    cut = dataclasses.replace(config, num_minibatches=6)
    assert any(len(set(rows // 6)) > 1 for rows in order_of_rows(cut, step=3).reshape(-1, 6))
