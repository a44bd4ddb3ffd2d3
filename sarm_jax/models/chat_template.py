"""A tokenizer's chat template: renders turns, after a check of what the template does.

A template is a program that comes with a model, so nothing about it is assumed. Before its first
use it renders a few exchanges, which must show that

- prompt and response stand in the text, whatever they say;
- the response is followed by its end-of-turn token, and then by the same text every time;
- the text does not depend on chance. The clock is fixed, so that a score does not depend on it;
- for a policy: the prompt's text ends in the header with which an assistant turn begins.

For a conversation it renders turns with the same roles and other contents once more, which must
show that every turn stands in the text once and unchanged, and that the conversation ends like an
exchange. Where a template puts a system turn, and what it writes without one, is its own matter.

Only the template makes special tokens. One that is spelled out in a prompt or a response is text;
otherwise a policy could end its turn and write another one. The template renders such content, and
content that is empty, as a mark that is exchanged afterwards.
"""

import dataclasses
import datetime
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

from sarm_jax.io.errors import InputError
from sarm_jax.io.libraries import as_input_error
from sarm_jax.models.conversation import Message, Prompt

DATE_STRING = "26 Jul 2024"  # the Llama-3.1 template's own default
# Replaces the function with which a template asks for the date or the time. It is in the template's
# own language, since transformers passes no functions to a template.
_NOW = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
_CODES = [f"%{code}" for code in "-d -m -e -H -I -j -M -S".split()]
_CODES += [f"%{code}" for code in "aAbBcCdDeFfgGhHIjklmMnprRStTuUVwWxXyYzZ"]
_VALUES = {code: _NOW.strftime(code) for code in _CODES} | {"%s": f"{_NOW.timestamp():.0f}"}
_REPLACEMENTS = "".join(f"|replace({code!r}, {value!r})" for code, value in _VALUES.items())
_FIXED_CLOCK = (
    f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACEMENTS}|replace('%%', '%') }}}}"
    "{% endmacro +%}"  # the plus keeps a line break after it
)
_MARGIN = "\u2003"  # white space around a mark, which a template may trim but does not write
_MARK = re.compile(f"({_MARGIN}?)\ue000(\\d+)\ue001({_MARGIN}?)")  # stands for the n-th content
_EMPTY_TAGS = re.compile(r"\s*(<(\w+)>(\s*</\2>)?)?\s*$")  # such as <think></think>, or <think>
_SHOWN = 60  # characters of a rendered text in a message
_PROMPT = ("user",)  # roles of the turns of a prompt that is a text
_EXCHANGE = ("user", "assistant")
_PROMPTS = ("Which fruit do lemurs like?", "Add 2 and 3.\n\nThen stop.")
_RESPONSES = (
    "Lemurs like figs.",
    "5",
    "1. two\n2. and three\n\n```python\nprint(2 + 3)\n```",
    "Füße, 水, {braces}, [brackets], \"quotes\" and 'more' & so on. " * 20,
)
_REPETITIONS = 8  # of one exchange, whose text must not depend on chance


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a rendered text; `is_content` marks text that has no special tokens."""

    text: str
    is_content: bool = False


@dataclasses.dataclass(frozen=True)
class Frame:
    """Text that a template writes around the contents of turns.

    Attributes:
        order: numbers of the turns, in the order in which their contents stand in the text.
        texts: the text before the content of each of them and, last, the text after all contents.
    """

    order: tuple[int, ...]
    texts: tuple[str, ...]


class ChatTemplate:
    """A chat template that has been checked.

    Args:
        tokenizer: a tokenizer with a chat template.

    Attributes:
        closing: the text after every response. It starts with the end of turn, after white space.
        end_token: the special token that ends a turn.
        ends_after_response: how often `closing` has that token.

    Raises:
        InputError: there is no template, it fails, or a score would depend on more than the text.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: use an "
                "instruction-tuned model, or add chat_template to its tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        own = tokenizer.chat_template
        self._check_special_tokens()
        self._template = _FIXED_CLOCK + own if "strftime_now" in own else own
        self._special = special_tokens(tokenizer)
        self._as_parts = self._needs_parts()
        text = self._apply(_exchange(_PROMPTS[0], _RESPONSES[0]))
        self._header, _, self.closing = text.rpartition(_RESPONSES[0])
        frame = Frame((0, 1), (*self._split(self._header), self.closing))
        self._frames: dict[tuple[str, ...], Frame] = {_EXCHANGE: frame}
        self.end_token = self._end_token()
        tokens_after = [match[0] for match in self._special.finditer(self.closing)]
        self.ends_after_response = tokens_after.count(self.end_token)
        self._check_exchanges(text)

    def exchange(self, prompt: Prompt, response: str) -> list[Piece]:
        """Renders a prompt and an assistant turn; the last piece ends in `closing`.

        A template may treat some texts in its own way, such as dropping the thoughts of a response.
        Such texts are put into the place of others, because all of them are scored.

        Raises:
            InputError: the template fails, or refuses turns with these roles.
        """
        return self._render_unchanged(_exchange(prompt, response))

    def prompt(self, prompt: Prompt) -> list[Piece]:
        """Renders a prompt and the header of the assistant turn, which a policy continues.

        Raises:
            InputError: the template fails, or refuses turns with these roles.
        """
        return self._render_unchanged(_turns(prompt))

    def check_turns(self, prompt: Prompt) -> None:
        """Checks that the template renders prompts with these roles, and responses to them.

        Raises:
            InputError: the template fails, or leaves a turn out.
        """
        roles = tuple(turn.role for turn in _turns(prompt))
        self._frame(roles)
        self._frame((*roles, "assistant"))

    def check_generation(self) -> None:
        """Checks that a policy which continues a rendered prompt writes an assistant turn.

        Raises:
            InputError: the rendered prompt does not end in the assistant's header.
        """
        prompt = self._apply(_turns(_PROMPTS[0]))
        # The header may have an empty block of thoughts, or the prompt the beginning of one.
        if _EMPTY_TAGS.sub("", prompt) == _EMPTY_TAGS.sub("", self._header):
            return
        if prompt == self._apply(_turns(_PROMPTS[0]), generation=False):
            self._refuse(
                f"has no generation prompt: a policy would go on after {_shown(prompt)}, "
                f"but an assistant turn begins with {_shown(self._header)}"
            )
        self._refuse(
            f"ends a prompt with {_shown(prompt)}, but begins an assistant turn with "
            f"{_shown(self._header)}"
        )

    def _frame(self, roles: tuple[str, ...]) -> Frame:
        """Returns the text around turns with these roles; the last one is user or assistant."""
        if roles not in self._frames:
            self._frames[roles] = self._new_frame(roles)
        return self._frames[roles]

    def _new_frame(self, roles: tuple[str, ...]) -> Frame:
        if roles == _PROMPT:
            return Frame((0,), self._split(self._apply(_turns(_PROMPTS[0]))))
        turns = [Message(role, f"Turn {number} of this talk.") for number, role in enumerate(roles)]
        text, spots = self._apply(turns), []
        for number, turn in enumerate(turns):
            if (count := text.count(turn.content)) != 1:
                self._refuse(
                    f"{'repeats' if count else 'leaves out'} turn {number + 1} of the turns "
                    f"{', '.join(roles)}: it writes {_shown(text)}"
                )
            spots.append((text.index(turn.content), number))
        texts, end = [], 0
        for start, number in sorted(spots):
            texts.append(text[end:start])
            end = start + len(turns[number].content)
        expected = self._frame(_EXCHANGE if roles[-1] == "assistant" else _PROMPT).texts[-1]
        if text[end:] != expected:
            self._refuse(
                f"ends the turns {', '.join(roles)} with {text[end:]!r}, but others with "
                f"{expected!r}"
            )
        return Frame(tuple(number for _, number in sorted(spots)), (*texts, text[end:]))

    def _split(self, text: str) -> tuple[str, str]:
        """Splits a rendered text at the first of `_PROMPTS`."""
        before, found, after = text.rpartition(_PROMPTS[0])
        if not found:
            self._refuse(f"leaves out the prompt {_PROMPTS[0]!r}: it writes {_shown(text)}")
        return before, after

    def _check_special_tokens(self) -> None:
        """Refuses special tokens that are ordinary text, which would be left out of responses."""
        for token in self._tokenizer.added_tokens_decoder.values():
            if token.special and (len(token.content) < 2 or token.content.isalnum()):
                raise InputError(
                    f"the tokenizer of {self._tokenizer.name_or_path!r} declares {token.content!r} "
                    "a special token, which would be dropped from texts: name another one"
                )

    def _needs_parts(self) -> bool:
        """Returns True if the template reads content as a list of parts, not as a text."""
        outcomes: list[str | InputError] = []
        for as_parts in (False, True):
            self._as_parts = as_parts
            try:
                text = self._apply(_exchange(_PROMPTS[0], _RESPONSES[0]))
            except InputError as error:
                outcomes.append(error)
                continue
            if _RESPONSES[0] in text:
                return as_parts
            outcomes.append(text)
        first = outcomes[0]
        if isinstance(first, InputError):
            raise first
        self._refuse(f"leaves out the response {_RESPONSES[0]!r}: it writes {_shown(first)}")

    def _end_token(self) -> str:
        """Returns the special token that `closing` begins with."""
        if not self.closing.strip():
            self._refuse("does not close the assistant's turn: nothing follows the response")
        match = self._special.match(self.closing.lstrip())
        if not match:
            self._refuse(
                f"closes the assistant's turn with {_shown(self.closing, start=True)}, "
                "which does not begin with a special token"
            )
        return match[0]

    def _check_exchanges(self, text: str) -> None:
        """Checks that texts do not depend on chance, and that exchanges are rendered alike."""
        for _ in range(_REPETITIONS):
            again = self._apply(_exchange(_PROMPTS[0], _RESPONSES[0]))
            if again != text:
                self._refuse(f"does not always write the same: {_shown(text)} and {_shown(again)}")
        for prompt in _PROMPTS:
            for response in _RESPONSES:
                turns = _exchange(prompt, response)
                if fault := self._fault(self._render(turns), turns):
                    self._refuse(fault)

    def _render_unchanged(self, turns: Sequence[Message]) -> list[Piece]:
        """Renders turns; raises InputError unless all contents stand in the text unchanged."""
        pieces = self._render(turns)
        if self._fault(pieces, turns):
            pieces = self._render(turns, all_marked=True)
            if fault := self._fault(pieces, turns):
                self._refuse(fault)
        return pieces

    def _fault(self, pieces: Sequence[Piece], turns: Sequence[Message]) -> str:
        """Describes what is wrong with rendered turns; empty if nothing is."""
        roles = tuple(turn.role for turn in turns)
        frame, text = self._frame(roles), "".join(piece.text for piece in pieces)
        after = frame.texts[-1]
        parts: list[tuple[str, ...]] = []
        for number, before in zip(frame.order, frame.texts, strict=False):
            is_response = roles[number] == "assistant"
            parts.append((before, _EMPTY_TAGS.sub("", before)) if is_response else (before,))
            parts.append((turns[number].content,))
        if _consists_of(text, [*parts, (after,)]) and text.endswith(after):
            return ""
        ends = f"it ends in {_shown(text)}"
        contents = [_shown(turn.content, start=True) for turn in turns]
        if roles == _PROMPT:
            others = f"as it does after other prompts: {ends}"
            return f"does not write {after!r} after {contents[0]}, {others}"
        if roles == _EXCHANGE:
            return (
                f"does not write the prompt {contents[0]} and the response {contents[1]} followed "
                f"by {after!r}, as it does with others: {ends}"
            )
        return (
            f"does not write each of the turns {', '.join(roles)} once and unchanged, as it does "
            f"with others; the last one is {contents[-1]}: {ends}"
        )

    def _render(self, turns: Sequence[Message], all_marked: bool = False) -> list[Piece]:
        """Renders turns; content that the template must not see is exchanged for a mark."""
        contents = [turn.content for turn in turns]
        marked = {
            number
            for number, content in enumerate(contents)
            if all_marked
            or not content.strip()
            or "\ue000" in content
            or spells_special_token(self._tokenizer, content)
        }
        shown = [
            turn._replace(content=f"{_MARGIN}\ue000{number}\ue001{_MARGIN}")
            if number in marked
            else turn
            for number, turn in enumerate(turns)
        ]
        text = self._apply(shown)
        if not marked:
            return [Piece(text)]
        pieces, end = [], 0
        for match in _MARK.finditer(text):
            before, number, after = match[1], int(match[2]), match[3]
            # If the template has trimmed a margin, it would have trimmed the content as well.
            content = contents[number] if before else contents[number].lstrip()
            content = content if after else content.rstrip()
            pieces += [Piece(text[end : match.start()]), Piece(content, is_content=True)]
            end = match.end()
            marked.discard(number)
        if marked:
            left_out = contents[min(marked)]
            self._refuse(f"leaves out {_shown(left_out, start=True)}: it writes {_shown(text)}")
        return [*pieces, Piece(text[end:])]

    def _apply(self, turns: Sequence[Message], generation: bool | None = None) -> str:
        """Runs the template on turns, by default with the generation prompt after a user turn."""
        roles = tuple(turn.role for turn in turns)
        if generation is None:
            generation = roles[-1] == "user"
        messages = [
            {
                "role": role,
                "content": [{"type": "text", "text": content}] if self._as_parts else content,
            }
            for role, content in turns
        ]
        problem = f"the chat template of {self._tokenizer.name_or_path!r} fails"
        advice = "repair chat_template.jinja or tokenizer_config.json there"
        if roles not in (_PROMPT, _EXCHANGE):
            problem, advice = f"{problem} for the turns {', '.join(roles)}", ""
        with as_input_error(problem, advice):
            return self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation,
                date_string=DATE_STRING,
                chat_template=self._template,
            )

    def _refuse(self, fault: str) -> NoReturn:
        raise InputError(f"the chat template of {self._tokenizer.name_or_path!r} {fault}")


