"""Seeds in processes of their own: one that is killed, and signals to the study."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from pipeline.study_processes import run_seeds, shares_of_cores
from pipeline.study_records import SeedOutcome
from tests.further import further
from tests.paths import ROOT
from tests.seed_processes import end_at_signal, fail, fail_oddly, report_cores, stop_at_signal

pytestmark = pytest.mark.slow  # processes are started

FINISHED = {seed: SeedOutcome([f"of {seed}"]) for seed in (0, 2)}


@pytest.mark.parametrize(
    ("allowed", "processes", "shares"),
    [
        ({0, 1}, 2, [[0], [1]]),
        ({1, 4, 5, 7, 9}, 2, [[1, 4, 5], [7, 9]]),
        ({3}, 1, [[3]]),
        ({3}, 2, [[], []]),  # too few: both may use it
    ],
)
def test_the_cores_are_divided_among_the_seeds(monkeypatch, allowed, processes, shares):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
    assert shares_of_cores(processes) == shares


def test_without_a_way_to_confine_processes_every_seed_may_use_all_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert shares_of_cores(2) == [[], []]


@pytest.fixture
def all_cores():
    """Lets this process use all cores, of which a worker of the tests has a share."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("the system confines no process")
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count()))
    cores = os.sched_getaffinity(0)
    try:
        if len(cores) < 2:
            pytest.skip("one core cannot be divided")
        yield cores
    finally:
        os.sched_setaffinity(0, own)


def test_seeds_at_the_same_time_have_cores_of_their_own(all_cores):
    """Three seeds, two at a time: the third gets the cores of the one that ended first."""
    cores = [outcome.finished for outcome in run_seeds(report_cores, [0, 1, 2], 2)]
    assert not set(cores[0]) & set(cores[1])
    assert {*cores[0], *cores[1]} == set(map(str, all_cores))
    assert cores[2] in cores[:2]


@pytest.mark.parametrize("number", [signal.SIGKILL, further(signal.SIGTERM)])
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
    ("number", "to_all"),
    [(signal.SIGINT, True), further(signal.SIGTERM, True), further(signal.SIGTERM, False)],
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
