"""Checkpoints of the stage train_sarm: an interrupted training goes on where it stopped."""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.changes import Provenance, change
from pipeline.stage import Stage
from ppo.tracking.checkpoint import Checkpoints, newest_facts
from sarm_jax.io.errors import InputError
from sarm_jax.io.signals import on_signal
from sarm_jax.parallel import processes
from sarm_jax.training.progress import Progress
from sarm_jax.version import VERSION

LOG = logging.getLogger(__name__)
KEPT = 2  # newest checkpoints; if the last one is damaged, the other is used


class SARMCheckpoints(Progress):
    """The progress of a training in checkpoints, each named after the number of finished steps.

    Attributes:
        made_from: what the result depends on, as JSON.

    Args:
        directory: the folder of the checkpoints; it is made for the first one.
        every: steps between checkpoints; 0: there is one only at a signal.
        starts: number of steps before the first one of each phase, by phase.
        made_from: what the result depends on.
        stage: the stage that trains.

    Raises:
        InputError: the folder has checkpoints of another training, or none that is intact.
    """

    def __init__(
        self,
        directory: Path,
        *,
        every: int,
        starts: Mapping[str, int],
        made_from: Provenance,
        stage: Stage,
    ):
        self._directory, self._every, self._starts = directory, every, starts
        self.made_from = dataclasses.asdict(made_from)
        self._checkpoints = Checkpoints(directory, keep=KEPT)
        self._phase, self._notes, self._signal = "", {}, 0
        self.rows: list[dict[str, Any]] = []
        newest = processes.on_primary(partial(newest_facts, directory))
        self._last = 0
        if newest is None:
            return
        self._last, facts = newest
        changed = change(stage, facts["made_from"], made_from)
        if changed:
            raise InputError(
                f"{directory / str(self._last)}: a checkpoint of another training: {changed}; "
                f"delete {directory} to start again, or choose another --workdir"
            )
        self._phase, self._notes, self.rows = facts["phase"], facts["notes"], facts["rows"]
        done = self._last - starts[self._phase]
        LOG.info("resuming after step %d of the phase %s", done, self._phase)

    def noted(self, name: str) -> Any:
        """Returns what was noted before the checkpoint."""
        return self._notes.get(name)

    def note(self, name: str, value: Any) -> None:
        """Notes a value for the next checkpoint."""
        self._notes[name] = value

    def restore(self, phase: str, like: Any) -> tuple[int, Any]:
        """Restores the newest checkpoint if it is of this phase."""
        if phase != self._phase:
            return 0, like
        steps, state, _ = self._checkpoints.restore(like)
        return steps - self._starts[phase], state

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Remembers a signal, so that the training stops after the step in progress."""
        with on_signal(self._remember):
            yield
        self._exit_at_signal()  # if it came after the last step of the phase

    def keep(self, phase: str, steps: int, state: Any) -> None:
        """Writes a checkpoint if one is due or a signal came, and then ends the training."""
        total = self._starts[phase] + steps
        due = self._every and total // self._every > self._last // self._every
        self._last = total
        signal = processes.all_max(self._signal)
        if due or signal:
            facts = {"phase": phase, "notes": self._notes, "rows": self.rows}
            facts |= {"made_from": self.made_from, "sarm_jax_version": VERSION}
            self._checkpoints.save(total, state, facts)
        if signal:
            LOG.info("stopped by signal %d after step %d of %s", signal, steps, phase)
        self._exit_at_signal(signal)

    def close(self) -> None:
        """Stops the threads of Orbax."""
        self._checkpoints.close()

    def remove(self) -> None:
        """Removes all checkpoints: the training has ended."""
        self.close()
        if processes.is_primary():
            shutil.rmtree(self._directory, ignore_errors=True)

    def _exit_at_signal(self, signal: int | None = None) -> None:
        """Ends the training, in every process, if a signal came to any of them."""
        signal = processes.all_max(self._signal) if signal is None else signal
        if signal:
            processes.shut_down()
            raise SystemExit(128 + signal)

    def _remember(self, number: int) -> None:
        LOG.info(
            "signal %d: a checkpoint follows this step; a second signal ends the process at once",
            number,
        )
        self._signal = number
