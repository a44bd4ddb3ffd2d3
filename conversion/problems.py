"""Reports all problems of an input at once."""

from collections.abc import Sequence

from sarm_jax.io.errors import InputError

MAX_SHOWN = 8


def report(source: object, problems: Sequence[str]) -> None:
    """Raises one InputError that lists the first problems and counts the others, if there are any.

    Args:
        source: what the message calls the input.
        problems: descriptions of everything that is wrong with it.
    """
    if problems:
        hidden = len(problems) - MAX_SHOWN
        more = f"; and {hidden} more" if hidden > 0 else ""
        raise InputError(f"{source}: " + "; ".join(problems[:MAX_SHOWN]) + more)
