"""The prompts of a run: read, encoded and checked before anything else, then dealt in batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sarm_jax.chat import encode_prompt, pad_batch, pad_id
from sarm_jax.errors import InputError
from sarm_jax.jsonl import line_of, read_jsonl


def read_prompts(path: str) -> list[str]:
    """The `prompt` fields of a JSONL file."""
    return [row["prompt"] for row in read_jsonl(path, {"prompt": str})]


def encode_prompts(
    prompts: Sequence[str], tokenizer: Any, max_tokens: int, source: str = ""
) -> list[list[int]]:
    """Tokens with the chat template; `source` names the file in the message on a long prompt."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for number, row in enumerate(rows, start=1):
        if len(row) > max_tokens:
            place = f"{source or 'prompts'}:{line_of(source, number)}"
            raise InputError(
                f"{place}: the prompt has {len(row)} tokens with its "
                f"chat template, more than ppo.max_prompt_tokens={max_tokens}"
            )
    return rows


class PromptDeck:
    """Every prompt once per pass, in an order that depends on (seed, pass) alone.

    The batch of a step is therefore a function of the step, and a resumed run deals on where it
    stopped. All batches share one padded length `[B, P]`, padded on the left.
    """

    def __init__(
        self, prompts: Sequence[str], tokenizer: Any, max_tokens: int, seed: int, source: str = ""
    ):
        """The arguments are those of `encode_prompts`; `seed` orders the batches."""
        self.prompts, self._seed, self._pad = list(prompts), seed, pad_id(tokenizer)
        self._deal = -1, np.zeros(0, np.int64)  # the last pass asked for, and its order
        self._rows = encode_prompts(prompts, tokenizer, max_tokens, source)
        self.longest = max(map(len, self._rows))  # in tokens
        self.length = -8 * (-self.longest // 8)  # one shape for all: no buckets

    def deal(self, step: int, batch_size: int) -> tuple[list[str], np.ndarray, np.ndarray]:
        """(texts, tokens `[B, P]` int32, mask `[B, P]` bool) of batch number `step`."""
        chosen = self._chosen(step, batch_size)
        tokens_bp, mask_bp = pad_batch(
            [self._rows[i] for i in chosen], self.length, self._pad, side="left"
        )
        return [self.prompts[i] for i in chosen], tokens_bp, mask_bp

    def lengths(self, step: int, batch_size: int) -> np.ndarray:
        """Tokens of each prompt of batch number `step`, `[B]`."""
        return np.asarray([len(self._rows[i]) for i in self._chosen(step, batch_size)])

    def _chosen(self, step: int, batch_size: int) -> list[int]:
        places = range(step * batch_size, (step + 1) * batch_size)
        return [self._order(p // len(self._rows))[p % len(self._rows)] for p in places]

    def _order(self, deal: int) -> np.ndarray:
        if deal != self._deal[0]:
            order = np.random.default_rng((self._seed, deal)).permutation(len(self._rows))
            self._deal = deal, order
        return self._deal[1]
