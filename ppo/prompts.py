"""The prompts of a run: read, encoded and checked before anything else, then dealt in batches."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo.config import PPOConfig
from ppo.prompt_lengths import padded_lengths
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import line_of, read_jsonl
from sarm_jax.models.chat import encode_prompt, pad_batch, pad_id

LOG = logging.getLogger(__name__)


def read_prompts(path: str) -> list[str]:
    """Reads the `prompt` fields of a JSONL file."""
    return [row["prompt"] for row in read_jsonl(path, {"prompt": str})]


@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
    """Prompts that fit: their texts, their tokens with the chat template, and what was done to fit.

    A truncated prompt has its shortened text here, so that policy and reward model see the same.
    """

    texts: list[str]
    rows: list[list[int]]
    dropped: int = 0
    truncated: int = 0


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Any,
    max_tokens: int,
    source: str = "prompts",
    long_prompts: str = "error",
) -> EncodedPrompts:
    """Encodes prompts with the chat template, each in at most `max_tokens` tokens.

    Args:
        source: the file that messages name.
        long_prompts: what to do with a prompt of more tokens: "error", "drop" it, or "truncate" the
            beginning of the user's text, which leaves the template whole.

    Raises:
        InputError: a prompt is too long and `long_prompts` is "error"; all are dropped; or the
            template alone has more than `max_tokens` tokens.
    """
    encoded = EncodedPrompts([], [])
    dropped = truncated = 0
    for number, text in enumerate(prompts, start=1):
        row = encode_prompt(tokenizer, text)
        if len(row) > max_tokens:
            if long_prompts == "drop":
                dropped += 1
                continue
            if long_prompts == "error":
                raise InputError(
                    f"{_place(source, number, row)}, more than ppo.max_prompt_tokens={max_tokens}: "
                    "raise it, or set ppo.long_prompts=drop or ppo.long_prompts=truncate"
                )
            text = _fitting_end(text, tokenizer, max_tokens)
            if not text:
                template = len(encode_prompt(tokenizer, ""))
                raise InputError(
                    f"{_place(source, number, row)}; without the user's text it has {template} "
                    f"tokens, which leaves no room in ppo.max_prompt_tokens={max_tokens}"
                )
            row = encode_prompt(tokenizer, text)
            truncated += 1
        encoded.texts.append(text)
        encoded.rows.append(row)
    if not encoded.rows:
        raise InputError(
            f"{source}: all {dropped} prompts have more than ppo.max_prompt_tokens={max_tokens} "
            "tokens, and ppo.long_prompts=drop leaves none"
        )
    if dropped or truncated:
        LOG.info(
            "%s: %d of %d prompts have more than %d tokens and were %s (ppo.long_prompts=%s)",
            source, dropped or truncated, len(prompts), max_tokens,
            "dropped" if dropped else "truncated on the left", long_prompts,
        )  # fmt: skip
    return dataclasses.replace(encoded, dropped=dropped, truncated=truncated)


def _place(source: str, number: int, row: Sequence[int]) -> str:
    """Names the line of a prompt and says how long it is."""
    line = line_of(source, number)
    return f"{source}:{line}: the prompt has {len(row)} tokens with its chat template"


def _fitting_end(text: str, tokenizer: Any, max_tokens: int) -> str:
    """Returns the longest end of the text that fits, by bisection; empty if none does."""
    too_early, fits = 0, len(text)
    while fits - too_early > 1:
        middle = (too_early + fits) // 2
        if len(encode_prompt(tokenizer, text[middle:])) <= max_tokens:
            fits = middle
        else:
            too_early = middle
    return text[fits:]


class PromptDeck:
    """Every prompt once per pass, in an order that depends on (seed, pass) alone.

    The batch of a step is therefore a function of the step, and a resumed run deals on where it
    stopped. A batch is padded on the left, to the least of a few lengths (`ppo.prompt_lengths`)
    that holds its longest prompt.
    """

    def __init__(
        self, prompts: Sequence[str], tokenizer: Any, config: PPOConfig, source: str = "prompts"
    ):
        self.source, self._given = source, len(prompts)
        self._batch_size, self._seed, self._pad = config.batch_size, config.seed, pad_id(tokenizer)
        self._order_of = -1, np.zeros(0, np.int64)  # the last pass asked for, and its order
        self._encoded = encode_prompts(
            prompts, tokenizer, config.max_prompt_tokens, source, config.long_prompts
        )
        self._lengths = np.asarray([len(row) for row in self._encoded.rows])
        self.padded_lengths = padded_lengths(
            self._lengths, config.batch_size, config.max_new_tokens
        )

    @property
    def prompts(self) -> list[str]:
        """Texts of all prompts, truncated ones as they are used."""
        return self._encoded.texts

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(self._lengths.max())

    def summary(self) -> dict[str, Any]:
        """Counts the prompts of the file, dropped and truncated ones, for summary.json."""
        return {
            "source": self.source,
            "prompts": self._given,
            "dropped": self._encoded.dropped,
            "truncated": self._encoded.truncated,
            "padded_lengths": list(self.padded_lengths),
        }

    def deal(self, step: int) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Returns (texts, tokens `[B, P]` int32, mask `[B, P]` bool) of batch number `step`."""
        indices = self._batch(step)
        rows = [self._encoded.rows[i] for i in indices]
        tokens_bp, mask_bp = pad_batch(rows, self.padded_length(step), self._pad, side="left")
        return [self.prompts[i] for i in indices], tokens_bp, mask_bp

    def texts(self, step: int) -> list[str]:
        """Returns the prompts of batch number `step`."""
        return [self.prompts[i] for i in self._batch(step)]

    def lengths(self, step: int) -> np.ndarray:
        """Returns the tokens of each prompt of batch number `step`, `[B]`."""
        return self._lengths[self._batch(step)]

    def padded_length(self, step: int) -> int:
        """Returns the columns P that batch number `step` is padded to."""
        place = np.searchsorted(self.padded_lengths, self.lengths(step).max())
        return self.padded_lengths[place]

    def _batch(self, step: int) -> np.ndarray:
        """Indices of the prompts of a batch, which may reach into the next passes."""
        places = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        passes, places = np.divmod(places, len(self._lengths))
        return np.concatenate([self._order(int(n))[places[passes == n]] for n in np.unique(passes)])

    def _order(self, number: int) -> np.ndarray:
        """The order of pass `number`."""
        if number != self._order_of[0]:
            order = np.random.default_rng((self._seed, number)).permutation(len(self._lengths))
            self._order_of = number, order
        return self._order_of[1]
