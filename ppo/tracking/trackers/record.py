"""trackers.json: which run of a tracker a working directory is logged to, and how far."""

import dataclasses
import re
import secrets
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json, write_json

FILE = "trackers.json"
FIELDS = {"id": str, "name": str, "project": str, "position": int}
ID = re.compile(r"[a-z0-9]{8}")


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """A run of a tracker.

    Attributes:
        id: eight random letters or digits.
        name: the name that the tracker shows.
        project: its project.
        position: the position of the newest entry that was logged; -1: none was.
    """

    id: str
    name: str
    project: str
    position: int = -1


def new_run(workdir: Path, project: str) -> TrackedRun:
    """Returns a run that is named after the working directory.

    The name is the path from the current directory, or the last part of another path.
    """
    path, start = workdir.resolve(), Path.cwd()
    within = path != start and path.is_relative_to(start)
    name = str(path.relative_to(start)) if within else path.name
    return TrackedRun(id=secrets.token_hex(4), name=name, project=project)


def read_runs(workdir: Path) -> dict[str, TrackedRun]:
    """Returns the recorded runs by the name of their tracker.

    Raises:
        InputError: the file is malformed.
    """
    path = workdir / FILE
    if not path.exists():
        return {}
    return {name: _run(path, name, row) for name, row in read_json(path).items()}


def _run(path: Path, tracker: str, row: Any) -> TrackedRun:
    advice = "restore the file, or delete it to start a new run of the tracker"
    if not isinstance(row, dict) or row.keys() != FIELDS.keys():
        raise InputError(f"{path}: {tracker!r} must have the fields {', '.join(FIELDS)}; {advice}")
    for name, kind in FIELDS.items():
        if type(row[name]) is not kind:
            place = f"{path}: field {name!r} of {tracker!r}"
            raise InputError(f"{place} must be {kind.__name__}, found {row[name]!r}; {advice}")
    if not ID.fullmatch(row["id"]):
        raise InputError(f"{path}: id {row['id']!r} of {tracker!r} is none of ours; {advice}")
    return TrackedRun(**row)


class Record:
    """The file, with the runs that are logged to now."""

    def __init__(self, workdir: Path, runs: dict[str, TrackedRun]):
        self._path, self._runs = workdir / FILE, runs

    def position(self, tracker: str) -> int:
        """Returns the position of the newest entry that a tracker was given; -1: none."""
        return self._runs[tracker].position

    def advance(self, tracker: str, position: int) -> None:
        """Records that a tracker is given the entry of this position."""
        self._runs[tracker] = dataclasses.replace(self._runs[tracker], position=position)
        self.write()

    def write(self) -> None:
        """Writes the file."""
        write_json(self._path, {k: dataclasses.asdict(run) for k, run in self._runs.items()})
