"""Run seeds of a study at the same time, each in a process of its own.

For Ctrl-C a terminal signals all processes of a command. The seeds are in process groups of their
own, so that only the study gets the signal. It terminates its seeds and waits for their
checkpoints. A seed that got both signals would take the second one as the order to end at once.

Each process is confined to its share of the cores. XLA starts as many threads as a process may use
cores, and the threads of several processes on the same cores wait for each other: two seeds of the
lab on two cores take 16 % more time without it.
"""

import os
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np

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
    free: SimpleQueue[list[int]] = SimpleQueue()
    for cores in shares_of_cores(min(processes, len(seeds))):
        free.put(cores)

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
        cores = free.get()
        try:
            return _run_in_process(run_seed, seed, cores)
        finally:
            free.put(cores)

    with ThreadPoolExecutor(processes) as threads, cleaning_up(stop):
        futures = [threads.submit(run, seed) for seed in seeds]
        return [future.result() for future in futures]


def shares_of_cores(processes: int) -> list[list[int]]:
    """Divides the cores that this process may use among so many processes.

    Returns:
        The numbers of the cores of each; all lists are empty, which stands for any core, if there
        are too few cores, or if the system cannot confine a process.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(allowed) < processes:
        return [[] for _ in range(processes)]
    return [share.tolist() for share in np.array_split(allowed, processes)]


def _run_in_process(
    run_seed: Callable[[int], SeedOutcome], seed: int, cores: list[int]
) -> SeedOutcome:
    """Calls `run_seed` in a new process on the cores; raises its error here."""
    context = get_context("spawn")  # a copy of this process would share the threads of JAX
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(run_seed, seed, cores, sender))
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


def _work(
    run_seed: Callable[[int], SeedOutcome], seed: int, cores: list[int], sender: Connection
) -> None:
    """Sends the outcome of a seed, or the error that ended it."""
    os.setpgrp()  # a group of its own, which gets no signals of the study's
    if cores:
        os.sched_setaffinity(0, cores)  # before XLA counts them
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
