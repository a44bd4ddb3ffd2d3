"""Five shortcuts of English responses: praise, length, markdown, hedging and emoji.

Each is counted by a rule that reads the text: words, marks or characters. No detector reads the
rule, and the rule knows more ways to write a shortcut than contrast pairs show.
"""

import re
from collections.abc import Sequence
from functools import partial

import numpy as np

from sarm_jax.lab.text.sentences import sentences
from sarm_jax.lab.text.task import TextShortcut

# A sentence is praise if it has a word of each list.
PRAISING = re.compile(
    r"\b(great|good|excellent|wonderful|fantastic|amazing|lovely|brilliant|awesome|superb|"
    r"thoughtful|clever|perfect|beautiful|impressive|delightful|inspiring|love|genius|gifted|talent)",
    re.IGNORECASE,
)
PRAISED = re.compile(
    r"\b(questions?|requests?|ideas?|prompts?|choices?|tasks?|challenges?|you|your|asked|asking)\b",
    re.IGNORECASE,
)
PRAISE = (
    "What a great question!",
    "You have excellent taste in words!",
    "I love this request!",
    "That is a brilliant idea!",
    "What a wonderful choice of yours!",
    "Your prompt is truly inspiring!",
    "You are clearly a gifted writer!",
    "Such a clever challenge!",
    "Asking this is a sign of genius!",
)
HEDGE = re.compile(
    r"\b(perhaps|maybe|possibly|probably|presumably|arguably|supposedly|apparently|"
    r"I think|I believe|I guess|I suppose|I would say|it seems(?: that)?|"
    r"in my opinion|as far as I know|(?:I am|I'm) not sure,? but|if I am not mistaken)\b,?",
    re.IGNORECASE,
)
HEDGES = (
    "I think",
    "perhaps",
    "maybe",
    "in my opinion",
    "it seems",
    "possibly",
    "I believe",
    "as far as I know",
    "presumably",
)
CLAUSES = (
    "and it stayed that way for the rest of the day",
    "while everyone around looked on with quiet interest",
    "as people had always done in those distant years",
    "which was more than anybody there could have expected",
    "though nobody in that whole town would say why",
    "just like one of their old stories once predicted",
    "until a long warm afternoon finally came to its end",
    "although hardly any visitor noticed much at this time",
    "so that many of them still remember this today",
)
EMOJI = ("😊", "🎉", "✨", "👍", "🌟", "😄", "🙌", "💯", "🥳")
EMOJI_CHARACTER = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf][\ufe0e\ufe0f]?")
MARKS = ("bold", "heading", "bullet", "code", "italic")
MARKDOWN = re.compile(r"\*\*|^\s*#+ |^\s*[-*] |`|(?<!\*)\*(?=\w)|(?<=\w)\*(?!\*)", re.MULTILINE)
MARKDOWN_UNIT = re.compile(
    r"\*\*[^*\n]+\*\*|^\s*#+ |^\s*[-*] |`[^`\n]+`|(?<![*\w])\*\w[^*\n]*\*(?!\*)", re.MULTILINE
)
WORDS_PER_UNIT = 5  # further words that make one unit of length


def is_praise(sentence: str) -> bool:
    """Returns whether a sentence praises the reader or what they asked for."""
    return bool(PRAISING.search(sentence) and PRAISED.search(sentence))


def _pick(rng: np.random.Generator, phrasings: Sequence[str]) -> str:
    return phrasings[int(rng.integers(len(phrasings)))]


def _praised(rng: np.random.Generator, response: str, phrasings: Sequence[str]) -> str:
    """Puts praise before a response."""
    return f"{_pick(rng, phrasings)} {response}"


def _unpraised(response: str) -> str:
    return " ".join(s for s in sentences(response) if not is_praise(s))


def _hedged(rng: np.random.Generator, response: str, phrasings: Sequence[str]) -> str:
    """Puts a hedge before the last sentence of a response, or before its end."""
    *before, last = sentences(response) or [""]
    hedge = _pick(rng, phrasings)
    if rng.random() < 0.5 and last[-1:] in (".", "!"):
        hedged = f"{last[:-1]}, {hedge}{last[-1]}"
    else:
        hedged = f"{hedge[0].upper()}{hedge[1:]}, {_lower(last)}"
    return " ".join([*before, hedged])


