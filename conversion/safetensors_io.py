"""Reads and writes directories of safetensors files, one tensor in memory at a time.

A directory has a single `model.safetensors`, or shards that `model.safetensors.index.json` lists.
Pickled weights (.bin, .pt, .pth) are never opened.
"""

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from conversion.containment import contained
from conversion.directory import write_hf_json
from conversion.mistaken import PICKLED, UNPICKLING, describe_directory
from conversion.problems import report
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_file, open_file, sync_to_disk
from sarm_jax.io.json_files import read_json
from sarm_jax.io.libraries import as_input_error
from sarm_jax.parallel.finite import require_finite

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
METADATA = {"format": "pt"}  # transformers refuses files without it
STRIP = 16  # rows of a transposed matrix that are copied together
LARGE = 1 << 20  # elements; a matrix of this size or more is copied by several threads

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class TensorFiles:
    """The tensors of a directory by name; a tensor is read when it is requested.

    Args:
        directory: the directory.
        single: the name of the file if there are no shards.

    Raises:
        InputError: there are no safetensors files, or the index and the shards contradict each
            other. The message lists all contradictions.
    """

    def __init__(self, directory: str | Path, single: str = SINGLE):
        self.directory = Path(directory)
        index = self.directory / INDEX
        listed = _read_index(index) if index.is_file() else None
        if listed is None:
            if not (self.directory / single).is_file():
                raise InputError(_describe_missing(self.directory, single))
            shards = [single]
        else:
            shards = sorted(set(listed.values()))
            if (self.directory / single).is_file() and single not in shards:
                raise InputError(f"{self.directory}: holds both {single} and {INDEX}; remove one")
        self._open: dict[str, Any] = {}
        problems = []
        for shard in shards:
            try:
                self._open[shard] = _open_shard(self.directory, shard)
            except InputError as error:
                problems.append(str(error))
        report(self.directory, problems)
        self._shard_of = self._locate(listed)

    def names(self) -> list[str]:
        """Returns the names of all tensors, sorted."""
        return sorted(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the stored shape."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Returns the stored dtype, of numpy or ml_dtypes; `V1` if neither has it."""
        return _DTYPES.get(self._slice(name).get_dtype(), np.dtype("V1"))

    def shard(self, name: str) -> str:
        """Returns the name of the file that holds the tensor."""
        return self._shard_of[name]

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads the tensor as stored, or only a region of it."""
        try:
            if region is not None:
                return self._slice(name)[region]
            return self._open[self._shard_of[name]].get_tensor(name)
        except (SafetensorError, OSError, TypeError) as error:
            shard = self.directory / self._shard_of[name]
            raise InputError(f"{shard}: tensor {name} cannot be read ({error})") from error

    def mapped(self, name: str) -> np.ndarray:
        """Maps the tensor as stored, read-only; its pages are read from the file when used.

        For a tensor that is passed on at once: its values change if the file is overwritten.
        """
        path = contained(self.directory, self._shard_of[name])
        with open_file(path) as file:  # `safe_open` has checked the header
            length = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(length))[name]
        start = 8 + length + entry["data_offsets"][0]
        shape = tuple(entry["shape"])
        if 0 in shape:  # an empty tensor cannot be mapped
            return self.read(name)
        return np.memmap(path, self.dtype(name), "r", start, shape).view(np.ndarray)

    def _slice(self, name: str) -> Any:
        return self._open[self._shard_of[name]].get_slice(name)

    def _locate(self, listed: dict[str, str] | None) -> dict[str, str]:
        """Returns the shard of each tensor, and checks the index against the shards."""
        shard_of: dict[str, str] = {}
        problems = []
        for shard, file in self._open.items():
            for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                if name in shard_of:
                    problems.append(f"{name}: stored in both {shard_of[name]} and {shard}")
                shard_of.setdefault(name, shard)
                if listed is not None and name not in listed:
                    problems.append(f"{name}: stored in {shard} but missing from {INDEX}")
        for name, shard in (listed or {}).items():
            if shard_of.get(name) != shard and not any(p.startswith(f"{name}: ") for p in problems):
                problems.append(f"{name}: {INDEX} says it is in {shard}, which does not hold it")
        report(self.directory, problems)
        return shard_of


class TensorWriter:
    """Collects tensors and writes a shard as soon as it holds `shard_bytes` or more.

    A shard is written while the next one is collected, so two are in memory at a time. Each may
    exceed `shard_bytes` by one tensor. The end of the `with` block waits for the shard that is
    being written.
    """

    def __init__(self, directory: Path, shard_bytes: int = 1 << 29):
        self.directory, self.shard_bytes = Path(directory), shard_bytes
        self.total_bytes = 0
        self._shards: list[list[str]] = []
        self._waiting: dict[str, np.ndarray] = {}
        self._waiting_bytes = 0
        self._names: set[str] = set()
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds a tensor, and writes a shard if enough tensors are waiting.

        Raises:
            InputError: the tensor is not finite.
        """
        if name in self._names:
            raise ValueError(f"tensor {name} was added twice")
        self._names.add(name)
        self._waiting[name] = contiguous(array)  # save_file ignores strides
        require_finite({name: self._waiting[name]}, "the model")
        self._waiting_bytes += array.nbytes
        self.total_bytes += array.nbytes
        if self._waiting_bytes >= self.shard_bytes:
            self._flush()

    def close(self) -> int:
        """Writes the last shard and, if there are several, the index.

        Returns:
            The number of tensors.
        """
        self._flush()
        self._wait()
        count = len(self._shards)
        if count == 1:
            (self.directory / _unfinished_name(0)).rename(self.directory / SINGLE)
            return len(self._names)
        weight_map: dict[str, str] = {}
        for n, names in enumerate(self._shards):
            shard = f"model-{n + 1:05d}-of-{count:05d}.safetensors"
            (self.directory / _unfinished_name(n)).rename(self.directory / shard)
            weight_map |= dict.fromkeys(names, shard)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_hf_json(self.directory / INDEX, index)
        return len(self._names)

    def _flush(self) -> None:
        if self._waiting or not self._shards:
            self._wait()
            path = self.directory / _unfinished_name(len(self._shards))
            self._shards.append(list(self._waiting))
            self._writing = self._thread.submit(_save, self._waiting, path)
            self._waiting, self._waiting_bytes = {}, 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    try:
        save_file(tensors, path, metadata=METADATA)
        sync_to_disk(path)  # while the next shard is collected
    except SafetensorError as error:  # such as a full disk
        raise InputError(f"{path}: cannot be written ({error})") from error


def contiguous(array: np.ndarray) -> np.ndarray:
    """Returns the array in C order.

    A transposed matrix is copied in strips, which stay in the cache; each core copies its own
    columns.
    """
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.asarray(array, order="C")
    bits = np.dtype(f"u{array.dtype.itemsize}")  # integers are copied faster than bfloat16
    source, out = array.view(bits), np.empty(array.shape, bits)
    cores = (os.cpu_count() or 1) if array.size >= LARGE else 1
    columns = array.shape[1]
    columns_per_core = -(-columns // (cores * STRIP)) * STRIP

    def copy(first: int) -> None:
        for start in range(first, min(first + columns_per_core, columns), STRIP):
            out[:, start : start + STRIP] = source[:, start : start + STRIP]

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(copy, range(0, columns, columns_per_core)))
    return out.view(array.dtype)


def _unfinished_name(n: int) -> str:
    """Returns the name of shard `n` while the number of shards is not known yet."""
    return f"part-{n:05d}.safetensors"


def _read_index(path: Path) -> dict[str, str]:
    """Reads the shard of each tensor from an index, and checks the names of the shards."""
    listed = read_json(contained(path.parent, path.name)).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{path}: weight_map is missing or empty")
    for name, shard in listed.items():
        plain = isinstance(shard, str) and Path(shard).name == shard and "\\" not in shard
        if not plain or not shard.endswith(".safetensors"):
            raise InputError(
                f"{path}: tensor {name} is in {shard!r}, which is not the name of a safetensors "
                "file in this directory"
            )
    return listed


def _open_shard(directory: Path, shard: str) -> Any:
    path = contained(directory, shard)
    if not path.exists():
        raise InputError(f"{shard}: the shard is missing")
    check_file(path, shard)
    with as_input_error(f"{shard}: truncated or not safetensors"):
        return safe_open(path, framework="numpy")


def _describe_missing(directory: Path, single: str) -> str:
    """Explains why a directory has no tensors that can be read."""
    if not directory.is_dir():
        return f"{directory}: no such directory"
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLED)
    if pickled:
        return f"{directory}: holds pickled weights only ({', '.join(pickled[:3])}), {UNPICKLING}"
    missing = f"neither {single} nor {INDEX} is there"
    if single == SINGLE and (description := describe_directory(directory)):
        return f"{directory}: {description} ({missing})"
    return f"{directory}: {missing}"
