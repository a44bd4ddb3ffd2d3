"""Killed and pre-empted processes, signals, and full disks."""

import errno
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks.kill_campaign import run_digest
from pipeline import runner
from ppo.tracking import metrics as metrics_module
from ppo.tracking.guards import GuardStopError, NonFiniteError
from ppo.tracking.metrics import COLUMNS, RunLog
from tests.command import run_main
from tests.paths import ROOT

pytestmark = pytest.mark.slow


def options(world, workdir):
    """Returns the options of a short run with every feature of a run."""
    small = (
        "ppo.total_steps=4 ppo.batch_size=4 ppo.max_new_tokens=4 ppo.calibration_batches=2 "
        "ppo.max_prompt_tokens=120 ppo.checkpoint_every=2 ppo.pack_levels=1 lora.rank=4 "
        "ppo.eval_every=2"
    ).split()
    arguments = (
        "--config=configs/base.py --policy_model={0}/policy --sarm_model={0}/sarm "
        "--prompts_jsonl={0}/demos.jsonl --config.eval_prompts_jsonl={0}/demos.jsonl "
        "--penalize_features=3,5 --tau_values=0.1,0.1 --alpha_values=0.5,0.25 --seed=0 "
        "--beta=0.1 --human_latents={0}/human.safetensors"
    )
    line = [*arguments.format(world).split(), f"--workdir={workdir}"]
    return [*line, *(f"--config.{option}" for option in small)]


def train(world, workdir, *killed):
    """Runs the train stage in a process of its own; returns the exit code and the log."""
    program = ["-m", "benchmarks.killed", *killed, "--"] if killed else ["main.py"]
    line = [sys.executable, *program, *options(world, workdir)]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    """The directory of a run without interruptions, in this process."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert run_main(*options(world, workdir)) == 0
    return workdir


def test_the_digest_depends_on_the_last_digit_of_a_log(uninterrupted, tmp_path):
    first = run_digest(uninterrupted)
    for part in ("lora", "value_head", "opt_state", "density_ratio", "metrics.csv", "adapter/"):
        assert any(part in name for name in first), part
    copied = shutil.copytree(uninterrupted, tmp_path / "copied")
    assert run_digest(copied) == first
    metrics = copied / "metrics.csv"
    metrics.write_text(re.sub(r"\d(?=\n$)", lambda d: str(9 - int(d[0])), metrics.read_text()))
    changed = run_digest(copied)
    assert {name for name in first if first[name] != changed[name]} == {"metrics.csv"}


@pytest.mark.evidence
def test_the_same_command_writes_the_same_bytes(world, uninterrupted, tmp_path):
    assert train(world, tmp_path / "again")[0] == 0
    assert run_digest(uninterrupted) == run_digest(tmp_path / "again")


def test_a_killed_and_preempted_run_ends_like_an_uninterrupted_one(world, uninterrupted, tmp_path):
    """To the byte; also the steps before the kill, which another process has taken."""
    resumed = tmp_path / "resumed"
    # Kill it while it writes the last checkpoint: the log is two steps ahead of the checkpoints.
    assert train(world, resumed, "--place=manifest", "--call=2")[0] == -signal.SIGKILL
    assert list((resumed / "checkpoints").glob("4*tmp*"))
    assert len((resumed / "metrics.csv").read_text().splitlines()) == 1 + 4
    # Pre-empt it in the first step after it resumes, when no checkpoint is due.
    code, log = train(world, resumed, "--place=update", "--call=1", "--signal=SIGTERM")
    assert code == 143 and "stopped by signal 15 after step 3" in log
    assert {path.name for path in (resumed / "checkpoints").iterdir()} == {"2", "3"}
    code, log = train(world, resumed)
    assert code == 0 and "resuming after step 3 of 4" in log
    assert run_digest(uninterrupted) == run_digest(resumed)


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a script in a process of its own."""
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_second_signal_ends_the_process_at_once():
    script = (
        "import os, signal, time; from sarm_jax.io.signals import on_signal\n"
        "with on_signal(lambda number: print('first', number, flush=True)):\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
        "print('never')"
    )
    done = run_script(script)
    assert done.returncode == -signal.SIGTERM and done.stdout == "first 15\n"


# Places in which Python drops exceptions.
DROPPED = {
    "__del__": (
        "class Old:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
        "with on_signal(stop): Old(); time.sleep(5)\n"
    ),
    "garbage collector": (
        "def collected(phase, info):\n"
        "    gc.callbacks.clear(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)\n"
        "gc.callbacks.append(collected)\n"
        "with on_signal(stop): gc.collect(); time.sleep(5)\n"
    ),
}


