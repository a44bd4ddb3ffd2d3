"""Compile several programs at once, before they are needed, and keep them for the next run."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Lowered

from sarm_jax.io.signals import cleaning_up

CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX reads it when it is imported


def compile_programs(programs: Iterable[Callable[[], Lowered]]) -> None:
    """Lowers the programs one after the other and compiles them side by side, one per core.

    Later calls with the same shapes find them compiled. Lowering is Python code and holds the
    interpreter; XLA compiles outside of it. The first exception is raised here, and programs that
    still wait are then not compiled.
    """
    futures = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for lower in programs:
                futures.append(pool.submit(lower().compile))
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """Keeps compiled programs on disk until the end, for several runs that need the same ones.

    Each run traces its own functions, which JAX would compile again. Processes that are started in
    the block use the same programs. If the user has set a cache of their own (`CACHE_VARIABLE`),
    that one is used and stays.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        yield
        return
    folder = tempfile.mkdtemp(prefix="sarm_jax_programs_")
    with cleaning_up(partial(shutil.rmtree, folder, ignore_errors=True)):
        compilation_cache.set_cache_dir(folder)
        compilation_cache.reset_cache()  # forgets the choice made without a directory
        before = os.environ.get(CACHE_VARIABLE)
        os.environ[CACHE_VARIABLE] = folder  # for processes that are started in the block
        try:
            yield
        finally:
            del os.environ[CACHE_VARIABLE]
            os.environ |= {} if before is None else {CACHE_VARIABLE: before}
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()
