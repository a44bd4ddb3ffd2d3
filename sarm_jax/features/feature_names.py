"""Names of features, which people or language models gave them, and how a feature is shown.

A file of names has one of three forms:
    {"987": "flattery", …}                           one JSON object
    {"feature": 987, "name": "flattery", …}          rows: the answers to naming_prompts.jsonl
    {"index": "987", "description": "flattery", …}   rows: an export of Neuronpedia's explanations
Rows are JSON Lines, a JSON array or Parquet, also compressed.

A name is shown as one line of at most `MAX_CHARACTERS` characters without control characters. Names
are for readers: no result depends on them, and files keep the numbers of the features.
"""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sarm_jax.features.feature_lists import LARGEST_ID
from sarm_jax.io.compression import unpacked
from sarm_jax.io.errors import InputError, printable
from sarm_jax.io.files import MAX_BYTES, read_bytes
from sarm_jax.io.formats import binary_format, is_json_lines, is_json_object
from sarm_jax.io.json_files import parse_json, short
from sarm_jax.io.row_files import Row, RowError, parse_rows

LOG = logging.getLogger(__name__)
OPTION = "identify.feature_names"
MAX_CHARACTERS = 80  # of a name that is shown
NUMBER_FIELDS, NAME_FIELDS = ("feature", "index"), ("name", "description")
SAE_FIELDS = ("modelId", "layer")  # of Neuronpedia: which SAE a row belongs to
EXPLAINER = "explanationModelName"  # of Neuronpedia, where a latent may have several explanations
EXPECTED = 'expected names by feature, as in {"987": "flattery"}'