@pytest.mark.parametrize("where", DROPPED)
def test_a_signal_is_handled_where_python_drops_exceptions(where):
    script = (
        "import gc, os, signal, sys, time\n"
        "from sarm_jax.io.signals import exit_after_cleanup, on_signal\n"
        "def stop(number): exit_after_cleanup(128 + number)\n"
    )
    done = run_script(f"{script}{DROPPED[where]}print('never')")
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_an_exit_cleans_up_all_enclosing_blocks(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from conversion.directory import atomic_directory\n"
        "from sarm_jax.io.files import replacing\n"
        "from sarm_jax.io.signals import exit_after_cleanup\n"
        "from sarm_jax.io.workdir import open_workdir\n"
        "root = Path(sys.argv[1])\n"
        "with open_workdir(root / 'new' / 'run'), atomic_directory(root / 'model') as folder:\n"
        "    (folder / 'half').write_text('x')\n"
        "    with replacing(root / 'file') as file: file.write('half'); exit_after_cleanup(143)\n"
    )
    assert run_script(script, str(tmp_path)).returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_an_ignored_signal_stays_ignored():
    script = (
        "import os, signal; from sarm_jax.io.signals import on_signal\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for background processes\n"
        "with on_signal(print): os.kill(os.getpid(), signal.SIGINT)\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    done = run_script(script)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """Returns a function that runs `main` with another stage and returns its exit code."""

    def call(stage, *options):
        monkeypatch.setattr(runner, "run_stage", stage)
        return run_main("--config=configs/base.py", f"--workdir={tmp_path / 'run'}", *options)

    return call


def raises(error):
    def stage(*_):
        raise error

    return stage


FULL = OSError(errno.ENOSPC, "no space for the checkpoint of step 6", "/runs/a/checkpoints")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (FULL, 2, "error: /runs/a/checkpoints: no space for the checkpoint of step 6; free space"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "run: No space left on device; free"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nBuffers:"),
            2,
            "memory; --stage=plan shows",
        ),
        (
            RuntimeError("INTERNAL: Failed to load module: CUDA_ERROR_OUT_OF_MEMORY"),
            2,
            "needs a smaller XLA_CLIENT_MEM_FRACTION",
        ),
        (MemoryError(), 2, "error: out of memory; --stage=plan shows what fits"),
        (NonFiniteError("step 3 is not finite"), 3, "error: step 3 is not finite"),
        (GuardStopError("step 3: stopped"), 3, "error: step 3: stopped"),
    ],
)
def test_an_expected_error_is_one_line(failing, capsys, error, code, line):
    assert failing(raises(error)) == code
    (error_line,) = capsys.readouterr().err.splitlines()
    assert line in error_line


@pytest.mark.parametrize("text", ["a bug", "RESOURCE_EXHAUSTED: Shared memory size limit exceeded"])
def test_an_unexpected_error_is_not_hidden(failing, text):
    with pytest.raises(RuntimeError, match=text):
        failing(raises(RuntimeError(text)))


def test_other_os_errors_are_one_line(failing, capsys):
    assert failing(raises(PermissionError(errno.EACCES, "Permission denied", "x"))) == 2
    assert capsys.readouterr().err == "error: x: Permission denied\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_ppo_ends_the_stage(failing, leaving, capsys, number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        failing(lambda *_: os.kill(os.getpid(), number))
    assert stop.value.code == 128 + number
    assert capsys.readouterr().err == "interrupted; the same command goes on\n"
    assert signal.getsignal(number) is before


def test_log_level_selects_messages(failing, capsys):
    def stage(*_):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING):
            logging.getLogger("ppo.train").log(level, "level %d", level)

    for name, levels in (("debug", [10, 20, 30]), ("info", [20, 30]), ("warning", [30])):
        assert failing(stage, f"--log_level={name}") == 0
        lines = capsys.readouterr().err.splitlines()
        assert [int(line.split()[-1]) for line in lines] == levels
    assert failing(stage, "--log_level=loud") == 2
    assert "log_level" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["metrics", "samples", "events"])
def test_a_log_on_a_full_disk_is_an_error(tmp_path, monkeypatch, file):
    monkeypatch.setattr(metrics_module, "_check_present", lambda *_: None)  # a device is elsewhere
    row = dict.fromkeys(COLUMNS, 1.0)
    log = RunLog(tmp_path, (), 0, 4)
    full = Path("/dev/full")  # every write to it fails as on a full disk
    if file == "events":
        fails = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        file_of_events = Mock(write=fails, spec=["write", "flush", "close"])
        log._trackers[0]._writer._py_recordio_writer._writer = file_of_events
    elif file == "samples":
        log._samples = full.open("w")
    else:
        log._metrics = full.open("w")
        log._writer.writer = type(log._writer)(log._metrics, log.columns).writer
    with pytest.raises(OSError, match="No space left") as error, log:
        log.write(row, [{"step": 1}])
    assert error.value.errno == errno.ENOSPC
