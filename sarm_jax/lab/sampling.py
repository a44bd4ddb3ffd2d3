"""Responses that a policy of the lab samples to prompts, in batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sarm_jax.models.chat import decode, encode_prompt, pad_batch, pad_id
from sarm_jax.models.llama import Llama
from sarm_jax.sampling.generate import Sampling, generate
from sarm_jax.sampling.refilling import generate_refilling

BATCH = 256  # responses sampled at a time
REFILLED = 1024  # responses sampled at a time if slots are refilled


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Responses to prompts.

    Attributes:
        prompts: the prompt of each response; those to one prompt are neighbours.
        responses: their texts.
        ended_b: which of them have an end of turn.
        tokens_b: their number of tokens, the end of turn included.
    """

    prompts: list[str]
    responses: list[str]
    ended_b: np.ndarray
    tokens_b: np.ndarray


def sample_responses(
    policy: Llama,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    slots: int = 0,
    shown: str = "responses",
) -> Sampled:
    """Samples `samples` responses to each prompt.

    Args:
        policy: the policy.
        tokenizer: its tokenizer.
        prompts: the prompts.
        samples: number of responses to each of them.
        max_new_tokens: length limit of a response in tokens.
        seed: seed of sampling.
        temperature: sampling temperature.
        slots: rows that are refilled as responses end, see `sampling.refilling`; 0: all rows of a
            batch run until the longest response has ended.
        shown: the label of the progress bar.
    """
    pad, key = pad_id(tokenizer, policy.stop_ids), jax.random.key(seed)
    encoded = {prompt: encode_prompt(tokenizer, prompt) for prompt in prompts}
    length = max(map(len, encoded.values()))
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    texts: list[str] = []
    ended, tokens = [], []
    size = REFILLED if slots else BATCH
    for batch, start in enumerate(tqdm(range(0, len(repeated), size), desc=shown, unit="batch")):
        rows = [encoded[prompt] for prompt in repeated[start : start + size]]
        filler = [rows[0]] * (size - len(rows)) if not slots else []
        tokens_bt, mask_bt = map(jnp.asarray, pad_batch([*rows, *filler], length, pad, side="left"))
        batch_key = jax.random.fold_in(key, batch)
        if slots:
            out = generate_refilling(
                policy, tokens_bt, mask_bt, key=batch_key, sampling=sampling, pad=pad, slots=slots
            )
        else:
            out = generate(
                policy,
                tokens_bt,
                mask_bt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                key=batch_key,
                pad_id=pad,
            )
        kept_br, tokens_br = np.asarray(out.mask_br), np.asarray(out.tokens_br)
        for b in range(len(rows)):
            texts.append(decode(tokenizer, tokens_br[b][kept_br[b]]))
        ended.append(np.asarray(out.ended_b)[: len(rows)])
        tokens.append(kept_br.sum(axis=1)[: len(rows)])
    return Sampled(repeated, texts, np.concatenate(ended), np.concatenate(tokens))
