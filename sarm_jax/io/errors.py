"""The one exception for what a user gave us and we cannot accept, in one line that can be shown."""

from collections.abc import Iterable, Mapping

from sarm_jax.io.secrets import secrets, without_secrets

# What CUDA and its libraries say when a GPU's memory beside JAX's own is used up.
OUTSIDE_THE_POOL = ("CUDA_ERROR_OUT_OF_MEMORY", "STATUS_ALLOC_FAILED")
LONGEST = 2000  # characters; a message that quotes more loses its middle


class InputError(ValueError):
    """Bad input: the message names the flag, file and line, or tensor, and the value found.

    `main.py` and the conversion commands print it as one `error: …` line and exit with 2. What a
    message quotes comes from files that nobody trusts, so it is made `printable` here.
    """

    def __init__(self, message: object):
        super().__init__(printable(str(message), secrets()))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text for sign in OUTSIDE_THE_POOL):
        return True
    return text.startswith("RESOURCE_EXHAUSTED") and "Shared memory" not in text


def refuse_secrets(options: Iterable[str]) -> None:
    """Raises InputError for an option, such as "--flag=value", with a secret in it.

    Options are written to config.json, stages.json and reports.
    """
    secret = secrets()
    for option in options:
        if option != without_secrets(option, secret):
            raise InputError(
                f"{option}: holds a secret of yours, and options are written to files; leave it "
                "out: downloads take the login from the environment or `hf auth login`"
            )


def printable(text: str, secret: Mapping[str, str]) -> str:
    """One line of bounded length without control characters or secrets."""
    text = without_secrets(text, secret)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} … {text[-LONGEST // 4 :]}"
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
