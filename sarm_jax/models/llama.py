"""The Llama decoder: pre-norm blocks of grouped-query attention with RoPE and a SwiGLU MLP.

    x ← x + W_o · attention(rope(W_q n), rope(W_k n), W_v n),   n = RMSNorm(x)
    x ← x + W_down (silu(W_gate n) ⊙ W_up n),                   n = RMSNorm(x)

Sources: Touvron et al. 2302.13971, Dubey et al. 2407.21783; attribute names follow Hugging Face.

Layers are stacked `[L, …]` and run under one `jax.lax.scan`, so compile time does not grow with
depth. Positions come from the mask (the number of real tokens before), so neither the side nor
the amount of padding matters. Kernels are stored `[in, out]`, the transpose of Hugging Face's.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from sarm_jax.models.lora import FOLDED, LoRA
from sarm_jax.models.packing import Packing
from sarm_jax.models.rope import Llama3Scaling, apply_rope, inverse_frequencies, rope_tables
from sarm_jax.parallel.sharding import ONE_DEVICE, Placement

# The least queries in a block, and the most blocks; see `attention`. A GPU takes longer to start
# the kernels of a small block than to compute what it saves.
QUERY_BLOCK, QUERY_BLOCKS = {"cpu": 32, "gpu": 512}, 8

REMAT = {
    # Everything: no recomputation.
    "none": jax.checkpoint_policies.everything_saveable,
    # Matrix products; what is cheap is recomputed. Also the fastest where memory is slow.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names(FOLDED),
    ),
    # Only the layer's input: the least memory, about a third more computation.
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture; field names and meanings are those of a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 8192


class Linear(nnx.Module):
    """x W, plus the adapter where one is attached."""

    def __init__(self, d_in: int, d_out: int, *, dtype: Any, rngs: nnx.Rngs):
        init = jax.nn.initializers.normal(0.02)
        self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out), dtype))
        self.lora: LoRA | None = nnx.data(None)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.lora is None:
            return x @ self.kernel[...]
        return self.lora(x, self.kernel[...])


class RMSNorm(nnx.Module):
    """`rms_norm` with its scale."""

    def __init__(self, size: int, eps: float, *, dtype: Any):
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        return rms_norm(x_btd, self.scale[...], self.eps)


def rms_norm(x_btd: jax.Array, scale_d: jax.Array, eps: float) -> jax.Array:
    """x / √(mean(x²) + ε) · scale, the mean in float32."""
    x32 = x_btd.astype(jnp.float32)
    inv_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inv_rms).astype(x_btd.dtype) * scale_d


def causal_mask(mask_bt: jax.Array) -> jax.Array:
    """Which columns S each token T attends to, `[B, T, S]`: the real ones up to itself, and itself.

    Padding so has a column too, its own: a fused kernel may answer an empty row with NaN, and its
    gradient then makes NaN of the rest.
    """
    length = mask_bt.shape[1]
    itself_ts = jnp.eye(length, dtype=bool)
    return jnp.tril(jnp.ones((length, length), bool)) & mask_bt[:, None, :] | itself_ts


def attention(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    mask_bts: jax.Array,
    implementation: str,
    placement: Placement = ONE_DEVICE,
    query_block: int = QUERY_BLOCK["cpu"],
) -> jax.Array:
    """softmax(q kᵀ / √H) v over the columns that `mask_bts` allows, `[B, T, N, H]`.

    A mask of more than one row must be causal, and let every row look at something, see
    `causal_mask`. XLA would compute all of `[T, S]`, so it is given the queries in blocks of
    `query_block` or more, each with the columns up to its own end: half the work, and on a CPU
    about half the time. There are few blocks, since each is compiled. cuDNN's never writes `[T, S]`
    to memory.
    """
    q_btnh, k_bskh, v_bskh = placement.keep_heads(q_btnh, k_bskh, v_bskh)
    attend = partial(jax.nn.dot_product_attention, implementation=implementation)
    length = q_btnh.shape[1]
    if implementation == "cudnn" and length % 2:  # it has no gradient of odd ones
        q_btnh, k_bskh, v_bskh = (
            jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q_btnh, k_bskh, v_bskh)
        )
        mask_bts = jnp.pad(mask_bts, ((0, 0), (0, 1), (0, 0)), mode="edge")  # no row is empty
        mask_bts = jnp.pad(mask_bts, ((0, 0), (0, 0), (0, 1)))
        return attend(q_btnh, k_bskh, v_bskh, mask=mask_bts[:, None])[:, :length]
    block = max(query_block, -(-length // QUERY_BLOCKS))
    if implementation == "cudnn" or length <= block:
        return attend(q_btnh, k_bskh, v_bskh, mask=mask_bts[:, None])
    chex.assert_axis_dimension(mask_bts, 2, length)
    blocks = []
    for start in range(0, length, block):
        end = min(start + block, length)
        mask_b1ts = mask_bts[:, None, start:end, :end]
        blocks.append(
            attend(q_btnh[:, start:end], k_bskh[:, :end], v_bskh[:, :end], mask=mask_b1ts)
        )
    return jnp.concatenate(blocks, axis=1)


class Attention(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
        d, h = config.hidden_size, config.head_dim
        q_width, kv_width = config.num_attention_heads * h, config.num_key_value_heads * h
        self.q_proj = Linear(d, q_width, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(d, kv_width, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(d, kv_width, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(q_width, d, dtype=dtype, rngs=rngs)
        self.head_dim = h

    def project(self, x_btd, rope):
        """Rotated queries `[B, T, N, H]` and keys, and values `[B, T, K, H]`."""
        projected = [f(x_btd) for f in (self.q_proj, self.k_proj, self.v_proj)]
        return cut_heads(projected, self.head_dim, rope)

    def attend(self, q_btnh, k_bskh, v_bskh, mask_bts, attention, packing=None):
        """What `attention` makes of them, projected back to D."""
        out_btnh = attention(q_btnh, k_bskh, v_bskh, mask_bts)
        if packing is not None:
            out_btnh = packing.pack(out_btnh)
        return self.o_proj(out_btnh.reshape(*out_btnh.shape[:-2], -1))


def cut_heads(
    projected: Sequence[jax.Array], head_dim: int, rope: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the products for queries, keys and values give, in heads; the first two rotated."""
    q_btnh, k_btkh, v_btkh = (y.reshape(*y.shape[:-1], -1, head_dim) for y in projected)
    return apply_rope(q_btnh, rope), apply_rope(k_btkh, rope), v_btkh


