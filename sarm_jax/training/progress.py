"""The interface through which a training in phases keeps its progress, to be resumed."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Log = Callable[[dict[str, Any]], None]  # receives the metrics rows of a training


class Progress:
    """The progress of a training of which nothing is kept; a subclass keeps checkpoints.

    Attributes:
        rows: the metrics rows so far.
    """

    rows: Sequence[Mapping[str, Any]] = ()

    def noted(self, name: str) -> Any:
        """Returns what was noted before; None if nothing was."""
        return None

    def note(self, name: str, value: Any) -> None:
        """Notes a JSON value that later phases need; the next checkpoint has it."""

    def restore(self, phase: str, like: Any) -> tuple[int, Any]:
        """Returns the number of finished steps of a phase, and the state after them.

        Args:
            phase: the phase.
            like: the state before its first step, a pytree of arrays.
        """
        return 0, like

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context of a phase, in which a signal may end the training after a step."""
        return contextlib.nullcontext()

    def keep(self, phase: str, steps: int, state: Any) -> None:
        """Takes the state of a phase after a step or a few; may write a checkpoint.

        Args:
            phase: the phase.
            steps: number of finished steps of the phase.
            state: the state after them, a pytree of arrays.

        Raises:
            SystemExit: a signal came during the step.
        """


NOTHING_KEPT = Progress()
