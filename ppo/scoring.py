"""What the reward reads from the SARM: scores, and the latents that its terms look at."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jax.stages import Lowered

from ppo.reward import RewardConfig
from ppo.rollout import Rollout
from sarm_jax.models.reward_model import RewardModel


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores `[B]` (of the clamped latents), and latents before the clamp.

    `penalised_bn` are those of the penalised features, `subset_bs` the discriminator's.
    """

    score_b: np.ndarray
    penalised_bn: np.ndarray
    subset_bs: np.ndarray


class Scorer:
    """A reward model under a run's clamp; `subset` are the features the discriminator reads."""

    def __init__(self, model: RewardModel, config: RewardConfig, subset: Sequence[int] = ()):
        size = model.model.config.sae.latent_size
        config.check_features(size)
        self._model, self._clamp = model, config.clamp(size)
        self._split = len(config.penalize_features)
        # One gather per response: the penalised features first, then the subset.
        self._watched = (*config.penalize_features, *subset)
        self._lengths: dict[str, int] = {}  # tokens of a prompt and an empty response

    def __call__(self, rollout: Rollout) -> Scored:
        """Scores the texts as the reward model's own tokenizer reads them."""
        score_b, z_bn = self._model.score(
            rollout.prompts, rollout.responses, self._clamp, self._watched
        )
        return Scored(score_b, z_bn[:, : self._split], z_bn[:, self._split :])

    def with_and_without_clamp(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """Scores `[B]` under the run's clamp, and those that the reward model itself gives."""
        score_b = self(rollout).score_b
        if self._clamp is None:
            return score_b, score_b
        texts, neutral = (rollout.prompts, rollout.responses), self._clamp.neutral()
        return score_b, self._model.score(*texts, neutral, self._watched)[0]

    def programs(
        self, batches: Iterable[Sequence[str]], max_new_tokens: int
    ) -> Iterator[Callable[[], Lowered]]:
        """Yields what scoring responses to these batches of prompts runs, for all padded lengths.

        `max_new_tokens` is the most that a response adds to its prompt.
        """
        lengths = [[self._length(prompt) for prompt in prompts] for prompts in batches]
        return self._model.programs(lengths, max_new_tokens, self._clamp, self._watched)

    def _length(self, prompt: str) -> int:
        if prompt not in self._lengths:
            self._lengths[prompt] = len(self._model.encode(prompt, ""))
        return self._lengths[prompt]
