"""The stage train_sarm, stopped and killed in each of its phases: it goes on to the same bytes."""

import errno
import json
import os
import signal

import pytest

from pipeline.sarm_checkpoints import SARMCheckpoints
from ppo.tracking.checkpoint import Checkpoints
from sarm_jax.io.matrix_files import MatrixFiles
from sarm_jax.training import activations
from tests.command import run_main
from tests.oracles import save_tiny_llama, tiny_llama_config, tiny_tokenizer

pytestmark = pytest.mark.slow
SMALL = (
    "source_layer=1 latent_size=16 k=4 aux_k=4 mode=3 sae_steps=60 sae_batch_tokens=16 epochs=2 "
    "batch_size=2 gradient_accumulation_steps=2 max_length=32 warmup_fraction=0.0 "
    "dead_after_steps=10 sae_learning_rate=0.01 learning_rate=0.001 tie_weight=2.0"
).split()
LAST = 60 + 2 * 6  # steps of the SAE, then those on 8 + 8 pairs of which 4 are held out


class KilledError(Exception):
    """Stands for a SIGKILL: nothing runs after it but what undoes files."""


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Returns a function that runs the stage in a folder."""
    world = tmp_path_factory.mktemp("world")
    save_tiny_llama(world / "policy", tiny_llama_config(), tiny_tokenizer())
    for name, count in (("pairs", 8), ("ties", 8)):
        rows = [
            {"prompt": f"{name} {n}", "chosen": f"it is {n}", "rejected": "no " * (n + 1)}
            for n in range(count)
        ]
        (world / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, *options, every=7):
        line = [f"--config.train_sarm.{option}" for option in SMALL]
        return run_main(
            "--config=configs/base.py",
            "--stage=train_sarm",
            f"--policy_model={world}/policy",
            f"--config.train_sarm.pairs_jsonl={world}/pairs.jsonl",
            f"--config.train_sarm.tie_pairs_jsonl={world}/ties.jsonl",
            f"--config.checkpoint.train_sarm_every={every}",
            f"--workdir={world / name}",
            *line,
            *options,
        )

    run.world = world
    return run


def results(folder):
    """Returns the bytes of all results, without the seconds that they took."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in (folder / "sarm").iterdir()}
    summary = json.loads((folder / "sarm_summary.json").read_text())
    summary.pop("seconds")
    return files | {"rows": (folder / "sarm_metrics.jsonl").read_bytes(), "summary": summary}


@pytest.fixture(scope="module")
def uninterrupted(train):
    assert train("uninterrupted", every=0) == 0
    folder = train.world / "uninterrupted"
    assert not (folder / "sarm_checkpoints").exists()
    rows = (folder / "sarm_metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3 + 12 and json.loads(rows[-1])["step"] == 12
    return results(folder)


def killed_at(monkeypatch, place, call):
    """Makes the n-th call of a method of the checkpoints end the process, as SIGKILL does."""
    owner = {"keep": SARMCheckpoints, "save": Checkpoints}[place]
    function, calls = getattr(owner, place), []

    def wrapped(*arguments):
        calls.append(place)
        if len(calls) == call:
            raise KilledError
        return function(*arguments)

    monkeypatch.setattr(owner, place, wrapped)


def stopped_at(monkeypatch, call):
    """Sends SIGTERM before the n-th step is counted."""
    function, calls = SARMCheckpoints.keep, []

    def wrapped(*arguments):
        calls.append("keep")
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments)

    monkeypatch.setattr(SARMCheckpoints, "keep", wrapped)


def stopped(train, *arguments, **options):
    with pytest.raises(SystemExit) as stop:
        train(*arguments, **options)
    assert stop.value.code == 143


def numbers(folder):
    return sorted(int(p.name) for p in (folder / "sarm_checkpoints").iterdir())


def test_an_interrupted_training_ends_with_the_same_bytes(
    train, uninterrupted, monkeypatch, capsys
):
    """It is killed in both phases, before and after its first checkpoint, and stopped in both."""
    folder = train.world / "resumed"
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        killed_at(patch, "save", 1)  # nothing is there yet
        train("resumed")
    assert not (folder / "sarm_checkpoints").exists()
    with monkeypatch.context() as patch:
        stopped_at(patch, 1)
        stopped(train, "resumed", every=0)  # without regular checkpoints, there is this one
    assert numbers(folder) == [20]
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        killed_at(patch, "keep", 2 + 5)  # two more of the SAE, then four of the preferences
        train("resumed")
    assert numbers(folder) == [60, 63]
    assert "resuming after step 20 of the phase sae" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        stopped_at(patch, 3)
        stopped(train, "resumed")
    assert numbers(folder) == [63, 66]
    assert train("resumed") == 0
    assert "resuming after step 6 of the phase preferences" in capsys.readouterr().err
    assert not (folder / "sarm_checkpoints").exists()
    ours = results(folder)
    assert ours.keys() == uninterrupted.keys()
    for name, content in uninterrupted.items():
        assert ours[name] == content, name


