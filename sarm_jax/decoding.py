"""One token at a time, with a KV cache: `Llama` once more, laid out for products of few tokens.

With few tokens a product takes as long as reading its kernel, so everything is arranged for reading
each weight and each cached column once, as it lies. Weights are those of the model; what is
different is their layout (`unstacked`) and that tokens stand in columns, `[D, B]`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx, struct

from sarm_jax.llama import MLP, Attention, Block, Linear, Llama, attention, mask_padding
from sarm_jax.packing import Packing


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


def unstacked(policy: Llama) -> tuple[nnx.State, ...]:
    """The weights of each layer in arrays of their own, for many calls of `decode`.

    A layer that is read out of its stack is copied first, up to three times the traffic of
    reading it, so `decode` would copy all weights at every token. Matrices are `[out, in]`, as
    products with tokens in columns read them, and adapters have the dtype they are used in.
    """
    stack, numbers = nnx.state(policy.layers), range(policy.config.num_hidden_layers)
    dtype = policy.embed_tokens.dtype

    def take(layer, x):
        return x[layer].T.astype(dtype)  # of a vector, itself

    return tuple(jax.tree.map(partial(take, layer), stack) for layer in numbers)


def decode(
    policy: Llama, token_b: jax.Array, cache: KVCache, layers: tuple[nnx.State, ...]
) -> tuple[jax.Array, KVCache]:
    """Feeds one token per row: (its `hidden` `[B, 1, D]`, the cache with one column more).

    `layers` are `unstacked`'s.
    """
    mask_bs = cache.mask_bs.at[:, cache.column].set(True)
    rope = policy.rope(cache.position_b[:, None])
    graphdef = nnx.graphdef(policy.layers)
    x_b1d = policy.embed_tokens[...][token_b[:, None]]
    keys_and_values = []
    for layer, k_bkhs, v_bkhs in zip(layers, cache.k, cache.v, strict=True):
        block = nnx.merge(graphdef, layer)
        x_b1d, *kv = _block(block, x_b1d, rope, mask_bs[:, None], cache.column, k_bkhs, v_bkhs)
        keys_and_values.append(kv)
    k, v = zip(*keys_and_values, strict=True)
    cache = KVCache(k, v, mask_bs, cache.column + 1, cache.position_b + 1)
    return (policy.norm(x_b1d) if policy.final_norm else x_b1d), cache


def next_logits(policy: Llama, x_b1d: jax.Array) -> jax.Array:
    """`Llama.logits` of one token per row, `[B, V]`, with the vocabulary read as it lies."""
    x_db = _to_columns(x_b1d)
    logits_vb = jnp.matmul(policy.vocabulary, x_db, preferred_element_type=jnp.float32)
    return mask_padding(_from_columns(logits_vb)[:, 0], policy.config.vocab_size)


def _block(block: Block, x_b1d, rope, mask_b1s, column, k_bkhs, v_bkhs):
    """One token through the layer; its keys and values go into the cache."""
    normed_b1d = block.input_layernorm(x_b1d)
    y_b1d, k, v = _attention(block.attn, normed_b1d, rope, mask_b1s, column, k_bkhs, v_bkhs)
    x_b1d = x_b1d + y_b1d
    return x_b1d + _mlp(block.mlp, block.post_attention_layernorm(x_b1d)), k, v


def _attention(attn: Attention, x_b1d, rope, mask_b1s, column, k_bkhs, v_bkhs):
    x_db = _to_columns(x_b1d)
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    q, k, v = attn.heads([_from_columns(_linear(f, x_db)) for f in projections], rope)
    at = (0, 0, 0, column)
    k_bkhs = jax.lax.dynamic_update_slice(k_bkhs, jnp.moveaxis(k, 1, -1), at)
    v_bkhs = jax.lax.dynamic_update_slice(v_bkhs, jnp.moveaxis(v, 1, -1), at)
    cached = jnp.moveaxis(k_bkhs, -1, 1), jnp.moveaxis(v_bkhs, -1, 1)
    out_b1d = attention(q, *cached, mask_b1s, "xla").reshape(*x_b1d.shape[:-1], -1)
    return _from_columns(_linear(attn.o_proj, _to_columns(out_b1d))), k_bkhs, v_bkhs


def _mlp(mlp: MLP, x_b1d):
    x_db = _to_columns(x_b1d)
    gated_fb = jax.nn.silu(_linear(mlp.gate_proj, x_db)) * _linear(mlp.up_proj, x_db)
    return _from_columns(_linear(mlp.down_proj, gated_fb))


def _linear(linear: Linear, x_db):
    """`[in, B]` → `[out, B]`; the kernel is `[out, in]`.

    A CPU's matrix product copies the operand on the right before it starts, so that is the tokens
    here: half the time.
    """
    y_ob = linear.kernel[...] @ x_db
    return y_ob if linear.lora is None else y_ob + linear.lora.columns(x_db)


def _to_columns(x_b1d):
    """`[B, 1, D]` → `[D, B]`."""
    # Behind the barrier, or XLA undoes the transposition and swaps the operands of the product.
    return jax.lax.optimization_barrier(x_b1d[:, 0].T)


def _from_columns(x_db):
    """`[D, B]` → `[B, 1, D]`."""
    return jax.lax.optimization_barrier(x_db).T[:, None]
