"""Benchmark files, their names and their rows: JSON Lines, a JSON array, or parquet.

    RM-Bench         {prompt, chosen[3], rejected[3], domain}: concise, detailed, detailed markdown
    RewardBench 2    {id, prompt, chosen[...], rejected[...], subset}

Sources: RM-Bench, arXiv 2410.16184; RewardBench 2, arXiv 2506.01937, whose Ties rows are named
"ref:N" (one right answer) and "tied:N" (several).

A row that cannot be used is a `RowError`. Scoring refuses the file for it, naming the row;
preparing data counts it and goes on.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import numbered_lines, parse_line, read_bytes, short
from sarm_jax.io.strict_json import parse_json

STYLES = ("concise", "detailed", "markdown")
DOMAINS = ("safety-refuse", "safety-response", "chat", "code", "math")
Parsed = TypeVar("Parsed")


class RowError(ValueError):
    """Why a row cannot be used; where it stands is the reader's to say."""


@dataclasses.dataclass(frozen=True)
class Row:
    """`place` names file and line; `content` is what stands there, or the error in reading it."""

    place: str
    content: Any


@dataclasses.dataclass(frozen=True)
class StyledRow:
    """A row of RM-Bench: the right and the wrong answer in the order of `STYLES`."""

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    domain: str


@dataclasses.dataclass(frozen=True)
class ChoiceRow:
    """A row of RewardBench 2. `tie` is (kind, number) of a Ties row, kind "ref" or "tied"."""

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str
    tie: tuple[str, int] | None


@dataclasses.dataclass(frozen=True)
class NamedFile:
    """A file and its name; `given` if the user named it, else it is named after its path."""

    path: str
    name: str
    given: bool


def named_files(parts: Sequence[str], option: str) -> list[NamedFile]:
    """Reads the FILE and NAME=FILE of an option; several files may be given the same name.

    A file without a name is called by its stem, with as many of its folders as tell it apart.
    """
    split = [_split_name(part, option) for part in parts]
    places = [(name, Path(path).resolve()) for name, path in split]
    for place, (_, path) in zip(places, split, strict=True):
        if places.count(place) > 1:
            raise InputError(f"{option}: {path} is given twice")
    short = _short_names([path for name, path in split if not name])
    files = [NamedFile(path, name or short[path], bool(name)) for name, path in split]
    for file in files:
        if not file.given and sum(file.name == other.name for other in files) > 1:
            raise InputError(
                f"{option}: two files are called {file.name!r}: give both as NAME=FILE"
            )
    return files


