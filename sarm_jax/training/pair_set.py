"""Pairs of responses as tokens, for training a SARM."""

import dataclasses
import sys
from functools import partial
from typing import Any

import numpy as np

from sarm_jax.models.chat import encode_conversation, encode_prompt
from sarm_jax.models.conversation import Prompt
from sarm_jax.training.activations import Conversation

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Preferences and ties as tokens.

    Attributes:
        rows: the distinct conversations, those of the preferences first.
        pairs_p2: row numbers (chosen, rejected) of each pair.
        prompt_p: number of the prompt of each pair.
        held_out_p: True for the pairs of held-out prompts.
        source_p: name of the source of each pair.
        tie_p: True for the ties, which come last; None if there are none.
    """

    rows: list[Conversation]
    pairs_p2: np.ndarray
    prompt_p: np.ndarray
    held_out_p: np.ndarray
    source_p: list[str]
    tie_p: np.ndarray | None = None

    @property
    def preferences(self) -> "PairSet":
        """The pairs that are no ties, with their conversations."""
        return self if self.tie_p is None else self._select(~self.tie_p)

    @property
    def ties(self) -> "PairSet | None":
        """The ties, with all conversations; None if there are none."""
        return None if self.tie_p is None else self._select(self.tie_p)

    def _select(self, keep_p: np.ndarray) -> "PairSet":
        return PairSet(
            rows=self.rows[: self.pairs_p2[keep_p].max() + 1],
            pairs_p2=self.pairs_p2[keep_p],
            prompt_p=self.prompt_p[keep_p],
            held_out_p=self.held_out_p[keep_p],
            source_p=[source for source, keep in zip(self.source_p, keep_p, strict=True) if keep],
        )


def encode_turn(
    tokenizer: Any, prompt: Prompt, response: str, max_length: int, ends_with_turn: bool = True
) -> Conversation:
    """Encodes an exchange; its assistant turn is the response with the end of turn.

    A conversation of more than `max_length` tokens loses its beginning. With `ends_with_turn` False
    the turn includes what the chat template writes after it.
    """
    encode = partial(
        encode_conversation, tokenizer, prompt, response, ends_with_turn=ends_with_turn
    )
    ids = encode(max_length=sys.maxsize)
    prompt_ids = encode_prompt(tokenizer, prompt)
    token_pairs = enumerate(zip(ids, prompt_ids, strict=False))
    first_difference = next((n for n, (a, b) in token_pairs if a != b), None)
    if first_difference is None:
        first_difference = min(len(ids), len(prompt_ids))
    turn_length = len(ids) - first_difference
    if len(ids) > max_length:
        ids = encode(max_length=max_length)
    bos = int(ids[0] == tokenizer.bos_token_id)  # truncation keeps it; it is no part of the turn
    return Conversation(ids, min(turn_length, len(ids) - bos))
