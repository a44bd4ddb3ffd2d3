"""Decoding one token at a time equals the full forward pass."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sarm_jax.models.lora import TARGET_MODULES, LoRAConfig, LoRAParam, add_lora
from sarm_jax.sampling import decoding
from sarm_jax.sampling.decoding import compiler_options, decode, next_logits, prefill
from sarm_jax.sampling.fused_layers import fuse_layers
from tests.closeness import assert_close


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decode_equals_the_full_forward(policy, batch_bt, side, adapted):
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
    assert_close(x[mask], expected[:, :5][mask], 3e-6)
    for t in range(4):
        x, cache = decode(policy, new[:, t], cache, fuse_layers(policy))
        assert_close(x[:, 0], expected[:, 5 + t], 3e-6)
        assert_close(next_logits(policy, x), logits[:, 5 + t], 3e-6)


def test_products_of_many_rows_on_a_gpu_use_no_split_k(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options("gpu", 64) == (("xla_gpu_experimental_force_split_k", 1),)
    assert compiler_options("gpu", 63) == compiler_options("cpu", 64) == ()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_experimental_force_split_k=8")
    assert compiler_options("gpu", 64) == ()


def test_an_option_that_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(decoding, "NO_SPLIT_K", ("xla_gpu_of_yesterday", 1))
    assert compiler_options("gpu", 64) == ()
