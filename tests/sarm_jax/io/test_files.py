"""Atomic writes, locks and checks of targets, also by several processes and threads at once."""

import json
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_target, locked_output, replacing
from sarm_jax.io.json_files import read_json, write_json
from sarm_jax.io.jsonl import read_jsonl, write_jsonl

ROUNDS, WORKERS = 100, 4


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_often(path: str, number: int) -> int:
    """Writes a file again and again; every content that is read must be whole."""
    for n in range(ROUNDS):
        write_json(path, {"number": number, "n": n, "more": ["x" * 100] * 20})
        assert read_json(path)["more"] == ["x" * 100] * 20
    return number


def count_often(path: str, number: int) -> int:
    """Adds to a number in a file under its lock."""
    for _ in range(ROUNDS):
        with locked_output(Path(path), wait=True):
            write_json(path, {"n": read_json(path)["n"] + 1} if Path(path).exists() else {"n": 1})
    return number


POOLS = {
    "threads": lambda: ThreadPoolExecutor(WORKERS),
    "processes": lambda: ProcessPoolExecutor(WORKERS, get_context("fork")),
}
several = pytest.mark.parametrize("kind", POOLS)
forking = pytest.mark.filterwarnings("ignore:.*fork:")  # the children use files alone


@forking
@several
def test_several_writers_of_one_file(tmp_path, kind):
    path = str(tmp_path / "a.json")
    with POOLS[kind]() as pool:
        assert list(pool.map(write_often, [path] * WORKERS, range(WORKERS))) == [0, 1, 2, 3]
    assert read_json(path)["n"] == ROUNDS - 1
    assert listing(tmp_path) == ["a.json"]


@forking
@several
def test_several_that_read_change_and_write_one_file(tmp_path, kind):
    path = str(tmp_path / "a.json")
    with POOLS[kind]() as pool:
        assert list(pool.map(count_often, [path] * WORKERS, range(WORKERS))) == [0, 1, 2, 3]
    assert read_json(path) == {"n": ROUNDS * WORKERS}
    assert listing(tmp_path) == ["a.json"]


def test_leftovers_of_killed_writers_are_removed_and_others_kept(tmp_path):
    path = tmp_path / "a.json"
    left, other = tmp_path / ".a.json.0123abcd.partial", tmp_path / ".b.json.0123abcd.partial"
    for file in (left, other):
        file.write_text("half")
    with replacing(path) as file:
        file.write("first")
        with replacing(path) as second:  # does not take the file of the first for a leftover
            second.write("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert listing(tmp_path) == [other.name, "a.json"]


def test_a_failed_write_keeps_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write("new")
        raise KeyError
    assert path.read_text() == "old" and listing(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["gone/a.json", "file/a.json", "folder"])
def test_errors_name_the_file_itself(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as error:
        write_json(tmp_path / name, {})
    assert error.value.filename == str(tmp_path / name)
    assert "partial" not in str(error.value)
    with pytest.raises(OSError) as error, locked_output(tmp_path / "gone" / "a.json"):
        pass
    assert error.value.filename == str(tmp_path / "gone" / "a.json")


def test_a_path_that_is_not_utf8_is_written_as_its_escape(tmp_path):
    path = tmp_path / "\udc80" / "a.jsonl"
    path.parent.mkdir()
    write_jsonl(path, [{"path": str(path)}])
    assert json.loads(path.read_text())["path"] == str(path)
    assert read_jsonl(path, {}, lenient=True)[0]["path"] == str(path)


def test_a_lock_is_exclusive_and_leaves_nothing(tmp_path):
    path = tmp_path / "a"
    with locked_output(path):
        with pytest.raises(BlockingIOError), locked_output(path):
            pass
        with locked_output(tmp_path / "b"):
            pass
        done = []

        def wait():
            with locked_output(path, wait=True):
                done.append(1)

        thread = threading.Thread(target=wait)
        thread.start()
        assert not done
    thread.join()
    assert done and not listing(tmp_path)
    (tmp_path / ".a.lock").touch()  # left by a process that was killed
    with locked_output(path):
        pass
    assert not listing(tmp_path)


@pytest.mark.parametrize(
    "name, folder, message",
    [
        ("file", True, "is a file, expected a folder"),
        ("folder", False, "is a folder, expected a file"),
        ("file/a", False, "file is not a folder"),
        ("file/a/b", True, "file is not a folder"),
        ("nothing", True, "is a link to nothing"),
        ("nothing/a", False, "nothing is not a folder"),
        ("/proc/a", False, "cannot be written in /proc"),
        ("/proc/a/b", True, "cannot be written in /proc"),
    ],
)
def test_targets_that_cannot_be_written(tmp_path, name, folder, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "nothing").symlink_to("gone")
    with pytest.raises(InputError, match="cannot|expected") as error:
        check_target(tmp_path / name, "option", folder=folder)
    assert message in str(error.value) and str(error.value).startswith("option: ")


@pytest.mark.parametrize(
    "name, folder",
    [("file", False), ("folder", True), ("new", False), ("new/deep/a", True), ("folder/a", False),
     ("link", True), ("link/a", False), ("nothing", False)],
)  # fmt: skip
def test_targets_that_can_be_written(tmp_path, name, folder):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "nothing").symlink_to("gone")
    before = listing(tmp_path)
    check_target(tmp_path / name, folder=folder)
    assert listing(tmp_path) == before
