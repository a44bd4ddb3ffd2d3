"""Several processes as one program, for a mesh over several hosts.

Every process runs the same command and takes the same steps with the same numbers; each one puts
its own shards on its own devices. Process 0, the primary process, keeps the results: it alone
writes files (`on_primary`), and it broadcasts what only its working directory holds. If one process
refuses its input or cannot write, all of them end (`raise_on_all`, `raising_on_all`). A single
process communicates with nobody.
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sarm_jax.io.errors import InputError, first_line
from sarm_jax.io.secrets import redact
from sarm_jax.io.signals import cleaning_up

MESSAGE_BYTES = 1000  # of an error that the other processes receive
MOST_PROCESSES = 1 << 16


class OtherProcessError(InputError):
    """Another process has bad input or a full disk; this one ends with it, and has neither."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """One process of several: its number, their count, and where process 0 listens (host:port)."""

    address: str
    count: int
    number: int
    timeout: int = 300  # seconds that the processes wait for one another

    def __post_init__(self) -> None:
        host, colon, port = self.address.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise InputError(f"--coordinator_address={self.address}: expected HOST:PORT")
        if not 2 <= self.count <= MOST_PROCESSES:
            rule = f"must lie in [2, {MOST_PROCESSES}]"
            raise InputError(f"--num_processes={self.count}: {rule}")
        if not 0 <= self.number < self.count:
            raise InputError(
                f"--process_id={self.number}: expected 0 to {self.count - 1}, "
                f"--num_processes={self.count}"
            )

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port of the address; an IPv6 address loses its brackets."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def connect(hosts: Hosts) -> None:
    """Connects this process to the others; call it before anything asks JAX for devices.

    Raises:
        InputError: process 0 cannot listen at the address, or no process listens there in time.
    """
    flag = f"--coordinator_address={hosts.address}"
    if hosts.number:
        _wait_for(hosts, flag)
    # JAX's service handles SIGTERM in its own way; `Trainer` saves a checkpoint then.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            hosts.address,
            hosts.count,
            hosts.number,
            cluster_detection_method="deactivate",  # Slurm's gives each process only one GPU
            initialization_timeout=hosts.timeout,
        )
    except RuntimeError as error:
        raise InputError(f"{flag}: {' '.join(str(error).split())}") from error
    # Gloo connects the processes at their first collective, for which it waits 30 seconds. Here all
    # of them have just come to the same point; later some may still import what others have.
    all_max(hosts.number)


def connected() -> bool:
    """Returns True if there are other processes. Initialises no backend, which would take a GPU."""
    return jax.distributed.is_initialized()


def is_primary() -> bool:
    """Returns True in process 0, which keeps the run."""
    return not connected() or jax.process_index() == 0


def fetch(tree: Any) -> Any:
    """Gathers arrays as NumPy arrays on every host; all processes have to call it."""

    def gather(x):
        elsewhere = isinstance(x, jax.Array) and not (
            x.is_fully_addressable or x.is_fully_replicated
        )
        return multihost_utils.process_allgather(x, tiled=True) if elsewhere else x

    return jax.device_get(jax.tree.map(gather, tree))


def broadcast(value: Any) -> Any:
    """Returns process 0's JSON value in every process; what the others pass is ignored."""
    if not connected():
        return value
    return json.loads(_broadcast_bytes(json.dumps(value).encode()))


def broadcast_array(like: Any, array: np.ndarray | None) -> np.ndarray:
    """Returns process 0's `array` in every process, bit for bit.

    Args:
        like: an array, or its description, with the shape and dtype of `array`.
        array: the array in process 0; the others may pass None.
    """
    if not connected():
        assert array is not None
        return array
    data = b"" if array is None else np.ascontiguousarray(array).tobytes()
    return np.frombuffer(_broadcast_bytes(data), like.dtype).reshape(like.shape)


