"""`main.py` in the process of the tests."""

import sys
from unittest import mock

from absl.testing import flagsaver

import main


def run_main(*options: str) -> int:
    """The exit code of `python main.py` with these options; every flag is afterwards as before."""
    argv = ["main.py", *options]
    # ml_collections looks for overrides in sys.argv.
    with mock.patch.object(sys, "argv", argv), flagsaver.flagsaver():
        return main.main(argv)
