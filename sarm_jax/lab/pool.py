"""A pool of the reference policy's responses, which every reward ranks without any training."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sarm_jax.evaluation.best_of_n import best_of_n
from sarm_jax.lab import world
from sarm_jax.lab.shortcuts import World
from sarm_jax.models.chat import decode, encode_prompt, pad_batch, pad_id
from sarm_jax.models.llama import Llama
from sarm_jax.sampling.generate import generate

BATCH = 256  # responses sampled at a time


@dataclasses.dataclass(frozen=True)
class Pool:
    """S responses to each of P prompts, with what the rules of the world say about them.

    Attributes:
        prompts: the prompt of each of the P · S responses; those to one prompt are neighbours.
        responses: their texts.
        ended_b: which of them have an end of turn.
        tokens_b: their number of tokens, the end of turn included.
        gold_b: their gold rewards.
        told_b: which of them have a shortcut that the method is told.
        shape: (P, S).
    """

    prompts: list[str]
    responses: list[str]
    ended_b: np.ndarray
    tokens_b: np.ndarray
    gold_b: np.ndarray
    told_b: np.ndarray
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
            `gold`, `score`, and `told`, the share of the responses with a shortcut that the method
            is told.
        """
        reward_ps = reward_b.reshape(self.shape)

        def means(value_b: np.ndarray) -> list[float]:
            value_ps = value_b.astype(np.float64).reshape(self.shape)
            return [float(best_of_n(reward_ps, value_ps, n).mean()) for n in sizes]

        return {"gold": means(self.gold_b), "score": means(score_b), "told": means(self.told_b)}


def sample_pool(
    policy: Llama,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    lab_world: World,
) -> Pool:
    """Samples responses to each prompt at temperature 1.

    Args:
        policy: the reference policy.
        tokenizer: its tokenizer.
        prompts: P prompts of the lab.
        samples: S, responses to each of them.
        max_new_tokens: longest response in tokens.
        seed: seed of sampling.
        lab_world: the world, which knows the shortcuts that the method is told.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    pad, key = pad_id(tokenizer, policy.stop_ids), jax.random.key(seed)
    encoded = {prompt: encode_prompt(tokenizer, prompt) for prompt in prompts}
    length = max(map(len, encoded.values()))
    texts: list[str] = []
    ended, tokens = [], []
    for batch, start in enumerate(tqdm(range(0, len(repeated), BATCH), desc="pool", unit="batch")):
        rows = [encoded[prompt] for prompt in repeated[start : start + BATCH]]
        filler = [rows[0]] * (BATCH - len(rows))
        tokens_bt, mask_bt = pad_batch([*rows, *filler], length, pad, side="left")
        out = generate(
            policy,
            jnp.asarray(tokens_bt),
            jnp.asarray(mask_bt),
            max_new_tokens=max_new_tokens,
            key=jax.random.fold_in(key, batch),
            pad_id=pad,
        )
        kept_br, tokens_br = np.asarray(out.mask_br), np.asarray(out.tokens_br)
        for b in range(len(rows)):
            texts.append(decode(tokenizer, tokens_br[b][kept_br[b]]))
        ended.append(np.asarray(out.ended_b)[: len(rows)])
        tokens.append(kept_br.sum(axis=1)[: len(rows)])
    ended_b = np.concatenate(ended)
    exchanges = list(zip(repeated, texts, strict=True))
    gold = [
        world.gold_reward(*exchange, end)
        for exchange, end in zip(exchanges, ended_b.tolist(), strict=True)
    ]
    return Pool(
        prompts=repeated,
        responses=texts,
        ended_b=ended_b,
        tokens_b=np.concatenate(tokens),
        gold_b=np.asarray(gold),
        told_b=np.asarray([lab_world.has_told(*exchange) for exchange in exchanges]),
        shape=(len(prompts), samples),
    )


def evading_gain(
    score_b: np.ndarray, silent_b: np.ndarray, told_b: np.ndarray, shape: tuple[int, int]
) -> float | None:
    """Returns what a shortcut that no detector sees can gain on a pool, mean over the prompts.

    It is the highest score of a prompt's responses that have a shortcut on which no detector fires,
    minus the highest score of its responses without a shortcut; None if no prompt has both.

    Args:
        score_b: scores of the reward model.
        silent_b: on which responses no detector fires.
        told_b: which responses have a shortcut that the method is told.
        shape: (P, S) of the pool.
    """

    def highest(kept_b: np.ndarray) -> np.ndarray:
        return np.where(kept_b, score_b, -np.inf).reshape(shape).max(axis=1)

    evading_p, clean_p = highest(told_b & silent_b), highest(~told_b)
    both_p = np.isfinite(evading_p) & np.isfinite(clean_p)
    return float((evading_p - clean_p)[both_p].mean()) if both_p.any() else None