@dataclasses.dataclass(frozen=True)
class FeatureNames:
    """The names of some features; `source` says where they come from, for messages."""

    by_feature: Mapping[int, str] = dataclasses.field(default_factory=dict)
    source: str = ""

    def __bool__(self) -> bool:
        return bool(self.by_feature)

    def show(self, feature: int) -> str:
        """Returns a feature for a reader: its number, followed by its name if it has one."""
        name = self.by_feature.get(int(feature))
        return str(feature) if name is None else f'{feature} "{name}"'

    def show_all(self, features: Iterable[int]) -> str:
        """Returns several features for a reader, separated by commas."""
        return ", ".join(map(self.show, features))

    def of(self, features: Iterable[int]) -> dict[str, str]:
        """Returns the names that some of the features have, by number, for JSON."""
        return {str(i): self.by_feature[i] for i in features if i in self.by_feature}

    def field(self, features: Iterable[int]) -> dict[str, dict[str, str]]:
        """Returns the field "feature_names" of a JSON object, or nothing if no feature has one."""
        names = self.of(features)
        return {"feature_names": names} if names else {}

    def annotated(self, value: Any) -> Any:
        """Returns a JSON value in which objects with a named "feature" have its "name" as well."""
        if isinstance(value, Mapping):
            feature = value.get("feature")
            own = {}
            if isinstance(feature, int) and feature in self.by_feature:
                own = {"feature": feature, "name": self.by_feature[feature]}
            return own | {key: self.annotated(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.annotated(item) for item in value]
        return value

    def check(self, latent_size: int) -> None:
        """Raises InputError if a feature that is named does not exist."""
        largest = max(self.by_feature, default=-1)
        if largest >= latent_size:
            raise InputError(
                f"{self.source}: {largest}: the reward model has {latent_size} latents, numbered "
                "from 0"
            )


NO_NAMES = FeatureNames()


def read_feature_names(path: str, option: str = OPTION) -> FeatureNames:
    """Reads a file of names.

    Args:
        path: the file.
        option: the option that names it, for messages.

    Raises:
        InputError: the file cannot be read or has another form, a key is no feature, a name is no
            text, or a feature has two names. The message names the option, the file and the key.
    """
    source = f"{option}={path}"
    content = unpacked(read_bytes(path, source), source, MAX_BYTES)
    text = "" if binary_format(content[:64]) else content.decode("utf-8", "replace")
    if text.lstrip().startswith("{") and not _holds_lines(text, source):
        names = _of_object(content, source)
    else:
        names = _of_rows(parse_rows(content, source), source)
    return FeatureNames(names, source)


def shown_name(text: str) -> str:
    """Returns a name as it is shown: one line without control characters, of bounded length."""
    name = printable(text)
    return name if len(name) <= MAX_CHARACTERS else f"{name[: MAX_CHARACTERS - 1].rstrip()}…"


def _holds_lines(text: str, source: str) -> bool:
    if is_json_object(text):
        return False
    return is_json_lines(text) or bool(re.search(r"(?i)\.(jsonl|ndjson)(\.\w+)?$", source))


def _of_object(content: bytes, source: str) -> dict[int, str]:
    """Parses a JSON object: names by feature, or a single row."""
    try:
        value = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{source}: not JSON ({error})") from error
    if any(field in value for field in NUMBER_FIELDS):
        return _of_rows([Row(source, value)], source)
    if not value:
        raise InputError(f"{source}: holds no names, {EXPECTED}")
    return _of_entries([(source, key, name) for key, name in value.items()])


def _of_rows(rows: Sequence[Row], source: str) -> dict[int, str]:
    """Parses rows; a single row without a feature is an object of names by feature."""
    first = rows[0].content
    if len(rows) == 1 and isinstance(first, dict) and not _field(first, NUMBER_FIELDS):
        return _of_entries([(rows[0].place, key, name) for key, name in first.items()])
    entries, seen, several = [], set(), 0
    for row in rows:
        number, name = _parsed(row)
        has_explainer = EXPLAINER in row.content
        if has_explainer and not (isinstance(name, str) and name.strip()):
            continue  # an explanation that was never written
        if has_explainer and str(number) in seen:
            several += 1
            continue
        seen.add(str(number))
        entries.append((row.place, number, name))
    _check_one_sae(rows, source)
    if not entries:
        raise InputError(f"{source}: holds no names")
    if several:
        LOG.info("%s: %d further explanations of latents that have one are left out",
                 source, several)  # fmt: skip
    return _of_entries(entries)


def _parsed(row: Row) -> tuple[Any, Any]:
    """Returns the feature and the name of a row, as they stand there."""
    if isinstance(row.content, RowError):
        raise InputError(f"{row.place}: {row.content}")
    if not isinstance(row.content, dict):
        raise InputError(f"{row.place}: expected a JSON object, found {short(row.content)}")
    number = _field(row.content, NUMBER_FIELDS)
    if not number:
        raise InputError(
            f"{row.place}: field 'feature' or 'index' is missing, found {sorted(row.content)}"
        )
    name = _field(row.content, NAME_FIELDS)
    if not name and EXPLAINER not in row.content:
        raise InputError(
            f"{row.place}: field 'name' or 'description' is missing, found {sorted(row.content)}"
        )
    return row.content[number], row.content[name] if name else None


def _field(content: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Returns the first of the fields that the row has."""
    return next((name for name in names if name in content), None)


def _check_one_sae(rows: Sequence[Row], source: str) -> None:
    """Raises InputError if the rows are of several SAEs, whose latents have the same numbers."""
    for field in SAE_FIELDS:
        values = list(dict.fromkeys(short(row.content[field]) for row in rows
                                    if field in row.content))  # fmt: skip
        if len(values) > 1:
            raise InputError(
                f"{source}: field {field!r} is {values[0]} and {values[1]}: keep the rows of one "
                "SAE"
            )


def _of_entries(entries: Iterable[tuple[str, Any, Any]]) -> dict[int, str]:
    """Checks (place, feature, name) and returns the names that are shown, by feature."""
    names: dict[int, str] = {}
    for place, key, name in entries:
        feature = _feature(key)
        if feature is None:
            raise InputError(
                f"{place}: {short(key)}: expected a feature id (a whole number that is not "
                "negative)"
            )
        if not isinstance(name, str):
            raise InputError(
                f"{place}: the name of feature {feature} must be a text, found {short(name)}"
            )
        if not name.strip():
            raise InputError(f"{place}: the name of feature {feature} is empty")
        if feature in names:
            raise InputError(f"{place}: feature {feature} is named twice")
        names[feature] = shown_name(name)
    return names


def _feature(key: Any) -> int | None:
    """Returns the feature that a JSON number or a text of digits stands for, or None."""
    if isinstance(key, str):
        digits = key.isascii() and key.isdecimal() and len(key) <= 10
        key = int(key) if digits else None
    is_number = isinstance(key, int) and not isinstance(key, bool)
    return key if is_number and 0 <= key <= LARGEST_ID else None
