"""How many slots the packed tokens of a batch take: few sizes, all known before the first step.

Programs are compiled for a fixed number of slots (see `sarm_jax.models.packing`). The prompts of
every step are known, so their share is the most that any step needs; the responses' share is one of
`ppo.pack_levels`, chosen when the responses are there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ppo.config import PPOConfig
from ppo.prompts import PromptDeck

MULTIPLE = 8  # every size is one: what matrix units like


class Slots(NamedTuple):
    """Of one group of rows: for all tokens, and for the tokens of the responses among them."""

    tokens: int
    responses: int


class SlotPlan:
    """The sizes that batches of one padded prompt length can take; None if `ppo.pack_levels` is 0.

    A microbatch is packed in `parts` groups, one per part of the mesh with rows of its own.
    `prompt_lengths` are those of every batch, `[B]` in tokens, and `orders` its rows in every
    epoch, `[epochs, B]`, where the batch is cut into microbatches. `prefill` holds the prompts of
    a whole batch.
    """

    def __init__(
        self,
        config: PPOConfig,
        prompt_lengths: Sequence[np.ndarray],
        orders: Sequence[np.ndarray],
        parts: int = 1,
    ):
        self._rows = config.batch_size // (config.pieces * parts)
        self._levels, self._new_tokens = config.pack_levels, config.max_new_tokens
        self.prefill: int | None = None
        if self._levels:
            whole = config.batch_size // parts
            self.prefill = _rounded(max(_fullest(n, None, whole) for n in prompt_lengths))
            pairs = zip(prompt_lengths, orders, strict=True)
            self._prompts = _rounded(max(_fullest(n, order, self._rows) for n, order in pairs))
            self._unit = _rounded(-(-self._rows * config.max_new_tokens // self._levels))

    def of(self, response_lengths: np.ndarray, order: np.ndarray | None = None) -> Slots | None:
        """What a batch takes whose responses have these lengths, `[B]` in tokens."""
        if not self._levels:
            return None
        return self._slots(-(-_fullest(response_lengths, order, self._rows) // self._unit))

    def all(self) -> list[Slots | None]:
        """Everything that `of` can return."""
        if not self._levels:
            return [None]
        levels = -(-self._rows * self._new_tokens // self._unit)
        return [self._slots(level + 1) for level in range(levels)]

    def _slots(self, level: int) -> Slots:
        return Slots(self._prompts + level * self._unit, level * self._unit)


def slot_plans(
    config: PPOConfig,
    deck: PromptDeck,
    batches: Sequence[int],
    order_of: Callable[[int], np.ndarray],
    parts: int,
) -> dict[int, SlotPlan]:
    """Returns a plan for each padded prompt length that a batch of the deck can have.

    Packed, these are the lengths of `batches`, which must be all of the run. `order_of` gives the
    order of a batch; it and `parts` are those of `SlotPlan`.
    """
    if not config.pack_levels:
        return {length: SlotPlan(config, [], [], parts) for length in deck.padded_lengths}
    numbers: dict[int, list[int]] = {}
    for number in batches:
        numbers.setdefault(deck.padded_length(number), []).append(number)
    return {
        length: SlotPlan(
            config, [deck.lengths(n) for n in some], [order_of(n) for n in some], parts
        )
        for length, some in numbers.items()
    }


def _fullest(lengths_b: np.ndarray, order: np.ndarray | None, rows: int) -> int:
    """Tokens of the fullest group of `rows`, in the batch's own order and in those of `order`."""
    orders = np.arange(len(lengths_b))[None]
    if order is not None:
        orders = np.concatenate([orders, order])
    return int(lengths_b[orders].reshape(-1, rows).sum(axis=1).max())


def _rounded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE
