"""A float32 matrix in files of bounded size, for arrays that do not fit into memory.

    FOLDER/rows_00000.f32 …  rows, little-endian, one after the other; all files but the last one
                             have the same number of them
    FOLDER/checksums.u32     the CRC-32 of each row
    FOLDER/matrix.json       shape, rows per file, and what the matrix was made from. It is written
                             last: a folder without it is incomplete

Rows are written and read in any order. They are read with `pread` and not through a memory map,
whose pages count as memory of the process. Every row that is read is compared with its checksum,
which starts from the number of the row, so that a row in the place of another one is found as well.
In memory there are the checksums, 4 bytes a row.
"""

import contextlib
import errno
import json
import os
import stat
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import read_bytes, replacing
from sarm_jax.io.json_files import read_json, write_json
from sarm_jax.io.signals import cleaning_up

FILE_BYTES = 2 << 30  # largest file of rows, unless a single row is larger
INDEX, CHECKSUMS = "matrix.json", "checksums.u32"
FLOAT, CHECKSUM = np.dtype("<f4"), np.dtype("<u4")


class DamagedMatrixError(InputError):
    """A file of a matrix is missing, has another length, or holds other bytes than were written."""


class MatrixFiles:
    """A matrix `[N, D]` in a folder; an index or a slice of rows reads them.

    `writing_matrix` and `open_matrix` make one.

    Args:
        folder: the folder, which has the files of rows.
        shape: N and D.
        file_rows: rows in each file but the last one.
        checksum_n: checksums of the rows `[N]`; `write` sets them.
        flags: how the files of rows are opened.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int],
        *,
        file_rows: int,
        checksum_n: np.ndarray,
        flags: int = os.O_RDONLY,
    ):
        self.folder, self.shape, self.file_rows = folder, shape, file_rows
        self.checksum_n = checksum_n
        with contextlib.ExitStack() as stack:
            self._descriptors = [
                _opened(stack, self.path(number), flags) for number in range(self._files)
            ]
            self._open = stack.pop_all()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Reads the rows of a slice, or those of an array of row numbers.

        Raises:
            DamagedMatrixError: a row is not what was written.
            OSError: a file cannot be read.
        """
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        row_k = np.asarray(index, np.int64).ravel()
        x_kd = np.empty((len(row_k), self.shape[1]), FLOAT)
        for number, offset, start, stop in self._runs(row_k):
            run = x_kd[start:stop]
            try:
                count = os.preadv(self._descriptors[number], [run.data], offset)
                if count < run.nbytes:
                    self._read_rest(number, offset + count, run.data.cast("B")[count:])
            except OSError as error:
                raise _named(error, self.path(number)) from error
        crc32, expected_k = zlib.crc32, self.checksum_n[row_k].tolist()
        for row, x_d, expected in zip(row_k.tolist(), x_kd, expected_k, strict=True):
            if crc32(x_d.data, row & 0xFFFFFFFF) != expected:
                path = self.path(row // self.file_rows)
                raise DamagedMatrixError(
                    f"{path}: row {row % self.file_rows} is damaged: it does not have its checksum"
                )
        return x_kd.reshape(*np.shape(index), self.shape[1])

    def write(self, start: int, x_kd: np.ndarray) -> None:
        """Writes rows from number `start` on.

        Raises:
            OSError: the disk is full, or a file cannot be written; the error names the file.
        """
        x_kd = np.ascontiguousarray(x_kd, FLOAT)
        row_k = np.arange(start, start + len(x_kd))
        for row, x_d in zip(row_k.tolist(), x_kd, strict=True):
            self.checksum_n[row] = zlib.crc32(x_d.data, row & 0xFFFFFFFF)
        for number, offset, first, stop in self._runs(row_k):
            left = x_kd[first:stop].data.cast("B")
            try:
                while left:
                    written = os.pwrite(self._descriptors[number], left, offset)
                    left, offset = left[written:], offset + written
            except OSError as error:
                raise _named(error, self.path(number)) from error

    def reserve(self) -> None:
        """Reserves the disk space of all rows, so that a disk that is too small shows at once.

        Raises:
            OSError: the disk is full; the error names the file.
        """
        for number, descriptor in enumerate(self._descriptors):
            try:
                _reserve(descriptor, self.file_bytes(number))
            except OSError as error:
                raise _named(error, self.path(number)) from error

    def close(self) -> None:
        """Closes the files."""
        self._open.close()

    def path(self, number: int) -> Path:
        """Returns the path of a file of rows."""
        return self.folder / f"rows_{number:05}.f32"

    def file_bytes(self, number: int) -> int:
        """Returns the size of a file of rows."""
        rows = min(len(self) - number * self.file_rows, self.file_rows)
        return rows * self.shape[1] * FLOAT.itemsize

    @property
    def _files(self) -> int:
        return -(-len(self) // self.file_rows)

    def _runs(self, row_k: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """Finds the runs of rows that lie next to each other in one file.

        Returns:
            An iterator over (number of the file, offset of the first byte in it, start, stop). A
            run consists of the rows `row_k[start:stop]`.
        """
        number_k, within_k = np.divmod(row_k, self.file_rows)
        first_k = np.ones(len(row_k), bool)
        first_k[1:] = (np.diff(row_k) != 1) | (np.diff(number_k) != 0)
        start_k = np.flatnonzero(first_k)
        stop_k = np.append(start_k[1:], len(row_k))[: len(start_k)]
        offset_k = within_k[start_k] * (self.shape[1] * FLOAT.itemsize)
        columns = (number_k[start_k], offset_k, start_k, stop_k)
        return zip(*(column.tolist() for column in columns), strict=True)

    def _read_rest(self, number: int, offset: int, left: memoryview) -> None:
        """Reads what a first call has not returned, which is at most 2 GiB."""
        while left:
            count = os.preadv(self._descriptors[number], [left], offset)
            if not count:
                raise DamagedMatrixError(f"{self.path(number)}: ends at byte {offset:,}")
            left, offset = left[count:], offset + count


@contextlib.contextmanager
def writing_matrix(
    folder: Path, shape: tuple[int, int], made_from: Any = None
) -> Iterator[MatrixFiles]:
    """Yields an empty matrix, whose rows the block has to write; completes it at the end.

    An earlier matrix in the folder is removed. If the block fails, or a signal ends the process,
    the files are removed again.

    Args:
        folder: the folder; it and its parents are made.
        shape: N and D.
        made_from: a JSON value that `open_matrix` compares.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the error names the file.
    """
    remove_matrix(folder)
    pending = [folder]
    with cleaning_up(partial(_remove_all, pending)):
        folder.mkdir(parents=True, exist_ok=True)
        matrix = MatrixFiles(
            folder,
            shape,
            file_rows=max(FILE_BYTES // (shape[1] * FLOAT.itemsize), 1),
            checksum_n=np.zeros(shape[0], CHECKSUM),
            flags=os.O_RDWR | os.O_CREAT | os.O_EXCL,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(matrix.close)
            matrix.reserve()
            yield matrix
            _complete(matrix, made_from)
            pending.clear()
            stack.pop_all()


def open_matrix(folder: Path, shape: tuple[int, int], made_from: Any) -> MatrixFiles | None:
    """Opens a matrix that is complete; returns None if there is none, or one of something else.

    Args:
        folder: its folder.
        shape: the expected N and D.
        made_from: what it must have been made from.

    Raises:
        DamagedMatrixError: a file is missing, or does not have its length; the error names it.
    """
    if not (folder / INDEX).is_file():
        return None
    # Paths that the matrix was made from may have half of a surrogate pair.
    index = read_json(folder / INDEX, expected="the index of a matrix", allow_surrogates=True)
    expected = {"shape": list(shape), "made_from": json.loads(json.dumps(made_from))}
    if {name: index.get(name) for name in expected} != expected:
        return None
    data = read_bytes(folder / CHECKSUMS)
    if len(data) != shape[0] * CHECKSUM.itemsize or zlib.crc32(data) != index.get("checksums"):
        raise DamagedMatrixError(f"{folder / CHECKSUMS}: is damaged: its own checksum is another")
    file_rows = index.get("file_rows")
    if type(file_rows) is not int or file_rows < 1:
        raise DamagedMatrixError(f"{folder / INDEX}: is damaged: file_rows is {file_rows!r}")
    matrix = MatrixFiles(
        folder, shape, file_rows=file_rows, checksum_n=np.frombuffer(data, CHECKSUM)
    )
    for number, descriptor in enumerate(matrix._descriptors):
        size, due = os.fstat(descriptor).st_size, matrix.file_bytes(number)
        if size != due:
            matrix.close()
            raise DamagedMatrixError(f"{matrix.path(number)}: has {size:,} bytes, expected {due:,}")
    return matrix


def remove_matrix(folder: Path) -> None:
    """Removes the files of a matrix, complete or not, and the folder if nothing else is in it."""
    (folder / INDEX).unlink(missing_ok=True)  # first: what is left is incomplete
    for path in (folder / CHECKSUMS, *folder.glob("rows_*.f32")):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove_all(folders: list[Path]) -> None:
    for folder in folders:
        remove_matrix(folder)


def _complete(matrix: MatrixFiles, made_from: Any) -> None:
    """Flushes the rows to the disk and writes checksums and index."""
    for number, descriptor in enumerate(matrix._descriptors):
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise _named(error, matrix.path(number)) from error
    data = matrix.checksum_n.tobytes()
    with replacing(matrix.folder / CHECKSUMS, "wb") as file:
        file.write(data)
    index = {
        "shape": matrix.shape,
        "file_rows": matrix.file_rows,
        "checksums": zlib.crc32(data),
        "made_from": made_from,
    }
    write_json(matrix.folder / INDEX, index)


def _opened(stack: contextlib.ExitStack, path: Path, flags: int) -> int:
    """Opens a file of rows until the stack is closed."""
    try:
        # Without O_NONBLOCK a pipe in the place of the file would block.
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except FileNotFoundError:
        raise DamagedMatrixError(f"{path}: is missing") from None
    stack.callback(os.close, descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise DamagedMatrixError(f"{path}: is no file")
    return descriptor


def _reserve(descriptor: int, size: int) -> None:
    """Reserves disk space for a file, if its file system can do so, and gives it its size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _named(error: OSError, path: Path) -> OSError:
    """Returns an error of a file descriptor with the path of its file."""
    return OSError(error.errno, error.strerror, str(path))
