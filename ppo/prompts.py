"""Reads, encodes and checks the prompts of a run, and deals them in batches."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ppo.config import PPOConfig
from ppo.prompt_lengths import padded_lengths
from sarm_jax.io.errors import InputError
from sarm_jax.io.row_files import place_of
from sarm_jax.models.chat import encode_prompt, pad_batch, pad_id
from sarm_jax.models.conversation import Conversation, Message, Prompt, as_prompt
from sarm_jax.models.conversation_rows import check_turns

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EncodedPrompts:
    """Prompts within the limit of tokens.

    Attributes:
        texts: the prompts, texts and conversations. A truncated prompt is the shortened one here,
            so that the policy and the reward model read the same.
        rows: their tokens, with the chat template.
        dropped: number of prompts that were too long and dropped.
        truncated: number of prompts that were too long and truncated.
    """

    texts: list[Prompt]
    rows: list[list[int]]
    dropped: int = 0
    truncated: int = 0


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    max_tokens: int,
    source: str = "prompts",
    long_prompts: str = "error",
) -> EncodedPrompts:
    """Encodes prompts with the chat template, each in at most `max_tokens` tokens.

    Args:
        prompts: texts and conversations.
        tokenizer: tokenizer of the policy.
        max_tokens: `ppo.max_prompt_tokens`.
        source: the file that messages name.
        long_prompts: what to do with a prompt of more tokens: "error", "drop" it, or "truncate" its
            beginning, which leaves the template whole, see `truncate`.

    Raises:
        InputError: the chat template refuses the turns of a conversation; a prompt is too long and
            `long_prompts` is "error"; all are dropped; or the template alone has more than
            `max_tokens` tokens.
    """
    check_turns(tokenizer, prompts, source)
    encoded = EncodedPrompts([], [])
    dropped = truncated = 0
    for number, prompt in enumerate(prompts, start=1):
        row = encode_prompt(tokenizer, prompt)
        if len(row) > max_tokens:
            if long_prompts == "drop":
                dropped += 1
                continue
            if long_prompts == "error":
                raise InputError(
                    f"{_length(source, number, row)}, more than "
                    f"ppo.max_prompt_tokens={max_tokens}: "
                    "raise it, or set ppo.long_prompts=drop or ppo.long_prompts=truncate"
                )
            fitting = truncate(prompt, tokenizer, max_tokens)
            if fitting is None:
                template = len(encode_prompt(tokenizer, _last_turns(prompt)("")))
                raise InputError(
                    f"{_length(source, number, row)}; without the user's text it has {template} "
                    f"tokens, which leaves no room in ppo.max_prompt_tokens={max_tokens}"
                )
            prompt, row = fitting, encode_prompt(tokenizer, fitting)
            truncated += 1
        encoded.texts.append(prompt)
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


def _length(source: str, number: int, row: Sequence[int]) -> str:
    """Describes the length of prompt `number`, with its file and row."""
    return f"{place_of(source, number)}: the prompt has {len(row)} tokens with its chat template"


def truncate(prompt: Prompt, tokenizer: Any, max_tokens: int) -> Prompt | None:
    """Cuts the beginning of a prompt that is too long; returns None if nothing fits.

    A conversation keeps its system turns at the start and loses its oldest other turns, up to a
    turn of the user. If the last turn alone is too long, its text loses its beginning.
    """
    if isinstance(prompt, Conversation):
        system, turns = _split_system(prompt)
        starts = [n for n, turn in enumerate(turns) if n and turn.role == "user"]
        for start in starts:
            shorter = as_prompt([*system, *turns[start:]], "prompt")
            if len(encode_prompt(tokenizer, shorter)) <= max_tokens:
                return shorter
    text = prompt if isinstance(prompt, str) else prompt.messages[-1].content
    with_text = _last_turns(prompt)
    too_early, fits = 0, len(text)
    while fits - too_early > 1:
        middle = (too_early + fits) // 2
        if len(encode_prompt(tokenizer, with_text(text[middle:]))) <= max_tokens:
            fits = middle
        else:
            too_early = middle
    return with_text(text[fits:]) if text[fits:].strip() else None


def _last_turns(prompt: Prompt) -> Callable[[str], Prompt]:
    """Returns a function of the user's last text: the prompt with it and the system turns alone."""
    system = [] if isinstance(prompt, str) else _split_system(prompt)[0]
    return lambda text: as_prompt([*system, Message("user", text)], "prompt")


