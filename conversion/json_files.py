"""JSON objects on disk, read strictly."""

import json
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.strict_json import parse_json

LARGEST = 1 << 28  # bytes: an index of a million tensors has less


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; a missing file, bad syntax or a repeated key is an `InputError`."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes, at most {LARGEST:,} are expected")
        value = parse_json(path.read_text(encoding="utf-8"), constants=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read ({reason})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
