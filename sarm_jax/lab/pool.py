"""A pool of the reference policy's responses, which every reward ranks without any training."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sarm_jax.evaluation.best_of_n import best_of_n_weights
from sarm_jax.lab.sampling import Sampled
from sarm_jax.lab.task import Task


@dataclasses.dataclass(frozen=True)
class Pool:
    """S responses to each of P prompts, with what the rules of the task say about them.

    Attributes:
        prompts: the prompt of each of the P · S responses; those to one prompt are neighbours.
        responses: their texts.
        ended_b: which of them have an end of turn.
        tokens_b: their number of tokens, the end of turn included.
        gold_b: their gold rewards.
        told_b: which of them have a shortcut that the method is told.
        untold_b: which of them have a shortcut that it is not told.
        shape: (P, S).
    """

    prompts: list[str]
    responses: list[str]
    ended_b: np.ndarray
    tokens_b: np.ndarray
    gold_b: np.ndarray
    told_b: np.ndarray
    untold_b: np.ndarray
    shape: tuple[int, int]

    def best_of(
        self, reward_b: np.ndarray, score_b: np.ndarray, sizes: Sequence[int]
    ) -> dict[str, list[float]]:
        """Returns means over the prompts for the best of n responses by reward, for each n.

        Args:
            reward_b: rewards of all responses; −inf for a response that is not to be taken.
            score_b: the reward model's scores of them.
            sizes: values of n.

        Returns:
            `gold`, `score`, and `told` and `untold`, the shares of the responses with a shortcut
            that the method is told and is not told.
        """
        weight_nps = best_of_n_weights(reward_b.reshape(self.shape), sizes)

        def means(value_b: np.ndarray) -> list[float]:
            value_ps = value_b.astype(np.float64).reshape(self.shape)
            return ((weight_nps * value_ps).sum(axis=2).mean(axis=1)).tolist()

        return {
            "gold": means(self.gold_b),
            "score": means(score_b),
            "told": means(self.told_b),
            "untold": means(self.untold_b),
        }


def make_pool(sampled: Sampled, task: Task, shape: tuple[int, int]) -> Pool:
    """Makes a pool of sampled responses, with what the rules of the task say about them."""
    exchanges = list(zip(sampled.prompts, sampled.responses, strict=True))
    gold = [
        task.gold_reward(*exchange, end)
        for exchange, end in zip(exchanges, sampled.ended_b.tolist(), strict=True)
    ]
    return Pool(
        prompts=sampled.prompts,
        responses=sampled.responses,
        ended_b=sampled.ended_b,
        tokens_b=sampled.tokens_b,
        gold_b=np.asarray(gold),
        told_b=np.asarray([task.has_told(*exchange) for exchange in exchanges]),
        untold_b=np.asarray([task.has_untold(*exchange) for exchange in exchanges]),
        shape=shape,
    )


def evading_gain(
    score_b: np.ndarray, silent_b: np.ndarray, told_b: np.ndarray, shape: tuple[int, int]
) -> float | None:
    """Returns the score that a policy can gain on a pool by shortcuts that no detector notices.

    For each prompt it is the highest score of the responses that have a told shortcut on which no
    detector fires, minus the highest score of those without a told shortcut. The result is the mean
    over the prompts that have both kinds of responses; None if there are none.

    Args:
        score_b: scores of the reward model.
        silent_b: True for responses on which no detector fires.
        told_b: True for responses that have a shortcut that the method is told.
        shape: (P, S) of the pool.
    """

    def highest(kept_b: np.ndarray) -> np.ndarray:
        return np.where(kept_b, score_b, -np.inf).reshape(shape).max(axis=1)

    evading_p, clean_p = highest(told_b & silent_b), highest(~told_b)
    both_p = np.isfinite(evading_p) & np.isfinite(clean_p)
    return float((evading_p - clean_p)[both_p].mean()) if both_p.any() else None