def test_a_checkpoint_of_another_training_is_refused_and_a_damaged_one_set_aside(
    train, uninterrupted, monkeypatch, capsys
):
    folder = train.world / "other"
    with monkeypatch.context() as patch:
        stopped_at(patch, 3 + 12)
        stopped(train, "other")
    assert numbers(folder) == [70, LAST]
    files = sorted(folder.rglob("*"))
    for option, change in (
        ("train_sarm.seed=1", "train_sarm.seed"),
        ("train_sarm.gradient_accumulation_steps=1", "train_sarm.gradient_accumulation_steps"),
    ):
        assert train("other", f"--config.{option}") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"sarm_checkpoints/{LAST}: a checkpoint of another training: {change}" in error
        assert f"delete {folder / 'sarm_checkpoints'} to start again" in error
    assert sorted(folder.rglob("*")) == files
    state = folder / "sarm_checkpoints" / str(LAST) / "state"
    (state / "manifest.ocdbt").write_bytes(b"damage")
    assert train("other") == 0
    log = capsys.readouterr().err
    assert f"checkpoint {LAST} is damaged" in log and "after step 10 of the phase pref" in log
    assert results(folder) == uninterrupted


def test_a_training_that_diverges_leaves_no_checkpoint(train, capsys):
    options = "--config.train_sarm.learning_rate=1e30", "--config.train_sarm.epochs=3"
    assert train("diverged", *options) == 3
    assert "training diverged" in capsys.readouterr().err
    folder = train.world / "diverged"
    assert not (folder / "sarm_checkpoints").exists() and not (folder / "sarm").exists()


def stopped_in_the_sae(train, monkeypatch, name):
    """Stops a training after 20 steps of the SAE; returns its activations."""
    with monkeypatch.context() as patch:
        stopped_at(patch, 1)
        stopped(train, name)
    return train.world / name / "sarm_activations" / "pretrained"


def test_a_resumed_training_uses_its_activations_again_and_removes_them(
    train, uninterrupted, monkeypatch, capsys
):
    folder = stopped_in_the_sae(train, monkeypatch, "again")
    collect, lengths = activations._kept_states, []

    def counted(trunk, rows, *arguments):
        lengths.append(len(rows))
        return collect(trunk, rows, *arguments)

    monkeypatch.setattr(activations, "_kept_states", counted)
    assert train("again") == 0
    assert f"activations in {folder} again" in capsys.readouterr().err
    assert lengths == [16, 16]  # after training: the preferences, then the ties
    assert results(train.world / "again") == uninterrupted
    assert not folder.parent.exists()


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_activations_are_named_and_collected_again(
    train, uninterrupted, monkeypatch, capsys, damage
):
    """A file that is cut is found at once; a changed byte is, with exit code 2, when it is read."""
    folder = stopped_in_the_sae(train, monkeypatch, damage)
    path = folder / "rows_00000.f32"
    data = path.read_bytes()
    path.write_bytes(data[:-4] if damage == "cut" else bytes(len(data)))
    if damage == "changed":
        assert train(damage) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {path}: row ") and "is damaged" in error
        assert not folder.parent.exists() and numbers(train.world / damage) == [20]
    assert train(damage) == 0
    log = capsys.readouterr().err
    assert (f"{path}: has" in log) == (damage == "cut")
    assert "resuming after step 20 of the phase sae" in log
    assert results(train.world / damage) == uninterrupted


@pytest.mark.parametrize("call", ["reserve", "write"])
def test_a_full_disk_ends_with_2_and_the_same_command_goes_on(
    train, uninterrupted, monkeypatch, capsys, call
):
    folder = stopped_in_the_sae(train, monkeypatch, call)
    for path in folder.iterdir():
        path.unlink()

    def fails(matrix, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device", str(matrix.path(0)))

    with monkeypatch.context() as patch:
        patch.setattr(MatrixFiles, call, fails)
        assert train(call) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    path = folder / "rows_00000.f32"
    assert error == (
        f"error: {path}: No space left on device; free space and run the same command again"
    )
    assert not path.exists() and numbers(train.world / call) == [20]
    assert train(call) == 0
    assert results(train.world / call) == uninterrupted
