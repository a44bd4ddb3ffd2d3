"""The log on stderr: this project's progress messages and warnings, without secrets."""

import contextlib
import contextvars
import functools
import io
import logging
import sys
from collections.abc import Iterator

from absl import logging as absl_logging
from tqdm import tqdm

from sarm_jax.io import secrets

LOG = logging.getLogger(__name__)
PACKAGES = ("sarm_jax", "ppo", "pipeline", "configs", "conversion")
LIBRARIES = ("transformers", "huggingface_hub")  # they install log handlers of their own
_name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="")


def show_progress(prefix: str = "", level: int = logging.INFO, primary: bool = True) -> None:
    """Logs this project's messages from `level` on to stderr; of libraries only warnings.

    No line shows a secret, whether it is in a library's message or in an unexpected error. The
    secrets of this process are collected here, because a spawned process starts with this call.

    Args:
        prefix: text before every message, such as "seed 3: ".
        level: the lowest level of this project's messages that is shown.
        primary: False in the other processes of a run; they show errors and no progress bars.
    """
    secrets.collect()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path that is not UTF-8 is shown with escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    line = f"%(asctime)s {prefix}%(run)s%(message)s"
    handler.setFormatter(_RedactingFormatter(line, "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], force=True)
    for name in LIBRARIES:
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    sys.excepthook = _log_unexpected
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level if primary else logging.ERROR)
    absl_logging.set_verbosity(absl_logging.WARNING)
    if not primary:
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


@contextlib.contextmanager
def named_messages(name: str) -> Iterator[None]:
    """Puts "name: " before every message of this thread, for one of several runs at a time."""
    token = _name.set(f"{name}: ")
    try:
        yield
    finally:
        _name.reset(token)


def show_last_line(message: str) -> None:
    """Prints the last line of a command on stderr, without secrets."""
    close_bars()
    print(secrets.redact(message), file=sys.stderr, flush=True)


def close_bars() -> None:
    """Closes the progress bars that an error has left open, where they are.

    Otherwise they would be drawn once more when Python deletes them, after what is shown next. Each
    keeps a line of its own, also one that would be cleared: clearing moves the cursor.
    """
    for bar in list(getattr(tqdm, "_instances", ())):
        with contextlib.suppress(Exception):  # a bar that cannot be drawn must hide no message
            bar.leave = True
            bar.close()


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.run = _name.get()
        return secrets.redact(super().format(record))


def _log_unexpected(kind, *error) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, *error)
        return
    close_bars()
    LOG.critical(
        "an error in the program: please report it with these lines; checkpoints and finished "
        "stages are kept, and the same command goes on from them",
        exc_info=(kind, *error),
    )
