"""Leaving the padding out: the real tokens of `[B, T]` side by side, `[G · N]`.

Norms and matrix products look at one token at a time and need no padding; only attention needs
the rows. A group is a run of consecutive rows with N slots of its own, so that on a mesh each
part of the batch keeps its tokens. N is fixed in advance and must hold every group's real tokens.
There is no axis beside that of the slots: XLA shares work among a CPU's cores along the first one
alone, and sums over the last one twenty times slower where there is a unit axis before it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Packing:
    """Both directions of the move.

    `source_gn` is the place in its group's rows · T that slot n is filled from, and `used_gn`
    whether it is; `slot_bt` is the slot of a real token, and `mask_bt` which tokens are real.
    """

    source_gn: jax.Array
    used_gn: jax.Array
    slot_bt: jax.Array
    mask_bt: jax.Array

    @classmethod
    def of(cls, mask_bt: jax.Array, slots: int, groups: int = 1) -> "Packing":
        """Packs what `mask_bt` marks. Tokens of a group beyond `slots` are lost."""
        mask_gm = mask_bt.astype(bool).reshape(groups, -1)
        slot_gm = jnp.cumsum(mask_gm, axis=1) - 1
        source_gn = jnp.argsort(~mask_gm, axis=1, stable=True)[:, :slots].astype(jnp.int32)
        used_gn = jnp.arange(source_gn.shape[1]) < mask_gm.sum(axis=1, keepdims=True)
        return cls(source_gn, used_gn, slot_gm.reshape(mask_bt.shape), mask_bt.astype(bool))

    def pack(self, x_bt: jax.Array) -> jax.Array:
        """`[B, T, …]` → `[G · N, …]`; unused slots are 0."""
        x_gm = x_bt.reshape(self.used_gn.shape[0], -1, *x_bt.shape[2:])
        y_gn = _move(x_gm, self._to_slots, self._to_rows)
        return y_gn.reshape(-1, *x_bt.shape[2:])

    def unpack(self, x_s: jax.Array) -> jax.Array:
        """`[G · N, …]` → `[B, T, …]`; padding is 0."""
        x_gn = x_s.reshape(*self.used_gn.shape, *x_s.shape[1:])
        y_gm = _move(x_gn, self._to_rows, self._to_slots)
        return y_gm.reshape(*self.mask_bt.shape, *x_s.shape[1:])

    @property
    def _to_slots(self):
        return self.source_gn, self.used_gn

    @property
    def _to_rows(self):
        groups = self.used_gn.shape[0]
        return self.slot_bt.reshape(groups, -1), self.mask_bt.reshape(groups, -1)


@jax.custom_vjp
def _move(x_gm: jax.Array, there: tuple, back: tuple) -> jax.Array:
    """x[index] where valid, for (index, valid) = `there`; `back` undoes it.

    Every valid place has one source, so the gradient is a gather too, not a scatter.
    """
    index_gn, valid_gn = there
    y_gn = jax.vmap(partial(jnp.take, axis=0, mode="clip"))(x_gm, index_gn)
    return jnp.where(valid_gn.reshape(*valid_gn.shape, *[1] * (x_gm.ndim - 2)), y_gn, 0)


def _move_forward(x_gm, there, back):
    return _move(x_gm, there, back), (there, back)


def _move_backward(residuals, dy_gn):
    there, back = residuals
    return _move(dy_gn, back, there), None, None


_move.defvjp(_move_forward, _move_backward)
