"""Encodes prompts and responses as token ids, through the tokenizer's own chat template.

- There is exactly one BOS if the tokenizer uses one.
- `date_string` is fixed, so that a score does not depend on the date.
- A conversation is truncated on the left, so that the end-of-turn token is kept.
- Text that a template writes after the end-of-turn token (ChatML's newline) is dropped, so that a
  SARM pools the end-of-turn token itself.
- Only the template makes special tokens. One that is spelled out in a prompt or a response is
  encoded as text; otherwise a policy could end its turn and write another one.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sarm_jax.io.errors import InputError

DATE_STRING = "26 Jul 2024"  # the Llama-3.1 template's own default
_MARGIN = "\u2003"  # white space around a mark, which a template may trim but does not write
_MARK = re.compile(
    f"({_MARGIN}?)(\ue000\\d\ue001)({_MARGIN}?)"
)  # stands for content that is encoded separately


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Encodes a user turn and the assistant header after it, which a policy continues."""
    return _encode(tokenizer, [{"role": "user", "content": prompt}], generation=True)


def encode_conversation(
    tokenizer: Any, prompt: str, response: str, max_length: int = 4096
) -> list[int]:
    """Encodes a prompt and its response: at most `max_length` ids, the last one ends the turn."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids = _encode(tokenizer, turns, generation=False)
    end = end_of_turn_id(tokenizer)
    ids = ids[: len(ids) - ids[::-1].index(end)]
    if len(ids) > max_length:
        bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
        ids = bos + ids[len(ids) - max_length + len(bos) :]
    return ids


def end_of_turn_id(tokenizer: Any) -> int:
    """Returns the special token that closes an assistant turn in the tokenizer's chat template.

    Raises:
        InputError: there is no chat template, or it closes a turn without a special token.
    """
    return _end_of_turn_id(tokenizer, getattr(tokenizer, "chat_template", None))


@lru_cache(maxsize=8)
def _end_of_turn_id(tokenizer: Any, _template: Any) -> int:
    """Finds `end_of_turn_id` once per template, because every conversation needs it."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    start = 1 if _adds_bos(tokenizer) else 0  # a BOS closes nothing
    for token in reversed(_encode(tokenizer, turns, generation=False)[start:]):
        if token in special:
            return token
    raise InputError("the tokenizer's chat template closes an assistant turn with no special token")


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end a response: end of turn, and the tokenizer's own eos."""
    ids = {end_of_turn_id(tokenizer), tokenizer.eos_token_id}
    return tuple(sorted(i for i in ids if i is not None))


def pad_id(tokenizer: Any) -> int:
    """Returns a token for padding that is not a stop token.

    Padding is recognised by its mask, so any other token will do.
    """
    stops = stop_ids(tokenizer)
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if candidate is not None and candidate not in stops:
            return candidate
    return next(i for i in range(len(stops) + 1) if i not in stops)


def pad_batch(
    rows: Sequence[Sequence[int]], length: int, pad: int, side: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """Pads rows of token ids.

    Args:
        rows: the token ids of each row.
        length: the padded length, at least that of the longest row.
        pad: the token to pad with.
        side: where the padding goes, "left" or "right".

    Returns:
        (tokens int32, mask bool), each `[len(rows), length]`.
    """
    tokens_bt = np.full((len(rows), length), pad, np.int32)
    mask_bt = np.zeros((len(rows), length), bool)
    for tokens_t, mask_t, ids in zip(tokens_bt, mask_bt, rows, strict=True):
        span = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        tokens_t[span], mask_t[span] = ids, True
    return tokens_bt, mask_bt


def bucket_length(length: int, smallest: int = 32, parts: int = 2) -> int:
    """Rounds a length up to 32, 48, 64, 96, 128, 192, …: few shapes, at most a third of padding.

    Above `smallest` there are `parts` sizes in an octave.
    """
    octave = 1 << max(length - 1, 1).bit_length() - 1
    step = max(octave // parts, 1)
    return max(smallest, -(-length // step) * step)


def scored_length(length: int) -> int:
    """Rounds a length up to 32, 64, 96, … 256, 320, …, for programs that are quick to compile."""
    return -(-bucket_length(length, parts=4) // 32) * 32


def _encode(tokenizer: Any, turns: list[dict[str, str]], generation: bool) -> list[int]:
    """Applies the chat template and encodes the result; `generation` adds the assistant header."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: use an "
            "instruction-tuned model, or add chat_template to its tokenizer_config.json"
        )
    content_of_mark = {}
    for number, turn in enumerate(turns):
        if _special_tokens(tokenizer).search(turn["content"]):
            mark = f"\ue000{number}\ue001"
            content_of_mark[mark] = turn["content"]
            turns[number] = turn | {"content": f"{_MARGIN}{mark}{_MARGIN}"}
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation, date_string=DATE_STRING
        )
    except Exception as error:  # a template is a program and may fail in any way
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} fails ({error}): "
            "repair chat_template.jinja or tokenizer_config.json there"
        ) from error
    ids: list[int] = []
    for piece, is_content in _pieces(text, content_of_mark):
        options = {"split_special_tokens": True} if is_content else {}
        ids += tokenizer(piece, add_special_tokens=False, **options)["input_ids"]
    if _adds_bos(tokenizer):
        bos = tokenizer.bos_token_id
        start = next((n for n, token in enumerate(ids) if token != bos), len(ids))
        ids = [bos, *ids[start:]]
    return ids


def _pieces(text: str, content_of_mark: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """Cuts the rendered text at its marks; yields (piece, True if it is content of a mark)."""
    end = 0
    for match in _MARK.finditer(text) if content_of_mark else ():
        before, mark, after = match.groups()
        content = content_of_mark[mark]
        yield text[end : match.start()], False
        # If the template has trimmed the margins, it would have trimmed the content as well.
        yield content if before and after else content.strip(), True
        end = match.end()
    yield text[end:], False


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> re.Pattern:
    """Builds a pattern for the texts of special tokens and for the first character of a mark."""
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.compile("|".join(map(re.escape, [*tokens, "\ue000"])))


@lru_cache(maxsize=8)
def _adds_bos(tokenizer: Any) -> bool:
    """Returns True if the tokenizer starts a text with its BOS token."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos
