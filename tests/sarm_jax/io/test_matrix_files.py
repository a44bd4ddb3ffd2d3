"""Matrices in files against NumPy arrays, their damage, and disks that are full."""

import errno
import os

import numpy as np
import pytest

from sarm_jax.io import matrix_files
from sarm_jax.io.matrix_files import (
    DamagedMatrixError,
    open_matrix,
    remove_matrix,
    writing_matrix,
)

SHAPE = (23, 5)
ROWS = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
SEED = {"seed": 3, "files": ["a", "b"]}


@pytest.fixture(autouse=True)
def _four_rows_a_file(monkeypatch):
    monkeypatch.setattr(matrix_files, "FILE_BYTES", 4 * 5 * 4 + 3)


def write(folder, made_from=SEED):
    """Writes the rows in three blocks out of order, each over several files."""
    with writing_matrix(folder, SHAPE, made_from) as matrix:
        for block in (slice(10, 23), slice(0, 1), slice(1, 10)):
            matrix.write(block.start, ROWS[block])
    return folder


def opened(folder, made_from=SEED):
    matrix = open_matrix(folder, SHAPE, made_from)
    assert matrix is not None
    return matrix


@pytest.mark.parametrize(
    "index",
    [
        slice(None), slice(3, 4), slice(2, 17), slice(20, 99), slice(5, 5), slice(0, 23, 5),
        np.asarray([22, 0, 7, 7, 8, 9, 3, 4]), np.asarray([[1, 2], [3, 1], [22, 21]]),
        np.zeros((0,), int),
    ],
    ids=str,
)  # fmt: skip
def test_rows_are_those_of_an_array(tmp_path, index):
    matrix = opened(write(tmp_path / "a" / "m"))
    assert len(matrix) == 23 and matrix.shape == SHAPE
    assert len(list(matrix.folder.glob("rows_*"))) == 6
    read = matrix[index]
    np.testing.assert_array_equal(read, ROWS[index])
    assert read.dtype == np.float32 and read.flags.c_contiguous


def test_short_reads_and_writes_are_continued(tmp_path, monkeypatch):
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    folder = write(tmp_path / "m")
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: preadv(fd, [b[0].cast("B")[:13]], at))
    np.testing.assert_array_equal(opened(folder)[:], ROWS)


@pytest.mark.parametrize("row", [0, 6, 22])
def test_a_changed_bit_is_found_and_its_file_named(tmp_path, row):
    folder = write(tmp_path / "m")
    path = folder / f"rows_{row // 4:05}.f32"
    data = bytearray(path.read_bytes())
    data[(row % 4) * 20 + 11] ^= 4
    path.write_bytes(data)
    matrix = opened(folder)
    with pytest.raises(DamagedMatrixError) as error:
        matrix[np.asarray([1, row])]
    assert str(error.value).startswith(f"{path}: row {row % 4} is damaged")
    others = np.delete(np.arange(23), row)
    np.testing.assert_array_equal(matrix[others], ROWS[others])


def test_a_row_in_the_place_of_another_one_is_found(tmp_path):
    folder = write(tmp_path / "m")
    first, second = folder / "rows_00000.f32", folder / "rows_00001.f32"
    data = first.read_bytes(), second.read_bytes()
    second.write_bytes(data[0]), first.write_bytes(data[1])
    for row, path in ((0, first), (5, second)):
        with pytest.raises(DamagedMatrixError, match=f"{path}: row"):
            opened(folder)[np.asarray([row])]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("rows_00002.f32", lambda data: data[:-1], "has 79 bytes, expected 80"),
        ("rows_00005.f32", lambda data: data + b"0", "has 61 bytes, expected 60"),
        ("rows_00003.f32", None, "is missing"),
        ("checksums.u32", lambda data: data[:-4], "is damaged"),
        ("checksums.u32", lambda data: b"\0" + data[1:], "is damaged"),
        ("matrix.json", lambda data: data.replace(b'"file_rows": 4', b'"file_rows": 0'), "is dam"),
    ],
)
def test_a_file_that_is_cut_or_missing_is_named_when_opened(tmp_path, name, change, message):
    path = write(tmp_path / "m") / name
    data = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change(data))
        assert path.read_bytes() != data
    with pytest.raises(DamagedMatrixError) as error:
        opened(tmp_path / "m")
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_something_else_in_the_place_of_a_file_is_named(tmp_path, make):
    """A pipe would be waited for."""
    path = write(tmp_path / "m") / "rows_00001.f32"
    path.unlink()
    make(path)
    with pytest.raises(DamagedMatrixError, match=f"{path}: is no file"):
        opened(tmp_path / "m")


def test_a_matrix_may_be_made_from_files_whose_paths_are_not_utf_8(tmp_path):
    made_from = {"inputs": {os.fsdecode(b"\xff.jsonl"): "abc"}}
    matrix = opened(write(tmp_path / "m", made_from), made_from)
    np.testing.assert_array_equal(matrix[:], ROWS)


def test_a_file_that_is_cut_later_is_named_when_read(tmp_path):
    folder = write(tmp_path / "m")
    matrix, path = opened(folder), folder / "rows_00001.f32"
    os.truncate(path, 30)
    with pytest.raises(DamagedMatrixError) as error:
        matrix[4:8]
    assert str(error.value) == f"{path}: ends at byte 30"


def test_a_matrix_of_something_else_or_an_incomplete_one_is_not_opened(tmp_path):
    folder = write(tmp_path / "m")
    assert open_matrix(folder, (23, 6), SEED) is None
    assert open_matrix(folder, SHAPE, SEED | {"seed": 4}) is None
    assert open_matrix(tmp_path / "none", SHAPE, SEED) is None
    (folder / "matrix.json").unlink()
    assert open_matrix(folder, SHAPE, SEED) is None
    (folder / "own.txt").write_text("kept")
    remove_matrix(folder)
    assert [path.name for path in folder.iterdir()] == ["own.txt"]


def test_a_matrix_replaces_an_earlier_one_and_is_removed_if_writing_fails(tmp_path):
    folder = write(tmp_path / "m")
    write(folder, "other")
    np.testing.assert_array_equal(opened(folder, "other")[:], ROWS)
    with pytest.raises(KeyError), writing_matrix(folder, SHAPE) as matrix:
        matrix.write(0, ROWS[:3])
        raise KeyError
    assert not folder.exists()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch, call):
    def fails(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(os, call, fails)
        write(tmp_path / "m")
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename.startswith(f"{tmp_path}/m/rows_0000")
    assert list(tmp_path.iterdir()) == []


def test_disk_space_is_reserved_before_the_first_row(tmp_path):
    with writing_matrix(tmp_path / "m", SHAPE) as matrix:
        sizes = [path.stat().st_size for path in sorted(matrix.folder.glob("rows_*"))]
        assert sizes == [80] * 5 + [60]
        matrix.write(0, ROWS)


def test_a_file_system_that_reserves_no_space_is_used_all_the_same(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", fails)
    np.testing.assert_array_equal(opened(write(tmp_path / "m"))[:], ROWS)
