"""Decodes one token at a time with a KV cache: the layers of `Llama` in another layout.

With few tokens, a matrix product takes as long as reading its kernel. Each weight and each cached
column is therefore read once per step, in the order in which it is stored. The weights are those of
the model; only their layout differs (`sarm_jax.sampling.fused_layers`), and tokens stand in
columns, `[D, B]`.
"""

import os
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sarm_jax.models.llama import Llama, attention, cut_heads, mask_padding, rms_norm
from sarm_jax.models.packing import Packing
from sarm_jax.sampling.fused_layers import FusedLayer, product

# XLA splits a GPU's products of few rows along their inner axis (split-K), so that every
# multiprocessor has work, and adds the partial sums. With this many rows or more, writing and
# reading the partial sums costs more than it saves.
NO_SPLIT_K_ROWS, NO_SPLIT_K = 64, ("xla_gpu_experimental_force_split_k", 1)


def compiler_options(platform: str, rows: int) -> tuple[tuple[str, Any], ...]:
    """Returns the best compiler options for a program that decodes `rows` rows on each device.

    They are (name, value) pairs for the `compiler_options` of a `jax.jit` that is not inside
    another one.
    """
    name, _ = NO_SPLIT_K
    if platform != "gpu" or rows < NO_SPLIT_K_ROWS or name in os.environ.get("XLA_FLAGS", ""):
        return ()
    return (NO_SPLIT_K,) if _is_known(NO_SPLIT_K) else ()


@cache
def _is_known(option: tuple[str, Any]) -> bool:
    """Returns True if this XLA has the option; not every version has an experimental one."""
    try:
        jax.jit(lambda: 0, compiler_options=dict([option])).lower().compile()
    except Exception as error:  # jaxlib defines its type
        if "No such compile option" not in str(error):
            raise
        return False
    return True


@struct.dataclass
class KVCache:
    """Keys and values of each layer, `[B, K, head_dim, S]`, filled column by column.

    With the columns last, both products of attention read the cache in its storage order.

    Attributes:
        k: the keys of each layer.
        v: the values of each layer.
        mask_bs: True for columns that hold real tokens.
        column: the next column to write.
        position_b: the next position of each row.
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
    """Runs the prompt.

    Args:
        policy: the model.
        tokens_bt: the prompts.
        mask_bt: marks their real tokens.
        cache_size: the number of columns of the cache, at least T.
        packing: a packing of `mask_bt`; padding is then not computed.

    Returns:
        (`Llama.hidden` of the prompts, the cache that holds them).
    """
    x_btd, (k, v) = policy.forward(tokens_bt, mask_bt, packing=packing, keep=lambda x, kv: kv)
    extra = cache_size - tokens_bt.shape[1]

    def by_layer(y):
        widths = ((0, 0), (0, 0), (0, 0), (0, extra))
        layers = range(policy.config.num_hidden_layers)
        return tuple(jnp.pad(jnp.moveaxis(y[layer], 1, -1), widths) for layer in layers)

    return x_btd, KVCache(
        k=by_layer(k),
        v=by_layer(v),
        mask_bs=jnp.pad(mask_bt.astype(bool), ((0, 0), (0, extra))),
        column=jnp.int32(tokens_bt.shape[1]),
        position_b=mask_bt.astype(jnp.int32).sum(axis=1),
    )


def repeat_rows(cache: KVCache, copies: int) -> KVCache:
    """Returns a cache with `copies` neighbouring copies of every row."""

    def repeat(y):
        return y if y.ndim == 0 else jnp.repeat(y, copies, axis=0)

    return jax.tree.map(repeat, cache)


def decode(
    policy: Llama, token_b: jax.Array, cache: KVCache, layers: tuple[FusedLayer, ...]
) -> tuple[jax.Array, KVCache]:
    """Runs one token per row.

    Args:
        policy: the model.
        token_b: the token of each row.
        cache: the cache of the tokens before.
        layers: the result of `fuse_layers(policy)`.

    Returns:
        (`Llama.hidden` of the tokens `[B, 1, D]`, the cache with one more column).
    """
    mask_bs = cache.mask_bs.at[:, cache.column].set(True)
    rope = policy.rope(cache.position_b[:, None])
    eps, head_dim = policy.config.rms_norm_eps, policy.config.head_dim
    x_b1d = policy.embed_tokens[...][token_b[:, None]]
    keys, values = [], []
    for layer, k_bkhs, v_bkhs in zip(layers, cache.k, cache.v, strict=True):
        projected = _linear(layer.qkv, rms_norm(x_b1d, layer.attention_norm, eps))
        norms = [
            None if scale_h is None else partial(rms_norm, scale_d=scale_h, eps=eps)
            for scale_h in (layer.q_norm, layer.k_norm)
        ]
        q, k, v = cut_heads(projected, head_dim, rope, norms)
        k_bkhs, v_bkhs = _write(k_bkhs, k, cache.column), _write(v_bkhs, v, cache.column)
        out_b1nh = attention(
            q_btnh=q,
            k_bskh=jnp.moveaxis(k_bkhs, -1, 1),
            v_bskh=jnp.moveaxis(v_bkhs, -1, 1),
            mask_bts=mask_bs[:, None],
            implementation="xla",
        )
        out_b1d = out_b1nh.reshape(*q.shape[:2], -1)
        x_b1d = x_b1d + _linear(layer.o, out_b1d)[0]
        x_b1d = x_b1d + _mlp(layer, rms_norm(x_b1d, layer.mlp_norm, eps))
        keys.append(k_bkhs)
        values.append(v_bkhs)
    cache = KVCache(
        k=tuple(keys),
        v=tuple(values),
        mask_bs=mask_bs,
        column=cache.column + 1,
        position_b=cache.position_b + 1,
    )
    return (policy.norm(x_b1d) if policy.final_norm else x_b1d), cache


def next_logits(policy: Llama, x_b1d: jax.Array) -> jax.Array:
    """Computes `Llama.logits` of one token per row, `[B, V]`, without a transposed vocabulary."""
    logits_vb = product(policy.vocabulary, _to_columns(x_b1d), jnp.float32)
    return mask_padding(logits_vb.T, policy.config.vocab_size)


def _write(cache_bkhs, y_b1kh, column):
    """Writes the keys or values of a token into a column of the cache."""
    return jax.lax.dynamic_update_slice(cache_bkhs, jnp.moveaxis(y_b1kh, 1, -1), (0, 0, 0, column))


def _mlp(layer, x_b1d):
    gate_fb, up_fb = layer.gate_up(_to_columns(x_b1d))
    return _from_columns(layer.down(jax.nn.silu(gate_fb) * up_fb)[0])


def _linear(linear, x_b1d):
    return [_from_columns(y_db) for y_db in linear(_to_columns(x_b1d))]


def _to_columns(x_b1d):
    """Converts `[B, 1, D]` to `[D, B]`."""
    return x_b1d[:, 0].T


def _from_columns(x_db):
    """Converts `[D, B]` to `[B, 1, D]`."""
    return x_db.T[:, None]
