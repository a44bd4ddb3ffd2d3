"""The one exception for what a user gave us and we cannot accept."""


class InputError(ValueError):
    """Bad input: the message names the flag, file and line, or tensor, and the value found.

    `main.py` and the conversion commands print it as one `error: …` line and exit with 2.
    """
