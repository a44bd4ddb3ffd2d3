"""The one exception for what a user gave us and we cannot accept."""

import os
import re
from collections.abc import Mapping

LONGEST = 2000  # characters; a message that quotes more loses its middle
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.I)


class InputError(ValueError):
    """Bad input: the message names the flag, file and line, or tensor, and the value found.

    `main.py` and the conversion commands print it as one `error: …` line and exit with 2. What a
    message quotes comes from files that nobody trusts, so it is made `printable` here.
    """

    def __init__(self, message: object):
        super().__init__(printable(str(message), os.environ))


def printable(text: str, environment: Mapping[str, str]) -> str:
    """One line of bounded length without control characters or secrets of the environment."""
    for name, value in environment.items():
        if SECRET_NAME.search(name) and len(value) >= 8:
            text = text.replace(value, f"[{name}]")
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} … {text[-LONGEST // 4 :]}"
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
