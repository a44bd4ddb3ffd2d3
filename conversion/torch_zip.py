"""Tensors of a file that torch.save wrote, read without unpickling it.

Such a file is a zip archive of stored (uncompressed) entries: NAME/data.pkl describes an object,
and NAME/data/KEY are the bytes of its tensors. A pickle is a program that may call anything. Here
it is not run: only the few instructions that build plain values are followed, the names that a
tensor needs become inert marks, and everything else is refused.
"""

import dataclasses
import math
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sarm_jax.io.errors import InputError

LARGEST_PROGRAM = 4 << 20  # bytes of data.pkl: a list of 65,536 indices has a tenth of it
ENCRYPTED = 0x1  # of a zip entry's flags
ORDERED_DICT, REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"
DTYPES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
MOST_DIMENSIONS = 8
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedError(ValueError):
    """Why a file is not read; which file is the caller's to say."""


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name of a program, "module name", which stands for nothing but itself."""

    text: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The entry data/`key`, which holds `size` elements."""

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
    """Returns the dict in a file of torch.save; those of its values that are tensors are arrays.

    Raises InputError for a file that holds anything but plain values and tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _Archive(archive, path.stat().st_size).read()
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
    """A zip archive of which every size is checked before anything is read."""

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
        if f"{self._folder}byteorder" in self._names:
            order = self._entry("byteorder", 16)
            if order != b"little":
                raise RefusedError(f"byte order {order!r}: only little is supported")
        found = _follow(self._entry("data.pkl", LARGEST_PROGRAM))
        if not isinstance(found, dict):
            raise RefusedError(f"holds a {_kind(found)}, expected a dict")
        return {k: self._array(v) if isinstance(v, _Tensor) else v for k, v in found.items()}

    def _entry(self, name: str, most: int) -> bytes:
        """Returns the bytes of an entry, at most `most`."""
        if self._folder + name not in self._names:
            raise RefusedError(f"entry {name[:60]!r} is missing")
        info = self._archive.getinfo(self._folder + name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
            raise RefusedError(
                f"entry {name[:60]!r} is compressed or encrypted, torch.save does not"
            )
        if info.file_size > min(most, self._size):
            raise RefusedError(
                f"entry {name[:60]!r} has {info.file_size:,} bytes, more than can be"
            )
        return self._archive.read(info)

    def _array(self, tensor: _Tensor) -> np.ndarray:
        """Returns the elements of a tensor, a view of its storage."""
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


def _follow(program: bytes) -> Any:
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
    """The stack of a pickle, and the instructions that put plain values on it."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise IndexError
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        """Follows one instruction; `RefusedError` for one that no plain tensor needs."""
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
    if text not in (ORDERED_DICT, REBUILD, *DTYPES):
        raise RefusedError(
            f"its pickle names {text[:60]!r}: only float32, float16 and bfloat16 tensors are read"
        )
    return _Name(text)


def _storage(described: Any) -> _Storage:
    """Returns the storage of ("storage", type, key, device, number of elements)."""
    kind, dtype, key, _, size = _expect(described, tuple)
    if kind != "storage" or _expect(dtype, _Name).text not in DTYPES or _expect(size, int) < 0:
        raise TypeError
    return _Storage(DTYPES[dtype.text], _expect(key, str), size)


def _result(called: Any, arguments: Any) -> Any:
    """Returns what a call of one of the known names stands for."""
    name = _expect(called, _Name).text
    if name == ORDERED_DICT and arguments == ():
        return {}
    if name != REBUILD:
        raise TypeError
    storage, offset, shape, strides = _expect(arguments, tuple)[:4]
    for number in (offset, *_expect(shape, tuple), *_expect(strides, tuple)):
        if _expect(number, int) < 0:
            raise TypeError
    if len(shape) != len(strides) or len(shape) > MOST_DIMENSIONS:
        raise TypeError
    return _Tensor(_expect(storage, _Storage), offset, shape, strides)


def _expect(value: Any, kind: type) -> Any:
    """Returns the value; TypeError if it is of another type, as a bool is no int."""
    if type(value) is not kind:
        raise TypeError
    return value


def _kind(value: Any) -> str:
    return "tensor" if isinstance(value, _Tensor) else type(value).__name__.strip("_")
