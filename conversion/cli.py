"""The command line that the conversion commands share."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from sarm_jax.io import secrets
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import disk_is_full
from sarm_jax.io.flag_files import check_flag_files
from sarm_jax.io.progress import show_last_line, show_progress
from sarm_jax.io.signals import exit_after_cleanup, on_signal


def run(
    main: Callable[[Any], str],
    values: flags.FlagValues,
    usage: str | None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parses `argv` into `values` and prints the line that `main(values)` returns.

    Bad flags, bad input and file-system errors become one `error: …` line on stderr and exit
    code 2; Ctrl-C and SIGTERM exit with 130 and 143. In both cases nothing is left of the
    destination.

    Args:
        main: the command; it returns its summary line.
        values: its flags.
        usage: its description, for --help.
        argv: the command line; by default that of this process.
    """
    argv = list(sys.argv if argv is None else argv)
    if {"--help", "-h", "--helpfull"} & set(argv[1:]):
        print(f"{usage}\n{values.get_help()}")
        sys.exit(0)
    show_progress()
    try:
        secrets.refuse_secrets(argv[1:])
        check_flag_files(argv[1:])
        arguments = values(argv)[1:]
        if arguments:
            raise InputError(f"unexpected argument {arguments[0]!r}: every option is a --flag")
        with on_signal(_interrupted):
            print(main(values))
    except (InputError, flags.Error, OSError) as error:
        advice = "; free space, and try again" if disk_is_full(error) else ""
        show_last_line(f"error: {InputError(error)}{advice}")
        sys.exit(2)


def _interrupted(number: int) -> None:
    show_last_line("interrupted; the same command starts again")
    exit_after_cleanup(128 + number)
