"""The implementations of an SAE step that the benchmark compares have one loss and one gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.sae_growth import IMPLEMENTATIONS
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.training.sae_training import SAETraining
from tests.closeness import assert_close

OPTIONS = SAETraining(
    steps=1, batch_tokens=16, learning_rate=1e-3, warmup_fraction=0.0, dead_after_steps=3, aux_k=8,
    aux_weight=1 / 4, seed=0,
)  # fmt: skip


@pytest.mark.parametrize("dead", [0, 5, 40])
def test_all_implementations_have_the_loss_and_gradient_of_the_training(dead):
    graphdef, params = nnx.split(SAE(SAEConfig(12, 48, 5), rngs=nnx.Rngs(0)))
    x_bd = np.random.default_rng(0).standard_normal((16, 12), np.float32)
    dead_f = jnp.asarray(np.random.default_rng(1).permutation(48) < dead)

    def of(loss):
        def loss_fn(params):
            return loss(nnx.merge(graphdef, params), x_bd, dead_f, OPTIONS)

        return jax.jit(jax.value_and_grad(loss_fn))(params)

    expected, expected_grads = of(IMPLEMENTATIONS["ours"])
    for name in ("dense", "sparse"):
        value, grads = of(IMPLEMENTATIONS[name])
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            assert_close(a, b, 1e-6, name=name)
