"""Run seeds of a study at the same time, each in a process of its own.

For Ctrl-C a terminal signals all processes of a command. The seeds are in process groups of their
own, so that only the study gets the signal. It terminates its seeds and waits for their
checkpoints. A seed that got both signals would take the second one as the order to end at once.
"""

import os
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection

from pipeline.study_records import SeedOutcome
from sarm_jax.io.signals import cleaning_up


def run_seeds(
    run_seed: Callable[[int], SeedOutcome], seeds: Sequence[int], processes: int
) -> list[SeedOutcome]:
    """Calls `run_seed` for every seed in a process of its own, `processes` of them at a time.

    If the process of a seed is ended from outside, the others go on. If a seed raises an error, the
    others are stopped with a checkpoint, and the error is raised.

    Args:
        run_seed: runs a seed; a function that can be pickled.
        seeds: the seeds.
        processes: number of processes.
    """
    os.environ["TQDM_DISABLE"] = "1"  # several processes would write bars to one line
    stopping = threading.Event()

    def stop() -> None:
        """Terminates the seeds in progress and waits for their checkpoints."""
        stopping.set()
        workers = active_children()
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()

    def run(seed: int) -> SeedOutcome:
        if stopping.is_set():
            return SeedOutcome([], "another seed ended the study")
        return _run_in_process(run_seed, seed)

    with ThreadPoolExecutor(processes) as threads, cleaning_up(stop):
        futures = [threads.submit(run, seed) for seed in seeds]
        return [future.result() for future in futures]


def _run_in_process(run_seed: Callable[[int], SeedOutcome], seed: int) -> SeedOutcome:
    """Calls `run_seed` in a new process; raises its error here."""
    context = get_context("spawn")  # a copy of this process would share the threads of JAX
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(run_seed, seed, sender))
    worker.start()
    sender.close()  # this end of it, so that the end of the process ends the pipe
    try:
        result = receiver.recv()
    except EOFError:
        return SeedOutcome(
            [],
            "its process was ended from outside, for example for lack of memory; the same command "
            "goes on, and needs the least memory with lab.processes=1",
        )
    finally:
        receiver.close()
        worker.join()
    if isinstance(result, SystemExit):
        number = result.code - 128 if isinstance(result.code, int) else result.code
        return SeedOutcome([], f"its process was stopped by signal {number}")
    if isinstance(result, BaseException):
        raise result
    assert isinstance(result, SeedOutcome)
    return result


def _work(run_seed: Callable[[int], SeedOutcome], seed: int, sender: Connection) -> None:
    """Sends the outcome of a seed, or the error that ended it."""
    os.setpgrp()  # a group of its own, which gets no signals of the study's
    result: SeedOutcome | BaseException
    try:
        result = run_seed(seed)
    except BaseException as error:
        error.add_note(f"In the process of seed {seed}:\n{traceback.format_exc()}")
        result = error
    try:
        sender.send(result)
    except Exception:  # the error is of a class that cannot be pickled
        sender.send(RuntimeError(f"{result}\n{traceback.format_exc()}"))
