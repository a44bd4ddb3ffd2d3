"""JSON Lines, read strictly and written atomically.

A bad file is refused with the line and the field that are wrong; nothing is guessed or skipped.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sarm_jax.errors import InputError
from sarm_jax.files import replacing


def read_jsonl(path: str | Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The rows of a file, each an object that has every one of `fields` with its type.

    Strings and lists must not be empty, `float` also takes an integer, and `int` takes no bool.
    Further fields are kept as they are. Raises `InputError` naming file, line and field.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_jsonl(content, fields, path)


def parse_jsonl(
    content: bytes, fields: Mapping[str, type], path: str | Path
) -> list[dict[str, Any]]:
    """`read_jsonl` of what was read already; `path` is what errors call it."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}: {error.reason})") from error
    lines = text.removesuffix("\n").split("\n")  # splitlines would also split at U+2028
    if lines == [""]:
        raise InputError(f"{path}: the file is empty")
    return [_row(line, fields, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all rows or, if anything fails, nothing: what was at `path` then stays."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def _row(line: str, fields: Mapping[str, type], place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        found = f"{line[:60]!r}" if line.strip() else "a blank line"
        raise InputError(f"{place}: expected a JSON object, found {found}") from error
    if not isinstance(row, dict):
        raise InputError(f"{place}: expected a JSON object, found {_short(row)}")
    for field, kind in fields.items():
        if field not in row:
            raise InputError(f"{place}: field {field!r} is missing, found {sorted(row)}")
        value = row[field]
        if not _has_type(value, kind):
            raise InputError(
                f"{place}: field {field!r} must be {kind.__name__}, found {_short(value)}"
            )
        if (isinstance(value, str) and not value.strip()) or value == []:
            raise InputError(f"{place}: field {field!r} is empty")
    return row


def _has_type(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
