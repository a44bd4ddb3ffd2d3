"""Checkpoints: kept, verified file by file, and intact after later errors."""

import dataclasses
import errno
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo.learner import TrainState
from ppo.run_state import RunState
from ppo.tracking.checkpoint import CheckpointConfig, Checkpoints, named_arrays, newest_facts
from ppo.tracking.manifest import ManifestHandler
from sarm_jax.io.errors import InputError
from sarm_jax.rewards.density_ratio import DensityRatioState


def state(step):
    return {"lora": {"a": jnp.arange(6.0) * step}, "count": jnp.asarray(step)}


def saved(directory, steps, **options):
    checkpoints = Checkpoints(directory, **{"keep": 2, **options})
    for step in steps:
        checkpoints.save(step, state(step), {"mean": step / 2})
    return checkpoints


def restored(directory):
    """Returns the step that a new process resumes from, after checking the content."""
    checkpoints = Checkpoints(directory, 2)
    step, content, facts = checkpoints.restore(state(0))
    np.testing.assert_array_equal(content["lora"]["a"], np.arange(6.0) * step)
    assert content["count"] == step and facts == {"mean": step / 2}
    checkpoints.close()
    return step


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 2 and 4."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    saved(directory, (2, 4)).close()
    return directory


def damage(path, how):
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted"])
def test_damage_to_any_file_is_found_or_does_not_matter(two, tmp_path, caplog, how):
    names = [p.relative_to(two) for p in sorted(two.glob("4/**/*")) if p.is_file()]
    assert len(names) > 10
    fallen_back = 0
    for number, name in enumerate(names):
        directory = tmp_path / str(number) / "checkpoints"
        shutil.copytree(two, directory)
        damage(directory / name, how)
        caplog.clear()
        step = restored(directory)  # checks the content
        if step == 4:  # Orbax's own records, from which nothing is restored
            assert name.name in ("_CHECKPOINT_METADATA", "commit_success.txt"), name
            continue
        fallen_back += 1
        (message,) = [r.getMessage() for r in caplog.records if r.name == "ppo.tracking.checkpoint"]
        assert "checkpoint 4 is damaged" in message and "resuming from checkpoint 2" in message
        # A flipped bit in the manifest makes it another file's.
        assert "/".join(name.parts[1:]) in message or name.parts[1] == "manifest"
        assert (directory.parent / "damaged_checkpoint_4").is_dir()
        assert not (directory / "4").exists()
    assert fallen_back >= len(names) - 3


