"""Several processes as one program, for a mesh over several hosts.

Each runs the same command and takes the same steps with the same numbers, and puts on its devices
what lies there. Process 0 keeps the run: what only its working directory knows it tells the others,
who write nothing that stays. What one refuses all refuse (`agree`). With a single process nothing
here communicates.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sarm_jax.io.errors import InputError
from sarm_jax.io.signals import cleaning_up

TEXT = 1000  # bytes of a refusal that the other processes hear


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Process `number` of `count`; process 0 listens at `address`, host:port."""

    address: str
    count: int
    number: int
    timeout: int = 300  # seconds to wait for one another

    def __post_init__(self) -> None:
        host, colon, port = self.address.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise InputError(f"--coordinator_address={self.address}: expected HOST:PORT")
        if self.count < 2:
            raise InputError(f"--num_processes={self.count}: must be at least 2")
        if not 0 <= self.number < self.count:
            raise InputError(
                f"--process_id={self.number}: expected 0 to {self.count - 1}, "
                f"--num_processes={self.count}"
            )


def connect(hosts: Hosts) -> None:
    """Joins this process to the others; before anything else asks JAX for devices.

    Raises InputError where the address cannot be listened at, or nobody does in time.
    """
    host, _, port = hosts.address.rpartition(":")
    flag = f"--coordinator_address={hosts.address}"
    if hosts.number:
        _wait_for(host.strip("[]"), int(port), hosts.timeout, flag)
    # It would save at a SIGTERM in a way of its own; `Trainer` has one.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            hosts.address,
            hosts.count,
            hosts.number,
            cluster_detection_method="deactivate",  # Slurm's would leave a process one GPU
            initialization_timeout=hosts.timeout,
        )
    except RuntimeError as error:
        raise InputError(f"{flag}: {' '.join(str(error).split())}") from error


def connected() -> bool:
    """Whether there are other processes. Asks for no device: a GPU would be taken by it."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that keeps the run."""
    return not connected() or jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Whole arrays as NumPy, wherever their parts are; all processes have to call this."""

    def gathered(x):
        elsewhere = isinstance(x, jax.Array) and not (
            x.is_fully_addressable or x.is_fully_replicated
        )
        return multihost_utils.process_allgather(x, tiled=True) if elsewhere else x

    return jax.device_get(jax.tree.map(gathered, tree))


def from_first(value: Any) -> Any:
    """Process 0's JSON value; the others' own is ignored."""
    if not connected():
        return value
    return json.loads(_bytes_from_first(json.dumps(value).encode()))


def array_from_first(like: Any, array: np.ndarray | None) -> np.ndarray:
    """Process 0's `array`, bit for bit, of the shape and type of `like`; the others give None."""
    if not connected():
        assert array is not None
        return array
    data = b"" if array is None else np.ascontiguousarray(array).tobytes()
    return np.frombuffer(_bytes_from_first(data), like.dtype).reshape(like.shape)


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if not connected():
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def agree(problem: str = "") -> None:
    """Goes on if no process has a problem; otherwise raises InputError in every one, parted.

    A process that refuses before it comes here is spoken for by `refuse`.
    """
    if not connected():
        return
    own = np.zeros(TEXT, np.uint8)
    text = np.frombuffer(problem.encode()[:TEXT], np.uint8)
    own[: len(text)] = text
    for number, found in enumerate(multihost_utils.process_allgather(own)):
        if found.any():
            part()
            said = found.tobytes().rstrip(b"\0").decode(errors="replace")
            raise InputError(f"process {number}: {said}")


def refuse(problem: str) -> None:
    """Tells the others, at their next `agree`, why this process does not go on."""
    with contextlib.suppress(InputError):
        agree(problem)


def part() -> None:
    """The end that all processes come to; waits for the others."""
    if connected():
        jax.distributed.shutdown()


@contextlib.contextmanager
def nobody_waits() -> Iterator[None]:
    """Ends this process at once where it leaves alone: the others cannot go on without it.

    The interpreter's own end would wait for them, and they for it.
    """
    try:
        yield
    except BaseException as error:
        if not connected():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


@contextlib.contextmanager
def place_to_write(workdir: Path) -> Iterator[Path]:
    """The working directory for process 0; for the others one that is thrown away."""
    if is_first():
        yield workdir
        return
    folder = tempfile.mkdtemp(prefix="sarm_jax_")
    with cleaning_up(partial(shutil.rmtree, folder, ignore_errors=True)):
        yield Path(folder)


def _bytes_from_first(data: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(data))))
    given = np.frombuffer(data, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return multihost_utils.broadcast_one_to_all(given).tobytes()


def _wait_for(host: str, port: int, timeout: int, flag: str) -> None:
    """Until somebody listens: the library would end the process without a word to catch."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise InputError(
                    f"{flag}: no answer in {timeout} s ({error}); process 0 is to listen there"
                ) from None
        time.sleep(0.2)
