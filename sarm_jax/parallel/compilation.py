"""Programs compiled before they are needed, side by side."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from jax.stages import Lowered


def compile_programs(programs: Iterable[Callable[[], Lowered]]) -> None:
    """Compiles what each lowers, one on a core; calls with such arguments then find it compiled.

    Lowering is Python's, one after the other; XLA compiles beside it. What one of them raises is
    raised here, and those that wait are not begun.
    """
    started = []
    with ThreadPoolExecutor(os.cpu_count()) as cores:
        try:
            for lower in programs:
                started.append(cores.submit(lower().compile))
            for one in started:
                one.result()
        finally:
            for one in started:
                one.cancel()
