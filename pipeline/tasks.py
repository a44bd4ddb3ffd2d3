"""The task of the lab that the options name: the world of capitals, or a task in English."""

import dataclasses
import hashlib
import math
from pathlib import Path

from ml_collections import ConfigDict

from pipeline.config_file import describe, run_file
from pipeline.own_task import checked_task
from sarm_jax.io.errors import InputError
from sarm_jax.lab.shortcuts import World
from sarm_jax.lab.task import Task
from sarm_jax.lab.text.animals import TASK as ANIMALS
from sarm_jax.lab.text.lists import TASK as LISTS
from sarm_jax.lab.text.task import TextTask
from sarm_jax.lab.text.words import TASK as WORDS

CAPITALS = "capitals"
BUILT_IN = {task.name: task for task in (ANIMALS, LISTS, WORDS)}
MODULE = "task_of_lab"  # name of the module of a task's file


def is_text(config: ConfigDict) -> bool:
    """Returns whether the lab's task is one in English, for a model that is given."""
    return config.lab.task != CAPITALS


def task_of(config: ConfigDict) -> Task:
    """Returns the lab's task, with its shortcuts and those that the method is told.

    Raises:
        InputError: the task or a shortcut is unknown, or the task's file fails.
    """
    if is_text(config):
        return text_task_of(config)
    return World.parse(config.lab.shortcuts, config.lab.told_shortcuts)


def text_task_of(config: ConfigDict) -> TextTask:
    """Returns the task in English that `lab.task` names, see `task_of`."""
    name, bias = config.lab.task, config.lab.annotator_bias
    task = BUILT_IN[name] if name in BUILT_IN else _from_file(name)
    if config.lab.shortcuts not in ("flattery", ""):
        raise InputError(
            f"lab.shortcuts={config.lab.shortcuts}: those of lab.task={name} are in its own file"
        )
    if not 0 <= bias < math.inf:
        raise InputError(f"lab.annotator_bias={bias}: must be 0 or positive, and finite")
    return dataclasses.replace(task.telling(config.lab.told_shortcuts, config.lab.seed), bias=bias)


def task_records(config: ConfigDict) -> dict[str, str]:
    """Returns the digest of the task's file, on whose content results depend; {} if built in."""
    name = config.lab.task
    if name == CAPITALS or name in BUILT_IN or not Path(name).is_file():
        return {}
    return {"task_file": hashlib.sha256(Path(name).read_bytes()).hexdigest()}


def _from_file(name: str) -> TextTask:
    """Returns `TASK` of a Python file, which is a program; its functions are checked."""
    if not name.endswith(".py"):
        expected = ", ".join([CAPITALS, *BUILT_IN])
        raise InputError(f"lab.task={name!r}: expected {expected}, or a Python file with TASK")
    if not Path(name).is_file():
        raise InputError(f"lab.task={name}: no such file")
    try:
        task = getattr(run_file(name, MODULE), "TASK", None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit, which would end the program with any code
        raise InputError(f"lab.task={name}: {describe(error, name, 'lab.task')}") from error
    if not isinstance(task, TextTask):
        raise InputError(
            f"lab.task={name}: its TASK must be a sarm_jax.lab.text.task.TextTask, not "
            f"{type(task).__name__}"
        )
    return checked_task(task, name)
