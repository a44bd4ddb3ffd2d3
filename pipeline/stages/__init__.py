"""The stages: a module each, imported when it runs.

A module's `options(config)` reads its options and refuses bad ones, from the config alone; its
`run(config, workdir)` takes them, calls what does the work, and writes the files.
"""

import importlib
from types import ModuleType

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


def load(name: str) -> ModuleType:
    """The stage's module."""
    return importlib.import_module(f"pipeline.stages.{name}")
