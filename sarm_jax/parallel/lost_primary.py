"""The end of a process that has lost process 0: one line and an exit code.

Process 0 runs the service through which JAX's processes know of one another. If it dies, JAX's
client in every other process notices in a thread of its own, logs a stack trace and aborts, whether
a collective is waiting (whose error Python would see, see `processes.lost_peer`) or the process
computes alone. Python's own handlers of signals do not run at an abort, and JAX's callback for this
case receives a C++ object that Python cannot. So the handler is a C function that calls Python.
"""

import ctypes
import signal
import socket
from collections.abc import Callable

from sarm_jax.io.signals import exit_after_cleanup
from sarm_jax.parallel import processes
from sarm_jax.parallel.processes import Hosts

EXIT_CODE = 2
SECONDS = 5  # that process 0 has to answer in
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handlers: list[object] = []  # C has their addresses and does not keep them alive


def on_lost_primary(hosts: Hosts, report: Callable[[], None]) -> None:
    """Calls `report` and exits with code 2 if this process aborts because process 0 has died.

    Any other abort goes on as one: process 0 answers then, or the processes have disconnected.
    """

    def aborted(_number: int) -> None:
        if processes.connected() and not _answers(hosts):
            report()
            exit_after_cleanup(EXIT_CODE)

    handler = _Handler(aborted)
    _handlers.append(handler)
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, _Handler], ctypes.c_void_p
    library.signal(signal.SIGABRT, handler)


def _answers(hosts: Hosts) -> bool:
    """Returns True if something listens at the address of process 0."""
    try:
        socket.create_connection(hosts.endpoint, timeout=SECONDS).close()
    except OSError:
        return False
    return True
