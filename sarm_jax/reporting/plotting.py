"""The look of every figure: light and dark, and a figure as a file."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


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


def by_step(axes: Axes, **labels: Any) -> None:
    """PPO steps along the x axis: there is none between two whole numbers."""
    axes.set(xlabel="PPO step", **labels)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def png(figure: Figure) -> bytes:
    """The figure's file, after which it is closed."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    return file.getvalue()
