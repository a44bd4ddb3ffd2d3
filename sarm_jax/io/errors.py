"""The exceptions for bad input and for training that stopped, and the signs of memory errors."""

# How CUDA and its libraries report that GPU memory outside JAX's own pool is used up.
CUDA_MEMORY_ERRORS = ("CUDA_ERROR_OUT_OF_MEMORY", "STATUS_ALLOC_FAILED")
MAX_CHARACTERS = 2000  # of a message; a longer one loses its middle
CUT = " … "  # marks the missing middle


class InputError(ValueError):
    """Bad input: the message names the flag, file and line, or tensor, and the value found.

    `main.py` and the conversion commands print it as one `error: …` line and exit with 2. A message
    may quote files from untrusted sources, so it is made `printable` here. Secrets are redacted
    where text is shown, see `sarm_jax.io.secrets`.
    """

    def __init__(self, message: object):
        super().__init__(printable(str(message)))


class TrainingStoppedError(RuntimeError):
    """Training stopped before its last step. The last good result is kept; the exit code is 3.

    `reason` is what summary.json says; by default the message.
    """

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason or message


def out_of_memory(error: BaseException) -> bool:
    """Returns True if an error means that a device or the host has run out of memory."""
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in CUDA_MEMORY_ERRORS):
        return True
    return text.startswith("RESOURCE_EXHAUSTED") and "Shared memory" not in text


def first_line(error: Exception) -> str:
    """Describes an error in one line, for a record of why something stopped."""
    if out_of_memory(error):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return printable(next(iter(str(error).splitlines()), "") or type(error).__name__)


def printable(text: str) -> str:
    """Converts a text to one line of bounded length without control characters."""
    if len(text) > MAX_CHARACTERS:
        text = f"{text[: MAX_CHARACTERS * 3 // 4]}{CUT}{text[-MAX_CHARACTERS // 4 :]}"
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
