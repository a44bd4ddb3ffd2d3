"""Figures of the report: one panel each, in a light and a dark version, with alternative text.

Panels are small and their letters large, so that they can be read on a phone.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes

from sarm_jax.reporting.plotting import png, theme

# Colours that colour-blind readers can tell apart (after Okabe and Ito); dashes serve without
# colour.
ON_WHITE = "#D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9 #888888 #8A63D2".split()
ON_BLACK = "#F07A2B #4DA3E0 #2CC79A #E29AC2 #F0B84D #8FD0F5 #A8A8A8 #B79BF0".split()
COLOURS = tuple(f"C{i}" for i in range(len(ON_WHITE)))  # names of the colours in either version
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKS = "os^Dv*X"
LETTERS: dict[Any, Any] = {
    "font.size": 17,
    "legend.fontsize": 15,
    "lines.linewidth": 2.6,
    "axes.linewidth": 1.4,
}
SIZE = (8, 6)  # inches at 120 dpi; the page shows them at about half that width


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure: file name without ".png", caption, alternative text, and both PNG versions."""

    name: str
    caption: str
    alt: str
    light: bytes
    dark: bytes


def picture(name: str, *, caption: str, alt: str, draw: Callable[[Axes], None]) -> Picture:
    """Draws a figure on white and on black; `draw` draws the panel."""

    def render(dark: bool) -> bytes:
        colours: dict[Any, Any] = {"axes.prop_cycle": cycler(color=ON_BLACK if dark else ON_WHITE)}
        with theme(dark), plt.rc_context(LETTERS | colours):
            figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
            draw(axes)
            axes.grid(visible=True)
            return png(figure)

    return Picture(
        name=file_name(name), caption=caption, alt=alt, light=render(False), dark=render(True)
    )


def file_name(text: str) -> str:
    """Returns `text` without the characters that do not belong into a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "run"


def line_style(position: int) -> dict[str, Any]:
    """Returns colour and dashes of the run, term or feature at `position` in its list."""
    colour, dashes = COLOURS[position % len(COLOURS)], DASHES[position % len(DASHES)]
    return {"color": colour, "linestyle": dashes}


def label(text: str, max_length: int = 28) -> str:
    """Returns a name for a legend: shortened, and safe from Matplotlib's special characters."""
    short = text if len(text) <= max_length else text[: max_length - 1] + "…"
    shown = "".join(c if c.isprintable() else "�" for c in short).replace("$", r"\$")
    return f"\u2060{shown}" if shown.startswith("_") else shown


def legend(axes: Axes, lines: int) -> None:
    """Puts a legend of `lines` lines above the panel, where it covers nothing."""
    columns = 2 if lines > 1 else 1
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False)


def smooth(values_t: np.ndarray, width: int = 5) -> np.ndarray:
    """Returns the running median over `width` steps, ignoring steps without a value."""
    half = width // 2
    windows = [values_t[max(0, t - half) : t + half + 1] for t in range(len(values_t))]
    finite = [window[np.isfinite(window)] for window in windows]
    return np.array([np.median(window) if len(window) else np.nan for window in finite])


def draw_histograms(
    axes: Axes,
    groups: Sequence[tuple[str, np.ndarray, dict[str, Any]]],
    span: tuple[float, float],
    bins: int = 24,
) -> None:
    """Draws histograms of several groups over the same bins, with a line at each mean.

    Args:
        axes: the panel.
        groups: (label, values, line style) of each group.
        span: the range of the bins.
        bins: the number of bins.
    """
    low, high = span
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    for name, values, style in groups:
        share, _ = np.histogram(values, edges)
        share = share / len(values)
        axes.stairs(share, edges, label=label(name), linewidth=2.6, **style)
        axes.stairs(share, edges, fill=True, alpha=0.15, color=style["color"])
        axes.axvline(values.mean(), linewidth=1.4, **style)
    axes.set(ylabel="share of responses", ylim=(0, None))
