"""The stages: a module each, imported when it runs.

A module's `run(config, workdir)` reads its options, calls what does the work, and writes the files.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

STAGES = (
    "prepare_data",
    "train_sarm",
    "identify",
    "probe",
    "human_latents",
    "train",
    "evaluate",
    "report",
    "plan",
)


def load(name: str) -> Callable[[ConfigDict, Path], None]:
    """What runs the stage."""
    return importlib.import_module(f"configs.stages.{name}").run
