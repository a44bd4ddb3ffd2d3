"""Options and results of the stage evaluate, for the tests of evaluation and report."""

from pathlib import Path
from typing import Any

from pipeline.report.evaluations import Evaluation
from sarm_jax.evaluation.steering import SteeringConfig


def steering_config(**changes: Any) -> SteeringConfig:
    """Returns options for all answers and 100 bootstrap samples, with the given fields changed."""
    options = {"num_example": 0, "steering_targets": (), "resamples": 100, "seed": 0}
    return SteeringConfig(**(options | changes))


def evaluation_of(**parts: dict[str, Any]) -> Evaluation:
    """Returns an evaluation with the given JSON files and without responses."""
    return Evaluation(name="x", folder=Path("x"), parts=parts, responses=[])
