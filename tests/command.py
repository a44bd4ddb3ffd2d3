"""Runs `main.py` in the process of the tests."""

import sys
from unittest import mock

from absl.testing import flagsaver

import main


def run_main(*options: str) -> int:
    """Runs `python main.py` with these options, restores all flags, and returns the exit code."""
    argv = ["main.py", *options]
    # ml_collections reads overrides from sys.argv.
    with mock.patch.object(sys, "argv", argv), flagsaver.flagsaver():
        return main.main(argv)
