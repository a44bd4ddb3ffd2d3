"""Strictness: what is wrong with an input is collected, and reported all at once."""

from collections.abc import Sequence

from sarm_jax.io.errors import InputError

SHOWN = 8


def report(where: object, problems: Sequence[str]) -> None:
    """Raises one `InputError` that lists the first problems and counts the rest; none is fine."""
    if problems:
        rest = len(problems) - SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        raise InputError(f"{where}: " + "; ".join(problems[:SHOWN]) + more)
