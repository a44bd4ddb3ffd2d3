"""Parameters that repeat on another setting what the tests of `make test` show on one."""

from typing import Any

import pytest


def further(*values: Any) -> Any:
    """Returns a parameter that `make evidence` runs and `make test` does not."""
    return pytest.param(*values, marks=pytest.mark.evidence)
