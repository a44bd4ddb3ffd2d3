"""One guard for calls into libraries that read what anybody may have written.

The Rust code of tokenizers raises bare Exceptions and, if it panics, a BaseException; a chat
template is a program and may raise anything.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

from sarm_jax.io.errors import InputError

MAX_REASON = 200  # characters of a library's message


@contextlib.contextmanager
def as_input_error(problem: str, advice: str = "") -> Iterator[None]:
    """Turns any exception of a library into an InputError "problem (reason): advice".

    Args:
        problem: what could not be done, and with which file.
        advice: what the user can do about it, if that is known.

    Raises:
        InputError: the block raised an exception, even one that is no `Exception`. An InputError
            stays as it is; KeyboardInterrupt, SystemExit and MemoryError pass through.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        advice = f": {advice}" if advice else ""
        raise InputError(f"{problem} ({_reason(error)}){advice}") from error


@contextlib.contextmanager
def native_messages_of_failure_dropped() -> Iterator[None]:
    """Holds back what the block writes to file descriptor 2; drops it if the block fails.

    A panic of Rust code prints its own message, and a stack of the library, before it becomes an
    exception. The descriptor belongs to the whole process, so this is for short blocks.
    """
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as file:
        try:
            os.dup2(file.fileno(), 2)
            yield
            sys.stderr.flush()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        file.seek(0)
        if held := file.read():
            os.write(2, held)


def _reason(error: BaseException) -> str:
    """Returns the beginning of an error's text, or its type if it has none."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # the exception of a template or of a library may not even have a text
        text = ""
    return text[:MAX_REASON] or type(error).__name__
