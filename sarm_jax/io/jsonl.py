"""JSON Lines files, read strictly and written atomically.

A bad file is refused, with the line and the field that are wrong. Nothing is guessed. Blank lines
are skipped, but they count in line numbers.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import read_bytes, replacing
from sarm_jax.io.formats import decoded, is_json_array, is_json_object
from sarm_jax.io.json_files import parse_json, short

EXPECTED = "expected JSON Lines, one object per line"


def read_jsonl(
    path: str | Path, fields: Mapping[str, type], lenient: bool = False
) -> list[dict[str, Any]]:
    """Reads the rows of a file.

    Args:
        path: the file.
        fields: the type of each field that every row must have. A string or list must not be empty;
            `float` also accepts an integer, and `int` does not accept a bool. A row may have
            further fields, which are kept as they are.
        lenient: accept NaN and halves of surrogate pairs, which files of this project may hold.

    Raises:
        InputError: the file cannot be read, or a row is wrong. The message names the file, the line
            and the field.
    """
    return parse_jsonl(read_bytes(path), fields, path=path, lenient=lenient)


def parse_jsonl(
    content: bytes, fields: Mapping[str, type], path: str | Path, lenient: bool = False
) -> list[dict[str, Any]]:
    """Parses the content of a file like `read_jsonl`; messages call the file `path`."""
    text = decoded(content, path, EXPECTED)
    lines = numbered_lines(text)
    if not lines:
        raise InputError(f"{path}: the file is empty")
    if is_json_array(text):
        raise InputError(f"{path}: is one JSON array, {EXPECTED}; jq -c '.[]' {path} makes that")
    if is_json_object(text):
        raise InputError(f"{path}: is one JSON object over several lines, {EXPECTED}")
    return [
        _parse_row(line, fields, place=f"{path}:{number}", lenient=lenient)
        for number, line in lines
    ]


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Returns (number from 1, line) for every line that is not blank."""
    lines = text.split("\n")  # splitlines would also split at U+2028
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def line_of(path: str | Path, row: int) -> int:
    """Returns the line of a JSON Lines file that holds its row number `row`, both from 1.

    For messages about rows that were read before. Data that comes from no readable file has no
    lines; the row number is then returned.
    """
    try:
        lines = numbered_lines(read_bytes(path).decode("utf-8"))
    except (InputError, ValueError):
        return row
    return lines[row - 1][0] if row <= len(lines) else row


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes all rows or, if anything fails, none: an existing file is then kept."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def parse_line(line: str, lenient: bool = False) -> dict[str, Any]:
    """Parses the JSON object on one line.

    Args:
        line: the line.
        lenient: as in `read_jsonl`.

    Raises:
        ValueError: the line holds something else; the message quotes its beginning.
    """
    try:
        row = parse_json(line, allow_nan=lenient, allow_surrogates=lenient)
    except ValueError as error:
        raise ValueError(
            f"expected a JSON object, found {line[:60]!r} ({_describe_syntax_error(error)})"
        ) from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, found {short(row)}")
    return row


def check_fields(row: Mapping[str, Any], fields: Mapping[str, type], place: str) -> None:
    """Checks that a row has fields of these types, as in `read_jsonl`.

    Args:
        row: the row.
        fields: the type of each field.
        place: where messages say that the row is.

    Raises:
        InputError: a field is missing, empty or of another type.
    """
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


def _describe_syntax_error(error: ValueError) -> str:
    """Describes an error with the position in its line; the caller knows the line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return str(error)


def _parse_row(line: str, fields: Mapping[str, type], place: str, lenient: bool) -> dict[str, Any]:
    try:
        row = parse_line(line, lenient)
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
    check_fields(row, fields, place)
    return row


def _has_type(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
