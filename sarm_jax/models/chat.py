"""(prompt, response) → token ids, through the tokenizer's own chat template.

Rules: exactly one BOS wherever the tokenizer uses one; a fixed `date_string`, so that a score
does not depend on today; truncation on the left, so that the end-of-turn token survives; what a
template writes after the end-of-turn token (ChatML's newline) is dropped, so that the pooled token
of a SARM is the end-of-turn token itself; and special tokens come from the template alone: one
spelled out in a prompt or response is text, so that no policy ends its turn and writes another.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sarm_jax.io.errors import InputError

DATE_STRING = "26 Jul 2024"  # the Llama-3.1 template's own default
_MARGIN = "\u2003"  # around a mark: white space to trim that no template writes itself
_MARK = re.compile(f"({_MARGIN}?)(\ue000\\d\ue001)({_MARGIN}?)")  # of content encoded apart


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Ids of a user turn followed by the assistant header: what a policy continues."""
    return _encode(tokenizer, [{"role": "user", "content": prompt}], generation=True)


def encode_conversation(
    tokenizer: Any, prompt: str, response: str, max_length: int = 4096
) -> list[int]:
    """Ids of a finished exchange, at most `max_length`, ending in the end-of-turn token."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    ids = _encode(tokenizer, turns, generation=False)
    end = end_of_turn_id(tokenizer)
    ids = ids[: len(ids) - ids[::-1].index(end)]
    if len(ids) > max_length:
        bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
        ids = bos + ids[len(ids) - max_length + len(bos) :]
    return ids


def end_of_turn_id(tokenizer: Any) -> int:
    """The special token that closes an assistant turn in this tokenizer's chat template."""
    return _end_of_turn_id(tokenizer, getattr(tokenizer, "chat_template", None))


@lru_cache(maxsize=8)
def _end_of_turn_id(tokenizer: Any, _template: Any) -> int:
    """`end_of_turn_id`, found once for a template: every conversation asks for it."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    start = 1 if _adds_bos(tokenizer) else 0  # a BOS closes nothing
    for token in reversed(_encode(tokenizer, turns, generation=False)[start:]):
        if token in special:
            return token
    raise InputError("the tokenizer's chat template closes an assistant turn with no special token")


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: end of turn, and the tokenizer's own eos."""
    ids = {end_of_turn_id(tokenizer), tokenizer.eos_token_id}
    return tuple(sorted(i for i in ids if i is not None))


def pad_id(tokenizer: Any) -> int:
    """A filler that is never a stop token. Padding is found by mask, so any other id will do."""
    stops = stop_ids(tokenizer)
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if candidate is not None and candidate not in stops:
            return candidate
    return next(i for i in range(len(stops) + 1) if i not in stops)


def pad_batch(
    rows: Sequence[Sequence[int]], length: int, pad: int, side: str = "right"
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32, mask bool), each `[len(rows), length]`; `side` is where the padding goes."""
    tokens_bt = np.full((len(rows), length), pad, np.int32)
    mask_bt = np.zeros((len(rows), length), bool)
    for tokens_t, mask_t, ids in zip(tokens_bt, mask_bt, rows, strict=True):
        place = slice(0, len(ids)) if side == "right" else slice(length - len(ids), length)
        tokens_t[place], mask_t[place] = ids, True
    return tokens_bt, mask_bt


def bucket_length(length: int, smallest: int = 32, parts: int = 2) -> int:
    """The next of 32, 48, 64, 96, 128, 192, …: few compiled shapes, at most a third wasted.

    Above `smallest` there are `parts` sizes in an octave.
    """
    octave = 1 << max(length - 1, 1).bit_length() - 1
    step = max(octave // parts, 1)
    return max(smallest, -(-length // step) * step)


def scored_length(length: int) -> int:
    """The next of 32, 64, 96, … 256, 320, …: for programs that are quick to compile."""
    return -(-bucket_length(length, parts=4) // 32) * 32


def _encode(tokenizer: Any, turns: list[dict[str, str]], generation: bool) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: use an "
            "instruction-tuned model, or add chat_template to its tokenizer_config.json"
        )
    spelled = {}
    for number, turn in enumerate(turns):
        if _special_tokens(tokenizer).search(turn["content"]):
            mark = f"\ue000{number}\ue001"
            spelled[mark] = turn["content"]
            turns[number] = turn | {"content": f"{_MARGIN}{mark}{_MARGIN}"}
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation, date_string=DATE_STRING
        )
    except Exception as error:  # a template is a program: it may fail in any way
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} fails ({error}): "
            "repair chat_template.jinja or tokenizer_config.json there"
        ) from error
    ids: list[int] = []
    for piece, written in _pieces(text, spelled):
        options = {"split_special_tokens": True} if written else {}
        ids += tokenizer(piece, add_special_tokens=False, **options)["input_ids"]
    if _adds_bos(tokenizer):
        bos = tokenizer.bos_token_id
        start = next((n for n, token in enumerate(ids) if token != bos), len(ids))
        ids = [bos, *ids[start:]]
    return ids


def _pieces(text: str, spelled: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """The rendered text, cut where a mark stands for content: (piece, is it such content)."""
    done = 0
    for found in _MARK.finditer(text) if spelled else ():
        before, mark, after = found.groups()
        content = spelled[mark]
        yield text[done : found.start()], False
        yield content if before and after else content.strip(), True  # as the template trims
        done = found.end()
    yield text[done:], False


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> re.Pattern:
    """Matches what stands for a special token, or what a mark begins with."""
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return re.compile("|".join(map(re.escape, [*tokens, "\ue000"])))


@lru_cache(maxsize=8)
def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos
