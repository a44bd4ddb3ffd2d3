"""Sampling: greedy tokens, log-probabilities, keys, stop tokens and distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sarm_jax.io.errors import InputError
from sarm_jax.sampling import generate as generation
from sarm_jax.sampling.generate import (
    Sampling,
    _first_beyond,
    draw_index,
    draw_token,
    generate,
    keep_top,
)
from tests.closeness import assert_close
from tests.tiny_models import MODEL_TYPES


def arrays(batch):
    return jnp.asarray(batch.tokens), jnp.asarray(batch.mask, bool)


def continuation_logits(policy, tokens, mask, out):
    """Returns the logits of a full forward pass for every response token."""
    length = tokens.shape[1]
    full_tokens = jnp.concatenate([tokens, out.tokens_br], axis=1)
    full_mask = jnp.concatenate([mask, out.mask_br], axis=1)
    return policy(full_tokens, full_mask)[:, length - 1 : -1]


@pytest.mark.parametrize("architecture", MODEL_TYPES, indirect=True)
def test_greedy_is_the_argmax_of_the_full_forward(policy, batch_bt):
    tokens, mask = arrays(batch_bt.left)
    out = generate(policy, tokens, mask, max_new_tokens=12, temperature=0.0)
    logits = continuation_logits(policy, tokens, mask, out)
    np.testing.assert_array_equal(
        np.where(out.mask_br, out.tokens_br, -1), np.where(out.mask_br, logits.argmax(-1), -1)
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampler_logprobs_are_those_of_the_full_forward(policy, batch_bt, temperature):
    tokens, mask = arrays(batch_bt.left)
    key = jax.random.key(0)
    out = generate(policy, tokens, mask, max_new_tokens=9, temperature=temperature, key=key)
    logp = jax.nn.log_softmax(continuation_logits(policy, tokens, mask, out) / temperature)
    expected = jnp.take_along_axis(logp, out.tokens_br[..., None], axis=-1)[..., 0]
    assert_close(np.where(out.mask_br, out.logp_br, 0), np.where(out.mask_br, expected, 0), 3e-6)


@pytest.mark.parametrize("architecture", MODEL_TYPES, indirect=True)
def test_padding_side_does_not_matter(policy, batch_bt):
    key = jax.random.key(1)
    outs = [
        generate(policy, *arrays(batch), max_new_tokens=8, key=key)
        for batch in (batch_bt.left, batch_bt.right, batch_bt.middle)
    ]
    for other in outs[1:]:
        np.testing.assert_array_equal(outs[0].tokens_br, other.tokens_br)


def test_stop_token_ends_a_row_and_is_included(policy, batch_bt):
    tokens, mask = arrays(batch_bt.left)
    free = generate(policy, tokens, mask, max_new_tokens=10, temperature=0.0, stop_ids=())
    stop = int(free.tokens_br[0, 3])
    out = generate(
        policy, tokens, mask, max_new_tokens=10, temperature=0.0, stop_ids=(stop,), pad_id=1
    )
    for row in range(2):
        hits = np.flatnonzero(np.asarray(free.tokens_br[row]) == stop)
        length = hits[0] + 1 if len(hits) else 10
        assert bool(out.ended_b[row]) == bool(len(hits))
        assert int(out.mask_br[row].sum()) == length
        np.testing.assert_array_equal(out.tokens_br[row, :length], free.tokens_br[row, :length])
        assert (np.asarray(out.tokens_br[row, length:]) == 1).all()


def test_the_key_determines_the_tokens(policy, batch_bt):
    tokens, mask = arrays(batch_bt.left)
    one, again, other = (
        generate(policy, tokens, mask, max_new_tokens=8, key=jax.random.key(k)).tokens_br
        for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one) != np.asarray(other)).any()
    rows = generate(policy, tokens[:1].repeat(4, 0), mask[:1].repeat(4, 0), max_new_tokens=8,
                    key=jax.random.key(3)).tokens_br  # fmt: skip
    assert len({tuple(row) for row in rows.tolist()}) > 1


def test_prompt_lengths_share_compilations(policy):
    key = jax.random.key(0)
    generation._compiled(()).clear_cache()
    for length in range(3, 30):
        tokens = jnp.ones((2, length), jnp.int32)
        generate(policy, tokens, tokens > 0, max_new_tokens=3, key=key)
    assert generation._compiled(())._cache_size() == 1


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])).repeat(20000, 0)
    tokens, logp = draw_token(logits, jax.random.key(0), Sampling(1, temperature=1.0))
    np.testing.assert_allclose(np.bincount(tokens) / 20000, [0.5, 0.3, 0.15, 0.05], atol=0.015)
    np.testing.assert_allclose(logp, logits[jnp.arange(20000), tokens], atol=1e-6)


def test_draws_follow_the_distribution_of_a_large_vocabulary():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(3000, 0.1)).astype(np.float32)
    p[rng.choice(3000, 1500, replace=False)] = 0.0
    p_bv = jnp.broadcast_to(p, (4_000, 3000))
    draw = jax.jit(lambda keys: jax.lax.map(lambda key: draw_index(p_bv, key), keys))
    draws = np.asarray(draw(jax.random.split(jax.random.key(1), 50))).ravel()
    counts = np.bincount(draws, minlength=3000)
    assert counts[p == 0].sum() == 0
    expected = p / p.sum() * 200_000
    big = expected > 20
    chi2 = ((counts - expected)[big] ** 2 / expected[big]).sum()
    assert chi2 < big.sum() + 5 * np.sqrt(2 * big.sum())


def test_an_index_of_weight_0_is_not_drawn_if_rounding_raises_the_sum_there():
    p = jnp.array([[0.0, 0.5, 0.0, 0.5, 0.0]])
    uneven = jnp.array([[0.0, 0.5, 0.50001, 1.0, 1.00001]])  # as a sum of partial sums may be
    for target, expected in ((0.0, 1), (0.49, 1), (0.500005, 3), (0.9, 3), (1.0, 3), (2.0, 3)):
        assert _first_beyond(jnp.array([target]), p, uneven).tolist() == [expected]


def test_top_k_and_top_p_renormalise():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    for kept in (keep_top(logits, 2, 1.0), keep_top(logits, 0, 0.6)):
        np.testing.assert_allclose(jax.nn.softmax(kept), [[0.625, 0.375, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(keep_top(logits, 0, 0.4) > -jnp.inf, [[True] + [False] * 3])
    _, logp = draw_token(logits, jax.random.key(0), Sampling(1, top_k=1))
    np.testing.assert_allclose(logp, 0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"key": None}, "key=None"),
    ],
)
def test_bad_options(policy, batch_bt, options, message):
    arguments = {"max_new_tokens": 2, "key": jax.random.key(0)} | options
    with pytest.raises(InputError, match=message):
        generate(policy, *arrays(batch_bt.left), **arguments)


def test_draws_of_different_tokens_are_independent(policy):
    policy.lm_head[...] = jnp.zeros_like(policy.lm_head[...])  # all tokens are equally likely
    tokens = jnp.ones((4, 3), jnp.int32)
    out = generate(
        policy, tokens, tokens > 0, max_new_tokens=20, stop_ids=(), key=jax.random.key(0)
    )
    assert min(len(set(row)) for row in out.tokens_br.tolist()) > 10


def test_the_loop_ends_when_every_row_has_ended(policy, monkeypatch):
    calls, decode = [], generation.decode

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return decode(*args)

    monkeypatch.setattr(generation, "decode", counted)
    generation._compiled.cache_clear()
    tokens = jnp.ones((2, 3), jnp.int32)
    out = generate(
        policy,
        tokens,
        tokens > 0,
        max_new_tokens=30,
        temperature=0.0,
        stop_ids=tuple(range(policy.config.vocab_size)),
    )
    jax.effects_barrier()
    generation._compiled.cache_clear()
    assert out.mask_br.sum() == 2 and calls == []
