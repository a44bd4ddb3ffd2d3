"""Names the format of a file that was expected to be another one, for messages."""

import json
from pathlib import Path

from sarm_jax.io.errors import InputError

_MAGIC = {
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"GGUF": "a GGUF file (model weights)",
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x1f\x8b": "compressed with gzip: unpack it",
    b"BZh": "compressed with bzip2: unpack it",
    b"\xfd7zXZ\x00": "compressed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF document",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}


def decoded(content: bytes, name: str | Path, expected: str) -> str:
    """Decodes the content of a text file.

    Args:
        content: the content.
        name: what messages call the file.
        expected: what messages say was expected.

    Raises:
        InputError: it is in another format, which is named, or not UTF-8.
    """
    if other := binary_format(content[:64]):
        raise InputError(f"{name}: is {other}, {expected}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 (byte {error.start}: {error.reason})") from error


def binary_format(content: bytes) -> str | None:
    """Names the format that the beginning of a file shows; None if it may be UTF-8 text."""
    for magic, name in _MAGIC.items():
        if content.startswith(magic):
            return name
    if content[8:10] == b'{"' and int.from_bytes(content[:8], "little") < 1 << 27:
        return "a safetensors file (tensors)"
    return None


def is_json_lines(text: str) -> bool:
    """Returns True if the first two lines that are not blank are JSON objects."""
    lines = [line for line in text.split("\n") if line.strip()]
    return len(lines) > 1 and all(_is_object(line) for line in (lines[0], lines[1]))


def is_json_array(text: str) -> bool:
    """Returns True if the whole text is one JSON array of objects."""
    if not text.lstrip().startswith("["):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def is_json_object(text: str) -> bool:
    """Returns True if the whole text is one JSON object that takes several lines."""
    return "\n" in text.strip() and _is_object(text)


def _is_object(text: str) -> bool:
    if not text.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
