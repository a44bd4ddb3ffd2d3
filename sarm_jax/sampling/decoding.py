"""One token at a time, with a KV cache: `Llama` once more, laid out for products of few tokens.

With few tokens a product takes as long as reading its kernel, so everything is arranged for reading
each weight and each cached column once, as it lies. Weights are those of the model; what is
different is their layout (`sarm_jax.sampling.fused_layers`) and that tokens stand in columns,
`[D, B]`.
"""

import os
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sarm_jax.models.llama import Llama, attention, cut_heads, mask_padding, rms_norm
from sarm_jax.models.packing import Packing
from sarm_jax.sampling.fused_layers import FusedLayer, product

# A GPU's products of few rows are cut along their inner axis (split-K), so that all of its
# multiprocessors have something to do, and the partial sums added up. From so many rows on, writing
# and reading these costs more than it gives.
NO_SPLIT_K_ROWS, NO_SPLIT_K = 64, ("xla_gpu_experimental_force_split_k", 1)


def compiler_options(platform: str, rows: int) -> tuple[tuple[str, Any], ...]:
    """What a program that decodes `rows` rows on each device is best compiled with.

    (name, value) of each option, for the `compiler_options` of a `jax.jit` that is not within
    another.
    """
    name, _ = NO_SPLIT_K
    if platform != "gpu" or rows < NO_SPLIT_K_ROWS or name in os.environ.get("XLA_FLAGS", ""):
        return ()
    return (NO_SPLIT_K,) if _is_known(NO_SPLIT_K) else ()


@cache
def _is_known(option: tuple[str, Any]) -> bool:
    """Whether this XLA has the option; experimental ones come and go."""
    try:
        jax.jit(lambda: 0, compiler_options=dict([option])).lower().compile()
    except Exception as error:  # its type is jaxlib's
        if "No such compile option" not in str(error):
            raise
        return False
    return True


@struct.dataclass
class KVCache:
    """Keys and values of each layer, `[B, K, head_dim, S]`, filled column by column.

    With the columns last, both products of attention read the cache as it lies. `mask_bs` marks
    the columns that hold real tokens, `column` is the next one to write and `position_b` the next
    position of each row.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    mask_bs: jax.Array
    column: jax.Array
    position_b: jax.Array


def prefill(
    policy: Llama,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    cache_size: int,
    packing: Packing | None = None,
) -> tuple[jax.Array, KVCache]:
    """Runs the prompt: (`Llama.hidden` of it, a cache of `cache_size` ≥ T columns holding it)."""
    x_btd, (k, v) = policy.forward(tokens_bt, mask_bt, packing=packing, keep=lambda x, kv: kv)
    extra = cache_size - tokens_bt.shape[1]

    def by_layer(y):
        widths = ((0, 0), (0, 0), (0, 0), (0, extra))
        numbers = range(policy.config.num_hidden_layers)
        return tuple(jnp.pad(jnp.moveaxis(y[layer], 1, -1), widths) for layer in numbers)

    return x_btd, KVCache(
        k=by_layer(k),
        v=by_layer(v),
        mask_bs=jnp.pad(mask_bt.astype(bool), ((0, 0), (0, extra))),
        column=jnp.int32(tokens_bt.shape[1]),
        position_b=mask_bt.astype(jnp.int32).sum(axis=1),
    )


def decode(
    policy: Llama, token_b: jax.Array, cache: KVCache, layers: tuple[FusedLayer, ...]
) -> tuple[jax.Array, KVCache]:
    """Feeds one token per row: (its `hidden` `[B, 1, D]`, the cache with one column more).

    `layers` are those of `fuse_layers(policy)`.
    """
    mask_bs = cache.mask_bs.at[:, cache.column].set(True)
    rope = policy.rope(cache.position_b[:, None])
    eps, head_dim = policy.config.rms_norm_eps, policy.config.head_dim
    x_b1d = policy.embed_tokens[...][token_b[:, None]]
    keys, values = [], []
    for layer, k_bkhs, v_bkhs in zip(layers, cache.k, cache.v, strict=True):
        projected = _linear(layer.qkv, rms_norm(x_b1d, layer.attention_norm, eps))
        q, k, v = cut_heads(projected, head_dim, rope)
        k_bkhs, v_bkhs = _write(k_bkhs, k, cache.column), _write(v_bkhs, v, cache.column)
        cached = jnp.moveaxis(k_bkhs, -1, 1), jnp.moveaxis(v_bkhs, -1, 1)
        out_b1d = attention(q, *cached, mask_bs[:, None], "xla").reshape(*q.shape[:2], -1)
        x_b1d = x_b1d + _linear(layer.o, out_b1d)[0]
        x_b1d = x_b1d + _mlp(layer, rms_norm(x_b1d, layer.mlp_norm, eps))
        keys.append(k_bkhs)
        values.append(v_bkhs)
    cache = KVCache(tuple(keys), tuple(values), mask_bs, cache.column + 1, cache.position_b + 1)
    return (policy.norm(x_b1d) if policy.final_norm else x_b1d), cache


def next_logits(policy: Llama, x_b1d: jax.Array) -> jax.Array:
    """`Llama.logits` of one token per row, `[B, V]`, with the vocabulary read as it lies."""
    logits_vb = product(policy.vocabulary, _to_columns(x_b1d), jnp.float32)
    return mask_padding(logits_vb.T, policy.config.vocab_size)


def _write(cache_bkhs, y_b1kh, column):
    """The cache with the token's keys or values in that column."""
    return jax.lax.dynamic_update_slice(cache_bkhs, jnp.moveaxis(y_b1kh, 1, -1), (0, 0, 0, column))


def _mlp(layer, x_b1d):
    gate_fb, up_fb = layer.gate_up(_to_columns(x_b1d))
    return _from_columns(layer.down(jax.nn.silu(gate_fb) * up_fb)[0])


def _linear(linear, x_b1d):
    return [_from_columns(y_db) for y_db in linear(_to_columns(x_b1d))]


def _to_columns(x_b1d):
    """`[B, 1, D]` → `[D, B]`."""
    return x_b1d[:, 0].T


def _from_columns(x_db):
    """`[D, B]` → `[B, 1, D]`."""
    return x_db.T[:, None]