def _split_name(part: str, option: str) -> tuple[str, str]:
    """(name or "", path) of FILE or NAME=FILE; a file's path may have the sign as well."""
    signs = [i for i, character in enumerate(part) if character == "="]
    splits = [("", part), *((part[:i].strip(), part[i + 1 :].strip()) for i in signs)]
    there = [(name, path) for name, path in splits if Path(path).is_file()]
    if there:
        name, path = there[0]
    else:  # an unnamed file of a folder with the sign in its name, or a named one
        name, path = splits[0] if "/" in splits[-1][0] else splits[-1]
    if not path or (not name and part.startswith("=")):
        raise InputError(f"{option}: found {part!r}, expected FILE or NAME=FILE")
    return name, path


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest end of each of these paths that none of the others has."""

    def end(path: str, folders: int, suffix: bool) -> str:
        *above, last = Path(path).absolute().parts
        kept = above[max(0, len(above) - folders) :]
        return "/".join([*kept, last if suffix else Path(last).stem])

    names = {}
    for path in paths:
        most = len(Path(path).absolute().parts)
        forms = [(folders, suffix) for folders in range(most) for suffix in (False, True)]
        ends = (([end(other, *form) for other in paths], end(path, *form)) for form in forms)
        names[path] = next(own for others, own in ends if others.count(own) == 1)
    return names


def read_rows(path: str | Path, name: str = "") -> list[Row]:
    """The rows of a file; a bad line of JSON Lines is a row with a `RowError`, a blank one
    is none.

    `name` is what the user called the file, where that differs. Raises `InputError` for a file
    that cannot be read as a whole, or is empty.
    """
    path, name = Path(path), name or str(path)
    if not path.is_file():
        raise InputError(f"{name}: no such file")
    if path.suffix == ".parquet":
        contents = _read_parquet(path, name)
    else:
        text = _read_text(path, name)
        if path.suffix == ".jsonl":
            return [Row(f"{name}:{number}", _object(line)) for number, line in numbered_lines(text)]
        contents = _parse_array(text, name)
    if not contents:
        raise InputError(f"{name}: holds no rows")
    return [Row(f"{name} row {number}", content) for number, content in enumerate(contents, 1)]


def parse_all(rows: Sequence[Row], parse: Callable[[Any], Parsed]) -> list[Parsed]:
    """Every row parsed, or `InputError` naming the first that cannot be."""
    parsed = []
    for row in rows:
        try:
            parsed.append(parse(row.content))
        except RowError as error:
            raise InputError(f"{row.place}: {error}") from None
    return parsed


def read_rm_bench(path: str | Path, name: str = "") -> list[StyledRow]:
    """RM-Bench, strictly."""
    domain = domain_of(name or str(path))
    return parse_all(read_rows(path, name), lambda content: parse_styled(content, domain))


def read_rewardbench2(path: str | Path, name: str = "") -> list[ChoiceRow]:
    """RewardBench 2, strictly."""
    return parse_all(read_rows(path, name), parse_choice)


def domain_of(name: str) -> str:
    """The domain that a file of RM-Bench is named after, else the name itself."""
    stem = Path(name).stem
    return next((domain for domain in DOMAINS if domain in stem.lower()), stem)


def parse_styled(content: Any, domain: str) -> StyledRow:
    """A row of RM-Bench; `domain` is used where the row names none."""
    row = fields_of(content)
    chosen, rejected = texts(row, "chosen"), texts(row, "rejected")
    for side, answers in (("chosen", chosen), ("rejected", rejected)):
        if len(answers) != len(STYLES):
            raise RowError(f"field {side!r} has {len(answers)} texts, expected {len(STYLES)}")
    domain = text({"domain": domain} | row, "domain")
    return StyledRow(text(row, "prompt"), chosen, rejected, domain)


def parse_choice(content: Any) -> ChoiceRow:
    """A row of RewardBench 2: one right answer among several, or Ties."""
    row = fields_of(content)
    chosen, rejected = texts(row, "chosen"), texts(row, "rejected")
    subset = text(row, "subset")
    if row.get("num_correct", len(chosen)) != len(chosen):
        raise RowError(f"num_correct={row['num_correct']!r}, but 'chosen' has {len(chosen)} texts")
    tie = _tie(row, len(chosen)) if subset.lower() == "ties" else None
    if tie is None and len(chosen) != 1:
        raise RowError(f"field 'chosen' has {len(chosen)} texts, expected 1 outside Ties")
    return ChoiceRow(text(row, "prompt"), chosen, rejected, subset, tie)


def fields_of(content: Any) -> dict[str, Any]:
    """The row as an object."""
    if isinstance(content, RowError):
        raise content
    if not isinstance(content, dict):
        raise RowError(f"expected an object, found {short(content)}")
    return content


def text(row: dict[str, Any], *names: str) -> str:
    """The text of the first of these fields that the row has; it must not be blank."""
    name = next((name for name in names if name in row), None)
    if name is None:
        raise RowError(f"field {' or '.join(map(repr, names))} is missing, found {sorted(row)}")
    value = row[name]
    if not isinstance(value, str):
        raise RowError(f"field {name!r} must be text, found {short(value)}")
    if not value.strip():
        raise RowError(f"field {name!r} is empty")
    return value


def texts(row: dict[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts, at least one. A model's answer may be blank, and is scored as it is."""
    if name not in row:
        raise RowError(f"field {name!r} is missing, found {sorted(row)}")
    value = row[name]
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise RowError(f"field {name!r} must be a list of texts, found {short(value)}")
    return tuple(value)


def _tie(row: dict[str, Any], right: int) -> tuple[str, int]:
    kind, _, number = text(row, "id").partition(":")
    if kind not in ("ref", "tied") or not number.isdecimal():
        raise RowError(f"id={row['id']!r} of a Ties row: expected ref:N or tied:N")
    if kind == "tied" and right < 2:
        raise RowError(f"id={row['id']!r}: a tied row needs two or more texts in 'chosen'")
    return kind, int(number)


def _object(line: str) -> Any:
    try:
        return parse_line(line)
    except ValueError as error:
        return RowError(str(error))


def _read_text(path: Path, name: str) -> str:
    try:
        content = read_bytes(path, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 (byte {error.start}: {error.reason})") from error
    if not content.strip():
        raise InputError(f"{name}: the file is empty")
    return content


def _parse_array(content: str, name: str) -> list[Any]:
    try:
        array = parse_json(content)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}:{error.lineno}: not JSON ({error.msg})") from error
    except ValueError as error:
        raise InputError(f"{name}: not JSON ({error})") from error
    if not isinstance(array, list):
        raise InputError(f"{name}: expected a JSON array of rows, found {short(array)}")
    return array


def _read_parquet(path: Path, name: str) -> list[Any]:
    import pyarrow  # slow to import, and only this file format needs it
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name}: not parquet ({' '.join(str(error).split())[:120]})") from error
