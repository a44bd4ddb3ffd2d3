"""Scores responses with the SARM, and returns the latents that the reward reads."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jax.stages import Lowered

from sarm_jax.models.conversation import Prompt
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import Intervention
from sarm_jax.rewards.compound import RewardConfig


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of the clamped latents `[B]`, and latents before the clamp.

    `z_bn` are the latents of the penalised features, `z_bs` those that the discriminator reads.
    """

    score_b: np.ndarray
    z_bn: np.ndarray
    z_bs: np.ndarray


class Scorer:
    """A reward model under the clamp of a run.

    Args:
        model: the SARM.
        config: the clamp and the penalised features.
        discriminator_features: the features that the discriminator reads.
    """

    def __init__(
        self,
        model: RewardModel,
        config: RewardConfig,
        discriminator_features: Sequence[int] = (),
    ):
        size = model.latent_size
        config.check_features(size)
        self._model, self._clamp = model.with_ensemble(config.ensemble), config.clamp(size)
        self._penalised = len(config.penalize_features)
        # One gather per response: the penalised features first, then the discriminator's.
        self._features = (*config.penalize_features, *discriminator_features)
        self._lengths: dict[Prompt, int] = {}  # tokens of a prompt and an empty response

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scored:
        """Scores the texts, which the reward model encodes with its own tokenizer."""
        score_b, z_bm = self._score(prompts, responses, self._clamp)
        return Scored(score_b, z_bn=z_bm[:, : self._penalised], z_bs=z_bm[:, self._penalised :])

    def score_with_and_without_clamp(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores `[B]` under the clamp of the run, and without it."""
        score_b = self.score(prompts, responses).score_b
        if self._clamp is None:
            return score_b, score_b
        unclamped_b, _ = self._score(prompts, responses, self._clamp.neutral())
        return score_b, unclamped_b

    def programs(
        self, batches: Iterable[Sequence[Prompt]], max_new_tokens: int
    ) -> Iterator[Callable[[], Lowered]]:
        """Yields the programs that score responses to batches of prompts, for all padded lengths.

        `max_new_tokens` is the most that a response adds to its prompt.
        """
        lengths = [[self._length(prompt) for prompt in prompts] for prompts in batches]
        return self._model.programs(
            lengths, max_new_tokens, clamp=self._clamp, latent_indices=self._features
        )

    def _score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], clamp: Intervention | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores `[B]` under a clamp, and the latents of all features that are read."""
        return self._model.score(prompts, responses, clamp=clamp, latent_indices=self._features)

    def _length(self, prompt: Prompt) -> int:
        if prompt not in self._lengths:
            self._lengths[prompt] = len(self._model.encode(prompt, ""))
        return self._lengths[prompt]
