"""Lists of names in the options of the lab, such as conditions and shortcuts."""

from collections.abc import Collection

from sarm_jax.io.errors import InputError


def parse_names(option: str, text: str, known: Collection[str], further: str = "") -> list[str]:
    """Parses comma-separated names.

    Args:
        option: the full name of the option, for messages.
        text: its value.
        known: the names that the list may have.
        further: another kind of value that the option has, for messages; the caller parses it.

    Raises:
        InputError: a name is unknown or given twice.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            expected = ", ".join(known) + (f", or {further}" if further else "")
            raise InputError(f"{option}={text}: found {name!r}, expected one of {expected}")
        if names.count(name) > 1:
            raise InputError(f"{option}={text}: {name} is given twice")
    return names