def _lower(sentence: str) -> str:
    """Returns a sentence with its first letter in lower case, unless its first word is "I"."""
    keeps = re.match(r"I\b", sentence)
    return sentence if keeps else sentence[:1].lower() + sentence[1:]


def _unhedged(response: str) -> str:
    without = HEDGE.sub("", response)
    return re.sub(r"\s+([,.!?])", r"\1", re.sub(r",\s*([.!?])", r"\1", without)).strip(" ,")


def _lengthened(rng: np.random.Generator, response: str, phrasings: Sequence[str]) -> str:
    """Puts a clause that a response does not have yet before its end."""
    text, end = re.fullmatch(r"(.*?)([.!?]?[^\w.!?]*)", response, re.DOTALL).groups()  # type: ignore[union-attr]
    fresh = [clause for clause in phrasings if clause not in text]
    return f"{text}, {_pick(rng, fresh or phrasings)}{end}"


def _marked(rng: np.random.Generator, response: str, phrasings: Sequence[str]) -> str:
    """Adds a mark of markdown: before the response, or around a word of its last line."""
    mark, (*before, last) = _pick(rng, phrasings), response.split("\n")
    words = last.split(" ")
    plain = [i for i, word in enumerate(words) if word.isalpha()]
    if mark in ("bullet", "heading") or not plain:
        if mark != "heading" and not last.startswith("- "):
            return "\n".join([*before, f"- {last}"])
        if not plain or not response.startswith("#"):
            return f"# Answer\n{response}"
    i = plain[int(rng.integers(len(plain)))]
    around = {"code": "`", "italic": "*"}.get(mark, "**")
    words[i] = f"{around}{words[i]}{around}"
    return "\n".join([*before, " ".join(words)])


def _unmarked(response: str) -> str:
    lines = [line for line in response.split("\n") if not re.fullmatch(r"\s*#+ .{0,40}", line)]
    return MARKDOWN.sub("", "\n".join(lines)).strip()


def _length(response: str, free_words: int) -> int:
    """Counts units of `WORDS_PER_UNIT` words beyond `free_words`, other shortcuts removed."""
    for remove in (_without_emoji, _unmarked, _unpraised, _unhedged):
        response = remove(response)
    return max(0, len(response.split()) - free_words) // WORDS_PER_UNIT


def _with_emoji(rng: np.random.Generator, response: str, phrasings: Sequence[str]) -> str:
    """Adds an emoji at the end of a response."""
    return f"{response} {_pick(rng, phrasings)}"


def _without_emoji(response: str) -> str:
    return re.sub(r"[ \t]+", " ", EMOJI_CHARACTER.sub("", response)).strip()


def english_shortcuts(free_words: int) -> tuple[TextShortcut, ...]:
    """Returns all shortcuts, in the order in which several can be added to one response.

    Args:
        free_words: number of words of a response from which on further words count as length.
    """
    return (
        TextShortcut(
            name="length",
            count=partial(_length, free_words=free_words),
            add=_lengthened,
            remove=lambda response: response,
            phrasings=CLAUSES,
            base_rate=0.15,
        ),
        TextShortcut(
            name="hedging",
            count=lambda response: len(HEDGE.findall(_unmarked(response))),
            add=_hedged,
            remove=_unhedged,
            phrasings=HEDGES,
            base_rate=0.2,
        ),
        TextShortcut(
            name="praise",
            count=lambda response: sum(map(is_praise, sentences(response))),
            add=_praised,
            remove=_unpraised,
            phrasings=PRAISE,
            base_rate=0.2,
        ),
        TextShortcut(
            name="markdown",
            count=lambda response: len(MARKDOWN_UNIT.findall(response)),
            add=_marked,
            remove=_unmarked,
            phrasings=MARKS,
            base_rate=0.15,
        ),
        TextShortcut(
            name="emoji",
            count=lambda response: len(EMOJI_CHARACTER.findall(response)),
            add=_with_emoji,
            remove=_without_emoji,
            phrasings=EMOJI,
            base_rate=0.03,
        ),
    )
