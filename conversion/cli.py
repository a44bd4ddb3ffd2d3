"""What the conversion commands share: flags in; one line out, and exit code 2 on bad input."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from sarm_jax.io.errors import InputError, refuse_secrets
from sarm_jax.io.files import disk_is_full
from sarm_jax.io.progress import show_progress
from sarm_jax.io.signals import leave, on_signal


def run(
    main: Callable[[Any], str],
    values: flags.FlagValues,
    usage: str | None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses `argv` into `values`, prints the line that `main(values)` returns.

    Bad flags, bad input and file-system errors become one `error: …` line on stderr and exit 2;
    Ctrl-C and SIGTERM exit 130 and 143. Nothing is left of the destination after either.
    """
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-h", "--helpfull"} & set(argv[1:]):
        print(f"{usage}\n{values.get_help()}")
        sys.exit(0)
    show_progress()
    try:
        refuse_secrets(argv[1:])
        rest = values(argv)[1:]
        if rest:
            raise InputError(f"unexpected argument {rest[0]!r}: every option is a --flag")
        with on_signal(_interrupted):
            print(main(values))
    except (InputError, flags.Error, OSError) as error:
        advice = "; free space, and try again" if disk_is_full(error) else ""
        print(f"error: {InputError(error)}{advice}", file=sys.stderr)
        sys.exit(2)


def _interrupted(number: int) -> None:
    print("interrupted; the same command starts again", file=sys.stderr)
    leave(128 + number)
