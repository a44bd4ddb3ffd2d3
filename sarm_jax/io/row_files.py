"""Files of rows as people keep them: JSON Lines, a JSON array or Parquet, here or on the hub.

The content of a file shows its format, and that it is compressed with gzip or Zstandard; its name
does not matter. Parquet has no missing fields: a field that is null counts as missing. Nothing else
is guessed, and a row that is wrong is refused with its place: FILE:LINE for JSON Lines, FILE: row N
for the others, both from 1.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sarm_jax.io.compression import check_unpacked_size, unpacked
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import MAX_BYTES, read_bytes
from sarm_jax.io.formats import decoded, is_json_array, is_json_object
from sarm_jax.io.hub_files import LocalFile, local_files
from sarm_jax.io.json_files import parse_json, short
from sarm_jax.io.jsonl import check_fields, numbered_lines, parse_line
from sarm_jax.io.libraries import as_input_error

EXPECTED = "expected JSON Lines, a JSON array or Parquet"
BATCH = 1024  # rows of a Parquet file that are unpacked at a time
ROW_BYTES = 64  # an empty dictionary; counts for rows that have next to no content


class RowError(ValueError):
    """The reason why a row cannot be used. The caller knows its place."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a file: its place, and the parsed JSON or the `RowError`."""

    place: str
    content: Any


def read_rows(source: str | Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Reads the rows of a file, or of a data set on the hub.

    Args:
        source: a path, or an address as in `hub_files`.
        fields: the type of each field that every row must have, as in `read_jsonl`. A row may have
            further fields, which are kept as they are.

    Raises:
        InputError: the file cannot be read, or a row is wrong. The message names the file, the row
            and the field.
    """
    return [_checked(row, fields) for row in read_placed_rows(source)]


def read_placed_rows(source: str | Path) -> list[Row]:
    """Reads the rows with their places; a malformed line of JSON Lines becomes a `RowError`.

    Raises:
        InputError: the file is missing, empty, too large, or of another format.
    """
    return [row for file in local_files(source) for row in _rows_of_file(file)]


def place_of(source: str | Path, number: int) -> str:
    """Returns the place of row `number`, from 1, for messages about rows that were read before.

    Data that comes from no readable file has no lines; the row number is then returned.
    """
    try:
        return read_placed_rows(source)[number - 1].place
    except (InputError, IndexError):
        return f"{source}:{number}"


def parse_rows(content: bytes, name: str, max_bytes: int = MAX_BYTES) -> list[Row]:
    """Parses the content of a file like `read_placed_rows`.

    Args:
        content: the content.
        name: what messages call the file.
        max_bytes: a file that has more bytes once it is unpacked is refused.
    """
    content = unpacked(content, name, max_bytes)
    if content.startswith(b"PAR1"):
        return _numbered(_parse_parquet(content, name, max_bytes), name)
    text = decoded(content, name, EXPECTED)
    if not text.strip():
        raise InputError(f"{name}: the file is empty")
    of_lines = re.search(r"(?i)\.(jsonl|ndjson)(\.\w+)?$", name)
    if is_json_array(text) if of_lines else text.lstrip().startswith("["):
        return _numbered(_parse_array(text, name), name)
    if is_json_object(text):
        raise InputError(f"{name}: is one JSON object over several lines, {EXPECTED}")
    return [Row(f"{name}:{number}", _parse_line(line)) for number, line in numbered_lines(text)]


def _rows_of_file(file: LocalFile) -> list[Row]:
    return parse_rows(read_bytes(file.path, file.name), file.name)


def _checked(row: Row, fields: Mapping[str, type]) -> dict[str, Any]:
    if isinstance(row.content, RowError):
        raise InputError(f"{row.place}: {row.content}")
    if not isinstance(row.content, dict):
        raise InputError(f"{row.place}: expected a JSON object, found {short(row.content)}")
    check_fields(row.content, fields, row.place)
    return row.content


def _numbered(contents: list[Any], name: str) -> list[Row]:
    if not contents:
        raise InputError(f"{name}: holds no rows")
    return [Row(f"{name}: row {number}", content) for number, content in enumerate(contents, 1)]


def _parse_line(line: str) -> Any:
    try:
        return parse_line(line)
    except ValueError as error:
        return RowError(str(error))


def _parse_array(text: str, name: str) -> list[Any]:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{error.lineno}: not JSON ({error.msg})") from error
    except ValueError as error:
        raise InputError(f"{name}: row {_first_refused(text)}: {error}") from error


def _first_refused(text: str) -> int:
    """Returns the number of the first element of a JSON array that `parse_json` refuses."""
    decoder, number, position = json.JSONDecoder(), 1, text.index("[") + 1
    while True:
        while position < len(text) and text[position] in ", \t\r\n":
            position += 1
        try:
            _, end = decoder.raw_decode(text, position)
            parse_json(text[position:end])
        except (ValueError, RecursionError):
            return number
        number, position = number + 1, end


def _parse_parquet(content: bytes, name: str, max_bytes: int) -> list[Any]:
    import pyarrow  # imported here because it is slow to import and only Parquet needs it
    from pyarrow import parquet

    rows: list[Any] = []
    size = 0
    # Given the path, the library would add columns for folders that are called NAME=VALUE.
    with as_input_error(f"{name}: not parquet"):
        file = parquet.ParquetFile(pyarrow.BufferReader(content), page_checksum_verification=True)
        columns = file.schema_arrow.names
        if twice := next((c for c in columns if columns.count(c) > 1), None):
            raise InputError(f"{name}: column {twice!r} appears twice")
        for batch in file.iter_batches(batch_size=BATCH):
            size += batch.nbytes + ROW_BYTES * batch.num_rows
            check_unpacked_size(size, name, max_bytes)
            rows += _rows_of_batch(batch, name, first=len(rows) + 1)
    return rows


def _rows_of_batch(batch: Any, name: str, first: int) -> Iterator[Any]:
    """Yields the rows of a record batch, whose first row has the number `first`."""
    try:
        contents = batch.to_pylist()
    except UnicodeDecodeError:
        contents = []
        for index in range(batch.num_rows):
            try:
                contents += batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise InputError(f"{name}: row {first + index}: not UTF-8 ({error})") from error
    return map(_without_nulls, contents)


def _without_nulls(value: Any) -> Any:
    """Removes fields that are null, which Parquet has instead of missing fields."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
