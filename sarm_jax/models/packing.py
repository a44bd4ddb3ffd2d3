"""Removes the padding: puts the real tokens of `[B, T]` side by side, `[G · N]`.

Norms and matrix products process one token at a time and need no padding; only attention needs the
rows. A group is a run of consecutive rows with N slots, so that on a mesh each part of the batch
keeps its tokens. N is fixed in advance and must be at least the number of real tokens of every
group. Groups and slots form a single axis: XLA splits work among a CPU's cores only along the first
axis, and sums over the last axis twenty times slower if a unit axis stands before it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Packing:
    """The indices of both directions of the move.

    Attributes:
        source_gn: the index, among the rows · T tokens of its group, that slot n is filled from.
        used_gn: True if slot n holds a token.
        slot_bt: the slot of a real token.
        mask_bt: True for real tokens.
    """

    source_gn: jax.Array
    used_gn: jax.Array
    slot_bt: jax.Array
    mask_bt: jax.Array

    @classmethod
    def from_mask(cls, mask_bt: jax.Array, slots: int, groups: int = 1) -> "Packing":
        """Packs the tokens that `mask_bt` marks; a group loses its tokens beyond `slots`."""
        mask_gm = mask_bt.astype(bool).reshape(groups, -1)
        slot_gm = jnp.cumsum(mask_gm, axis=1) - 1
        source_gn = jnp.argsort(~mask_gm, axis=1, stable=True)[:, :slots].astype(jnp.int32)
        used_gn = jnp.arange(source_gn.shape[1]) < mask_gm.sum(axis=1, keepdims=True)
        return cls(
            source_gn=source_gn,
            used_gn=used_gn,
            slot_bt=slot_gm.reshape(mask_bt.shape),
            mask_bt=mask_bt.astype(bool),
        )

    def pack(self, x_bt: jax.Array) -> jax.Array:
        """Converts `[B, T, …]` to `[G · N, …]`; unused slots are 0."""
        x_gm = x_bt.reshape(self.used_gn.shape[0], -1, *x_bt.shape[2:])
        y_gn = _move(x_gm, self._to_slots, self._to_rows)
        return y_gn.reshape(-1, *x_bt.shape[2:])

    def unpack(self, x_s: jax.Array) -> jax.Array:
        """Converts `[G · N, …]` to `[B, T, …]`; padding is 0."""
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
def _move(x_gm: jax.Array, forward: tuple, backward: tuple) -> jax.Array:
    """Gathers x[index] where valid, else 0, for (index, valid) = `forward`.

    `backward` describes the inverse. Every valid element has one source, so the gradient is a
    gather too, not a scatter.
    """
    index_gn, valid_gn = forward
    y_gn = jax.vmap(partial(jnp.take, axis=0, mode="clip"))(x_gm, index_gn)
    return jnp.where(valid_gn.reshape(*valid_gn.shape, *[1] * (x_gm.ndim - 2)), y_gn, 0)


def _move_forward(x_gm, forward, backward):
    return _move(x_gm, forward, backward), (forward, backward)


def _move_backward(residuals, dy_gn):
    forward, backward = residuals
    return _move(dy_gn, backward, forward), None, None


_move.defvjp(_move_forward, _move_backward)
