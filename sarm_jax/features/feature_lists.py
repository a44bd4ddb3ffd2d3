"""Comma-separated lists of features and values, as flags and config fields contain them.

Examples: "48659,28879", "3.0,none",
"@outputs/run/probes/selected_features.json:safety_harming[:3]", and several of them joined by
commas.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.float32 import RANGE, fits_float32
from sarm_jax.io.json_files import read_json
from sarm_jax.io.path_lists import ListInFile, list_entries

EMPTY = "the list is empty; name another list or leave out"
NUMBER = f"a finite number, {RANGE}"
LARGEST_ID = 2**31 - 1  # device indices are int32


def parse_features(option: str, text: str) -> tuple[int, ...]:
    """Parses a list of feature ids.

    Args:
        option: the option's name, for error messages.
        text: the list.

    Raises:
        InputError: an entry is no feature id, or a file has no such list.
    """

    def feature(entry: Any) -> int:
        if isinstance(entry, (float, bool)):
            raise ValueError
        value = int(entry)
        if not 0 <= value <= LARGEST_ID:
            raise ValueError
        return value

    expected = "a feature id (a whole number that is not negative)"
    return _parse(option, text, convert=feature, expected=expected)


def parse_values(option: str, text: str) -> tuple[float, ...]:
    """Parses a list of finite numbers; otherwise as `parse_features`."""
    return _parse(option, text, convert=_number, expected=NUMBER)


def parse_bounds(option: str, text: str) -> tuple[float | None, ...]:
    """Parses a list of finite numbers and of "none", which leaves a bound open."""

    def bound(entry: Any) -> float | None:
        return None if str(entry).strip().lower() == "none" else _number(entry)

    return _parse(option, text, convert=bound, expected=f"{NUMBER}, or none")


def _number(entry: Any) -> float:
    value = float(entry)
    if isinstance(entry, bool) or not fits_float32(value):
        raise ValueError
    return value


def _parse(option: str, text: str, convert: Callable[[Any], Any], expected: str) -> tuple:
    """Converts every entry of a list; `expected` describes an entry in error messages."""
    items = list_entries(option, text)
    entries = [
        entry
        for item in items
        for entry in (_from_file(option, item) if isinstance(item, ListInFile) else [item])
    ]
    if items and not entries and not any(_asks_for_none(item) for item in items):
        raise InputError(f"{option}={text}: {EMPTY} {option}")
    values = []
    for entry in entries:
        try:
            values.append(convert(entry))
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{option}: found {entry!r}, expected {expected}") from None
    return tuple(values)


def _asks_for_none(item: str | ListInFile) -> bool:
    """Returns whether an entry is "@FILE:key[:0]", which asks for an empty list."""
    return isinstance(item, ListInFile) and item.count is not None and not item.count.strip("0")


def _from_file(option: str, item: ListInFile) -> list[Any]:
    """Reads the list that "@FILE:key" or "@FILE:key[:n]" names."""
    path, key, count = Path(item.path), item.key, item.count
    content = read_json(path, f"{option}={item}: {path}", allow_nan=False)
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if key not in lists:
        names = ", ".join(lists) or "none"
        raise InputError(f"{option}={item}: {path} has no list {key!r} (it has: {names})")
    entries = lists[key]
    if count is None:
        return entries
    if len(count) > 9 or int(count) > len(entries):
        if not entries:
            raise InputError(f"{option}={item}: {EMPTY} {option}")
        raise InputError(f"{option}={item}: {path} lists only {len(entries)} under {key!r}")
    return entries[: int(count)]
