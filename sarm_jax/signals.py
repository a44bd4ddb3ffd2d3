"""What happens at SIGTERM and Ctrl-C."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)
AGAIN = 0.05  # seconds


@contextlib.contextmanager
def on_signal(handler: Callable[[int], None]) -> Iterator[None]:
    """Calls `handler` with the number of the first signal; a second one ends the process.

    A signal that the process was started to ignore is. Python drops what `handler` raises within
    `__del__` or a callback of the garbage collector, JAX's own for one: the signal is sent again.
    """
    heeded = [n for n in STOPPING if signal.getsignal(n) is not signal.SIG_IGN]
    raised: tuple[int, BaseException] | None = None

    def first(number: int, _frame: FrameType | None) -> None:
        nonlocal raised
        for other in heeded:
            signal.signal(other, signal.SIG_DFL)
        try:
            handler(number)
        except BaseException as error:
            raised = number, error
            raise

    def drop(dropped: Any) -> None:
        if raised is None or dropped.exc_value is not raised[1]:
            hook(dropped)
            return
        number = raised[0]
        for other in heeded:
            signal.signal(other, first)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_REAL, AGAIN)

    before = {n: signal.signal(n, first) for n in heeded}
    before[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
    hook, sys.unraisablehook = sys.unraisablehook, drop
    try:
        yield
    finally:
        if raised is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for n, old in before.items():
            signal.signal(n, old)
