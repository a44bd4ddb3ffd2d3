"""One batch of prompts and the responses that the current policy gave to them."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from ppo.learner import Learner
from ppo.prompts import PromptDeck
from sarm_jax.generate import Generation


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Texts of B prompts and responses, and their tokens.

    Prompts `[B, P]` are padded on the left, responses `[B, R]` on the right, so that the response
    is in the last R columns of `tokens_bt`.
    """

    prompts: list[str]
    responses: list[str]
    tokens_bp: np.ndarray
    mask_bp: np.ndarray
    generation: Generation

    @property
    def tokens_bt(self) -> jax.Array:
        """Prompt and response `[B, P + R]`."""
        return jnp.concatenate([self.tokens_bp, self.generation.tokens_br], axis=1)

    @property
    def mask_bt(self) -> jax.Array:
        """Where `tokens_bt` is not padding."""
        return jnp.concatenate([self.mask_bp, self.generation.mask_br], axis=1)

    @property
    def ended_b(self) -> np.ndarray:
        """Whether the response ended by itself."""
        return np.asarray(self.generation.ended_b)

    @property
    def lengths_b(self) -> np.ndarray:
        """Response tokens, the stop token included."""
        return np.asarray(self.generation.mask_br).sum(axis=1)


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
        size = self.learner.config.batch_size
        prompts, tokens_bp, mask_bp = deck.deal(number, size)
        generation = self.learner.rollout(params, self.base, tokens_bp, mask_bp, key, slots=slots)
        return Rollout(prompts, self._decode(generation), tokens_bp, mask_bp, generation)

    def _decode(self, generation: Generation) -> list[str]:
        """Response texts, without special tokens."""
        tokens_br, mask_br = jax.device_get((generation.tokens_br, generation.mask_br))
        rows = [tokens[mask] for tokens, mask in zip(tokens_br, mask_br, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)
