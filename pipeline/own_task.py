"""A task of the user's own: its functions end in one line if they fail or return something else.

The file of `lab.task` is a program, and its functions are called for many texts, some of which
nobody thought of: an empty response, half a sentence, a prompt of another file.
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.config_file import describe
from sarm_jax.io.errors import InputError
from sarm_jax.lab.text.task import TextTask

Check = Callable[[Any], bool]
TEXTS = ("spoil", "write", "misread")  # functions of a task that return a text
TEXTS_OF_SHORTCUTS = ("add", "remove")


def checked_task(task: TextTask, file: str) -> TextTask:
    """Returns a task whose functions raise InputError, naming the file, if they fail.

    Raises:
        InputError: something that has to be a function is none.
    """
    shortcuts = [
        dataclasses.replace(
            shortcut,
            count=_checked(
                shortcut.count, file, f"count of {shortcut.name}", "a whole number from 0", _counts
            ),
            **{
                name: _checked(
                    getattr(shortcut, name), file, f"{name} of {shortcut.name}", "a text", _is_text
                )
                for name in TEXTS_OF_SHORTCUTS
            },
        )
        for shortcut in task.all_shortcuts
    ]
    texts = {
        name: _checked(getattr(task, name), file, name, "a text", _is_text)
        for name in TEXTS
        if name == "spoil" or getattr(task, name) is not None
    }
    return dataclasses.replace(
        task,
        file=file,
        prompts=_checked(task.prompts, file, "prompts", "a list of texts", _are_texts),
        quality=_checked(task.quality, file, "quality", "a number", _is_number),
        all_shortcuts=tuple(shortcuts),
        **texts,
    )


def _checked(function: Any, file: str, name: str, expected: str, check: Check) -> Callable:
    """Returns a function of the file whose errors and results are checked; `name` is for them."""
    place = f"lab.task={file}: {name}"
    if not callable(function):
        raise InputError(f"{place}: expected a function, found {function!r:.80}")

    def call(*arguments: Any) -> Any:
        try:
            result = function(*arguments)
        except (InputError, KeyboardInterrupt):
            raise
        except BaseException as error:  # also SystemExit, which would end the program
            raise InputError(f"{place}: {describe(error, file, 'lab.task')}") from error
        if not check(result):
            raise InputError(f"{place}: returned {result!r:.80}, expected {expected}")
        return result

    return call


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    is_list = isinstance(value, list | tuple | np.ndarray)
    return is_list and all(isinstance(text, str) and text.strip() for text in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real | np.bool_)


def _counts(value: Any) -> bool:
    return isinstance(value, numbers.Integral | np.bool_) and value >= 0
