"""The folders of activations of several processes, and their use by a run that is resumed."""

import logging
from pathlib import Path

import jax
import numpy as np
import pytest

from pipeline.activation_files import activation_folder
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import locked_output
from sarm_jax.models.chat import pad_batch
from sarm_jax.parallel import processes
from sarm_jax.parallel.processes import OtherProcessError
from sarm_jax.training import activations
from sarm_jax.training.activations import Conversation
from sarm_jax.training.train_sarm import truncate


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The temporary directory of the host; this process is not the primary one."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.fixture
def collect(tmp_path, policy, monkeypatch):
    """Returns a function that collects activations in a run; it returns how often the trunk ran."""
    trunk, run = truncate(policy, 1), tmp_path / "run"
    runs: list[int] = []
    kept_states = activations._kept_states

    def counted(*arguments):
        runs.append(1)
        return kept_states(*arguments)

    monkeypatch.setattr(activations, "_kept_states", counted)

    def call(error=None, workdir=run):
        runs.clear()
        with activation_folder(workdir / "activations", {"seed": 0}) as folder:
            rows = [Conversation([1, 2, 3], 2), Conversation([4, 5], 1)]
            x_nd = folder.collect("a", trunk, rows, max_tokens=9, seed=0).x_nd[:]
            if error is not None:
                raise error
        tokens_bt, mask_bt = pad_batch([[1, 2, 3]], 3, 0)
        expected = activations.standardise(trunk.hidden(tokens_bt, mask_bt))
        np.testing.assert_allclose(x_nd[:2], expected[0, 1:], 1e-4, 1e-4)
        return len(runs)

    return call


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


MATRIX = ["checksums.u32", "matrix.json", "rows_00000.f32"]


@pytest.mark.parametrize("error", [SystemExit(143), OtherProcessError("process 0: x"), OSError()])
def test_the_other_processes_use_their_files_again(collect, temporary, error):
    with pytest.raises(type(error)):
        collect(error)
    assert files(temporary) == MATRIX
    (parent,) = temporary.iterdir()
    assert parent.stat().st_mode & 0o777 == 0o700
    assert collect() == 0
    assert list(temporary.iterdir()) == []


def test_files_are_removed_if_this_process_has_bad_input(collect, temporary):
    with pytest.raises(InputError):
        collect(InputError("a damaged row"))
    assert list(temporary.iterdir()) == []


def test_all_collect_again_if_one_process_lacks_its_files(collect, temporary, monkeypatch, caplog):
    with pytest.raises(SystemExit):
        collect(SystemExit(143))
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(processes, "all_max", lambda number: 1)
        assert collect(workdir=Path("elsewhere")) == 1  # has none
        assert collect() == 1
    assert "again" not in caplog.text and list(temporary.iterdir()) == []


def test_every_run_and_process_has_files_of_its_own(collect, temporary, tmp_path, monkeypatch):
    for number, run in ((1, "run"), (2, "run"), (1, "other")):
        monkeypatch.setattr(jax, "process_index", lambda number=number: number)
        with pytest.raises(SystemExit):
            collect(SystemExit(143), workdir=tmp_path / run)
    assert files(temporary) == sorted(MATRIX * 3)
    monkeypatch.setattr(processes, "is_primary", lambda: True)
    with pytest.raises(SystemExit):
        collect(SystemExit(143))
    assert files(tmp_path / "run") == MATRIX


def test_a_folder_in_use_or_of_another_user_is_left_alone(collect, temporary):
    with pytest.raises(SystemExit):
        collect(SystemExit(143))
    (parent,) = temporary.iterdir()
    (folder,) = parent.iterdir()
    with locked_output(folder):
        assert collect() == 1
    parent.chmod(0o755)
    assert collect() == 1
    parent.chmod(0o700)
    assert files(temporary) == MATRIX and collect() == 0
