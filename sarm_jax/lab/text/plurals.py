"""Plurals of English nouns, by the rules that the names of the tasks follow."""

from collections.abc import Container

# Endings of the plural and the singular. "es" is an ending after a hiss or an o alone: the singular
# of stages is not stag.
ENDINGS = (
    ("s", ""),
    ("ies", "y"),
    ("ves", "f"),
    *((f"{last}es", last) for last in ("s", "x", "z", "o", "ch", "sh")),
)
IRREGULAR = {"geese": "goose", "mice": "mouse"}


def singular(word: str, names: Container[str]) -> str | None:
    """Returns the name in the singular, if a word is a name or the plural of one; otherwise None.

    Args:
        word: the word, in lower case.
        names: the names, in lower case and in the singular.
    """
    forms = [word, IRREGULAR.get(word, word)]
    forms += [f"{word.removesuffix(s)}{end}" for s, end in ENDINGS if word.endswith(s)]
    return next((form for form in forms if form in names), None)
