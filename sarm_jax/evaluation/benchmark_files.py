"""Benchmark files, their names and their rows.

    RM-Bench         {prompt, chosen[3], rejected[3], domain}: concise, detailed, detailed markdown
    RewardBench 2    {id, prompt, chosen[...], rejected[...], subset}

Sources: RM-Bench, arXiv 2410.16184; RewardBench 2, arXiv 2506.01937. In RewardBench 2, rows of the
subset Ties have the ids "ref:N" (one right answer) and "tied:N" (several right answers).

A row that cannot be used is a `RowError`. Evaluation refuses a file with such a row and names the
row; data preparation counts the row and continues.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sarm_jax.io.errors import InputError
from sarm_jax.io.hub_files import single_files
from sarm_jax.io.json_files import short
from sarm_jax.io.path_lists import named_path
from sarm_jax.io.row_files import Row, RowError, read_placed_rows

STYLES = ("concise", "detailed", "markdown")
DOMAINS = ("safety-refuse", "safety-response", "chat", "code", "math")
Parsed = TypeVar("Parsed")


@dataclasses.dataclass(frozen=True)
class StyledRow:
    """A row of RM-Bench: the right and the wrong answer, each in the order of `STYLES`."""

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    domain: str


@dataclasses.dataclass(frozen=True)
class ChoiceRow:
    """A row of RewardBench 2. `tie` is (kind, number) in the subset Ties, kind "ref" or "tied"."""

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str
    tie: tuple[str, int] | None


@dataclasses.dataclass(frozen=True)
class NamedFile:
    """A file and its name, which comes from the user or, if not `named_by_user`, from the path."""

    path: str
    name: str
    named_by_user: bool


def named_files(entries: Sequence[str], option: str) -> list[NamedFile]:
    """Parses the entries FILE and NAME=FILE of an option.

    Several files may be given the same name. A file without a name is named after its stem, with as
    many of its folders as are needed to tell it apart from the others.

    Args:
        entries: the comma-separated entries of the option.
        option: the full name of the option, for messages.

    Raises:
        InputError: an entry is malformed, a file is given twice, or a derived name is taken.
    """
    split = [named_path(entry, option, "FILE") for entry in entries]
    resolved = [(name, Path(path).resolve()) for name, path in split]
    for entry, (_, path) in zip(resolved, split, strict=True):
        if resolved.count(entry) > 1:
            raise InputError(f"{option}: {path} is given twice")
    derived_names = _shortest_names([path for name, path in split if not name])
    files = [NamedFile(path, name or derived_names[path], bool(name)) for name, path in split]
    for file in files:
        if not file.named_by_user and sum(file.name == other.name for other in files) > 1:
            raise InputError(
                f"{option}: two files are called {file.name!r}: give both as NAME=FILE"
            )
    return files


def _shortest_names(paths: Sequence[str]) -> dict[str, str]:
    """Returns, for each path, the shortest end of it that is not an end of another path."""

    def end_of(path: str, folders: int, suffix: bool) -> str:
        *parents, last = Path(path).absolute().parts
        kept = parents[max(0, len(parents) - folders) :]
        return "/".join([*kept, last if suffix else Path(last).stem])

    names = {}
    for path in paths:
        depth = len(Path(path).absolute().parts)
        for folders, suffix in itertools.product(range(depth), (False, True)):
            end = end_of(path, folders, suffix)
            if sum(end_of(other, folders, suffix) == end for other in paths) == 1:
                names[path] = end
                break
    return names


def parse_all(rows: Sequence[Row], parse: Callable[[Any], Parsed]) -> list[Parsed]:
    """Parses every row.

    Raises:
        InputError: a row cannot be used; the message names the first such row.
    """
    parsed = []
    for row in rows:
        try:
            parsed.append(parse(row.content))
        except RowError as error:
            raise InputError(f"{row.place}: {error}") from None
    return parsed


def read_rm_bench(source: str | Path) -> list[StyledRow]:
    """Reads a file of RM-Bench; raises InputError if any row cannot be used."""
    return [
        row
        for name in single_files(source)
        for row in parse_all(read_placed_rows(name), partial(parse_styled, domain=domain_of(name)))
    ]


def read_rewardbench2(source: str | Path) -> list[ChoiceRow]:
    """Reads a file of RewardBench 2; raises InputError if any row cannot be used."""
    return parse_all(read_placed_rows(source), parse_choice)


def domain_of(name: str) -> str:
    """Returns the domain in the name of an RM-Bench file, or the stem if there is none."""
    stem = Path(name).stem
    return next((domain for domain in DOMAINS if domain in stem.lower()), stem)


def parse_styled(content: Any, domain: str) -> StyledRow:
    """Parses a row of RM-Bench; `domain` is used if the row names none."""
    row = fields_of(content)
    chosen, rejected = texts(row, "chosen"), texts(row, "rejected")
    for side, answers in (("chosen", chosen), ("rejected", rejected)):
        if len(answers) != len(STYLES):
            raise RowError(f"field {side!r} has {len(answers)} texts, expected {len(STYLES)}")
    domain = text({"domain": domain} | row, "domain")
    return StyledRow(prompt=text(row, "prompt"), chosen=chosen, rejected=rejected, domain=domain)


def parse_choice(content: Any) -> ChoiceRow:
    """Parses a row of RewardBench 2: one right answer among several, or a row of Ties."""
    row = fields_of(content)
    chosen, rejected = texts(row, "chosen"), texts(row, "rejected")
    subset = text(row, "subset")
    if row.get("num_correct", len(chosen)) != len(chosen):
        raise RowError(f"num_correct={row['num_correct']!r}, but 'chosen' has {len(chosen)} texts")
    tie = _parse_tie(row, len(chosen)) if subset.lower() == "ties" else None
    if tie is None and len(chosen) != 1:
        raise RowError(f"field 'chosen' has {len(chosen)} texts, expected 1 outside Ties")
    return ChoiceRow(
        prompt=text(row, "prompt"), chosen=chosen, rejected=rejected, subset=subset, tie=tie
    )


def fields_of(content: Any) -> dict[str, Any]:
    """Returns the fields of a row; raises RowError if it is not a JSON object."""
    if isinstance(content, RowError):
        raise content
    if not isinstance(content, dict):
        raise RowError(f"expected an object, found {short(content)}")
    return content


def text(row: dict[str, Any], *names: str) -> str:
    """Returns the first of these fields that the row has; it must be text and not blank."""
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
    """Returns a field that is a list of at least one text.

    An answer of a model may be blank; it is scored like any other.
    """
    if name not in row:
        raise RowError(f"field {name!r} is missing, found {sorted(row)}")
    value = row[name]
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise RowError(f"field {name!r} must be a list of texts, found {short(value)}")
    return tuple(value)


def _parse_tie(row: dict[str, Any], right_answers: int) -> tuple[str, int]:
    kind, _, number = text(row, "id").partition(":")
    if kind not in ("ref", "tied") or not number.isdecimal():
        raise RowError(f"id={row['id']!r} of a Ties row: expected ref:N or tied:N")
    if kind == "tied" and right_answers < 2:
        raise RowError(f"id={row['id']!r}: a tied row needs two or more texts in 'chosen'")
    return kind, int(number)
