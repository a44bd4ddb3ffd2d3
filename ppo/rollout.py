"""Rollouts: a batch of prompts, and the responses that the current policy samples to them."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jax.stages import Lowered

from ppo.learner import Learner
from ppo.prompts import PromptDeck
from ppo.run_group import Member
from sarm_jax.models.chat import decode
from sarm_jax.models.conversation import Prompt
from sarm_jax.parallel.processes import fetch
from sarm_jax.sampling.generate import Generation


@dataclasses.dataclass(frozen=True)
class Rollout:
    """B prompts, and the texts and tokens of responses to them.

    Prompts `[B, P]` are padded on the left, responses `[B, R]` on the right, so the last R columns
    of `tokens_bt` are the response. `ended_b` marks responses that ended with a stop token, and
    `lengths_b` counts the tokens of each response, including the stop token.
    """

    prompts: list[Prompt]
    responses: list[str]
    tokens_bp: np.ndarray
    mask_bp: np.ndarray
    generation: Generation
    ended_b: np.ndarray
    lengths_b: np.ndarray

    @property
    def tokens_bt(self) -> jax.Array:
        """Tokens of prompt and response, `[B, P + R]`."""
        return jnp.concatenate([self.tokens_bp, self.generation.tokens_br], axis=1)

    @property
    def mask_bt(self) -> jax.Array:
        """Mask of prompt and response, `[B, P + R]`; False for padding."""
        return jnp.concatenate([self.mask_bp, self.generation.mask_br], axis=1)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples responses to the prompts of a deck; `base` is the learner's frozen state.

    The run may be a `member` of a group, whose responses are sampled together.
    """

    learner: Learner
    base: nnx.State
    tokenizer: Any
    member: Member | None = None

    def sample(
        self,
        params: dict,
        deck: PromptDeck,
        *,
        batch_number: int,
        key: jax.Array,
        slots: int | None = None,
    ) -> Rollout:
        """Samples responses to a batch of the deck, `ppo.samples_per_prompt` to each prompt.

        Args:
            params: parameters of the policy.
            deck: the prompts.
            batch_number: which batch of the deck.
            key: random key of the batch.
            slots: slots of the packed prompts, as in `Learner.rollout`.
        """
        tokens_np, mask_np = deck.deal(batch_number)
        rollout = self.learner.rollout
        if self.member is not None:
            rollout = partial(self.member.rollout, self.learner)
        generation = rollout(params, self.base, tokens_np, mask_np, key=key, slots=slots)
        copies = self.learner.config.samples_per_prompt
        on_host: Generation = fetch(generation)
        return Rollout(
            prompts=deck.texts(batch_number),
            responses=self._decode(on_host),
            tokens_bp=np.repeat(tokens_np, copies, axis=0),
            mask_bp=np.repeat(mask_np, copies, axis=0),
            generation=generation,
            ended_b=np.asarray(on_host.ended_b),
            lengths_b=np.asarray(on_host.mask_br).sum(axis=1),
        )

    def programs(
        self, params: dict, prompt_length: int, slots: int | None
    ) -> Iterator[Callable[[], Lowered]]:
        """Yields the program of `sample` for prompts padded to `prompt_length` tokens.

        There is none for a member of a group, whose program depends on the other members.
        """
        if self.member is None:
            yield partial(self.learner.lower_rollout, params, self.base, prompt_length, slots)

    def _decode(self, generation: Generation) -> list[str]:
        """Returns the texts of responses that are on the host, without special tokens."""
        pairs = zip(generation.tokens_br, generation.mask_br, strict=True)
        return [decode(self.tokenizer, tokens[mask]) for tokens, mask in pairs]
