"""Plurals of English nouns, by the rules that the names of the tasks follow."""

from collections.abc import Container

ENDINGS = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"))  # of plural and singular
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
