"""Seeds that do no work, for tests of the processes that run them (no import of JAX)."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

from pipeline.study_processes import run_seeds
from pipeline.study_records import SeedOutcome
from sarm_jax.io.signals import exit_after_cleanup, on_signal

STEP = 1.0  # seconds from a signal to the checkpoint of a seed


def finish(seed: int) -> SeedOutcome:
    """Finishes a seed, after those that end at once."""
    time.sleep(STEP)
    return SeedOutcome([f"of {seed}"])


def report_cores(seed: int) -> SeedOutcome:
    """Returns the numbers of the cores that the process may use."""
    time.sleep(STEP)  # so that two seeds run at the same time
    return SeedOutcome([str(core) for core in sorted(os.sched_getaffinity(0))])


def end_at_signal(number: int, seed: int) -> SeedOutcome:
    """Ends the process of seed 1 by a signal; finishes the others."""
    if seed == 1:
        os.kill(os.getpid(), number)
    return finish(seed)


def stop_at_signal(seed: int) -> SeedOutcome:
    """Stops seed 1 at a signal, as training does after its checkpoint; finishes the others."""
    if seed == 1:
        raise SystemExit(128 + signal.SIGTERM)
    return finish(seed)


def fail(seed: int) -> SeedOutcome:
    """Raises an error of the program in seed 1; finishes the others."""
    if seed == 1:
        raise KeyError("a mistake of the program")
    return finish(seed)


def fail_oddly(seed: int) -> SeedOutcome:
    """Raises an error of a class that another process does not know."""

    class OddError(RuntimeError):
        pass

    raise OddError("RESOURCE_EXHAUSTED: 7 GiB")


def save_at_signal(folder: Path, seed: int) -> SeedOutcome:
    """Writes a checkpoint a step after the first signal; a second one ends the process."""
    received: list[int] = []
    with on_signal(received.append):
        (folder / f"began_{seed}").touch()
        while not received:
            time.sleep(0.05)
        time.sleep(STEP)
        (folder / f"saved_{seed}").touch()
    raise SystemExit(128 + received[0])


def main(folder: Path) -> None:
    """Runs two seeds until a signal comes, as the program does."""
    with on_signal(lambda number: exit_after_cleanup(128 + number)):
        run_seeds(partial(save_at_signal, folder), [0, 1, 2], 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
