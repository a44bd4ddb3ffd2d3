"""Scores responses with the SARM, and returns the latents that the reward reads."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jax.stages import Lowered

from sarm_jax.models.conversation import Prompt
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import Intervention
from sarm_jax.rewards.compound import (
    NO_READINGS,
    RewardTerms,
    ScoreScale,
    StateReadings,
    compound_reward,
)
from sarm_jax.rewards.reward_config import RewardConfig
from sarm_jax.rewards.state_controls import NO_STATES, StateControls


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores `[B]` of the clamped latents, and latents before the clamp.

    `z_bn` are the latents of the penalised features, `z_bs` those that the discriminator reads.
    `states` are the numbers that the reward reads from the pooled states.
    """

    score_b: np.ndarray
    z_bn: np.ndarray
    z_bs: np.ndarray
    states: StateReadings = NO_READINGS


def feature_count(model: RewardModel, config: RewardConfig) -> int:
    """Returns the number of features of a reward model; 0 if it has none and none is read.

    Raises:
        InputError: the reward reads features, and the reward model has no SAE.
    """
    return model.latent_size if model.has_features or config.reads_features else 0


def reward_terms(
    config: RewardConfig,
    scored: Scored,
    *,
    d_b: np.ndarray,
    scale: ScoreScale,
    lengths_b: np.ndarray | None,
) -> RewardTerms:
    """Returns the terms of R_total of scored responses, see `compound_reward`."""
    return compound_reward(
        config,
        score_b=scored.score_b,
        z_bn=scored.z_bn,
        d_b=d_b,
        score_std=scale.std,
        score_mean=scale.mean,
        states=scored.states,
        lengths_b=lengths_b,
    )


class Scorer:
    """A reward model under the clamp of a run.

    Args:
        model: the SARM.
        config: the clamp and the penalised features.
        discriminator_features: the features that the discriminator reads.
        states: what the reward reads from pooled states.
    """

    def __init__(
        self,
        model: RewardModel,
        config: RewardConfig,
        discriminator_features: Sequence[int] = (),
        states: StateControls = NO_STATES,
    ):
        size = feature_count(model, config)
        config.check_features(size)
        self._model, self._states = model.with_ensemble(config.ensemble), states
        self._clamp = config.clamp(size)
        self._penalised = len(config.penalize_features)
        # One gather per response: the penalised features first, then the discriminator's.
        self._features: tuple[int, ...] | None = None
        if model.has_features:
            self._features = (*config.penalize_features, *discriminator_features)
        self._lengths: dict[Prompt, int] = {}  # tokens of a prompt and an empty response

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Scored:
        """Scores the texts, which the reward model encodes with its own tokenizer."""
        score_b, z_bm, states = self._score(prompts, responses, self._clamp)
        return Scored(
            score_b,
            z_bn=z_bm[:, : self._penalised],
            z_bs=z_bm[:, self._penalised :],
            states=states,
        )

    def score_with_and_without_clamp(
        self, prompts: Sequence[Prompt], responses: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the scores `[B]` under the clamp of the run, and without it."""
        score_b = self.score(prompts, responses).score_b
        if self._clamp is None:
            return score_b, score_b
        unclamped_b, _, _ = self._score(prompts, responses, self._clamp.neutral())
        return score_b, unclamped_b

    def programs(
        self, batches: Iterable[Sequence[Prompt]], max_new_tokens: int
    ) -> Iterator[Callable[[], Lowered]]:
        """Yields the programs that score responses to batches of prompts, for all padded lengths.

        `max_new_tokens` is the most that a response adds to its prompt.
        """
        lengths = [[self._length(prompt) for prompt in prompts] for prompts in batches]
        return self._model.programs(
            lengths,
            max_new_tokens,
            clamp=self._clamp,
            latent_indices=self._features,
            states=self._states.read_states,
        )

    def _score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], clamp: Intervention | None
    ) -> tuple[np.ndarray, np.ndarray, StateReadings]:
        """Returns scores `[B]` under a clamp, latents of all features that are read, readings."""
        features, readings = self._features, NO_READINGS
        if self._states.read_states:
            score_b, z_bm, x_bd = self._model.score_with_states(
                prompts, responses, clamp=clamp, latent_indices=features
            )
            readings = self._states.read(x_bd)
        else:
            score_b, z_bm = self._model.score(
                prompts, responses, clamp=clamp, latent_indices=features
            )
        if z_bm is None:
            z_bm = np.zeros((len(score_b), 0), np.float32)
        return score_b, z_bm, readings

    def _length(self, prompt: Prompt) -> int:
        if prompt not in self._lengths:
            self._lengths[prompt] = len(self._model.encode(prompt, ""))
        return self._lengths[prompt]
