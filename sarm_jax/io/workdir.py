"""The working directory of a run and the settings in its config.json."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import locked
from sarm_jax.io.json_files import read_json, write_json
from sarm_jax.io.signals import cleaning_up
from sarm_jax.version import VERSION

VERSION_KEY = "sarm_jax_version"  # in config.json, beside the options of the run


@contextlib.contextmanager
def open_workdir(workdir: Path) -> Iterator[None]:
    """Creates the directory if it does not exist, and checks that it can be written.

    Directories that are created here and are still empty at the end are removed again.

    Raises:
        InputError: the path is a file, or the directory cannot be written.
    """
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir}: is a file, expected a directory")
    created = [path for path in (workdir, *workdir.parents) if not path.exists()]
    with cleaning_up(lambda: _remove_empty(created)):
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=workdir):
                pass
        except OSError as error:
            raise InputError(f"--workdir={workdir}: cannot be written ({error.strerror})") from None
        yield


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of the directory, if its file system supports locks.

    Raises:
        InputError: another process trains there.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(workdir))
        except BlockingIOError:
            raise InputError(f"--workdir={workdir}: another process is training there") from None
        except OSError:
            pass  # some network file systems have no locks
        yield


def _remove_empty(directories: list[Path]) -> None:
    """Removes directories, the innermost first, up to the first one that is not empty."""
    for path in directories:
        try:
            path.rmdir()
        except OSError:
            return


def save_settings(workdir: Path, settings: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Writes the settings of a run as config.json, unless `has_settings` finds them there.

    The version of this software is written beside them and is not compared.

    Args:
        workdir: the working directory.
        settings: the settings of the run.
        defaults: as in `first_difference`.

    Raises:
        InputError: the directory holds a run with other settings.
    """
    if not has_settings(workdir, settings, defaults):
        write_json(workdir / "config.json", {VERSION_KEY: VERSION} | settings)


def has_settings(workdir: Path, settings: dict[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Returns True if the directory holds a run with these settings, False if it holds no run.

    Raises:
        InputError: the directory holds a run with other settings, or a model.
    """
    path = workdir / "config.json"
    if not path.exists():
        return False
    stored = read_json(path, expected="the options of a run")
    stored.pop(VERSION_KEY, None)
    if "model_type" in stored:
        raise InputError(f"--workdir={workdir} holds a model; choose another --workdir")
    difference = first_difference(stored, settings, defaults=defaults)
    if difference:
        raise InputError(
            f"--workdir={workdir} holds a run of another configuration: {difference}; "
            "choose another --workdir, or delete it to start again"
        )
    return True


def named_workdirs(text: str, default: Path, option: str) -> dict[str, Path]:
    """Parses a comma-separated list of DIR or NAME=DIR.

    Args:
        text: the list. An entry of report.runs may also be the metrics of a run, FILE.csv.
        default: the directory that an empty list stands for.
        option: the option's name, for error messages.

    Returns:
        The directory of each name; an entry without a name is called like its directory.
    """
    runs: dict[str, Path] = {}
    for entry in text.split(",") if text.strip() else [str(default)]:
        name, equals, path = entry.strip().rpartition("=")
        folder = Path(path)
        name = name.strip() if equals else _run_name(folder.resolve())
        if not path or not name:
            raise InputError(f"{option}: found {entry.strip()!r}, expected DIR or NAME=DIR")
        if name in runs:
            raise InputError(f"{option}: two runs are called {name!r}: give them as NAME=DIR")
        runs[name] = folder
    return runs


def _run_name(path: Path) -> str:
    """Returns the default name of a run; its metrics may be called NAME_metrics.csv."""
    return path.stem.removesuffix("_metrics") if path.suffix == ".csv" else path.name


def first_difference(
    stored: Any, current: Any, name: str = "", defaults: Mapping[str, Any] | None = None
) -> str | None:
    """Describes the first difference between two nested configurations.

    Args:
        stored: the earlier configuration.
        current: the configuration to compare with it.
        name: the dotted name of these values; empty for the whole configuration.
        defaults: the values of options that one of the configurations lacks, nested alike. They are
            what was done before these options existed. Any other missing option is a difference.

    Returns:
        The difference in words, or None if there is none.
    """
    if not (isinstance(stored, dict) and isinstance(current, dict)):
        same = stored == current
        return None if same else f"{name or 'config'} was {stored!r} and is now {current!r}"
    for key in sorted(stored.keys() | current.keys()):
        child = f"{name}.{key}".lstrip(".")
        default = defaults.get(key) if isinstance(defaults, Mapping) else None
        before, now = stored.get(key, default), current.get(key, default)
        difference = first_difference(before, now, name=child, defaults=default)
        if difference:
            return difference
    return None
