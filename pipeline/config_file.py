"""Load the config file of --config.

The file is a program and may do anything: its mistakes become one line that names the file, the
line and the statement.
"""

import contextlib
import inspect
import sys
import traceback
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

MODULE = "config_config"  # name of the file's module


class ConfigFileError(Exception):
    """A config file that cannot be used; no ValueError, because absl adds words to those."""


class ConfigFileParser(flags.ArgumentParser):
    """Parser of --config=FILE.py[:ARGUMENT]; `config` is what the file returned last."""

    config: ConfigDict | None = None

    def parse(self, argument: str) -> ConfigDict:
        """Loads the file, and locks its config: an unknown field is an error.

        Raises:
            ConfigFileError: the file fails, or returns something else than a config.
        """
        self.config = None
        self.config = load(argument)
        return self.config

    def flag_type(self) -> str:
        """Returns the name of the type, for --help."""
        return "config file"


def load(path: str) -> ConfigDict:
    """Returns the config of FILE.py[:ARGUMENT], locked.

    Raises:
        ConfigFileError: as above.
    """
    file, colon, argument = split_argument(path)
    arguments = [argument] if colon else []
    try:
        get_config = getattr(run_file(file), "get_config", None)
        _check_function(get_config, arguments, path)
        config: Any = get_config(*arguments)  # type: ignore[misc]
        if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
            kind = type(config).__name__
            raise ConfigFileError(
                f"--config={path}: its get_config() must return a ConfigDict, not a {kind}"
            )
        return config.lock()
    except (ConfigFileError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit, which would end the program with any code
        raise ConfigFileError(describe(error, path)) from error


def split_argument(path: str) -> tuple[str, str, str]:
    """Splits FILE.py[:ARGUMENT] like `str.partition`, after the longest file that exists."""
    ends = [len(path), *(n for n in range(len(path) - 1, 0, -1) if path[n] == ":")]
    with contextlib.suppress(OSError, ValueError):  # no name that a file can have
        for end in ends:
            if Path(path[:end]).is_file():
                return path[:end], path[end : end + 1], path[end + 1 :]
    return path.partition(":")


class _Loader(SourceFileLoader):
    """A loader without a cache, which takes two files of the same second and size for the same."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def run_file(file: str, name: str = MODULE) -> ModuleType:
    """Runs a Python file and returns its module, which gets a name of its own."""
    spec = spec_from_loader(name, _Loader(name, file))
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_function(get_config: Any, arguments: list[str], path: str) -> None:
    """Raises ConfigFileError unless get_config is a function that takes the arguments."""
    if get_config is None:
        raise ConfigFileError(
            f"--config={path}: the file has no attribute 'get_config', a function that returns the "
            "config"
        )
    if not callable(get_config):
        raise ConfigFileError(f"--config={path}: its get_config must be a function")
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        needs = "takes no argument" if arguments else "needs an argument"
        raise ConfigFileError(
            f"--config={path}: this config {needs}, as in FILE.py:ARGUMENT"
        ) from None


def describe(error: BaseException, path: str, option: str = "--config") -> str:
    """Describes an error of an option's Python file in one line: place, kind, text, statement."""
    file = split_argument(path)[0]
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {kind}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    frames_of_file = [frame for frame in frames if Path(frame.filename) == Path(file)]
    if not frames_of_file:
        return f"{option}={path}: {kind}: {text_of(error)}"
    last = frames_of_file[-1]
    statement = f" (in: {last.line})" if last.line else ""
    return f"{file}:{last.lineno}: {kind}: {text_of(error)}{statement}"


def text_of(error: BaseException) -> str:
    """Returns the text of an exception in one line, even if its own `__str__` fails."""
    try:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        return " ".join(str(text).split())
    except KeyboardInterrupt:
        raise
    except BaseException:  # the class comes from a config file and may raise anything
        return "an error without a text"
