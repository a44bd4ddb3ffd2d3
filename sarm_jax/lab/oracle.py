"""A reward model of the lab whose last features are the task's own counts of its shortcuts.

    features 0 … M − 1   the latents of the SARM
    features M …         units of every shortcut of the task, in the order of `Task.shortcuts`

A penalty on them is a penalty with a perfect detector: the ceiling for penalties on latents. The
counts read the words of a response, not the model, and the score does not depend on them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.stages import Lowered

from sarm_jax.io.errors import InputError
from sarm_jax.lab.task import Task
from sarm_jax.models.conversation import PromptValue
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import Intervention


class OracleRewardModel(RewardModel):
    """A SARM with further features that count the shortcuts; they can be penalised, not clamped.

    Args:
        sarm: the SARM.
        task: the task whose shortcuts are counted.
    """

    def __init__(self, sarm: RewardModel, task: Task):
        super().__init__(sarm.model, sarm.tokenizer, sarm.max_length, sarm.batch_size)
        self.task, self.latents = task, sarm.sae.config.latent_size

    @property
    def latent_size(self) -> int:
        """The number of features, shortcuts included."""
        return self.latents + len(self.task.shortcuts)

    def with_ensemble(self, ensemble: str) -> "OracleRewardModel":
        """Returns a copy that combines the scores of its heads as `ensemble` says."""
        return OracleRewardModel(super().with_ensemble(ensemble), self.task)

    def score(
        self,
        prompts: Sequence[PromptValue],
        responses: Sequence[str],
        clamp: Intervention | dict[int, float] | None = None,
        latent_indices: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, Any]:
        """Scores responses as `RewardModel` does; the features of shortcuts count words.

        Raises:
            InputError: as there, or the clamp names a shortcut.
        """
        own, indices = self._split_features(clamp, latent_indices)
        score_b, z_bo = super().score(prompts, responses, clamp, indices[own].tolist())
        return score_b, self._with_counts(z_bo, own, indices, prompts, responses)

    def score_with_states(
        self,
        prompts: Sequence[PromptValue],
        responses: Sequence[str],
        clamp: Intervention | dict[int, float] | None = None,
        latent_indices: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, Any, np.ndarray]:
        """Scores responses and returns their pooled states, with features as in `score`.

        Raises:
            InputError: as there.
        """
        own, indices = self._split_features(clamp, latent_indices)
        score_b, z_bo, x_bd = super().score_with_states(
            prompts, responses, clamp, indices[own].tolist()
        )
        return score_b, self._with_counts(z_bo, own, indices, prompts, responses), x_bd

    def programs(
        self,
        batches: Iterable[Sequence[int]],
        extra: int,
        clamp: Intervention | None = None,
        latent_indices: Sequence[int] | None = None,
        states: bool = False,
    ) -> Iterator[Callable[[], Lowered]]:
        """Yields the programs that `score` runs, see `RewardModel`."""
        if latent_indices is not None:
            latent_indices = [i for i in latent_indices if i < self.latents]
        return super().programs(batches, extra, clamp, latent_indices, states)

    def _split_features(self, clamp, latent_indices) -> tuple[np.ndarray, np.ndarray]:
        """Checks the clamp; returns which of the features are latents, bool `[f]`, and all ids."""
        self._check(clamp)
        indices = range(self.latent_size) if latent_indices is None else latent_indices
        indices_f = np.asarray(indices, np.int64)
        return indices_f < self.latents, indices_f

    def _with_counts(self, z_bo, own, indices, prompts, responses) -> np.ndarray:
        """Returns the values of all features `[B, f]`, given those of the latents `[B, o]`."""
        z_bf = np.zeros((len(responses), len(indices)), np.float32)
        z_bf[:, own] = z_bo
        counts = [
            list(self.task.counts(str(prompt), response).values())
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        z_bf[:, ~own] = np.asarray(counts, np.float32)[:, indices[~own] - self.latents]
        return z_bf

    def _check(self, clamp: Intervention | dict[int, float] | None) -> None:
        """Raises InputError if a clamp names a feature that counts a shortcut."""
        if clamp is None:
            return
        features = clamp if isinstance(clamp, dict) else np.asarray(clamp.indices).tolist()
        for feature in features:
            if feature >= self.latents:
                raise InputError(
                    f"reward.clamp_features: feature {feature} counts a shortcut, and only the "
                    f"{self.latents} latents can be clamped"
                )
