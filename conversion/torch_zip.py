"""Reads the tensors of a file that torch.save wrote, without unpickling it.

Such a file is a zip archive of stored (uncompressed) entries: NAME/data.pkl describes an object,
and NAME/data/KEY holds the bytes of a tensor. A pickle is a program that may call any function, so
it is not run here. Only the few instructions that build plain values are interpreted, the names
that a tensor needs become inert marks, and everything else is refused.
"""

import dataclasses
import math
import os
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import open_file

MAX_PROGRAM_BYTES = 4 << 20  # of data.pkl; a list of 65,536 indices takes a tenth of it
ENCRYPTED = 0x1  # a bit of the flags of a zip entry
ORDERED_DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
DTYPES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
MAX_DIMENSIONS = 8
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedError(ValueError):
    """The reason why a file is refused; the caller adds the name of the file."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name in a pickle, "module name", which is not resolved to anything."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The storage in the entry data/`key`, which holds `size` elements."""

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_object(path: str | Path) -> dict[str, Any]:
    """Reads the dict in a file that torch.save wrote; its tensors are returned as arrays.

    Raises:
        InputError: the file holds something else than plain values and tensors, or is damaged.
    """
    path = Path(path)
    with open_file(path) as file:
        return _read_archive(path, file)


def _read_archive(path: Path, file: BinaryIO) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            return _Archive(archive, os.fstat(file.fileno()).st_size).read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except zipfile.BadZipFile as error:
        raise InputError(
            f"{path}: no whole zip archive, as torch.save writes it since 1.6 ({error})"
        ) from error
    except RefusedError as error:
        raise InputError(f"{path}: {error}") from error
    except (ValueError, EOFError, RuntimeError, OverflowError, struct.error) as error:
        raise InputError(f"{path}: the archive is damaged ({error})") from error


class _Archive:
    """A zip archive; every size is checked before an entry is read."""

    def __init__(self, archive: zipfile.ZipFile, size: int):
        self._archive, self._size = archive, size
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise RefusedError("an entry of the archive is there twice")
        programs = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(programs) != 1:
            raise RefusedError("the archive holds no NAME/data.pkl: not written by torch.save")
        self._folder = programs[0].removesuffix("data.pkl")
        self._names = set(names)

    def read(self) -> dict[str, Any]:
        """Returns the dict that the archive holds."""
        if f"{self._folder}byteorder" in self._names:
            order = self._entry("byteorder", 16)
            if order != b"little":
                raise RefusedError(f"byte order {order!r}: only little is supported")
        value = _interpret(self._entry("data.pkl", MAX_PROGRAM_BYTES))
        if not isinstance(value, dict):
            raise RefusedError(f"holds a {_type_name(value)}, expected a dict")
        return {k: self._array(v) if isinstance(v, _Tensor) else v for k, v in value.items()}

    def _entry(self, name: str, max_bytes: int) -> bytes:
        """Reads an entry; refuses one of more than `max_bytes`."""
        if self._folder + name not in self._names:
            raise RefusedError(f"entry {name[:60]!r} is missing")
        info = self._archive.getinfo(self._folder + name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
            raise RefusedError(
                f"entry {name[:60]!r} is compressed or encrypted, torch.save does not"
            )
        if info.file_size > min(max_bytes, self._size):
            raise RefusedError(
                f"entry {name[:60]!r} has {info.file_size:,} bytes, more than can be"
            )
        return self._archive.read(info)

    def _array(self, tensor: _Tensor) -> np.ndarray:
        """Reads a tensor as a view of its storage."""
        storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
        if math.prod(shape) > storage.size:
            raise RefusedError(f"a tensor {list(shape)} in a storage of {storage.size:,} elements")
        steps = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if math.prod(shape) and tensor.offset + steps >= storage.size:
            raise RefusedError(
                f"a tensor {list(shape)} reaches beyond its {storage.size:,} elements"
            )
        content = self._entry(f"data/{storage.key}", self._size)
        itemsize = storage.dtype.itemsize
        if len(content) != storage.size * itemsize:
            raise RefusedError(
                f"a storage of {storage.size:,} elements of {storage.dtype} has "
                f"{len(content):,} bytes"
            )
        if not math.prod(shape):
            return np.empty(shape, storage.dtype)
        flat = np.frombuffer(content, storage.dtype)[tensor.offset :]
        return np.lib.stride_tricks.as_strided(
            flat, shape, [s * itemsize for s in strides], writeable=False
        )


def _interpret(program: bytes) -> Any:
    """Returns the value that a pickle describes."""
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            machine.step(opcode.name, argument)
        return machine.result()
    except RefusedError:
        raise
    except (IndexError, KeyError, TypeError, ValueError):
        raise RefusedError("its pickle is damaged") from None


class _Machine:
    """The stack machine of a pickle, with only the instructions that build plain values."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        """Returns the value that is left on the stack."""
        if len(self._stack) != 1:
            raise IndexError
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        """Interprets one instruction.

        Raises:
            RefusedError: no plain tensor needs this instruction.
        """
        stack = self._stack
        match name:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "BININT" | "BININT1" | "BININT2" | "BINUNICODE":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(CONSTANTS[name])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(self._pop(TUPLES[name]))
            case "TUPLE":
                stack.append(self._pop_to_mark())
            case "APPEND" | "APPENDS":
                items = self._pop(1) if name == "APPEND" else self._pop_to_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._pop(2) if name == "SETITEM" else self._pop_to_mark()
                keys = [_expect(key, str) for key in items[::2]]
                _expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
            case "GLOBAL":
                stack.append(_name(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                stack.append(_result(*self._pop(2)))
            case _:
                raise RefusedError(f"its pickle has an instruction {name}, which no tensor needs")

    def _pop(self, count: int) -> tuple[Any, ...]:
        start = len(self._stack) - count
        if start < 0:
            raise IndexError
        items = tuple(self._stack[start:])
        del self._stack[start:]
        return items

    def _pop_to_mark(self) -> tuple[Any, ...]:
        return self._pop(len(self._stack) - self._marks.pop())


def _name(text: str) -> _Name:
    """Returns the mark for an allowed name."""
    if text not in (ORDERED_DICT, REBUILD, *DTYPES):
        raise RefusedError(
            f"its pickle names {text[:60]!r}: only float32, float16 and bfloat16 tensors are read"
        )
    return _Name(text)


def _storage(description: Any) -> _Storage:
    """Returns the storage of ("storage", type, key, device, number of elements)."""
    kind, dtype, key, _, size = _expect(description, tuple)
    if kind != "storage" or _expect(dtype, _Name).text not in DTYPES or _expect(size, int) < 0:
        raise TypeError
    return _Storage(DTYPES[dtype.text], _expect(key, str), size)


def _result(function: Any, arguments: Any) -> Any:
    """Returns the value of a call of one of the allowed names."""
    name = _expect(function, _Name).text
    if name == ORDERED_DICT and arguments == ():
        return {}
    if name != REBUILD:
        raise TypeError
    storage, offset, shape, strides = _expect(arguments, tuple)[:4]
    for number in (offset, *_expect(shape, tuple), *_expect(strides, tuple)):
        if _expect(number, int) < 0:
            raise TypeError
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise TypeError
    return _Tensor(storage=_expect(storage, _Storage), offset=offset, shape=shape, strides=strides)


def _expect(value: Any, kind: type) -> Any:
    """Returns the value; raises TypeError unless its type is `kind` itself (a bool is no int)."""
    if type(value) is not kind:
        raise TypeError
    return value


def _type_name(value: Any) -> str:
    return "tensor" if isinstance(value, _Tensor) else type(value).__name__.strip("_")
