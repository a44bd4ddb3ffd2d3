"""log π and entropy against torch, at a temperature, whole and in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppo.logprobs import token_logprobs


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
    np.testing.assert_allclose(logp, distribution.log_prob(torch.tensor(targets)), atol=1e-5)
    np.testing.assert_allclose(entropy, distribution.entropy(), atol=1e-5)


def test_chunked_gradient_is_the_whole_gradient(arrays):
    def loss(x, chunk):
        return (token_logprobs(x, *map(jnp.asarray, arrays[1:]), 0.7, chunk)[0] ** 2).sum()

    x = jnp.asarray(arrays[0])
    np.testing.assert_allclose(jax.grad(loss)(x, 3), jax.grad(loss)(x, 0), rtol=1e-4, atol=1e-5)


def test_chunks_never_hold_the_whole_projection(arrays):
    x, vocabulary, targets = (jnp.asarray(a) for a in arrays)
    grad = jax.jit(jax.grad(lambda x: token_logprobs(x, vocabulary, targets, 1.0, 1)[0].sum()))
    text = grad.lower(x).as_text()
    assert "tensor<3x7x50xf32>" not in text
    assert "tensor<3x1x50xf32>" in text
