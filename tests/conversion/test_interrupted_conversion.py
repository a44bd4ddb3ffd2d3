"""Conversions that are killed, that lack disk space, or that run beside another one."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest

from conversion import cli, converted, from_hf, to_hf
from conversion.directory import atomic_directory
from sarm_jax.io.errors import InputError
from tests import oracles

pytestmark = pytest.mark.slow

# Converts once per row of MOMENTS, in a fork that kills itself at the n-th call of a function.
KILLED = """
import json, os, shutil, signal, sys
from conversion import converted, directory, from_hf, safetensors_io
src, parent, moments = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])

def kill_at(module, name, count, after):
    original, seen = getattr(module, name), []
    def wrapped(*args, **kwargs):
        seen.append(name)
        last = len(seen) == count
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, wrapped)

from_hf.load_hf_tokenizer(src)  # imports slow modules once, not in every fork
modules = {"directory": directory, "converted": converted, "writer": safetensors_io.TensorWriter,
           "io": safetensors_io, "shutil": shutil, "os": os}
for n, (module, name, count, after) in enumerate(moments):
    child = os.fork()
    if not child:
        kill_at(modules[module], name, count, after)
        from_hf.convert(src, f"{parent}/{n}/dst", "policy")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else "survived")
"""
MOMENTS = [
    ("converted", "TensorWriter", 1, True),  # the directory exists and is empty
    ("writer", "add", 1, False),
    ("writer", "add", 5, True),
    ("io", "save_file", 1, False),
    ("io", "save_file", 1, True),
    ("converted", "write_description", 1, False),
    ("converted", "write_description", 1, True),
    ("shutil", "copyfile", 1, True),
    ("os", "fsync", 1, True),
    ("directory", "_exchange", 1, False),
    ("directory", "_exchange", 1, True),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "hf"
    config = oracles.tiny_llama_config(num_hidden_layers=1)
    oracles.save_tiny_llama(directory, config, oracles.tiny_tokenizer())
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_killed_conversion_is_complete_or_absent_and_the_next_one_cleans_up(source, tmp_path):
    from_hf.convert(source, tmp_path / "complete", "policy")
    complete = contents(tmp_path / "complete")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path), json.dumps(MOMENTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["9"] * len(MOMENTS), done.stderr
    states = []
    for n, moment in enumerate(MOMENTS):
        dst = tmp_path / str(n) / "dst"
        leftovers = [path for path in dst.parent.iterdir() if path != dst]
        if dst.exists():
            assert contents(dst) == complete, moment
            with pytest.raises(InputError, match="exists already"):
                from_hf.convert(source, dst, "policy")
        else:
            assert leftovers, moment
            from_hf.convert(source, dst, "policy")
        states.append(dst.exists() and not leftovers)
        assert list(dst.parent.iterdir()) == [dst], moment
        assert contents(dst) == complete, moment
    assert states == [False] * (len(MOMENTS) - 1) + [True]


def test_an_interrupted_replacement_is_undone(tmp_path):
    dst, new, old = (tmp_path / n for n in ("dst", ".dst.0123abcd", ".dst.0123abcd.old"))
    for directory in (new, old):
        directory.mkdir()
        (directory / "file").write_text(directory.name)
    with atomic_directory(dst, replace=True) as directory:
        assert contents(dst) == {"file": old.name.encode()}
        (directory / "file").write_text("newest")
    assert list(tmp_path.iterdir()) == [dst] and contents(dst) == {"file": b"newest"}


def test_only_leftovers_of_a_conversion_are_removed(tmp_path):
    others = [".dst.backup", ".dst.0123abcde", ".other.0123abcd", "dst.0123abcd", ".dst.0123ABCD"]
    for name in others:
        (tmp_path / name).mkdir()
    with atomic_directory(tmp_path / "dst") as first:
        (first / "file").write_text("first")
        with atomic_directory(tmp_path / "dst") as second:  # while the first one is still open
            assert first.is_dir() and second.is_dir()
            shutil.copy(first / "file", second / "file")
            (second / "more").write_text("")
        first_is_kept = first.is_dir() and contents(first) == {"file": b"first"}
        shutil.rmtree(tmp_path / "dst")
    assert first_is_kept
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "dst"])


@pytest.mark.parametrize("command", [from_hf, to_hf])
def test_a_disk_without_room_is_refused_before_anything_is_written(
    source, tmp_path, monkeypatch, capsys, command
):
    def free_bytes(free):
        usage = namedtuple("usage", "total used free")(1 << 40, 0, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    dst = tmp_path / "new" / "dst"
    argv = ["command", f"--src={source}", f"--dst={dst}", "--kind=policy"]
    free_bytes(12_345)
    with pytest.raises(SystemExit) as stopped:
        cli.run(command.main, copy.deepcopy(command.FLAGS), "", argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert f"{dst}: takes" in error and "only 12,345 are free" in error
    assert not dst.parent.exists()
    needed = int(error.split("takes ")[1].split()[0].replace(",", ""))
    free_bytes(needed)
    cli.run(command.main, copy.deepcopy(command.FLAGS), "", argv)
    written = sum(map(len, contents(dst).values()))
    assert written <= needed < written + (1 << 20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(source, tmp_path, monkeypatch, leaving, capsys, number):
    options = ["from_hf", "--kind=policy", f"--src={source}", f"--dst={tmp_path}/dst"]
    monkeypatch.setattr(
        converted, "write_description", lambda *_, **__: os.kill(os.getpid(), number)
    )
    with pytest.raises(SystemExit) as stopped:
        cli.run(from_hf.main, copy.deepcopy(from_hf.FLAGS), "", options)
    assert stopped.value.code == 128 + number
    assert "interrupted; the same command starts again" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_error_for_a_full_disk_advises_to_free_space(source, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr(converted, "write_description", full)
    options = ["from_hf", "--kind=policy", f"--src={source}", f"--dst={tmp_path}/dst"]
    with pytest.raises(SystemExit) as stopped:
        cli.run(from_hf.main, copy.deepcopy(from_hf.FLAGS), "", options)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.endswith("'x'; free space, and try again")
    assert not list(tmp_path.iterdir())
