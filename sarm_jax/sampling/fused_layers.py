"""Fuses the weights of a layer into few large matrices for decoding.

Decoding one token is bound by weight bandwidth and by the number of kernels. Linear layers with the
same input therefore form one product, with the A of their adapters as further rows below them:

    [W_q; W_k; W_v; A_q; A_k; A_v] x = [y_q; y_k; y_v; a],    y += (α / r) diag(B_q, B_k, B_v) a

On a mesh, each part of the rows of W has all of A below it. So A needs no communication beyond that
of W, and no row moves to another device.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec as P

from sarm_jax.models.llama import Linear, Llama


@struct.dataclass
class FusedLinear:
    """Linear layers with the same input: maps `[in, B]` to `[out, B]` of each layer.

    (Suffixes here: p part, o output, i input, r rank.)

    Attributes:
        kernel_poi: `[parts, out / parts + r, in]`, all rows of W and then those of A; `out` is the
            sum of the widths and `r` the sum of the ranks.
        b_por: the block-diagonal B, `[parts, out / parts, r]`; None without adapters.
        bias_po: the biases of the layers, `[parts, out / parts]`; None without biases.
        scale: α / r of the adapters.
        widths: the output size of each layer.
        axes: the axes of the mesh that split the rows and the columns.
        a_ri: the A of the adapters, `[r, in]`, if they are not among the rows of `kernel_poi`.
    """

    kernel_poi: jax.Array
    b_por: jax.Array | None
    bias_po: jax.Array | None
    scale: float = struct.field(pytree_node=False)
    widths: tuple[int, ...] = struct.field(pytree_node=False)
    axes: tuple[str, str] = struct.field(pytree_node=False)
    a_ri: jax.Array | None = None

    def __call__(self, x_ib: jax.Array) -> list[jax.Array]:
        """Applies every layer to tokens, which stand in columns."""
        parts, batch = len(self.kernel_poi), x_ib.shape[1]
        y_pob = product(self.kernel_poi, x_ib)
        cuts = np.cumsum(self.widths) // parts
        *y, a_prb = jnp.split(y_pob, cuts, axis=1)
        if self.a_ri is not None:
            a_prb = product(self.a_ri, x_ib)[None]
        if self.b_por is not None:
            adapted_pob = self.b_por @ a_prb * self.scale
            adapters = jnp.split(adapted_pob, cuts[:-1], axis=1)
            y = [base + adapter for base, adapter in zip(y, adapters, strict=True)]
        if self.bias_po is not None:
            biases = jnp.split(self.bias_po[..., None], cuts[:-1], axis=1)
            y = [base + bias for base, bias in zip(y, biases, strict=True)]
        return [output.reshape(-1, batch) for output in y]

    def placed(self, put: Callable[[Any, P], Any]) -> "FusedLinear":
        """Returns a copy whose arrays are `put(array, spec)`; the spec describes their split."""
        rows, columns = self.axes
        b_por = None if self.b_por is None else put(self.b_por, P(rows))
        bias_po = None if self.bias_po is None else put(self.bias_po, P(rows))
        kernel_poi = put(self.kernel_poi, P(rows, None, columns))
        a_ri = None if self.a_ri is None else put(self.a_ri, P(None, columns))
        return dataclasses.replace(
            self, kernel_poi=kernel_poi, b_por=b_por, bias_po=bias_po, a_ri=a_ri
        )


@struct.dataclass
class FusedLayer:
    """One decoder layer: the scales of its norms and its seven linear layers, fused to four.

    `q_norm` and `k_norm` are None if heads are not normalised.
    """

    attention_norm: jax.Array
    qkv: FusedLinear
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    o: FusedLinear
    mlp_norm: jax.Array
    gate_up: FusedLinear
    down: FusedLinear


def product(kernel: jax.Array, x: jax.Array, dtype: Any = None) -> jax.Array:
    """Computes kernel · x in `dtype`, with the tokens of x in columns.

    A CPU's matrix product first copies its right operand. With the tokens on the right, which are
    smaller than the kernel, it takes half the time. Without the barriers XLA would swap and
    transpose the operands.
    """
    x = jax.lax.optimization_barrier(x)
    return jax.lax.optimization_barrier(jnp.matmul(kernel, x, preferred_element_type=dtype))


def fuse_layers(policy: Llama, separate_adapters: bool = False) -> tuple[FusedLayer, ...]:
    """Copies and fuses each layer's weights, for many calls of `sarm_jax.sampling.decoding.decode`.

    XLA copies a layer when it takes it out of the stack, with up to three times the traffic of
    reading it; a loop would copy all weights for every token. Adapters are cast to the weights'
    dtype. With `separate_adapters` no array holds both weights and adapters, so that a program of
    several adapters (`jax.vmap`) has and reads the weights once.
    """
    attn, mlp, placement = policy.layers.attn, policy.layers.mlp, policy.placement

    def fuse(layer: int) -> FusedLayer:
        def linear(*linears: Linear, axes: tuple[str, str]) -> FusedLinear:
            fused = _fuse(
                linears, layer=layer, axes=axes, parts=placement.size(axes[0]),
                separate_adapters=separate_adapters,
            )  # fmt: skip
            return fused.placed(placement.constrain)

        return FusedLayer(
            attention_norm=policy.layers.input_layernorm.scale[layer],
            qkv=linear(attn.q_proj, attn.k_proj, attn.v_proj, axes=("tensor", "fsdp")),
            q_norm=None if attn.q_norm is None else attn.q_norm.scale[layer],
            k_norm=None if attn.k_norm is None else attn.k_norm.scale[layer],
            o=linear(attn.o_proj, axes=("fsdp", "tensor")),
            mlp_norm=policy.layers.post_attention_layernorm.scale[layer],
            gate_up=linear(mlp.gate_proj, mlp.up_proj, axes=("tensor", "fsdp")),
            down=linear(mlp.down_proj, axes=("fsdp", "tensor")),
        )

    return tuple(fuse(layer) for layer in range(policy.config.num_hidden_layers))


def _fuse(
    linears: Sequence[Linear],
    layer: int,
    axes: tuple[str, str],
    *,
    parts: int,
    separate_adapters: bool,
) -> FusedLinear:
    """Fuses one layer of stacked linear layers."""
    dtype = linears[0].kernel.dtype
    kernels = [linear.kernel[layer].T for linear in linears]
    widths = tuple(len(kernel) for kernel in kernels)
    rows = [kernel.reshape(parts, -1, kernel.shape[1]) for kernel in kernels]
    loras = [linear.lora for linear in linears]
    adapted = [lora for lora in loras if lora is not None]
    a_rows = []
    for lora in adapted:
        a_ri = lora.a[layer].T.astype(dtype)
        a_rows.append(a_ri)
        if not separate_adapters:
            rows.append(jnp.broadcast_to(a_ri, (parts, *a_ri.shape)))
    (scale,) = {lora.scale for lora in adapted} or {1.0}  # all adapters have the same configuration
    return FusedLinear(
        kernel_poi=jnp.concatenate(rows, axis=1),
        b_por=_block_diagonal(loras, layer=layer, widths=widths, parts=parts).astype(dtype)
        if adapted
        else None,
        bias_po=_biases(linears, layer=layer, parts=parts),
        scale=scale,
        widths=widths,
        axes=axes,
        a_ri=jnp.concatenate(a_rows) if separate_adapters and adapted else None,
    )


def _biases(linears: Sequence[Linear], layer: int, parts: int) -> jax.Array | None:
    """Returns `[parts, out / parts]` with the biases of the layers; None if they have none."""
    biases = [linear.bias[layer] for linear in linears if linear.bias is not None]
    if not biases:
        return None
    return jnp.concatenate([bias.reshape(parts, -1) for bias in biases], axis=1)


def _block_diagonal(loras, layer, widths, parts):
    """Builds `[parts, out / parts, r]` with the B of each adapter in separate columns."""
    ranks = [0 if lora is None else lora.b.shape[1] for lora in loras]
    blocks, rank_before = [], 0
    for lora, width, rank in zip(loras, widths, ranks, strict=True):
        block = jnp.zeros((width, 0)) if lora is None else lora.b[layer].T
        block = jnp.pad(block, ((0, 0), (rank_before, sum(ranks) - rank_before - rank)))
        blocks.append(block.reshape(parts, width // parts, -1))
        rank_before += rank
    return jnp.concatenate(blocks, axis=1)
