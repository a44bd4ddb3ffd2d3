"""Make models of any size with random weights, directly on their devices."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sarm_jax.parallel.sharding import Placement


def random_weights(model: Any, placed: Placement) -> Any:
    """Fills an abstract model with normal random weights, ones for norms and zeros for biases."""
    graphdef, state = nnx.split(model)
    flat = []
    for number, (path, variable) in enumerate(nnx.to_flat_state(state)):
        name = ".".join(map(str, path))
        target = placed.abstract_parameter(name, variable.shape, variable.dtype)
        flat.append((path, variable.replace(_make(name, number, target))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _make(name: str, number: int, target: jax.ShapeDtypeStruct) -> jax.Array:
    """Makes one parameter; `number` is the seed."""

    def make(key: jax.Array) -> jax.Array:
        if name.endswith("scale"):
            return jnp.ones(target.shape, target.dtype)
        if name.endswith("bias"):
            return jnp.zeros(target.shape, target.dtype)
        return 0.02 * jax.random.normal(key, target.shape, target.dtype)

    return jax.jit(make, out_shardings=target.sharding)(jax.random.key(number))
