"""The style of every figure, light or dark, and its conversion to a PNG."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sarm_jax.reporting.spread import is_constant


@contextmanager
def theme(dark: bool) -> Iterator[None]:
    """Sets the colours of text and background, and draws no box around the axes."""
    text, background = ("#e6e6e6", "#1b1e23") if dark else ("#1a1a1a", "#ffffff")
    text_keys = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    background_keys = ("figure", "axes", "savefig", "legend")
    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False}
    style |= {"grid.color": "#888888", "grid.alpha": 0.25}
    style |= dict.fromkeys(text_keys, text)
    style |= {f"{name}.facecolor": background for name in background_keys}
    with plt.rc_context(style):
        yield


def spread_of_axis(values: np.ndarray) -> float:
    """Returns the range of the values that an axis shows, or their size if they are all equal.

    Values that are equal up to rounding would otherwise be magnified until the rounding fills the
    axis. The range of values that are all 0 is 1.
    """
    if is_constant(values):
        return float(np.abs(values).max()) or 1.0
    return float(np.ptp(values))


def by_step(axes: Axes, **labels: Any) -> None:
    """Labels the x axis as PPO steps, with ticks at whole numbers only."""
    axes.set(xlabel="PPO step", **labels)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def png(figure: Figure) -> bytes:
    """Writes the figure as a PNG and closes it."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    return file.getvalue()
