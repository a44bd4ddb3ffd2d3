"""Fixtures of the report's tests."""

import io

import pytest
from matplotlib import pyplot as plt

from pipeline.report import pictures


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Draws every figure, but renders it small and without its layout, which takes most time.

    The page of the module's fixture `report` has its figures in full.
    """

    def png(figure) -> bytes:
        figure.set_layout_engine("none")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=10)
        plt.close(figure)
        return file.getvalue()

    monkeypatch.setattr(pictures, "png", png)
