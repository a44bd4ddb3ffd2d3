"""The look of every figure: light and dark, and a figure as a file."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure


@contextmanager
def theme(dark: bool) -> Iterator[None]:
    """Ink and paper, no box around the axes."""
    ink, paper = ("#e6e6e6", "#1b1e23") if dark else ("#1a1a1a", "#ffffff")
    edges = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    papers = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor")
    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"grid.color": "#888888", "grid.alpha": 0.25}
    style |= dict.fromkeys(edges, ink) | dict.fromkeys(papers, paper)
    with plt.rc_context(style):
        yield


def png(figure: Figure) -> bytes:
    """The figure's file, after which it is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    return file.getvalue()
