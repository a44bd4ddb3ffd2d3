"""What nothing that is shown or written may hold: keys in the environment, the hub's login."""

import contextlib
import os
import re
from collections.abc import Mapping

import huggingface_hub

SHORTEST = 8  # characters of a secret; a shorter one would be found in ordinary words
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.I)


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