class MLP(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, f, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(d, f, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(f, d, dtype=dtype, rngs=rngs)

    def __call__(self, x_btd):
        return self.down_proj(jax.nn.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd))


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype
        )
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x_btd, rope, mask_bts, attention, packing=None):
        """One full-sequence layer: (x, (keys, values)); with a packing, x is `[G · N, D]`."""
        q, k, v = self.attn.project(self.input_layernorm(x_btd), rope)
        if packing is not None:
            q, k, v = map(packing.unpack, (q, k, v))
        x_btd = x_btd + self.attn.attend(q, k, v, mask_bts, attention, packing)
        return x_btd + self.mlp(self.post_attention_layernorm(x_btd)), (k, v)


class Llama(nnx.Module):
    """A decoder. `final_norm=False` gives the truncated trunk of a SARM: `hidden` then returns
    the residual stream itself (`norm` is kept, unused, because its checkpoints carry it).
    `stop_ids` are the tokens that end a response, which the tokenizer knows best. `remat` says
    what a layer keeps for its backward pass, see `REMAT`; `backend` the platform that programs are
    made for, None: JAX's default; `placement` where the weights are."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        final_norm: bool = True,
        head: bool = True,
        remat: str = "dots",
        stop_ids: tuple[int, ...] = (),
    ):
        self.config, self.final_norm, self.remat = config, final_norm, remat
        self.stop_ids = stop_ids
        self.backend: str | None = None
        self.placement = ONE_DEVICE
        init = jax.nn.initializers.normal(0.02)
        shape = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nnx.Param(init(rngs.params(), shape, dtype))
        self.layers = nnx.vmap(lambda r: Block(config, dtype=dtype, rngs=r))(
            rngs.fork(split=config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.lm_head: nnx.Param | None = nnx.data(None)
        if head and not config.tie_word_embeddings:
            self.lm_head = nnx.Param(init(rngs.params(), shape, dtype))

    def __call__(self, tokens_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        """Logits, float32 `[B, T, V]`; meaningless where `mask_bt` is 0."""
        return self.logits(self.hidden(tokens_bt, mask_bt))[..., : self.config.vocab_size]

    def hidden(
        self,
        tokens_bt: jax.Array,
        mask_bt: jax.Array,
        packing: Packing | None = None,
    ) -> jax.Array:
        """The last layer's output `[B, T, D]`, after the final norm where the model has one.

        With a packing of `mask_bt` no padding is computed, and what stands there is 0.
        """
        return self.forward(tokens_bt, mask_bt, packing)[0]

    def layer_states(self, tokens_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        """The residual stream after each layer, `[L, B, T, D]`, before any final norm."""
        return self.forward(tokens_bt, mask_bt, keep=lambda x, kv: x)[1]

    def logits(self, x_btd: jax.Array) -> jax.Array:
        """Vocabulary projection in float32, `[B, T, V]`, with columns for the padding on a mesh."""
        return mask_padding(to_logits(x_btd, self.vocabulary), self.config.vocab_size)

    @property
    def vocabulary(self) -> jax.Array:
        """The output embedding `[V, D]`: the head's own, or the tied input embedding.

        On a mesh there may be rows beyond `config.vocab_size`, see `mask_padding`.
        """
        return (self.embed_tokens if self.lm_head is None else self.lm_head)[...]

    @property
    def platform(self) -> str:
        """What programs are made for: `cpu`, `gpu` …"""
        return self.backend or jax.default_backend()

    def rope(self, positions_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The rotation of queries and keys at these positions, see `rope_tables`."""
        config = self.config
        inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        return rope_tables(positions_bt, inv_freq)

    def forward(
        self,
        tokens_bt: jax.Array,
        mask_bt: jax.Array,
        packing: Packing | None = None,
        keep: Callable[[jax.Array, tuple[jax.Array, jax.Array]], Any] = lambda x, kv: None,
    ) -> tuple[jax.Array, Any]:
        """(`hidden`, `keep(output, (keys, values))` of every layer, stacked).

        With a packing, a layer's output is `[G · N, D]`; keys and values are `[B, T, …]` either
        way.
        """
        mask_bt = mask_bt.astype(bool)
        mask_bts = causal_mask(mask_bt)
        positions_bt = jnp.maximum(jnp.cumsum(mask_bt, axis=1) - 1, 0)
        if packing is not None:
            tokens_bt, positions_bt = packing.pack(tokens_bt), packing.pack(positions_bt)
        rope = self.rope(positions_bt)
        x_btd = self.embed_tokens[...][tokens_bt]
        implementation = attention_implementation(self.platform, x_btd.dtype, self.config.head_dim)
        attend = partial(
            attention,
            implementation=implementation,
            placement=self.placement,
            query_block=QUERY_BLOCK.get(self.platform, QUERY_BLOCK["gpu"]),
        )
        graphdef, state = nnx.split(self.layers)

        def layer(x, layer_state):
            x, kv = nnx.merge(graphdef, layer_state)(x, rope, mask_bts, attend, packing)
            return x, keep(x, kv)

        body = jax.checkpoint(layer, policy=REMAT[self.remat])
        x_btd, kept = jax.lax.scan(body, x_btd, state)
        x_btd = self.norm(x_btd) if self.final_norm else x_btd
        return (x_btd if packing is None else packing.unpack(x_btd)), kept


