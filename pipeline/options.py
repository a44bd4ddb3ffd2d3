"""Config fields: their values, the paths that they hold, and the rows of the files they name."""

from typing import Any

from ml_collections import ConfigDict

from sarm_jax.io.errors import InputError
from sarm_jax.io.path_lists import split_paths
from sarm_jax.io.row_files import place_of, read_rows

DEMONSTRATION = {"prompt": str, "response": str}
PAIR = {"prompt": str, "chosen": str, "rejected": str}


def field_value(config: ConfigDict, field: str) -> Any:
    """Returns the value of a field such as "dtype", "reward" or "reward.beta"."""
    value = config
    for name in field.split("."):
        value = value[name]
    return value


def plain(value: Any) -> Any:
    """Returns a config section as JSON-ready values, and any other value as it is."""
    return value.to_dict() if isinstance(value, ConfigDict) else value


def required(config: ConfigDict, *fields: str) -> None:
    """Checks that none of the fields is empty.

    Raises:
        InputError: names the first field that is.
    """
    for field in fields:
        if not field_value(config, field):
            raise InputError(f"{field} is empty: name it with --config.{field}=…")


def optional_paths(text: str) -> tuple[str, ...]:
    """Splits the comma-separated paths of a field that may be empty."""
    return split_paths(text) if text else ()


def read_pairs(paths: tuple[str, ...], unequal: bool = False) -> list[dict]:
    """Reads the preference pairs of several files, one file after the other.

    Args:
        paths: files of {"prompt", "chosen", "rejected"} and, optionally, "source" rows.
        unequal: refuse a pair whose two sides are the same.

    Raises:
        InputError: names the file, the row and the field that is wrong.
    """
    pairs = []
    for path in paths:
        for number, row in enumerate(read_rows(path, PAIR), 1):
            if not isinstance(row.get("source", ""), str):
                raise InputError(f"{place_of(path, number)}: field 'source' must be str")
            if unequal and row["chosen"] == row["rejected"]:
                place = place_of(path, number)
                raise InputError(f"{place}: fields 'chosen' and 'rejected' are the same")
            pairs.append(row)
    return pairs
