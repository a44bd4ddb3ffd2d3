"""Keeps secrets out of what is shown or written: keys in the environment and stored logins.

A program collects its secrets once, when it starts, and redacts every text where it is shown.
Nothing is read from the environment or from files in between.
"""

import contextlib
import netrc
import os
import re
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub

from sarm_jax.io.errors import CUT, InputError

MIN_CHARACTERS = 8  # of a secret; a shorter one would also match ordinary words
# Parts of names that stand for a secret wherever they are, as in PGPASSWORD or tokenizer_secret.
SECRET_PART = re.compile(
    r"TOKEN(?!I[ZS])|SECRET(?!AR)|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|CREDENTIAL|BEARER|MNEMONIC"
    r"|(API|ACCESS|AUTH|PRIVATE|MASTER|SSH|SIGNING|ENCRYPTION|LICENSE)_?KEY|SSHPASS|PGPASS"
    r"|CONN(ECTION)?_?STR",
    re.I,
)
# Words that stand for a secret only as a whole, as in DB_PASS: PATH has no PAT, KEYBOARD no KEY.
SECRET_WORDS = set(
    "PASS PWD PW KEY KEYS PAT PATS AUTH OAUTH AUTHORIZATION CRED CREDS JWT COOKIE COOKIES DSN "
    "WEBHOOK".split()
)
# Last words of names whose value says where or how large something is.
PLAIN_ENDS = set("FILE PATH DIR DIRECTORY FOLDER HOME SOCK SOCKET TYPE COUNT".split())
PLAIN_NAMES = ("PWD", "OLDPWD")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
PASSWORD_IN_URL = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")
FIELD_IN_URL = re.compile(r"[?&]([^=&#\s]+)=([^&#\s]+)")
WANDB_USER, WANDB_CHARACTERS = "user", 40  # the name of W&B's logins; fewest characters of a key

_secrets: list[tuple[str, str]] = []  # (value, name), the longest value first


def collect() -> None:
    """Reads this process's secrets; call it at start-up, before anything is shown.

    They are the environment variables that are named like a secret, the passwords and tokens in
    addresses that other variables hold, and the logins of the hub and of W&B, which may also stand
    in a file.
    """
    variables = [(value, name) for name, value in os.environ.items()]
    secrets = [(value, name) for value, name in variables if is_secret(name, value)]
    secrets += [
        (password, name) for v, name in variables for password in PASSWORD_IN_URL.findall(v)
    ]
    secrets += [
        (field, name)
        for value, name in variables
        for key, field in (FIELD_IN_URL.findall(value) if "://" in value else ())
        if is_secret(key, field)
    ]
    secrets += [(key, "WANDB_API_KEY") for key in _wandb_logins()]
    with contextlib.suppress(OSError, ValueError):  # a login that cannot be read cannot be shown
        secrets.append((huggingface_hub.get_token() or "", "HF_TOKEN"))
    # A message in one line holds a secret of several lines, such as a private key, in one line too.
    secrets += [(" ".join(value.split()), name) for value, name in secrets]
    secrets = [secret for secret in secrets if len(secret[0]) >= MIN_CHARACTERS]
    # The longest first, because one secret may be part of another.
    _secrets[:] = sorted(dict(secrets).items(), key=lambda secret: -len(secret[0]))


def _wandb_logins() -> list[str]:
    """Returns the keys that `wandb login` has stored in the netrc file, if there is one."""
    with contextlib.suppress(OSError, ValueError, RuntimeError, netrc.NetrcParseError):
        path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        logins = netrc.netrc(path).hosts.values()
        return [
            key or ""
            for user, _, key in logins
            if user == WANDB_USER and len(key or "") >= WANDB_CHARACTERS
        ]
    return []


def is_secret(name: str, value: str) -> bool:
    """Returns True if a variable of this name is a secret, unless its value is a path or a number.

    A number is one all the same if the name is that of a password.
    """
    words = [word.upper() for word in WORD.findall(name)]
    if name in PLAIN_NAMES or not (SECRET_PART.search(name) or SECRET_WORDS & set(words)):
        return False
    if words[-1] in PLAIN_ENDS or _is_path(value):
        return False
    return not value.isdecimal() or "PASS" in name.upper() or bool({"PWD", "PW"} & set(words))


def _is_path(value: str) -> bool:
    """Returns True for the path of a file; "/" alone does not tell, base64 may begin with it."""
    if not value.startswith(("/", "~/", "./", "../", "file:")):
        return False
    path = value.removeprefix("file://")
    return bool(Path(path).suffix) or os.path.exists(path)  # noqa: PTH110 (any text is a name)


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
