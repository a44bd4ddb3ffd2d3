"""What happens at SIGTERM and Ctrl-C."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

STOPPING = (signal.SIGTERM, signal.SIGINT)

_CLEANUPS: list[Callable[[], object]] = []


@contextlib.contextmanager
def on_signal(handler: Callable[[int], None]) -> Iterator[None]:
    """Calls `handler` with the number of the first signal; a second one ends the process.

    A signal that the process was started to ignore is.
    """
    heeded = [n for n in STOPPING if signal.getsignal(n) is not signal.SIG_IGN]

    def first(number: int, _frame: FrameType | None) -> None:
        for other in heeded:
            signal.signal(other, signal.SIG_DFL)
        handler(number)

    before = {number: signal.signal(number, first) for number in heeded}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def cleaning_up(cleanup: Callable[[], object]) -> Iterator[None]:
    """Calls `cleanup` at the end of the block, however it ends: by `leave`, too."""
    _CLEANUPS.append(cleanup)
    try:
        yield
    finally:
        _CLEANUPS.remove(cleanup)
        cleanup()


def leave(code: int) -> NoReturn:
    """Ends the process where it is, after the cleanups of the blocks that it is in.

    For handlers of signals: what they raise is dropped by Python within `__del__` and callbacks of
    the garbage collector, JAX's own for one, and aborts the process within C++ that expects none.
    """
    for step in (*reversed(_CLEANUPS), sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(Exception):
            step()
    os._exit(code)
