"""The working directory of a run and the settings in its config.json."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import locked, locked_output
from sarm_jax.io.json_files import read_json
from sarm_jax.io.path_lists import named_paths
from sarm_jax.io.signals import cleaning_up

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
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--workdir={workdir}: cannot be written ({reason})") from None
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


@contextlib.contextmanager
def lock_stage(workdir: Path, stage: str) -> Iterator[None]:
    """Lets one process at a time run a stage in a working directory.

    Raises:
        InputError: another process runs the stage there.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_output(workdir / stage))
        except BlockingIOError:
            doing = "is training" if stage == "train" else f"runs --stage={stage}"
            raise InputError(f"--workdir={workdir}: another process {doing} there") from None
        yield


def require_utf8(workdir: Path) -> None:
    """Raises InputError if the path is not UTF-8, which checkpoints and tokenizer files need."""
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"--workdir={workdir}: the path is not UTF-8, and neither a checkpoint nor a model can "
            "be written there; choose another --workdir"
        ) from None


def _remove_empty(directories: list[Path]) -> None:
    """Removes directories, the innermost first, up to the first one that is not empty."""
    for path in directories:
        try:
            path.rmdir()
        except OSError:
            return


def read_settings(workdir: Path) -> dict[str, Any] | None:
    """Reads config.json of a run; None if there is no such file.

    It holds the options of the run and, under `VERSION_KEY`, the version that started it.

    Raises:
        InputError: the file is malformed, or the directory holds a model.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    stored = read_json(path, expected="the options of a run", allow_surrogates=True)
    if "model_type" in stored:
        raise InputError(f"--workdir={workdir} holds a model; choose another --workdir")
    return stored


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
    for given, path in named_paths(text, option, "DIR") or [("", str(default))]:
        folder = Path(path)
        name = given or _run_name(folder.resolve())
        if not name:
            raise InputError(f"{option}: found {path!r}, expected NAME={path}")
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
