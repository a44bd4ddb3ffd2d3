"""Models of any size with random weights, made where they are to be."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sarm_jax.sharding import Placement


def random_weights(model: Any, placed: Placement) -> Any:
    """The abstract model with weights made on the devices: normal ones, and ones for the norms."""
    graphdef, state = nnx.split(model)
    flat = []
    for number, (path, variable) in enumerate(nnx.to_flat_state(state)):
        name = ".".join(map(str, path))
        target = placed.abstract_parameter(name, variable.shape, variable.dtype)
        array = _random(number, target, 0.0 if name.endswith("bias") else 0.02)
        if name.endswith("scale"):
            array = jnp.ones_like(array)
        flat.append((path, variable.replace(array)))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _random(number: int, target: jax.ShapeDtypeStruct, deviation: float) -> jax.Array:
    def make(key: jax.Array) -> jax.Array:
        return deviation * jax.random.normal(key, target.shape, target.dtype)

    return jax.jit(make, out_shardings=target.sharding)(jax.random.key(number))
