"""Stages whose work is replaced in a test."""

import dataclasses
import importlib
from collections.abc import Callable

import pytest

from pipeline import runner


def replace_run(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable) -> None:
    """Lets a stage call `run(config, workdir)` instead of doing its work and checking its input."""
    module = importlib.import_module(f"pipeline.stages.{name}")
    monkeypatch.setattr(module, "STAGE", dataclasses.replace(module.STAGE, run=run))
    monkeypatch.setattr(runner, "check_call", runner.refuse_missing_inputs)
