"""Sentences of English responses, by their punctuation."""

import re

SENTENCE = re.compile(r"[^.!?]+(?:[.!?]+[\"'”’)*]*|$)")


def sentences(text: str) -> list[str]:
    """Splits a text into sentences; the last one may lack its end."""
    return [match.group().strip() for match in SENTENCE.finditer(text) if match.group().strip()]


def ends_like_a_sentence(text: str) -> bool:
    """Returns whether a text ends in ".", "!" or "?", before any closing quotes and brackets."""
    return text.rstrip("\"'”’) ")[-1:] in (".", "!", "?")
