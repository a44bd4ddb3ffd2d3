"""Keeps secrets out of what is shown or written: keys in the environment and the hub's login.

A program collects its secrets once, when it starts, and redacts every text where it is shown.
Nothing is read from the environment or from files in between.
"""

import contextlib
import os
import re
from collections.abc import Iterable

import huggingface_hub

from sarm_jax.io.errors import CUT, InputError

MIN_CHARACTERS = 8  # of a secret; a shorter one would also match ordinary words
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.I)

_secrets: list[tuple[str, str]] = []  # (value, name), the longest value first


def collect() -> None:
    """Reads this process's secrets; call it at start-up, before anything is shown.

    They are the environment variables that are named like a secret, and the login of the hub, which
    may also stand in a file.
    """
    secrets = [(value, name) for name, value in os.environ.items() if SECRET_NAME.search(name)]
    with contextlib.suppress(OSError, ValueError):  # a login that cannot be read cannot be shown
        secrets.append((huggingface_hub.get_token() or "", "HF_TOKEN"))
    # A message in one line holds a secret of several lines, such as a private key, in one line too.
    secrets += [(" ".join(value.split()), name) for value, name in secrets]
    secrets = [secret for secret in secrets if len(secret[0]) >= MIN_CHARACTERS]
    # The longest first, because one secret may be part of another.
    _secrets[:] = sorted(dict(secrets).items(), key=lambda secret: -len(secret[0]))


def redact(text: str) -> str:
    """Replaces each secret by its name in brackets, also one that `printable` has cut in two."""
    for value, name in _secrets:
        text = text.replace(value, f"[{name}]")
        if CUT in text and (value[:MIN_CHARACTERS] in text or value[-MIN_CHARACTERS:] in text):
            for length in range(len(value) - 1, MIN_CHARACTERS - 1, -1):
                text = text.replace(value[:length] + CUT, f"[{name}]{CUT}")
                text = text.replace(CUT + value[-length:], f"{CUT}[{name}]")
    return text


def refuse_secrets(options: Iterable[str]) -> None:
    """Raises InputError if an option, such as "--flag=value", holds a secret.

    Options are written to config.json, stages.json and reports.
    """
    for option in options:
        redacted = redact(option)
        if option != redacted:
            raise InputError(
                f"{redacted}: holds a secret of yours, and options are written to files; leave it "
                "out: downloads take the login from the environment or `hf auth login`"
            )
