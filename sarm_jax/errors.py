"""The one exception for what a user gave us and we cannot accept, and what no message may show."""

import contextlib
import os
import re
from collections.abc import Mapping

import huggingface_hub

LONGEST = 2000  # characters; a message that quotes more loses its middle
SHORTEST = 8  # characters of a secret; a shorter one would be found in ordinary words
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.I)


class InputError(ValueError):
    """Bad input: the message names the flag, file and line, or tensor, and the value found.

    `main.py` and the conversion commands print it as one `error: …` line and exit with 2. What a
    message quotes comes from files that nobody trusts, so it is made `printable` here.
    """

    def __init__(self, message: object):
        super().__init__(printable(str(message), secrets()))


def secrets() -> dict[str, str]:
    """What nothing may show, by name: the environment's secrets and the stored login of the hub."""
    found = {name: value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    with contextlib.suppress(OSError, ValueError):  # what cannot be read cannot be shown either
        found["HF_TOKEN"] = huggingface_hub.get_token() or ""  # the environment's, or the stored
    return {name: value for name, value in found.items() if len(value) >= SHORTEST}


def without_secrets(text: str, secret: Mapping[str, str]) -> str:
    """The text with the name of each secret, in brackets, instead of its value."""
    for name, value in sorted(secret.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"[{name}]")  # longest first: one may be part of another
    return text


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    return isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED")


def refuse_secrets(option: str) -> None:
    """Raises InputError for an option, such as "--flag=value", with a secret in it.

    Options are written to config.json, stages.json and reports.
    """
    if option != without_secrets(option, secrets()):
        raise InputError(
            f"{option}: holds a secret of yours, and options are written to files; leave it out: "
            "downloads take the login from the environment or `hf auth login`"
        )


def printable(text: str, secret: Mapping[str, str]) -> str:
    """One line of bounded length without control characters or secrets."""
    text = without_secrets(text, secret)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} … {text[-LONGEST // 4 :]}"
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
