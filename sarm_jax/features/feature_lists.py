"""Comma-separated lists of features and values, as flags and config fields give them.

"48659,28879" · "3.0,none" · "@outputs/run/probes/selected_features.json:safety_harming[:3]",
and any of them one after the other.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.strict_json import parse_json

EMPTY = "the list is empty; name another one, or no"
LARGEST_ID = 2**31 - 1  # device indices are int32


def parse_features(option: str, text: str) -> tuple[int, ...]:
    """Feature ids; `option` is what an error message calls the list."""

    def feature(entry: Any) -> int:
        if isinstance(entry, (float, bool)):
            raise ValueError
        value = int(entry)
        if not 0 <= value <= LARGEST_ID:
            raise ValueError
        return value

    return _parse(option, text, feature, "a feature id (a whole number that is not negative)")


def parse_values(option: str, text: str) -> tuple[float, ...]:
    """Finite numbers."""
    return _parse(option, text, _finite, "a finite number")


def parse_bounds(option: str, text: str) -> tuple[float | None, ...]:
    """Finite numbers, or "none" where a bound is left open."""

    def bound(entry: Any) -> float | None:
        return None if str(entry).strip().lower() == "none" else _finite(entry)

    return _parse(option, text, bound, "a finite number or none")


def _finite(entry: Any) -> float:
    value = float(entry)
    if not abs(value) < float("inf"):
        raise ValueError
    return value


def _parse(option: str, text: str, convert: Callable[[Any], Any], expected: str) -> tuple:
    values = []
    entries = _entries(option, text.strip())
    if not entries and text.strip() and "[:0]" not in text:  # which asks for none
        raise InputError(f"{option}={text}: {EMPTY} {option}")
    for entry in entries:
        try:
            values.append(convert(entry))
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"{option}: found {entry!r}, expected {expected}") from None
    return tuple(values)


def _entries(option: str, text: str) -> list[Any]:
    parts = [part.strip() for part in text.split(",")] if text else []
    return [
        entry
        for part in parts
        for entry in (_from_file(option, part) if part.startswith("@") else [part])
    ]


def _from_file(option: str, text: str) -> list[Any]:
    match = re.fullmatch(r"@(.+):([^:\[\]]+?)(?:\[:(\d+)\])?", text)
    if not match:
        raise InputError(f"{option}={text}: expected @FILE:key or @FILE:key[:n]")
    path, key, count = Path(match[1]), match[2], match[3]
    try:
        if not path.is_file():
            raise InputError(f"{option}={text}: no such file {path}")
        content = parse_json(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{option}={text}: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{option}={text}: {path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{option}={text}: {path} holds no JSON object")
    lists = {k: v for k, v in content.items() if isinstance(v, list)}
    if key not in lists:
        have = ", ".join(lists) or "none"
        raise InputError(f"{option}={text}: {path} has no list {key!r} (it has: {have})")
    entries = lists[key]
    if count is None:
        return entries
    if len(count) > 9 or int(count) > len(entries):
        if not entries:
            raise InputError(f"{option}={text}: {EMPTY} {option}")
        raise InputError(f"{option}={text}: {path} lists only {len(entries)} under {key!r}")
    return entries[: int(count)]
