"""Encodes prompts and responses as token ids, through the tokenizer's own chat template.

- There is exactly one BOS at the start if the tokenizer uses one; a template may write more of
  them between the turns of a conversation.
- A conversation is truncated on the left, so that the end-of-turn token is kept.
- Text that a template writes after the end-of-turn token (ChatML's newline, or the header of
  another turn) is dropped for a SARM, so that it pools the end-of-turn token itself. A sequence
  classifier reads all of it, as it does in transformers.
- A special token that is spelled out in a prompt or a response is encoded as text.
- Every turn of a conversation is encoded, once and unchanged.
"""

import json
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from sarm_jax.io.errors import InputError
from sarm_jax.io.libraries import as_input_error
from sarm_jax.models.chat_template import (
    Piece,
    chat_template,
    special_tokens,
    spells_special_token,
)
from sarm_jax.models.conversation import Prompt


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Encodes a prompt and the assistant header after it, which a policy continues."""
    return _encode(tokenizer, chat_template(tokenizer).prompt(prompt))


def encode_conversation(
    tokenizer: Any,
    prompt: Prompt,
    response: str,
    max_length: int = 4096,
    ends_with_turn: bool = True,
) -> list[int]:
    """Encodes a prompt and its response: at most `max_length` ids, the last one ends the turn.

    With `ends_with_turn` False, what the template writes after the turn is kept as well.
    """
    template = chat_template(tokenizer)
    pieces = template.exchange(prompt, response)
    ids = _encode(tokenizer, pieces)
    end = _ends(tokenizer, ids, pieces)[-template.ends_after_response]
    if ends_with_turn:
        ids = ids[: end + 1]
    if len(ids) > max_length:
        bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
        ids = bos + ids[len(ids) - max_length + len(bos) :]
    return ids


def end_of_turn_id(tokenizer: Any) -> int:
    """Returns the special token that closes an assistant turn in the tokenizer's chat template.

    Raises:
        InputError: there is no chat template, or it is not usable.
    """
    return tokenizer.convert_tokens_to_ids(chat_template(tokenizer).end_token)


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end a response: end of turn, and the tokenizer's own eos.

    A policy stops at the tokens of its generation_config.json as well, see `Llama.stop_ids`.
    """
    ids = {end_of_turn_id(tokenizer), tokenizer.eos_token_id}
    return tuple(sorted(i for i in ids if i is not None))


def pad_id(tokenizer: Any, stops: Sequence[int] | None = None) -> int:
    """Returns a token for padding that is not a stop token.

    Padding is recognised by its mask, so any other token will do.

    Args:
        tokenizer: the tokenizer.
        stops: the stop tokens, such as a policy's; by default those of the tokenizer.
    """
    stops = stop_ids(tokenizer) if stops is None else stops
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id):
        if candidate is not None and candidate not in stops:
            return candidate
    return next(i for i in range(len(stops) + 1) if i not in stops)


def decode(tokenizer: Any, ids: Sequence[int], keep_special: bool = False) -> str:
    """Decodes what a policy wrote, without special tokens unless `keep_special`.

    The text is never tidied: a tokenizer may ask for that (`clean_up_tokenization_spaces`), but the
    policy wrote "x != y", and not "x!= y".
    """
    options = {"skip_special_tokens": not keep_special, "clean_up_tokenization_spaces": False}
    with as_input_error(f"the tokenizer of {tokenizer.name_or_path!r} cannot decode"):
        return tokenizer.decode(ids, **options)


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


def _ends(tokenizer: Any, ids: Sequence[int], pieces: Sequence[Piece]) -> list[int]:
    """Returns the positions of the end-of-turn tokens.

    Raises:
        InputError: not every one that the template wrote has become a token.
    """
    token, special = chat_template(tokenizer).end_token, special_tokens(tokenizer)
    end = end_of_turn_id(tokenizer)
    ends = [n for n, i in enumerate(ids) if i == end]
    written = [m[0] for p in pieces if not p.is_content for m in special.finditer(p.text)]
    if len(ends) != written.count(token):
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path!r} makes {len(ends)} tokens {token!r} of "
            f"{written.count(token)} that the chat template wrote: its tokens overlap"
        )
    return ends


def _encode(tokenizer: Any, pieces: Sequence[Piece]) -> list[int]:
    """Encodes a rendered text as a whole; pieces that are content have no special tokens."""
    special = special_tokens(tokenizer)
    text = "".join(piece.text for piece in pieces)
    with as_input_error(f"the tokenizer of {tokenizer.name_or_path!r} cannot encode {text[:60]!r}"):
        if any(p.is_content and spells_special_token(tokenizer, p.text) for p in pieces):
            core, renamed = _renamed_tokenizer(tokenizer)
            text = "".join(
                piece.text if piece.is_content else special.sub(lambda m: renamed[m[0]], piece.text)
                for piece in pieces
            )
            ids = core.encode(text, add_special_tokens=False).ids
        else:
            options = {"add_special_tokens": False, "split_special_tokens": False}
            ids = tokenizer(text, **options)["input_ids"]
    if _adds_bos(tokenizer):
        bos = tokenizer.bos_token_id
        start = next((n for n, token in enumerate(ids) if token != bos), len(ids))
        ids = [bos, *ids[start:]]
    return ids


@lru_cache(maxsize=2)
def _renamed_tokenizer(tokenizer: Any) -> tuple[Tokenizer, dict[str, str]]:
    """Returns a copy of the tokenizer whose special tokens have new names, and these names.

    The copy encodes a spelled-out special token as any other text, in the middle of a text whose
    own special tokens have the new names. They are random, so that no text contains them.
    """
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    special = [token["content"] for token in fields["added_tokens"] if token["special"]]
    special += [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    prefix = secrets.token_hex(8)
    renamed = {name: f"\ue000{prefix}.{number}\ue001" for number, name in enumerate(special)}
    for token in fields["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
    model = fields["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(name, name): i for name, i in model["vocab"].items()}
    else:  # Unigram has pairs of a token and its score
        model["vocab"] = [[renamed.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = renamed.get(model["unk_token"], model["unk_token"])
    fields |= {"truncation": None, "padding": None, "post_processor": None}
    return Tokenizer.from_str(json.dumps(fields)), renamed


@lru_cache(maxsize=8)
def _adds_bos(tokenizer: Any) -> bool:
    """Returns True if the tokenizer starts a text with its BOS token."""
    bos = tokenizer.bos_token_id
    with as_input_error(f"the tokenizer of {tokenizer.name_or_path!r} cannot encode 'a'"):
        return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
