"""Comma-separated lists of features and values, as flags and config fields contain them.

Examples: "48659,28879", "3.0,none",
"@outputs/run/probes/selected_features.json:safety_harming[:3]", and several of them joined by
commas.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json

EMPTY = "the list is empty; name another list or leave out"
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
    return _parse(option, text, convert=_finite, expected="a finite number")


def parse_bounds(option: str, text: str) -> tuple[float | None, ...]:
    """Parses a list of finite numbers and of "none", which leaves a bound open."""

    def bound(entry: Any) -> float | None:
        return None if str(entry).strip().lower() == "none" else _finite(entry)

    return _parse(option, text, convert=bound, expected="a finite number or none")


def _finite(entry: Any) -> float:
    value = float(entry)
    if not abs(value) < float("inf"):
        raise ValueError
    return value


def _parse(option: str, text: str, convert: Callable[[Any], Any], expected: str) -> tuple:
    """Converts every entry of a list; `expected` describes an entry in error messages."""
    values = []
    entries = _entries(option, text.strip())
    if not entries and text.strip() and "[:0]" not in text:  # "[:0]" asks for an empty list
        raise InputError(f"{option}={text}: {EMPTY} {option}")
    for entry in entries:
        try:
            values.append(convert(entry))
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{option}: found {entry!r}, expected {expected}") from None
    return tuple(values)


def _entries(option: str, text: str) -> list[Any]:
    """Splits a list at its commas and replaces each "@FILE:key" by the entries of that list."""
    items = [item.strip() for item in text.split(",")] if text else []
    return [
        entry
        for item in items
        for entry in (_from_file(option, item) if item.startswith("@") else [item])
    ]


def _from_file(option: str, text: str) -> list[Any]:
    """Reads the list that "@FILE:key" or "@FILE:key[:n]" names."""
    match = re.fullmatch(r"@(.+):([^:\[\]]+?)(?:\[:(\d+)\])?", text)
    if not match:
        raise InputError(f"{option}={text}: expected @FILE:key or @FILE:key[:n]")
    path, key, count = Path(match[1]), match[2], match[3]
    content = read_json(path, f"{option}={text}: {path}", allow_nan=False)
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if key not in lists:
        names = ", ".join(lists) or "none"
        raise InputError(f"{option}={text}: {path} has no list {key!r} (it has: {names})")
    entries = lists[key]
    if count is None:
        return entries
    if len(count) > 9 or int(count) > len(entries):
        if not entries:
            raise InputError(f"{option}={text}: {EMPTY} {option}")
        raise InputError(f"{option}={text}: {path} lists only {len(entries)} under {key!r}")
    return entries[: int(count)]
