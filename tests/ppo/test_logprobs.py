"""log π and entropy against torch, at a temperature, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppo.logprobs import token_logprobs
from tests.closeness import assert_close


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 7, 16)).astype(np.float32)
    vocabulary = rng.normal(size=(50, 16)).astype(np.float32)
    return x, vocabulary, rng.integers(0, 50, size=(3, 7)).astype(np.int32)


@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_matches_torch(arrays, chunk, temperature):
    x, vocabulary, targets = arrays
    logp, entropy = token_logprobs(*map(jnp.asarray, arrays), temperature, chunk)
    distribution = torch.distributions.Categorical(
        logits=torch.tensor(x) @ torch.tensor(vocabulary).T / temperature
    )
    assert_close(logp, distribution.log_prob(torch.tensor(targets)), 3e-7)
    assert_close(entropy, distribution.entropy(), 3e-6)


def test_chunked_gradient_is_the_whole_gradient(arrays):
    def loss(x, chunk):
        return (token_logprobs(x, *map(jnp.asarray, arrays[1:]), 0.7, chunk)[0] ** 2).sum()

    x = jnp.asarray(arrays[0])
    assert_close(jax.grad(loss)(x, 3), jax.grad(loss)(x, 0), 1e-6)


def test_gradients_are_those_of_torch(arrays):
    x, vocabulary, targets = arrays

    def loss(x, vocabulary):
        return token_logprobs(x, vocabulary, jnp.asarray(targets), 0.7)[0].sum()

    theirs = [torch.tensor(array, requires_grad=True) for array in (x, vocabulary)]
    logp = torch.log_softmax(theirs[0] @ theirs[1].T / 0.7, dim=-1)
    logp.gather(-1, torch.tensor(targets, dtype=torch.int64)[..., None]).sum().backward()
    for ours, their in zip(jax.grad(loss, argnums=(0, 1))(x, vocabulary), theirs, strict=True):
        assert_close(ours, their.grad, 1e-6)


def test_gradient_in_half_precision_casts_no_vocabulary(arrays):
    x, vocabulary = (jnp.asarray(array, jnp.bfloat16) for array in arrays[:2])

    def loss(x):
        return token_logprobs(x, vocabulary.astype(x.dtype), jnp.asarray(arrays[2]), 1.0)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    assert "tensor<50x16xbf16>" in text and "tensor<50x16xf32>" not in text
    rounded = jax.grad(loss)(x).astype(jnp.float32)
    exact = jax.grad(loss)(x.astype(jnp.float32))
    assert jnp.linalg.norm(rounded - exact) <= 0.01 * jnp.linalg.norm(exact)


def test_chunks_never_hold_the_whole_projection(arrays):
    x, vocabulary, targets = (jnp.asarray(a) for a in arrays)
    grad = jax.jit(jax.grad(lambda x: token_logprobs(x, vocabulary, targets, 1.0, 1)[0].sum()))
    text = grad.lower(x).as_text()
    assert "tensor<3x7x50xf32>" not in text
    assert "tensor<3x1x50xf32>" in text


def test_chunks_are_recomputed():
    rng = np.random.default_rng(0)
    x, vocabulary = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 7, 16), (50, 16)))
    targets = jnp.zeros((3, 7), jnp.int32)
    _, pull = jax.vjp(lambda x: token_logprobs(x, vocabulary, targets, 1.0, 1)[0], x)
    assert max(leaf.size for leaf in jax.tree.leaves(pull)) < 3 * 7 * 50
