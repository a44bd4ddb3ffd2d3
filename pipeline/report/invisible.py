"""Texts by models in the page: characters that cannot be seen are shown by their number."""

import re

from markupsafe import Markup, escape

# Control characters except tab and line feed, those that end lines or change the direction of text,
# the byte order mark, and halves of surrogate pairs, which UTF-8 does not have.
INVISIBLE = re.compile(
    "([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff])"
)


def visible(text: str) -> Markup:
    """Returns a text for HTML, escaped, with invisible characters in boxes such as U+202E."""
    parts = INVISIBLE.split(text)  # every other part is an invisible character
    shown = (
        Markup('<span class="code">U+{:04X}</span>').format(ord(part))
        if index % 2
        else escape(part)
        for index, part in enumerate(parts)
    )
    return Markup("").join(shown)