def test_newest_facts_are_read_without_changing_anything(two, tmp_path, caplog):
    assert newest_facts(tmp_path / "none") is None
    assert newest_facts(two) == (4, {"mean": 2.0})
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    damage(next((directory / "4" / "state" / "d").iterdir()), "truncated")
    (directory / "6.orbax-checkpoint-tmp").mkdir()  # left by a save that was killed
    before = sorted(directory.rglob("*"))
    assert newest_facts(directory) == (2, {"mean": 1.0})
    assert before == sorted(directory.rglob("*")) and not caplog.records


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"lora": {"a": jnp.zeros(7)}, "count": jnp.asarray(0)},
            "float32 [6], expected float32 [7",
        ),
        ({"lora": {"a": jnp.zeros((6, 1))}, "count": jnp.asarray(0)}, "expected float32 [6, 1]"),
        ({"lora": {"a": jnp.zeros(6, int)}, "count": jnp.asarray(0)}, "expected int32 [6]"),
        ({"lora": {"b": jnp.zeros(6)}, "count": jnp.asarray(0)}, "lora.b is not there"),
        ({"lora": {"a": jnp.zeros(6)}}, "count is int32 [], expected none"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(two, other, message):
    checkpoints = Checkpoints(two, 2)
    with pytest.raises(InputError, match="4: a checkpoint of another model") as error:
        checkpoints.restore(other)
    assert message in str(error.value)
    assert checkpoints.restore(state(0))[0] == 4
    checkpoints.close()


def run_state(value):
    """A state of the same structure as a run's, filled with one value."""
    params = {"lora": {"a": jnp.full((2, 3), value)}, "value_head": {"bias": jnp.full((), value)}}
    train = TrainState(params, opt_state=(jnp.full((), value),))
    return RunState(train, DensityRatioState({"out": jnp.full(4, value)}, opt_state=()))


def test_a_checkpoint_of_the_dict_is_restored_as_a_run_state(tmp_path):
    """Versions before `RunState` saved a dict of the same parts."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    old = run_state(2.5)
    checkpoints.save(1, {"train": old.train, "density_ratio": old.density_ratio}, {})
    _, restored_state, _ = checkpoints.restore(run_state(0.0))
    assert isinstance(restored_state, RunState)
    assert jax.tree.structure(restored_state) == jax.tree.structure(old)
    for ours, theirs in zip(*map(jax.tree.leaves, (restored_state, old)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    checkpoints.save(2, old, {})
    metadata = [(tmp_path / "checkpoints" / n / "state" / "_METADATA").read_text() for n in "12"]
    assert metadata[0] == metadata[1]
    checkpoints.close()


def test_names_of_arrays_without_a_discriminator():
    state = dataclasses.replace(run_state(0.0), density_ratio=None)
    assert sorted(named_arrays(state)) == [
        "train.opt_state.0", "train.params.lora.a", "train.params.value_head.bias",
    ]  # fmt: skip


def test_a_checkpoint_that_was_set_aside_is_made_again(two, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    damage(next((directory / "4" / "state" / "d").iterdir()), "flipped")
    assert restored(directory) == 2
    saved(directory, (4,)).close()
    assert restored(directory) == 4


def test_no_intact_checkpoint_is_an_error_and_nothing_is_moved(two, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    shutil.rmtree(directory / "2" / "manifest")
    damage(directory / "4" / "facts" / "metadata", "truncated")
    before = sorted(directory.rglob("*"))
    with pytest.raises(InputError, match="no checkpoint is intact") as error:
        restored(directory)
    assert "4: facts/metadata" in str(error.value) and "2: manifest/sha256.json" in str(error.value)
    assert before == sorted(directory.rglob("*"))


def test_the_newest_are_kept_and_every_nth_permanently(tmp_path):
    checkpoints = saved(tmp_path / "checkpoints", range(1, 9), keep_every=5)
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} == {5, 7, 8}
    checkpoints.close()
    with pytest.raises(InputError, match=r"checkpoint.keep_every=-1"):
        CheckpointConfig(-1)


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_tensorstore(*_args, **_kwargs):
    raise ValueError("RESOURCE_EXHAUSTED: Failed to write 165 bytes: No space left on device")


@pytest.mark.parametrize("failure", [full, full_in_tensorstore])
def test_a_full_disk_is_an_error_and_leaves_the_last_checkpoint(
    two, tmp_path, monkeypatch, failure
):
    directory = tmp_path / "checkpoints"
    shutil.copytree(two, directory)
    checkpoints = Checkpoints(directory, 1)
    with monkeypatch.context() as patch:
        patch.setattr(ManifestHandler, "finalize", failure)  # the last thing before the rename
        with pytest.raises(OSError, match="no space for the checkpoint of step 6") as error:
            checkpoints.save(6, state(6), {"mean": 3.0})
    assert error.value.errno == errno.ENOSPC
    assert Path(error.value.filename) == directory
    again = Checkpoints(directory, 2)  # as the next process makes it
    assert again.restore(state(0))[0] == 4
    again.save(6, state(6), {"mean": 3.0})  # removes what the first attempt left
    assert sorted(path.name for path in directory.iterdir()) == ["4", "6"]
    assert restored(directory) == 6


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)

    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(ManifestHandler, "finalize", broken)
    with pytest.raises(RuntimeError, match="something else"):
        checkpoints.save(1, state(1), {})


def test_orbax_is_quiet_only_while_it_saves(tmp_path):
    level = logging.getLogger("absl").level
    saved(tmp_path / "checkpoints", (1,)).close()
    assert logging.getLogger("absl").level == level
