"""JSON Lines, read strictly and written atomically.

A bad file is refused with the line and the field that are wrong. Nothing is guessed, and only blank
lines are skipped, which still count in the numbers of lines.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing
from sarm_jax.io.strict_json import parse_json

LARGEST = 1 << 32  # bytes of a file that is read as a whole


def read_jsonl(
    path: str | Path, fields: Mapping[str, type], own: bool = False
) -> list[dict[str, Any]]:
    """The rows of a file, each an object that has every one of `fields` with its type.

    Strings and lists must not be empty, `float` also takes an integer, and `int` takes no bool.
    Further fields are kept as they are. `own`: this project wrote the file, so that it may hold
    NaN, and halves of surrogate pairs. Raises `InputError` naming file, line and field.
    """
    return parse_jsonl(read_bytes(path), fields, path, own)


def read_bytes(path: str | Path, name: str = "") -> bytes:
    """The content of a file, which messages call `name`.

    Raises InputError where it cannot be read, is no plain file, or huge.
    """
    path, name = Path(path), name or str(path)
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe or a device may never end
            raise InputError(f"{name}: is not a file")
        if size > LARGEST:
            raise InputError(f"{name}: has {size:,} bytes, at most {LARGEST:,} are read: split it")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error


def parse_jsonl(
    content: bytes, fields: Mapping[str, type], path: str | Path, own: bool = False
) -> list[dict[str, Any]]:
    """`read_jsonl` of what was read already; `path` is what errors call it."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}: {error.reason})") from error
    lines = numbered_lines(text)
    if not lines:
        raise InputError(f"{path}: the file is empty")
    return [_row(line, fields, f"{path}:{number}", own) for number, line in lines]


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Returns (number from 1, line) of all lines but blank ones."""
    lines = text.split("\n")  # splitlines would also split at U+2028
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def line_of(path: str | Path, row: int) -> int:
    """Returns the line of a JSON Lines file that holds its row number `row`, both from 1.

    For messages on rows that were read before. If `path` is no file that can be read, but what a
    message calls its data, the row's own number is all there is to say.
    """
    try:
        lines = numbered_lines(read_bytes(path).decode("utf-8"))
    except (InputError, ValueError):
        return row
    return lines[row - 1][0] if row <= len(lines) else row


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all rows or, if anything fails, nothing: what was at `path` then stays."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def parse_line(line: str, own: bool = False) -> dict[str, Any]:
    """The object on one line; ValueError says what stands there instead. `own` as above."""
    try:
        row = parse_json(line, constants=own, unicode=not own)
    except ValueError as error:
        raise ValueError(
            f"expected a JSON object, found {line[:60]!r} ({_without_place(error)})"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {short(row)}")
    return row


def _without_place(error: ValueError) -> str:
    """The line is known already, but not the column."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return str(error)


def _row(line: str, fields: Mapping[str, type], place: str, own: bool) -> dict[str, Any]:
    try:
        row = parse_line(line, own)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
    for field, kind in fields.items():
        if field not in row:
            raise InputError(f"{place}: field {field!r} is missing, found {sorted(row)}")
        value = row[field]
        if not _has_type(value, kind):
            raise InputError(
                f"{place}: field {field!r} must be {kind.__name__}, found {short(value)}"
            )
        if (isinstance(value, str) and not value.strip()) or value == []:
            raise InputError(f"{place}: field {field!r} is empty")
    return row


def _has_type(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def short(value: Any) -> str:
    """A JSON value, or its beginning, as messages show it."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:  # it fitted the reader's stack, but not this one's
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
