"""Parameters that repeat a test of `make test` with other settings."""

from typing import Any

import pytest


def further(*values: Any) -> Any:
    """Returns a parameter that `make evidence` runs and `make test` does not."""
    return pytest.param(*values, marks=pytest.mark.evidence)
