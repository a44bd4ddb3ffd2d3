"""JSON files, read strictly and written atomically.

Anybody may have written a file that is read here. A repeated key, nesting that is too deep, NaN and
half of a surrogate pair are therefore refused, the last two unless the caller allows them.
"""

import json
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import read_bytes, replacing
from sarm_jax.io.formats import binary_format, is_json_lines

MAX_BYTES = 1 << 28  # the index of a checkpoint with a million tensors is smaller
MAX_SHOWN = 60  # characters of a JSON value in a message


def read_json(
    path: str | Path,
    name: str = "",
    *,
    expected: str = "a JSON object",
    allow_nan: bool = True,
    allow_surrogates: bool = False,
) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Args:
        path: the file.
        name: what messages call the file; its path by default.
        expected: what messages say the file should hold.
        allow_nan: as in `parse_json`.
        allow_surrogates: as in `parse_json`.

    Raises:
        InputError: the file cannot be read, is not valid JSON, or holds something else than an
            object. The message names the file and, for a syntax error, the position.
    """
    name = name or str(path)
    content = read_bytes(path, name, MAX_BYTES)
    if other := binary_format(content[:64]):
        raise InputError(f"{name}: is {other}, expected {expected}")
    try:
        value = parse_json(
            content.decode("utf-8"), allow_nan=allow_nan, allow_surrogates=allow_surrogates
        )
    except ValueError as error:
        if is_json_lines(content.decode("utf-8", "replace")):
            raise InputError(f"{name}: is JSON Lines, expected {expected}") from error
        raise InputError(f"{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{name}: expected {expected}, found {short(value)}")
    return value


def write_json(path: str | Path, value: Any, indent: int = 2) -> None:
    """Writes a JSON file atomically: a reader sees the old content or the new one."""
    with replacing(path) as file:
        json.dump(value, file, indent=indent)


def parse_json(text: str, *, allow_nan: bool = False, allow_surrogates: bool = False) -> Any:
    """Parses a JSON text.

    Args:
        text: the text.
        allow_nan: accept NaN and Infinity, which are not JSON, but which Python writes.
        allow_surrogates: accept half of a surrogate pair. No tokenizer takes one, and it cannot be
            written as UTF-8.

    Raises:
        ValueError: the text is not valid JSON or holds something that is refused. The message says
            what is wrong and, if it is known, where.
    """
    if text.startswith("\ufeff"):
        raise ValueError("it starts with a byte order mark: save it as UTF-8 without one")
    parse_constant = None if allow_nan else _refuse_constant
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=parse_constant)
        if not allow_surrogates and "\\u" in text:  # only an escape can produce half of a pair
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        raise ValueError(f"{half} is half of a surrogate pair, no text") from None
    return value


def short(value: Any) -> str:
    """Formats a JSON value, or the beginning of a long one, for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:  # the parser had enough stack for it, the encoder has not
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {name!r} appears twice")
            seen.add(name)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")
