"""The files of --flagfile, which absl opens itself: checked before it does."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import read_bytes

MAX_BYTES = 1 << 20
FLAG = "--flagfile"


def check_flag_files(argv: Sequence[str]) -> None:
    """Reads the files of flags that a command line names, and those that they name.

    Raises:
        InputError: one of them is not a regular file of text, or names itself.
    """
    _check(argv, opened=())


def _check(argv: Sequence[str], opened: tuple[str, ...]) -> None:
    for argument, following in pairwise([*argv, ""]):
        flag, equals, value = argument.strip().partition("=")
        if flag not in (FLAG, FLAG[1:]):
            continue
        name = (value if equals else following).strip()
        if name in opened:
            raise InputError(f"{FLAG}={name}: names itself")
        content = read_bytes(Path(name).expanduser(), f"{FLAG}={name}", MAX_BYTES)
        try:
            lines = content.decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{FLAG}={name}: not UTF-8 (byte {error.start})") from None
        _check(lines, (*opened, name))