def chat_template(tokenizer: Any) -> ChatTemplate:
    """Returns the tokenizer's chat template; it is checked once.

    Raises:
        InputError: as `ChatTemplate` does.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is not None and not isinstance(template, str):
        name = tokenizer.name_or_path
        raise InputError(f"the chat template of {name!r} is {str(template)[:60]}, expected a text")
    return _chat_template(tokenizer, template)


@lru_cache(maxsize=8)
def _chat_template(tokenizer: Any, _template: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer)


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> re.Pattern:
    """Builds a pattern for the texts of the tokenizer's special tokens, the longest first."""
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    alternatives = map(re.escape, sorted(filter(None, tokens), key=len, reverse=True))
    return re.compile("|".join(alternatives) or r"(?!)")  # without any, it matches nothing


def spells_special_token(tokenizer: Any, text: str) -> bool:
    """Returns True if a tokenizer could find a special token in a text.

    It looks for some tokens after it has normalised the text, such as to lower case.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    texts = [text] if normalizer is None else [text, normalizer.normalize_str(text)]
    return any(special_tokens(tokenizer).search(text) for text in texts)


def _turns(prompt: Prompt) -> tuple[Message, ...]:
    """Returns the turns of a prompt."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt.messages


def _exchange(prompt: Prompt, response: str) -> tuple[Message, ...]:
    """Returns the turns of a prompt and its response."""
    return (*_turns(prompt), Message("assistant", response))


def _consists_of(text: str, parts: Sequence[Sequence[str]]) -> bool:
    """Returns True if a text is one alternative of each part after another.

    There may be any white space between the parts and around them.
    """
    rests = {text}
    for alternatives in parts:
        stripped = [part.strip() for part in alternatives]
        rests = {
            rest.lstrip()[len(part) :]
            for rest in rests
            for part in stripped
            if rest.lstrip().startswith(part)
        }
    return any(not rest.strip() for rest in rests)


def _shown(text: str, start: bool = False) -> str:
    """Returns the start or the end of a text for a message."""
    if len(text) <= _SHOWN:
        return repr(text)
    return f"{text[:_SHOWN]!r}…" if start else f"…{text[-_SHOWN:]!r}"
