"""The interface of a tracker, and what it is given to log."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sarm_jax.models.conversation import parse_prompt, plain_text


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry of the log: the metrics of a step, or the means of an evaluation.

    Attributes:
        step: number of the step, or of the steps before the evaluation.
        metrics: values by name; names of metrics.csv, or `held_out/…`.
        samples: rows of samples.jsonl.
        is_evaluation: whether these are the means of an evaluation.
    """

    step: int
    metrics: Mapping[str, float]
    samples: Sequence[Mapping[str, Any]] = ()
    is_evaluation: bool = False

    @property
    def position(self) -> int:
        """A number that grows from entry to entry of a run.

        The evaluation after n steps is logged before the step that has the number n.
        """
        return 2 * self.step + (not self.is_evaluation)


class Tracker(Protocol):
    """A place that a run is logged to."""

    def log(self, entry: Entry) -> None:
        """Logs an entry. Entries come in the order of their positions."""

    def finish(self, failed: bool) -> None:
        """Writes everything that is logged, and ends; `failed`: an error ended the run."""


def flat_samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns rows of samples.jsonl as rows of a table.

    Each penalty has a column of its own, and a conversation is a text, as W&B's tables want one
    type per column.
    """
    rows = []
    for sample in samples:
        row = {name: value for name, value in sample.items() if name != "penalties"}
        if "prompt" in row:
            row["prompt"] = plain_text(parse_prompt(row["prompt"], "prompt"))
        penalties = sample.get("penalties", {})
        rows.append(row | {f"penalty_{feature}": x for feature, x in penalties.items()})
    return rows
