"""Prompts: a text, or a conversation with system turns and earlier assistant turns.

    "Which fruit do lemurs like?"
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which fruit …?"}]

The last turn of a prompt is the user's. A conversation of one user turn alone is the same prompt as
its text, and becomes that text when it is parsed. Prompts are hashable, so that they can be counted
and grouped.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import short

ROLES = ("system", "user", "assistant")
# Fields of a message that chat templates write into the text. Without them it would be another one.
UNSUPPORTED = (
    "tools",
    "tool_calls",
    "tool_call_id",
    "images",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
)


class Message(NamedTuple):
    """A turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A prompt of several turns, or of a system turn and the user's; the user's comes last."""

    messages: tuple[Message, ...]

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the turns."""
        return tuple(message.role for message in self.messages)


Prompt = str | Conversation
PromptValue = Prompt | Sequence[Mapping[str, Any]]  # what `parse_prompt` parses


def parse_prompt(value: Any, name: str) -> Prompt:
    """Parses a prompt from its JSON value: a text, or a list of {"role", "content"} messages.

    Args:
        value: the value; a prompt that was parsed before stays as it is.
        name: what messages call the value, such as "field 'prompt'".

    Raises:
        InputError: the value is something else, or the last message is not the user's.
    """
    if isinstance(value, (str, Conversation)):
        return value
    return as_prompt(parse_messages(value, name), name)


def as_prompt(messages: Sequence[Message], name: str) -> Prompt:
    """Makes a prompt of one or more messages; one user turn alone becomes its text.

    Raises:
        InputError: the last message is not the user's.
    """
    if messages[-1].role != "user":
        raise InputError(
            f"{name}[{len(messages) - 1}].role: the last turn of a prompt must be 'user', found "
            f"{messages[-1].role!r}"
        )
    if len(messages) == 1:
        return messages[0].content
    return Conversation(tuple(messages))


def parse_reply(value: Any, name: str) -> str:
    """Parses a response from its JSON value: a text, or a list of one assistant message.

    Raises:
        InputError: the value is something else, or a message without a text.
    """
    if isinstance(value, str):
        return value
    messages = parse_messages(value, name)
    if len(messages) > 1:
        raise InputError(f"{name} must hold one assistant message, found {len(messages)} messages")
    if messages[0].role != "assistant":
        raise InputError(f"{name}[0].role must be 'assistant', found {messages[0].role!r}")
    return messages[0].content


def split_reply(messages: Sequence[Message], name: str) -> tuple[Prompt, str]:
    """Splits a conversation into a prompt and the assistant turn at its end.

    Raises:
        InputError: the last message is not the assistant's, or the one before not the user's.
    """
    if messages[-1].role != "assistant":
        raise InputError(
            f"{name}[{len(messages) - 1}].role: the last turn must be 'assistant', found "
            f"{messages[-1].role!r}"
        )
    if len(messages) == 1:
        raise InputError(f"{name} has no prompt before the turn of the assistant")
    return as_prompt(messages[:-1], name), messages[-1].content


def parse_messages(value: Any, name: str) -> list[Message]:
    """Parses a list of one or more messages.

    Raises:
        InputError: names the message and its field that is wrong.
    """
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{name} must be str or a list of messages, found {short(value)}")
    if not value:
        raise InputError(f"{name} is empty")
    return [_parse_message(item, f"{name}[{number}]") for number, item in enumerate(value)]


def to_json(prompt: Prompt) -> str | list[dict[str, str]]:
    """Returns the JSON value of a prompt: a text stays one, a conversation lists its messages."""
    if isinstance(prompt, str):
        return prompt
    return [message._asdict() for message in prompt.messages]


def plain_text(prompt: Prompt) -> str:
    """Returns a prompt as one text for pages and tables; turns are headed by their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{role.capitalize()}: {content}" for role, content in prompt.messages)


def _parse_message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a message with role and content, found {short(value)}")
    for field in ("role", "content"):
        if field not in value:
            raise InputError(f"{name}.{field} is missing, found {short(sorted(map(str, value)))}")
    if value["role"] not in ROLES:
        raise InputError(
            f"{name}.role: expected system, user or assistant, found {short(value['role'])}"
        )
    for field in UNSUPPORTED:
        if value.get(field):
            raise InputError(f"{name}.{field}: not supported, found {short(value[field])}")
    return Message(value["role"], _parse_content(value["content"], f"{name}.content"))


def _parse_content(value: Any, name: str) -> str:
    """Returns the text of a message; it may be wrapped as the only part, which has type "text"."""
    content = value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        fields = {key for key, item in value[0].items() if item is not None}
        if fields == {"type", "text"} and value[0]["type"] == "text":
            content = value[0]["text"]
    if not isinstance(content, str):
        raise InputError(f"{name} must be a text, or a list of one text part, found {short(value)}")
    if not content.strip():
        raise InputError(f"{name} is empty")
    return content