def _split_system(prompt: Conversation) -> tuple[list[Message], list[Message]]:
    """Splits a conversation into the system turns at its start and the other turns."""
    turns = list(prompt.messages)
    count = next(n for n, turn in enumerate(turns) if turn.role != "system")
    return turns[:count], turns[count:]


class PromptDeck:
    """Deals batches of N prompts: every prompt once per pass, in an order given by (seed, pass).

    `ppo.batch_size` counts responses, so that N is `batch_size` / `samples_per_prompt`.

    The batch of a step is a function of the step, so that a resumed run continues with the batches
    that it would have had. A batch is padded on the left, to the smallest of a few lengths
    (`ppo.prompt_lengths`) that holds its longest prompt.

    Args:
        prompts: texts and conversations.
        tokenizer: tokenizer of the policy.
        config: sizes of a batch, seed, limit of tokens, and what to do with longer prompts.
        source: the file that messages name.

    Raises:
        InputError: as `encode_prompts` does.
    """

    def __init__(
        self, prompts: Sequence[Prompt], tokenizer: Any, config: PPOConfig, source: str = "prompts"
    ):
        self.source, self._prompts_in_file = source, len(prompts)
        self._batch_size, self._copies = config.prompts_per_batch, config.samples_per_prompt
        self._seed, self._pad = config.seed, pad_id(tokenizer)
        self._cached_order = -1, np.zeros(0, np.int64)  # a pass and its order
        self._encoded = encode_prompts(
            prompts,
            tokenizer,
            config.max_prompt_tokens,
            source=source,
            long_prompts=config.long_prompts,
        )
        self._lengths = np.asarray([len(row) for row in self._encoded.rows])
        self.padded_lengths = padded_lengths(
            self._lengths, config.prompts_per_batch, config.max_new_tokens
        )

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts; truncated ones are the shortened ones."""
        return self._encoded.texts

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt."""
        return int(self._lengths.max())

    def summary(self) -> dict[str, Any]:
        """Returns the part of summary.json about the prompts."""
        return {
            "source": self.source,
            "prompts": self._prompts_in_file,
            "dropped": self._encoded.dropped,
            "truncated": self._encoded.truncated,
            "padded_lengths": list(self.padded_lengths),
        }

    def deal(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens `[N, P]` int32, mask `[N, P]` bool) of batch number `step`."""
        rows = [self._encoded.rows[i] for i in self._batch(step)]
        return pad_batch(rows, self.padded_length(step), self._pad, side="left")

    def texts(self, step: int) -> list[Prompt]:
        """Returns the prompt of each of the B responses of batch number `step`."""
        return [self.prompts[i] for i in self._batch(step) for _ in range(self._copies)]

    def lengths(self, step: int) -> np.ndarray:
        """Returns the number of tokens of each prompt of batch number `step`, `[N]`."""
        return self._lengths[self._batch(step)]

    def padded_length(self, step: int) -> int:
        """Returns the number of columns P that batch number `step` is padded to."""
        index = np.searchsorted(self.padded_lengths, self.lengths(step).max())
        return self.padded_lengths[index]

    def _batch(self, step: int) -> np.ndarray:
        """Returns the indices of the prompts of a batch, which may extend into the next passes."""
        dealt = np.arange(step * self._batch_size, (step + 1) * self._batch_size)
        passes, positions = np.divmod(dealt, len(self._lengths))
        return np.concatenate(
            [self._order(int(n))[positions[passes == n]] for n in np.unique(passes)]
        )

    def _order(self, number: int) -> np.ndarray:
        """Returns the order of the prompts in pass `number`."""
        if number != self._cached_order[0]:
            order = np.random.default_rng((self._seed, number)).permutation(len(self._lengths))
            self._cached_order = number, order
        return self._cached_order[1]
