"""Reads feature_pages.json and certificates.json, and checks what the pages rely on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.report.runs import read_object
from sarm_jax.features.feature_pages import PAGES
from sarm_jax.io.errors import InputError

FILES = (f"probes/{PAGES}", f"eval/{PAGES}")  # of identify, and of evaluate
LARGEST = 1e30
CERTIFICATES = "probes/certificates.json"


def read_certificates(path: Path) -> dict[int, Mapping[str, Any]]:
    """Returns the certificates by feature; none if there is no file."""
    rows = (read_object(path) or {}).get("features", [])
    if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise InputError(f"{path}: field 'features' must be a list of objects")
    return {row["feature"]: row for row in rows if isinstance(row.get("feature"), int)}


def read_pages(path: Path) -> dict[str, Any] | None:
    """Reads and checks one file; None if it does not exist."""
    content = read_object(path)
    if content is None:
        return None
    if not (_is_count(content.get("latents")) and isinstance(content.get("features"), list)):
        raise InputError(f"{path}: expected 'latents', a number, and 'features', a list")
    for number, row in enumerate(content["features"]):
        problem = _problem(row, content["latents"])
        if problem:
            raise InputError(f"{path}: features[{number}]: {problem}")
    return content


def _problem(row: Any, latents: int) -> str:
    """Returns what is wrong with the entry of a feature; an empty text if nothing is."""
    if not isinstance(row, dict):
        return "expected an object"
    checks = {
        "feature": lambda x: _is_count(x) and x < latents,
        "roles": lambda x: isinstance(x, list) and all(isinstance(role, str) for role in x),
        "weight": _is_finite,
        "weight_rank": _is_count,
        "tau": lambda x: x is None or _is_finite(x),
        "groups": lambda x: isinstance(x, dict) and all(map(_is_group, x.values())),
        "neighbours": lambda x: isinstance(x, list) and all(map(_is_neighbour, x)),
        "examples": lambda x: isinstance(x, list) and all(map(_is_example, x)),
    }
    wrong = next((field for field, check in checks.items() if not check(row.get(field))), None)
    return f"field {wrong!r} is missing or malformed" if wrong else ""


def _is_group(group: Any) -> bool:
    if not isinstance(group, dict):
        return False
    ends, counts = group.get("range"), group.get("counts")
    return (
        _is_count(group.get("responses"))
        and _is_finite(group.get("fires"))
        and (group.get("above_tau") is None or _is_finite(group["above_tau"]))
        and isinstance(ends, list)
        and len(ends) == 2
        and all(map(_is_finite, ends))
        and ends[0] < ends[1]
        and isinstance(counts, list)
        and bool(counts)
        and all(map(_is_count, counts))
    )


def _is_neighbour(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_count(value.get("feature"))
        and _is_finite(value.get("cosine"))
    )


def _is_example(example: Any) -> bool:
    if not isinstance(example, dict):
        return False
    groups, tokens = example.get("groups"), example.get("tokens")
    return (
        _is_finite(example.get("z"))
        and isinstance(example.get("prompt"), str)
        and isinstance(groups, list)
        and all(isinstance(group, str) for group in groups)
        and isinstance(tokens, list)
        and all(map(_is_piece, tokens))
    )


def _is_piece(piece: Any) -> bool:
    if isinstance(piece, dict):
        return _is_count(piece.get("left_out"))
    return (
        isinstance(piece, list)
        and len(piece) == 2
        and isinstance(piece[0], str)
        and _is_finite(piece[1])
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: Any) -> bool:
    """Returns whether a value is a number that sums and products of such numbers keep finite."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= LARGEST
