"""The number of slots that hold the packed tokens of a batch.

Programs are compiled for a fixed number of slots (see `sarm_jax.models.packing`), so there are only
a few numbers, all known before the first step. The prompts of every step are known, so the slots
for prompts are the most that any step needs. The slots for responses are one of `ppo.pack_levels`
sizes, chosen once the responses have been sampled.

Several responses to a prompt share the slots of the prompt, and the policy computes it once for all
of them, as far as they are in the same part of a microbatch.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ppo.config import PPOConfig
from ppo.prompts import PromptDeck

MULTIPLE = 8  # every size is a multiple of it, which suits matrix units


class Slots(NamedTuple):
    """Slots of one group of rows: for all tokens, and for the response tokens among them.

    Every `copies` consecutive rows have the same prompt, whose tokens have slots once.
    """

    tokens: int
    responses: int
    copies: int = 1


class SlotPlan:
    """The slots that batches of one padded prompt length can take.

    If `ppo.pack_levels` is 0, nothing is packed and all slots are None. `prefill` is the number of
    slots that hold the prompts of a whole batch.

    Args:
        config: sizes of the batches and number of levels.
        prompt_lengths: tokens of the N prompts of every batch, each `[N]`; N is B divided by
            `ppo.samples_per_prompt`.
        orders: the rows of every batch in each epoch, `[epochs, B]`, in the order in which the
            batch is cut into microbatches, as in `order_of_rows`.
        parts: number of groups that a microbatch is packed in, one for each part of the mesh that
            has rows of its own.
    """

    def __init__(
        self,
        config: PPOConfig,
        prompt_lengths: Sequence[np.ndarray],
        orders: Sequence[np.ndarray],
        parts: int = 1,
    ):
        self._rows = _rows_of_a_group(config, parts)
        self._levels, self._new_tokens = config.pack_levels, config.max_new_tokens
        self._copies = copies_sharing_slots(config, parts)
        self.prefill: int | None = None
        if self._levels:
            rows = config.prompts_per_batch // parts
            self.prefill = _rounded(max(_fullest(n, None, rows) for n in prompt_lengths))
            self._prompts = _rounded(
                max(
                    self._fullest_prompts(np.repeat(lengths, config.samples_per_prompt), order)
                    for lengths, order in zip(prompt_lengths, orders, strict=True)
                )
            )
            self._unit = _rounded(-(-self._rows * config.max_new_tokens // self._levels))

    @property
    def sizes(self) -> tuple[int | None, list[Slots | None]]:
        """All sizes that batches can have; plans with the same sizes give the same results."""
        return self.prefill, self.all_slots()

    def slots_for(
        self, response_lengths: np.ndarray, order: np.ndarray | None = None
    ) -> Slots | None:
        """Returns the slots of a batch whose responses have these lengths, `[B]` in tokens."""
        if not self._levels:
            return None
        return self._slots(-(-_fullest(response_lengths, order, self._rows) // self._unit))

    def all_slots(self) -> list[Slots | None]:
        """Returns everything that `slots_for` can return."""
        if not self._levels:
            return [None]
        levels = -(-self._rows * self._new_tokens // self._unit)
        return [self._slots(level + 1) for level in range(levels)]

    def _slots(self, level: int) -> Slots:
        return Slots(self._prompts + level * self._unit, level * self._unit, self._copies)

    def _fullest_prompts(self, lengths_b: np.ndarray, order: np.ndarray) -> int:
        """Returns the most slots that the prompts of a group of rows need."""
        shared = order.reshape(len(order), -1, self._copies) // self._copies
        assert (shared == shared[..., :1]).all(), "rows that share slots are not together"
        return _fullest(lengths_b[:: self._copies], shared[..., 0], self._rows // self._copies)


def copies_sharing_slots(config: PPOConfig, parts: int = 1) -> int:
    """Returns how many consecutive rows share the slots of their prompt in each of `parts` parts.

    These are all responses to a prompt, or those of them that are in a microbatch and a part.
    """
    if not keeps_prompts_together(config):
        return 1
    return math.gcd(_rows_of_a_group(config, parts), config.samples_per_prompt)


def keeps_prompts_together(config: PPOConfig) -> bool:
    """Returns whether a minibatch holds all responses to its prompts.

    That depends neither on the microbatches nor on the mesh, so that they change no result.
    """
    return config.batch_size // config.num_minibatches % config.samples_per_prompt == 0


def order_of_rows(config: PPOConfig, step: int) -> np.ndarray:
    """Returns the rows of the batch in each epoch of a step, `[epochs, B]`.

    Responses to the same prompt stay together if they are in the same minibatch, so that they can
    share the slots of their prompt.
    """
    together = config.samples_per_prompt if keeps_prompts_together(config) else 1
    first = np.tile(np.arange(0, config.batch_size, together), (config.ppo_epochs, 1))
    first = np.random.default_rng((config.seed, step)).permuted(first, axis=1)
    return (first[..., None] + np.arange(together)).reshape(config.ppo_epochs, -1)


def largest_slots(config: PPOConfig, prompt_length: int, parts: int = 1) -> Slots | None:
    """Returns the slots if all prompts have `prompt_length` tokens, and responses their limit.

    Without packing it returns None.
    """
    if not config.pack_levels:
        return None
    rows = _rows_of_a_group(config, parts)
    copies, responses = copies_sharing_slots(config, parts), rows * config.max_new_tokens
    return Slots(rows // copies * prompt_length + responses, responses, copies)


def slot_plans(
    config: PPOConfig,
    deck: PromptDeck,
    batches: Sequence[int],
    order_of: Callable[[int], np.ndarray],
    parts: int,
) -> dict[int, SlotPlan]:
    """Returns a plan for each padded prompt length that a batch of the deck can have.

    Args:
        config: sizes of the batches and number of levels.
        deck: the prompts.
        batches: numbers of all batches of the run.
        order_of: gives the rows of a batch in each epoch, as in `SlotPlan`.
        parts: groups that a microbatch is packed in, as in `SlotPlan`.
    """
    if not config.pack_levels:
        unpacked = SlotPlan(config, prompt_lengths=[], orders=[], parts=parts)
        return dict.fromkeys(deck.padded_lengths, unpacked)
    numbers: dict[int, list[int]] = {}
    for number in batches:
        numbers.setdefault(deck.padded_length(number), []).append(number)
    return {
        length: SlotPlan(
            config,
            prompt_lengths=[deck.lengths(n) for n in own],
            orders=[order_of(n) for n in own],
            parts=parts,
        )
        for length, own in numbers.items()
    }


def _rows_of_a_group(config: PPOConfig, parts: int) -> int:
    """Returns the rows that are packed together: those of a microbatch in one of `parts` parts."""
    return config.batch_size // (config.pieces * parts)


def _fullest(lengths_b: np.ndarray, order: np.ndarray | None, rows: int) -> int:
    """Returns the most tokens in a group of `rows`, in the batch's own order and in `order`."""
    orders = np.arange(len(lengths_b))[None]
    if order is not None:
        orders = np.concatenate([orders, order])
    return int(lengths_b[orders].reshape(-1, rows).sum(axis=1).max())


def _rounded(tokens: int) -> int:
    return -(-tokens // MULTIPLE) * MULTIPLE
