"""Seeds in processes of their own: one that is killed, and signals to the study."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from pipeline.study_processes import run_seeds
from pipeline.study_records import SeedOutcome
from tests.paths import ROOT
from tests.seed_processes import end_at_signal, fail, fail_oddly, stop_at_signal

pytestmark = pytest.mark.slow  # processes are started

FINISHED = {seed: SeedOutcome([f"of {seed}"]) for seed in (0, 2)}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_seed_whose_process_is_killed_leaves_the_others(number):
    first, killed, last = run_seeds(partial(end_at_signal, number), [0, 1, 2], 2)
    assert (first, last) == (FINISHED[0], FINISHED[2])
    assert not killed.finished
    assert killed.stopped.startswith("its process was ended from outside, for example for lack of")


def test_a_seed_that_a_signal_stops_leaves_the_others():
    first, stopped, last = run_seeds(stop_at_signal, [0, 1, 2], 2)
    assert (first, last) == (FINISHED[0], FINISHED[2])
    assert stopped == SeedOutcome([], "its process was stopped by signal 15")


def test_an_error_of_the_program_is_not_hidden():
    with pytest.raises(KeyError, match="a mistake of the program") as error:
        run_seeds(fail, [0, 1, 2], 2)
    assert "in fail" in error.value.__notes__[0]  # where it was raised, in the other process


def test_an_error_that_cannot_be_sent_keeps_its_text():
    with pytest.raises(RuntimeError, match="^RESOURCE_EXHAUSTED: 7 GiB"):  # as main.py reads it
        run_seeds(fail_oddly, [0, 1], 2)


@pytest.mark.parametrize(
    ("number", "to_all"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGTERM, False)]
)
def test_a_signal_to_the_study_lets_every_seed_save_its_checkpoint(tmp_path, number, to_all):
    """A terminal sends Ctrl-C to all processes of a command, and so does `timeout`."""
    line = [sys.executable, "-m", "tests.seed_processes", str(tmp_path)]
    output = {"stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, cwd=ROOT, start_new_session=True, **output) as study:
        while not all((tmp_path / f"began_{seed}").exists() for seed in (0, 1)):
            assert study.poll() is None
            time.sleep(0.1)
        (os.killpg if to_all else os.kill)(study.pid, number)
        _, shown = study.communicate(timeout=60)
    assert study.returncode == 128 + number and not shown
    saved = sorted(path.name for path in tmp_path.glob("saved_*"))
    assert saved == ["saved_0", "saved_1"]  # before the study ended
    assert not (tmp_path / "began_2").exists()
