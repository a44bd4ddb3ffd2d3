"""Reads metrics.csv of a run, strictly."""

import csv
from pathlib import Path

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import read_bytes


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Reads the rows as floats. Empty cells become NaN.

    A last line without a line break is ignored: an interruption can leave an incomplete row.

    Raises:
        InputError: the file cannot be read or is malformed; the message names file, line and
            column.
    """
    try:
        text = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}: {error.reason})") from None
    lines = text[: text.rfind("\n") + 1].splitlines()
    if not lines:
        raise InputError(f"{path}: the file has no header")
    try:
        names, *rows = csv.reader(lines)
    except csv.Error as error:
        raise InputError(f"{path}: not CSV ({error})") from None
    if "step" not in names:
        raise InputError(f"{path}:1: no column 'step' (found {', '.join(names[:3]) or 'nothing'})")
    if len(set(names)) < len(names):
        raise InputError(f"{path}:1: column {max(names, key=names.count)!r} appears twice")
    return [_row(names, cells, f"{path}:{number}") for number, cells in enumerate(rows, 2)]


def _row(names: list[str], cells: list[str], place: str) -> dict[str, float]:
    if len(cells) != len(names):
        raise InputError(f"{place}: {len(cells)} cells for {len(names)} columns")
    row = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            row[name] = float(cell) if cell else float("nan")
        except ValueError:
            raise InputError(f"{place}: column {name!r} is {cell!r}, not a number") from None
    return row
