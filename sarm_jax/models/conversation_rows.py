"""Rows of data files: prompts, demonstrations, preference pairs and the data of probes.

Texts and conversations may be mixed in a file, in the formats of TRL's data sets:

    prompts         {"prompt"}
    demonstrations  {"prompt", "response"}, {"prompt", "completion"} or {"messages"}
    pairs           {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} with conversations
                    that differ in their last turns only
    probes          demonstrations, pairs, or {"prompt", "candidates"}

A prompt is a text or a list of messages, the last of which is the user's. A response is a text or a
list of one assistant message. The rows that are returned have a `Prompt` under "prompt" and texts
under "response", "chosen", "rejected" and "candidates"; further fields are kept as they are.

Source: https://huggingface.co/docs/trl/dataset_formats
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import dropwhile
from typing import Any, TypeVar

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import short
from sarm_jax.io.row_files import place_of, read_rows
from sarm_jax.models.chat_template import chat_template
from sarm_jax.models.conversation import (
    Conversation,
    Message,
    Prompt,
    parse_messages,
    parse_prompt,
    parse_reply,
    split_reply,
)

Row = dict[str, Any]
Parsed = TypeVar("Parsed")
SIDES = ("chosen", "rejected")
_ANSWERS = {"response", "completion"}  # a row with one of them is a demonstration
_MESSAGES = {"prompt", "response", "completion", "messages", *SIDES}  # may be lists of messages
# What a chat template or a processor would add to the text of a conversation.
_CONTEXT = ("tools", "images", "image", "videos", "audios", "chat_template_kwargs")


def read_prompts(path: str) -> list[Prompt]:
    """Reads the `prompt` fields of a file.

    Raises:
        InputError: names the file, the line and the field that is wrong; so do the other readers.
    """
    return _read(path, prompt_of)


def read_demonstrations(path: str) -> list[Row]:
    """Reads demonstrations, as rows with "prompt" and "response"."""
    return _read(path, _demonstration)


def read_responses(path: str) -> list[tuple[Prompt, tuple[str, ...]]]:
    """Reads demonstrations and preference pairs; a file may have rows of both forms.

    Returns:
        (prompt, its response or both sides of the pair) for each row.
    """

    def parse(row: Row) -> tuple[Prompt, tuple[str, ...]]:
        if all(side in row for side in SIDES) and not _ANSWERS & set(row):
            pair = _pair(row)
            return pair["prompt"], tuple(pair[side] for side in SIDES)
        parsed = _demonstration(row)
        return parsed["prompt"], (parsed["response"],)

    return _read(path, parse)


def read_pairs(path: str, unequal: bool = False) -> list[Row]:
    """Reads preference pairs, as rows with "prompt", "chosen" and "rejected".

    Args:
        path: the file. A row may have a text in a field "source".
        unequal: refuse a pair whose two sides are the same.
    """

    def parse(row: Row) -> Row:
        pair = _pair(row)
        if not isinstance(pair.get("source", ""), str):
            raise InputError("field 'source' must be str")
        if unequal and pair["chosen"] == pair["rejected"]:
            raise InputError("fields 'chosen' and 'rejected' are the same")
        return pair

    return _read(path, parse)


def read_probe_rows(path: str, mode: str) -> list[Row]:
    """Reads the data of probes; `features.probing.check_probe` checks the responses.

    Args:
        path: the file.
        mode: "pairs" or "bestofn", as in `ProbeConfig`.
    """
    return _read(path, _candidates if mode == "bestofn" else _probed)


def check_turns(tokenizer: Any, prompts: Sequence[Prompt], path: str) -> None:
    """Checks that a tokenizer's chat template takes the turns of all prompts of a file.

    Args:
        tokenizer: the tokenizer of a policy or of a SARM.
        prompts: the prompts, one for each row of the file.
        path: the file.

    Raises:
        InputError: names the first row whose turns the template refuses.
    """
    seen = set()
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, Conversation) or prompt.roles in seen:
            continue
        seen.add(prompt.roles)
        try:
            chat_template(tokenizer).check_turns(prompt)
        except InputError as error:
            raise InputError(f"{place_of(path, number)}: {error}") from None


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """Returns the prompt of a row.

    Raises:
        InputError: the field is missing, empty or no prompt.
    """
    return _not_blank(parse_prompt(_field(row, "prompt"), "field 'prompt'"), "prompt")


def _read(path: str, parse: Callable[[Row], Parsed]) -> list[Parsed]:
    """Reads and parses the rows of a file; names the row in the error of a parser."""
    parsed = []
    for number, row in enumerate(read_rows(path, {}), 1):
        try:
            _check_context(row)
            parsed.append(parse(row))
        except InputError as error:
            raise InputError(f"{place_of(path, number)}: {error}") from None
    return parsed


def _demonstration(row: Row) -> Row:
    if "messages" in row and not _ANSWERS & set(row):
        messages = parse_messages(row["messages"], "field 'messages'")
        prompt, response = split_reply(messages, "field 'messages'")
        if row.get("prompt") is not None and not _begins_with(messages, prompt_of(row)):
            raise InputError("field 'messages' does not begin with field 'prompt'")
        return row | {"prompt": prompt, "response": response}
    prompt = prompt_of(row)
    answers = [row.get(field) for field in _ANSWERS]
    is_twice = all(isinstance(value, str) or _is_messages(value) for value in answers)
    if is_twice and _reply(row, "response") != _reply(row, "completion"):
        raise InputError("fields 'response' and 'completion' are both given and differ")
    field = "completion" if "completion" in row and "response" not in row else "response"
    return row | {"prompt": prompt, "response": _reply(row, field)}


def _begins_with(messages: Sequence[Message], prompt: Prompt) -> bool:
    """Returns True if the messages begin with a prompt, system turns at the start left out."""

    def without_system(turns: Iterable[Message]) -> list[Message]:
        return list(dropwhile(lambda turn: turn.role == "system", turns))

    turns = [Message("user", prompt)] if isinstance(prompt, str) else prompt.messages
    start = without_system(turns)
    return without_system(messages)[: len(start)] == start


def _pair(row: Row) -> Row:
    """Parses a pair; one whose sides are whole conversations may have no prompt of its own."""
    are_lists = [isinstance(row.get(side), list) for side in SIDES]
    given = None if "prompt" not in row and all(are_lists) else prompt_of(row)
    sides = {side: _field(row, side) for side in SIDES}
    if given is not None and not any(_is_whole(value) for value in sides.values()):
        return row | {"prompt": given} | {side: _reply(row, side) for side in SIDES}
    if not all(are_lists):
        raise InputError("fields 'chosen' and 'rejected' must both be lists of messages")
    exchanges = {
        side: split_reply(parse_messages(value, f"field {side!r}"), f"field {side!r}")
        for side, value in sides.items()
    }
    (prompt, chosen), (other, rejected) = exchanges.values()
    if prompt != other:
        raise InputError(
            "fields 'chosen' and 'rejected' differ before their last turns: they are responses to "
            "different prompts"
        )
    if given not in (None, prompt):
        raise InputError("field 'chosen' holds another conversation than field 'prompt'")
    return row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _probed(row: Row) -> Row:
    """Parses what is a conversation in a row of mode pairs."""
    if "response" not in row and any(side in row for side in SIDES):
        if any(isinstance(row.get(side), list) for side in SIDES):
            return _pair(row)
    elif "response" not in row and ("completion" in row or "messages" in row):
        return _demonstration(row)
    prompt = prompt_of(row)
    if isinstance(row.get("response"), list):
        row = row | {"response": parse_reply(row["response"], "field 'response'")}
    return row | {"prompt": prompt}


def _candidates(row: Row) -> Row:
    """Parses what is a conversation in a row of mode bestofn."""
    prompt, candidates = prompt_of(row), row.get("candidates")
    if isinstance(candidates, list):
        candidates = [
            parse_reply(item, f"field 'candidates'[{number}]") if isinstance(item, list) else item
            for number, item in enumerate(candidates)
        ]
        row = row | {"candidates": candidates}
    return row | {"prompt": prompt}


def _is_messages(value: Any) -> bool:
    """Returns True for a list that holds messages."""
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def _is_whole(value: Any) -> bool:
    """Returns True for a list of messages that is more than one response."""
    return isinstance(value, list) and len(value) > 1


def _reply(row: Row, field: str) -> str:
    value = _field(row, field)
    if not isinstance(value, (str, list)):
        raise InputError(f"field {field!r} must be str, found {short(value)}")
    return _not_blank(parse_reply(value, f"field {field!r}"), field)


def _field(row: Mapping[str, Any], field: str) -> Any:
    if field not in row:
        raise InputError(f"field {field!r} is missing, found {sorted(row)}")
    return row[field]


def _not_blank(value: Parsed, field: str) -> Parsed:
    if isinstance(value, str) and not value.strip():
        raise InputError(f"field {field!r} is empty")
    return value


def _check_context(row: Mapping[str, Any]) -> None:
    """Refuses a conversation that is read with tools or images, which no model here would get."""
    if any(_is_messages(row.get(field)) for field in _MESSAGES):
        for field in _CONTEXT:
            if row.get(field):
                raise InputError(f"field {field!r}: not supported, found {short(row[field])}")
