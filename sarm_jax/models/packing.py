"""Removes the padding: puts the real tokens of `[B, T]` side by side, `[G · N]`.

Norms and matrix products process one token at a time and need no padding; only attention needs the
rows. A group is a run of consecutive rows with N slots, so that on a mesh each part of the batch
keeps its tokens. N is fixed in advance and must be at least the number of tokens of every group
that have a slot: all real ones, except for those of shared prompts. Groups and slots form a single
axis: XLA splits work among a CPU's cores only along the first axis, and sums over the last axis
twenty times slower if a unit axis stands before it.

Several responses to one prompt begin alike. What a causal model computes for the prompt is then the
same in all of their rows, so these tokens have slots in the first of the rows only, and are copied
to the others where rows are needed.
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
        slot_bt: the slot of a token that has one.
        own_bt: True for real tokens that have a slot.
        copies: number of consecutive rows that begin with the same `prefix` columns.
        prefix: number of these columns, which have slots in the first of the rows only.
    """

    source_gn: jax.Array
    used_gn: jax.Array
    slot_bt: jax.Array
    own_bt: jax.Array
    copies: int = struct.field(pytree_node=False, default=1)
    prefix: int = struct.field(pytree_node=False, default=0)

    @classmethod
    def from_mask(
        cls, mask_bt: jax.Array, slots: int, groups: int = 1, *, copies: int = 1, prefix: int = 0
    ) -> "Packing":
        """Packs the tokens that `mask_bt` marks; a group loses its tokens beyond `slots`.

        Args:
            mask_bt: True for real tokens.
            slots: slots of a group.
            groups: number of groups.
            copies: number of consecutive rows whose first `prefix` columns are the same, both mask
                and tokens; it divides the rows of a group.
            prefix: number of columns.
        """
        rows, columns = mask_bt.shape
        assert rows % (groups * copies) == 0
        own_bt = mask_bt.astype(bool)
        if copies > 1:
            is_first_b, in_prefix_t = jnp.arange(rows) % copies == 0, jnp.arange(columns) < prefix
            own_bt &= is_first_b[:, None] | ~in_prefix_t
        mask_gm = own_bt.reshape(groups, -1)
        slot_gm = jnp.cumsum(mask_gm, axis=1) - 1
        source_gn = jnp.argsort(~mask_gm, axis=1, stable=True)[:, :slots].astype(jnp.int32)
        used_gn = jnp.arange(source_gn.shape[1]) < mask_gm.sum(axis=1, keepdims=True)
        return cls(
            source_gn=source_gn,
            used_gn=used_gn,
            slot_bt=slot_gm.reshape(mask_bt.shape),
            own_bt=own_bt,
            copies=copies,
            prefix=prefix,
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
        return self._with_copies(y_gm.reshape(*self.own_bt.shape, *x_s.shape[1:]))

    def _with_copies(self, y_bt):
        """Copies the prefix from the first of `copies` rows to the others."""
        if self.copies == 1:
            return y_bt
        by_prompt = y_bt.reshape(-1, self.copies, *y_bt.shape[1:])
        first = by_prompt[:, :1, : self.prefix]
        copied = jnp.broadcast_to(first, by_prompt.shape[:2] + first.shape[2:])
        rest = by_prompt[:, :, self.prefix :]
        return jnp.concatenate([copied, rest], axis=2).reshape(y_bt.shape)

    @property
    def _to_slots(self):
        return self.source_gn, self.used_gn

    @property
    def _to_rows(self):
        groups = self.used_gn.shape[0]
        return self.slot_bt.reshape(groups, -1), self.own_bt.reshape(groups, -1)


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