def all_max(number: int) -> int:
    """Returns the maximum of all processes' numbers in every process (an all-reduce)."""
    if not connected():
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def raise_on_all(problem: str = "") -> None:
    """Raises InputError in every process, after shutting down, if any process has a problem.

    It is an OtherProcessError in the processes that do not have it. All processes have to call it.
    A process that fails earlier calls `raise_on_others` instead.

    Args:
        problem: the problem of this process; empty if it has none. Its secrets are redacted here,
            since the other processes do not know them.
    """
    if not connected():
        return
    own = np.zeros(MESSAGE_BYTES, np.uint8)
    text = np.frombuffer(redact(problem).encode()[:MESSAGE_BYTES], np.uint8)
    own[: len(text)] = text
    for number, received in enumerate(multihost_utils.process_allgather(own)):
        if received.any():
            kind = InputError if number == jax.process_index() else OtherProcessError
            shut_down()
            message = received.tobytes().rstrip(b"\0").decode(errors="replace")
            raise kind(f"process {number}: {message}")


def raise_on_others(problem: str) -> None:
    """Ends the other processes, which wait in `raise_on_all`, with this process's problem."""
    with contextlib.suppress(InputError):
        raise_on_all(problem)


def lost_peer(error: BaseException) -> bool:
    """Returns True if an error of a collective means that another process has ended.

    JAX raises a ValueError if the program had been dispatched and its result is then read.
    """
    signs = ("gloo", "connection closed by peer", "connection reset by peer", "remote process")
    is_collective = connected() and isinstance(error, (jax.errors.JaxRuntimeError, ValueError))
    return is_collective and any(sign in str(error).lower() for sign in signs)


def shut_down() -> None:
    """Disconnects this process after all others have come to this point (a barrier)."""
    if connected():
        jax.distributed.shutdown()


@contextlib.contextmanager
def exit_without_barrier() -> Iterator[None]:
    """Ends this process at once if an exception leaves the block while others are connected.

    The interpreter's own exit would wait for the other processes, and they would wait for this one.
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
def raising_on_all() -> Iterator[None]:
    """Ends all processes if the block fails in any of them with bad input or a full disk.

    The process in which it failed raises its own error, the others an OtherProcessError that names
    the process. All processes have to run the block, and to communicate alike in it, if at all.
    """
    try:
        yield
    except (InputError, OSError) as error:
        raise_on_others(first_line(error))
        raise
    raise_on_all()


def on_primary(function: Callable[[], Any]) -> Any:
    """Calls a function in process 0 alone, while the others wait for it, and broadcasts its result.

    All processes have to call `on_primary`. If the function fails, all of them end, as in
    `raising_on_all`.

    Args:
        function: returns a JSON value; it must not communicate.
    """
    value = None
    with raising_on_all():
        if is_primary():
            value = function()
    return broadcast(value)


def primary_only(context: AbstractContextManager[None]) -> AbstractContextManager[None]:
    """Returns the context in process 0, and one without an effect in the others."""
    return context if is_primary() else contextlib.nullcontext()


@contextlib.contextmanager
def writable_workdir(workdir: Path) -> Iterator[Path]:
    """Yields the working directory in process 0 and a temporary directory in the others."""
    if is_primary():
        yield workdir
        return
    folder = tempfile.mkdtemp(prefix="sarm_jax_")
    with cleaning_up(partial(shutil.rmtree, folder, ignore_errors=True)):
        yield Path(folder)


def _broadcast_bytes(data: bytes) -> bytes:
    size = int(multihost_utils.broadcast_one_to_all(np.uint32(len(data))))
    own = np.frombuffer(data, np.uint8) if is_primary() else np.zeros(size, np.uint8)
    return multihost_utils.broadcast_one_to_all(own).tobytes()


def _wait_for(hosts: Hosts, flag: str) -> None:
    """Waits until process 0 listens; JAX would end this process without a message if it does not.

    Raises:
        InputError: no process listens in time.
    """
    end = time.monotonic() + hosts.timeout
    while True:
        try:
            socket.create_connection(hosts.endpoint, timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise InputError(
                    f"{flag}: no answer in {hosts.timeout} s ({error}); process 0 is to listen "
                    "there"
                ) from None
        time.sleep(0.2)
