"""Low-rank adapters: y = x W + (α / r) · x A B   (Hu et al. 2106.09685, as in PEFT, no dropout).

A is drawn Kaiming-uniform and B is zero, so a fresh adapter changes nothing. `LoRAParam` is a
separate `Variable` type: `nnx.split(model, LoRAParam, ...)` returns the trainable state, and the
remaining state, merged into the graph definition without adapters, is the reference policy. Both
share one copy of the base weights.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sarm_jax.io.errors import InputError

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The name of the output of a folded product in rematerialisation policies.
FOLDED = "folded_matmul"


class LoRAParam(nnx.Param):
    """A trainable adapter matrix, stacked over layers, in float32 for any dtype of the base.

    A subclass of `nnx.Param`, so filters must name `LoRAParam` before `nnx.Param`.
    """


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """The shape of an adapter. `dropout` is only recorded for PEFT; no dropout is applied here."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"lora.rank={self.rank}: must be at least 1")
        if not 0 < self.alpha < float("inf"):
            raise InputError(f"lora.alpha={self.alpha}: must be positive and finite")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout={self.dropout}: must lie in [0, 1)")
        unknown = sorted(set(self.target_modules) - set(TARGET_MODULES))
        if unknown or not self.target_modules:
            raise InputError(
                f"lora.target_modules={','.join(self.target_modules)}: "
                f"choose from {','.join(TARGET_MODULES)}"
            )


class LoRA(nnx.Module):
    """The adapter of one (stacked) linear layer: `a [L, in, r]`, `b [L, r, out]`."""

    def __init__(self, kernel_shape: tuple[int, int, int], config: LoRAConfig, rngs: nnx.Rngs):
        layers, d_in, d_out = kernel_shape
        bound = d_in**-0.5  # Kaiming-uniform with a = √5, the initialiser of PEFT
        self.a = LoRAParam(
            jax.random.uniform(
                rngs.params(), (layers, d_in, config.rank), minval=-bound, maxval=bound
            )
        )
        self.b = LoRAParam(jnp.zeros((layers, config.rank, d_out)))
        self.scale = config.alpha / config.rank

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Computes x W + (α / r) · x A B for one layer's slice of the stack, in the dtype of x."""
        a, b = self.a[...], self.b[...]
        if kernel.dtype == jnp.float32 and _folding_is_cheaper(x, kernel):
            return checkpoint_name(folded_matmul(x, kernel, a, b, self.scale), FOLDED)
        y = x @ kernel
        # Without the barrier XLA merges the two products and copies W beside A at every call.
        x = jax.lax.optimization_barrier(x)
        return y + (x @ a.astype(x.dtype)) @ b.astype(x.dtype) * self.scale


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def folded_matmul(
    x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> jax.Array:
    """Computes x (W + scale · A B); its gradients form no `[in, out]` product of activations.

    There is one wide product in each direction instead of one wide and two thin ones. The kernel
    must be float32, since half precision would round the adapter away.
    """
    return x @ merge_lora(kernel, a, b, scale)


def _folded_forward(x, kernel, a, b, scale):
    return folded_matmul(x, kernel, a, b, scale), (x, kernel, a, b)


def _folded_backward(scale, residuals, dy):
    x, kernel, a, b = residuals
    dx = dy @ merge_lora(kernel, a, b, scale).T
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    # XLA removes the gradient of the kernel if it is not used.
    return dx, x.T @ dy, scale * x.T @ (dy @ b.T), scale * (x @ a).T @ dy


folded_matmul.defvjp(_folded_forward, _folded_backward)


def _folding_is_cheaper(x: jax.Array, kernel: jax.Array) -> bool:
    """Returns True if A B takes fewer multiplications than x A and (x A) B, for any rank."""
    d_in, d_out = kernel.shape
    return x.size // d_in * (d_in + d_out) > d_in * d_out


def add_lora(model: Any, config: LoRAConfig, rngs: nnx.Rngs) -> None:
    """Puts a fresh adapter on every chosen linear layer of a `Llama`, in place."""
    for name in config.target_modules:
        parent = model.layers.attn if hasattr(model.layers.attn, name) else model.layers.mlp
        linear = getattr(parent, name)
        linear.lora = LoRA(linear.kernel.shape, config, rngs)


def fold_lora(model: Any) -> None:
    """Adds every adapter of a `Llama` to its kernel and removes it, in place."""
    for parent in (model.layers.attn, model.layers.mlp):
        for name in TARGET_MODULES:
            linear = getattr(parent, name, None)
            if linear is not None and linear.lora is not None:
                lora = linear.lora
                kernel = merge_lora(linear.kernel[...], lora.a[...], lora.b[...], lora.scale)
                linear.kernel, linear.lora = nnx.Param(kernel), None


def merge_lora(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Computes W + scale · A B in float32, returned in the kernel's dtype; any leading axes."""
    delta = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32)) * scale
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
