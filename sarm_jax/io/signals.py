"""Handlers for SIGTERM and Ctrl-C, and cleanups that also run when a signal ends the process."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_cleanups: list[Callable[[], object]] = []  # of the blocks that are open, the outermost first


@contextlib.contextmanager
def on_signal(handler: Callable[[int], None]) -> Iterator[None]:
    """Calls `handler` with the number of the first signal; a second signal ends the process.

    Leaves signals that were ignored at start-up ignored.
    """
    handled = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]

    def handle_first(number: int, _frame: FrameType | None) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_DFL)
        handler(number)

    previous = {number: signal.signal(number, handle_first) for number in handled}
    try:
        yield
    finally:
        for number, previous_handler in previous.items():
            signal.signal(number, previous_handler)


@contextlib.contextmanager
def cleaning_up(cleanup: Callable[[], object]) -> Iterator[None]:
    """Calls `cleanup` at the end of the block, however it ends, also by `exit_after_cleanup`."""
    _cleanups.append(cleanup)
    try:
        yield
    finally:
        _cleanups.remove(cleanup)
        cleanup()


def exit_after_cleanup(code: int) -> NoReturn:
    """Runs the cleanups of all open `cleaning_up` blocks, then ends the process at once.

    For signal handlers. An exception that a handler raises may be lost: Python drops it within
    `__del__` and within callbacks of the garbage collector, such as JAX's, and C++ code that
    expects none aborts the process.
    """
    for step in (*reversed(_cleanups), sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(Exception):
            step()
    os._exit(code)