@jax.custom_vjp
def to_logits(x_btd: jax.Array, vocabulary_vd: jax.Array) -> jax.Array:
    """x Eᵀ, float32 `[B, T, V]`, with gradients computed in the dtype of x and E.

    JAX's own are products with the float32 gradient of the logits, for which a half-precision E is
    cast to float32: on an H200 177 TFLOP/s in a trace, where the bfloat16 products of the layers
    do four times as much.
    """
    return jnp.einsum("btd,vd->btv", x_btd, vocabulary_vd, preferred_element_type=jnp.float32)


def _to_logits_forward(x_btd, vocabulary_vd):
    return to_logits(x_btd, vocabulary_vd), (x_btd, vocabulary_vd)


def _to_logits_backward(residuals, d_btv):
    x_btd, vocabulary_vd = residuals
    d_btv = d_btv.astype(x_btd.dtype)
    # The vocabulary's own gradient costs nothing where nobody asks for it.
    return (
        jnp.einsum("btv,vd->btd", d_btv, vocabulary_vd),
        jnp.einsum("btv,btd->vd", d_btv, x_btd),
    )


to_logits.defvjp(_to_logits_forward, _to_logits_backward)


def mask_padding(logits_btv: jax.Array, vocab_size: int) -> jax.Array:
    """Makes the columns from `vocab_size` on impossible: rows that a mesh has added, no tokens.

    Their probability is 0, and finite logits keep it free of NaN in p · log p.
    """
    columns = logits_btv.shape[-1]
    if columns == vocab_size:
        return logits_btv
    return jnp.where(jnp.arange(columns) < vocab_size, logits_btv, -1e30)


def attention_implementation(backend: str, dtype: Any, head_dim: int) -> str:
    """cuDNN's fused attention where it exists (GPU, half precision, usual heads), else XLA's."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    fused = backend == "gpu" and half and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if fused else "xla"
