"""Starts the trackers of `config.track`.

TensorBoard's files are a part of the run's log: an error while they are written ends the run.
The other trackers are packages that may be missing and services that may fail, so
- they are checked before anything is loaded (`check_available`),
- a failure after the start is a warning,
- only the primary process logs to them,
- a run that is resumed goes on in the tracker's run, which has every entry once.
"""

import contextlib
import dataclasses
import importlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ppo.tracking.trackers.record import Record, TrackedRun, new_run, read_runs
from ppo.tracking.trackers.tensorboard import Board
from ppo.tracking.trackers.tracker import Entry, Tracker
from ppo.tracking.trackers.trackio_run import TrackioRun
from ppo.tracking.trackers.wandb_run import WandbRun, check_login
from sarm_jax.io.errors import InputError, first_line
from sarm_jax.io.secrets import redact
from sarm_jax.parallel import processes

LOG = logging.getLogger(__name__)

SERVICES = ("wandb", "trackio")  # names of the trackers and of their packages
TRACKERS = ("tensorboard", *SERVICES)
# What W&B and Trackio both take as the name of a project.
PROJECT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    """The trackers of a run.

    Attributes:
        names: names of trackers.
        project: project of W&B and Trackio.
        options: all options of the run, which W&B and Trackio show as its config.
    """

    names: tuple[str, ...] = ("tensorboard",)
    project: str = "sarm_jax"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in TRACKERS:
                expected = ", ".join(TRACKERS)
                raise InputError(
                    f"track={','.join(self.names)}: no tracker is called {name!r}; "
                    f"expected some of {expected}"
                )
            if self.names.count(name) > 1:
                raise InputError(f"track={','.join(self.names)}: {name!r} is given twice")
        if not PROJECT.fullmatch(self.project):
            rule = "expected a letter or digit, then up to 99 letters, digits, '_', '-' and '.'"
            raise InputError(f"track_project={self.project!r}: {rule}")

    @property
    def services(self) -> list[str]:
        """Names of the trackers that are services."""
        return [name for name in self.names if name in SERVICES]


def check_available(config: TrackConfig) -> None:
    """Checks that the packages of the trackers are installed, and that they can be logged in to.

    Raises:
        InputError: one of them is missing, or refuses.
    """
    for name in config.services if processes.is_primary() else ():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"track={name}: {first_line(error)}; pip install {name}") from error
        if not hasattr(module, "init"):  # such as a folder of this name
            raise InputError(f"track={name}: the package is not installed; pip install {name}")
    if "wandb" in config.services and processes.is_primary():
        with _refusing("wandb"):
            check_login()


def start_trackers(
    config: TrackConfig,
    workdir: Path,
    first_step: int,
    *,
    begun: bool,
    descriptions: Mapping[str, str] | None = None,
) -> list[Tracker]:
    """Starts the trackers of a run.

    Args:
        config: the options.
        workdir: the working directory.
        first_step: number of the first step that this call takes.
        begun: whether an earlier call has logged a step here, so that a run is continued.
        descriptions: what some columns mean, by column. TensorBoard shows them with its charts, W&B
            and Trackio as an entry of the run's config.

    Raises:
        InputError: a tracker cannot be started, or trackers.json is damaged.
    """
    trackers: list[Tracker] = []
    if "tensorboard" in config.names:
        trackers.append(Board(workdir, first_step, descriptions))
    if not (config.services and processes.is_primary()):
        return trackers
    runs = read_runs(workdir) if begun else {}
    for name in config.services:
        if name not in runs or runs[name].project != config.project:
            runs[name] = new_run(workdir, config.project)
    record = Record(workdir, runs)
    record.write()
    columns = {"columns": dict(descriptions)} if descriptions else {}
    options = _without_secrets({**config.options, **columns})
    try:
        for name in config.services:
            with _refusing(name):
                tracker = _start(name, workdir, runs[name], options)
            trackers.append(Service(name, tracker, record))
    except InputError:
        for started in trackers:
            started.finish(failed=True)
        raise
    return trackers


class Service:
    """A tracker that is given every entry once over all calls of a run, and cannot stop the run.

    An entry is recorded before it is logged. If the process dies between the two, it is lost: it
    would otherwise be logged again.
    """

    def __init__(self, name: str, tracker: Tracker, record: Record):
        self._name, self._tracker, self._record = name, tracker, record
        self._has_failed = False

    def log(self, entry: Entry) -> None:
        """Logs the entry, unless an earlier call has."""
        if entry.position <= self._record.position(self._name):
            return
        with self._warning():
            self._record.advance(self._name, entry.position)
            self._tracker.log(entry)

    def finish(self, failed: bool) -> None:
        """Ends the tracker."""
        with self._warning():
            self._tracker.finish(failed)

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        """Logs the first error of the tracker as a warning, and ignores the others."""
        try:
            yield
        except Exception as error:
            if not self._has_failed:
                reason = f"{type(error).__name__}: {first_line(error)}"
                LOG.warning("track=%s: %s; the run goes on", self._name, reason)
            self._has_failed = True


def _start(name: str, workdir: Path, run: TrackedRun, options: Mapping[str, Any]) -> Tracker:
    if name == "wandb":
        return WandbRun(
            workdir=workdir, project=run.project, name=run.name, run_id=run.id, options=options
        )
    # Trackio finds a run by its name.
    return TrackioRun(project=run.project, name=f"{run.name}-{run.id}", options=options)


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turns any error of a tracker into an InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(f"track={name}: {type(error).__name__}: {first_line(error)}") from error


def _without_secrets(options: Any) -> Any:
    """Returns a copy of nested options with every secret in a text redacted."""
    if isinstance(options, Mapping):
        return {name: _without_secrets(value) for name, value in options.items()}
    return redact(options) if isinstance(options, str) else options
