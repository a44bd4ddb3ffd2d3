"""One batch of prompts and the responses that the current policy gave to them."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from ppo.learner import Learner
from ppo.prompts import PromptDeck
from sarm_jax.parallel.processes import fetch
from sarm_jax.sampling.generate import Generation


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Texts of B prompts and responses, and their tokens.

    Prompts `[B, P]` are padded on the left, responses `[B, R]` on the right, so that the response
    is in the last R columns of `tokens_bt`. `ended_b` says whether a response ended by itself,
    `lengths_b` are its tokens, the stop token included.
    """

    prompts: list[str]
    responses: list[str]
    tokens_bp: np.ndarray
    mask_bp: np.ndarray
    generation: Generation
    ended_b: np.ndarray
    lengths_b: np.ndarray

    @property
    def tokens_bt(self) -> jax.Array:
        """Prompt and response `[B, P + R]`."""
        return jnp.concatenate([self.tokens_bp, self.generation.tokens_br], axis=1)

    @property
    def mask_bt(self) -> jax.Array:
        """Where `tokens_bt` is not padding."""
        return jnp.concatenate([self.mask_bp, self.generation.mask_br], axis=1)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Deals prompts and lets a policy answer them; `base` is the learner's frozen state."""

    learner: Learner
    base: nnx.State
    tokenizer: Any

    def __call__(
        self, params: dict, deck: PromptDeck, number: int, key: jax.Array, slots: int | None = None
    ) -> Rollout:
        """Responses to batch `number` of the deck by the policy with `params`.

        `slots` as in `Learner.rollout`.
        """
        prompts, tokens_bp, mask_bp = deck.deal(number)
        generation = self.learner.rollout(params, self.base, tokens_bp, mask_bp, key, slots=slots)
        seen: Generation = fetch(generation)
        lengths_b = np.asarray(seen.mask_br).sum(axis=1)
        ended_b, texts = np.asarray(seen.ended_b), self._decode(seen)
        return Rollout(prompts, texts, tokens_bp, mask_bp, generation, ended_b, lengths_b)

    def _decode(self, seen: Generation) -> list[str]:
        """Response texts, without special tokens, of what the host has."""
        rows = [tokens[mask] for tokens, mask in zip(seen.tokens_br, seen.mask_br, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)
