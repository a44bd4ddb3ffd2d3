"""One token at a time is the full forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo.learner import Learner
from ppo.programs import _Halves
from sarm_jax.decoding import decode, next_logits, prefill, unstacked
from sarm_jax.llama import Llama
from sarm_jax.lora import TARGET_MODULES, LoRAConfig, LoRAParam, add_lora


def test_unstacked_layers_are_transposed_and_have_one_dtype(architecture):
    policy = Llama(architecture, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    add_lora(policy, LoRAConfig(rank=4), nnx.Rngs(1))
    layers = unstacked(policy)
    assert len(layers) == architecture.num_hidden_layers
    for number, layer in enumerate(layers):
        pairs = zip(*map(jax.tree.leaves, (layer, nnx.state(policy.layers))), strict=True)
        for leaf, stack in pairs:
            assert leaf.dtype == jnp.bfloat16
            np.testing.assert_array_equal(leaf, stack[number].T.astype(jnp.bfloat16))


def test_planned_layers_are_those_of_a_run(architecture, ppo_config):
    def make() -> Llama:
        return Llama(architecture, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    learner, state, base = Learner.attach(ppo_config(), LoRAConfig(rank=4), make(), pad=0)
    planned = _Halves(learner, state, base, prompt=8)._layers()
    policy = nnx.merge(learner.graphdef, state.params["lora"], base)
    for ours, theirs in zip(*map(jax.tree.leaves, (planned, unstacked(policy))), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decode_is_the_full_forward(policy, batch_bt, side, adapted):
    if adapted:
        add_lora(policy, LoRAConfig(rank=4, alpha=8.0, target_modules=TARGET_MODULES), nnx.Rngs(3))
        adapter = nnx.state(policy, LoRAParam)
        noise = nnx.Rngs(4)
        nnx.update(
            policy,
            jax.tree.map(lambda x: 0.1 * jax.random.normal(noise.params(), x.shape), adapter),
        )
    batch = getattr(batch_bt, side)
    tokens, mask = jnp.asarray(batch.tokens), jnp.asarray(batch.mask, bool)
    new = jnp.asarray([[3, 4, 5, 6], [7, 8, 9, 2]])
    full_tokens = jnp.concatenate([tokens, new], axis=1)
    full_mask = jnp.concatenate([mask, jnp.ones_like(new, bool)], axis=1)
    expected, logits = policy.hidden(full_tokens, full_mask), policy(full_tokens, full_mask)
    x, cache = prefill(policy, tokens, mask, cache_size=9)
    np.testing.assert_allclose(x[mask], expected[:, :5][mask], atol=1e-5)
    for t in range(4):
        x, cache = decode(policy, new[:, t], cache, unstacked(policy))
        np.testing.assert_allclose(x[:, 0], expected[:, 5 + t], atol=1e-5)
        np.testing.assert_allclose(next_logits(policy, x), logits[:, 5 + t], atol=1e-5)
