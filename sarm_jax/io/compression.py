"""Unpacks files that are compressed with gzip or Zstandard, in memory and up to a limit."""

import gzip
import io
from collections.abc import Callable
from typing import Protocol

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import MAX_BYTES
from sarm_jax.io.libraries import as_input_error

CHUNK = 1 << 20  # bytes that are unpacked at a time


class Stream(Protocol):
    """A file that is read in pieces; the last piece is empty."""

    def read(self, size: int, /) -> bytes: ...


def unpacked(content: bytes, name: str, max_bytes: int = MAX_BYTES) -> bytes:
    """Unpacks the content of a file; content that is not compressed is returned as it is.

    Several members or frames, one behind the other, are all unpacked.

    Args:
        content: the content of the file, whose beginning shows how it is compressed.
        name: what messages call the file.
        max_bytes: a file that has more bytes once it is unpacked is refused.

    Raises:
        InputError: the content is damaged, incomplete or too large.
    """
    for magic, (compression, unpack) in _COMPRESSIONS.items():
        if content.startswith(magic):
            with as_input_error(f"{name}: cannot be unpacked with {compression}"):
                return _read(unpack(content, name), name, max_bytes)
    return content


def check_unpacked_size(size: int, name: str, max_bytes: int) -> None:
    """Raises InputError if the part of a file that is unpacked so far is too large already."""
    if size > max_bytes:
        raise InputError(f"{name}: has more than {max_bytes:,} bytes unpacked, which are not read")


def _read(stream: Stream, name: str, max_bytes: int) -> bytes:
    chunks, size = [], 0
    while chunk := stream.read(CHUNK):
        chunks.append(chunk)
        size += len(chunk)
        check_unpacked_size(size, name, max_bytes)
    return b"".join(chunks)


def _gzip(content: bytes, name: str) -> Stream:
    return gzip.GzipFile(fileobj=io.BytesIO(content))


def _zstd(content: bytes, name: str) -> Stream:
    import pyarrow  # imported here because it is slow to import

    if not pyarrow.Codec.is_available("zstd"):
        raise InputError(
            f"{name}: the installed pyarrow cannot read zstd: install pyarrow with pip, or unpack "
            "the file"
        )
    return pyarrow.input_stream(pyarrow.py_buffer(content), compression="zstd")


_COMPRESSIONS: dict[bytes, tuple[str, Callable[[bytes, str], Stream]]] = {
    b"\x1f\x8b": ("gzip", _gzip),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
    b"\x50\x2a\x4d\x18": ("zstd", _zstd),  # a frame without data, with which pzstd begins
}
