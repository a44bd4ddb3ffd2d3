"""The working directory of a run, and the configuration it belongs to."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import locked, replacing
from sarm_jax.io.jsonl import short
from sarm_jax.io.signals import cleaning_up
from sarm_jax.io.strict_json import parse_json


@contextlib.contextmanager
def open_workdir(workdir: Path) -> Iterator[None]:
    """Creates the directory where needed and checks that it can be written.

    A directory that was created here and is still empty at the end is removed again.
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
def nobody_else_in(workdir: Path) -> Iterator[None]:
    """Holds the directory against a second run, where its file system can; else InputError."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(workdir))
        except BlockingIOError:
            raise InputError(f"--workdir={workdir}: another process is training there") from None
        except OSError:
            pass  # a network's file system, perhaps
        yield


def _remove_empty(directories: list[Path]) -> None:
    """Removes directories, the innermost first, up to the first that holds something."""
    for path in directories:
        try:
            path.rmdir()
        except OSError:
            return


def claim(workdir: Path, settings: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Writes `settings` as config.json, or checks that the run there has the very same ones.

    `defaults` as in `first_difference`.
    """
    if not is_claimed(workdir, settings, defaults):
        with replacing(workdir / "config.json") as file:
            json.dump(settings, file, indent=2)


def is_claimed(workdir: Path, settings: dict[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a run with these settings is there; InputError where one with others is."""
    path = workdir / "config.json"
    if not path.exists():
        return False
    try:
        found = parse_json(path.read_text(encoding="utf-8"), constants=True)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected the options of a run, found {short(found)}")
    if "model_type" in found:
        raise InputError(f"--workdir={workdir} holds a model; choose another --workdir")
    difference = first_difference(found, settings, defaults=defaults)
    if difference:
        raise InputError(
            f"--workdir={workdir} holds a run of another configuration: {difference}; "
            "choose another --workdir, or delete it to start again"
        )
    return True


def named_workdirs(text: str, own: Path, flag: str) -> dict[str, Path]:
    """Comma-separated DIR or NAME=DIR, as `flag` has it → name → directory; empty: `own`.

    report.runs also takes a run's metrics, FILE.csv.
    """
    runs: dict[str, Path] = {}
    for part in text.split(",") if text.strip() else [str(own)]:
        name, equals, path = part.strip().rpartition("=")
        folder = Path(path)
        name = name.strip() if equals else _run_name(folder.resolve())
        if not path or not name:
            raise InputError(f"{flag}: found {part.strip()!r}, expected DIR or NAME=DIR")
        if name in runs:
            raise InputError(f"{flag}: two runs are called {name!r}: give them as NAME=DIR")
        runs[name] = folder
    return runs


def _run_name(path: Path) -> str:
    """The name of a run that is given without one; its metrics may be NAME_metrics.csv."""
    return path.stem.removesuffix("_metrics") if path.suffix == ".csv" else path.name


def first_difference(
    found: Any, wanted: Any, name: str = "", defaults: Mapping[str, Any] | None = None
) -> str | None:
    """Describes the first difference between two nested configurations; None: there is none.

    `defaults`, nested alike, stand for options that one of them lacks: what was done before they
    existed. Other options that one of them lacks are differences.
    """
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        same = found == wanted
        return None if same else f"{name or 'config'} was {found!r} and is now {wanted!r}"
    for key in sorted(found.keys() | wanted.keys()):
        child = f"{name}.{key}".lstrip(".")
        default = defaults.get(key) if isinstance(defaults, Mapping) else None
        before, now = found.get(key, default), wanted.get(key, default)
        difference = first_difference(before, now, child, default)
        if difference:
            return difference
    return None
