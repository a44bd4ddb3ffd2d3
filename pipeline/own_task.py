"""Checks the functions of a user's own task: their errors become messages of one line.

The file of `lab.task` is a program. Its functions are called for texts that its author may not have
thought of, such as an empty response, half a sentence or a prompt of another file.
"""

import dataclasses
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from pipeline.config_file import describe
from sarm_jax.io.errors import InputError
from sarm_jax.lab.text.task import TextTask


def checked_task(task: TextTask, file: str) -> TextTask:
    """Returns a task whose functions raise InputError, naming the file, if they fail.

    Raises:
        InputError: an attribute that has to be a function is something else.
    """
    check = partial(_checked, file=file)
    text = partial(check, expected="a text", fits=_is_text)
    shortcuts = [
        dataclasses.replace(
            shortcut,
            count=check(
                shortcut.count,
                f"count of {shortcut.name}",
                expected="a whole number from 0",
                fits=_is_count,
            ),
            add=text(shortcut.add, f"add of {shortcut.name}"),
            remove=text(shortcut.remove, f"remove of {shortcut.name}"),
        )
        for shortcut in task.all_shortcuts
    ]
    return dataclasses.replace(
        task,
        file=file,
        prompts=check(task.prompts, "prompts", expected="a list of texts", fits=_are_texts),
        quality=check(task.quality, "quality", expected="a number", fits=_is_number),
        spoil=text(task.spoil, "spoil"),
        write=None if task.write is None else text(task.write, "write"),
        misread=None if task.misread is None else text(task.misread, "misread"),
        all_shortcuts=tuple(shortcuts),
    )


def _checked(
    function: Any, name: str, *, file: str, expected: str, fits: Callable[[Any], bool]
) -> Callable:
    """Returns a function of the file whose errors and results are checked.

    Args:
        function: the function.
        name: what messages call it.
        file: the file.
        expected: what it has to return, in words.
        fits: returns whether a result is as expected.

    Raises:
        InputError: it is no function.
    """
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
        if not fits(result):
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


def _is_count(value: Any) -> bool:
    return isinstance(value, numbers.Integral | np.bool_) and int(value) >= 0
