"""Figures of the evaluation: distributions before and after steering, and the benchmarks."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from sarm_jax.evaluation.rm_bench import LEVELS
from sarm_jax.reporting.plotting import png, spread_of_axis, theme
from sarm_jax.reporting.spread import is_constant

BEFORE, AFTER = "#0072B2", "#D55E00"  # by Okabe and Ito, distinct for colour-blind readers
VARIANTS = {"plain": BEFORE, "controlled": AFTER, "penalised": "#009E73"}


def before_after(name: str, answer_set: Mapping[str, Any]) -> bytes:
    """Draws the densities of a set's scores before and after steering.

    Args:
        name: the name of the set.
        answer_set: its entry in `sets` of steering.json.

    Returns:
        A PNG.
    """
    scores = answer_set["scores"]
    with theme(dark=False):
        figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
        everything = np.concatenate([scores["before"], scores["after"]])
        margin = 0.1 * spread_of_axis(everything)
        grid_x = np.linspace(everything.min() - margin, everything.max() + margin, 512)
        _draw_density(
            axes, grid_x, values=scores["before"], label="before", colour=BEFORE, style="-"
        )
        _draw_density(axes, grid_x, values=scores["after"], label="after", colour=AFTER, style="--")
        change, count = answer_set["change"]["mean"], answer_set["responses"]
        axes.set(xlabel="score of the reward model", ylabel="density", ylim=(0, None))
        title = f"{name}\n{count} responses, mean change {change:+.3g}"
        axes.set_title(title, parse_math=False)  # a name may contain "$"
        axes.grid(visible=True)
        axes.legend(frameon=False)
        return png(figure)


def _draw_density(
    axes: Axes,
    grid_x: np.ndarray,
    *,
    values: Sequence[float],
    label: str,
    colour: str,
    style: str,
) -> None:
    """Draws a kernel density estimate, or a line if all values are equal, with the values below."""
    if not is_constant(values):
        density_x = stats.gaussian_kde(values)(grid_x)
        axes.plot(grid_x, density_x, style, color=colour, linewidth=2, label=label)
        axes.fill_between(grid_x, density_x, color=colour, alpha=0.15, linewidth=0)
    else:
        axes.axvline(values[0], color=colour, linestyle=style, linewidth=2, label=label)
    marks = axes.get_xaxis_transform()
    axes.plot(values, np.full(len(values), 0.015), "|", color=colour, alpha=0.3, transform=marks)


def style_matrices(content: Mapping[str, Any]) -> bytes:
    """Draws the overall 3 × 3 matrix of every variant in rm_bench.json, as a PNG."""
    variants, styles = content["variants"], content["styles"]
    with theme(dark=False):
        size = (0.6 + 3.8 * len(variants), 4.2)
        figure, row = plt.subplots(
            1, len(variants), figsize=size, layout="constrained", squeeze=False
        )
        for axes, (name, variant) in zip(row[0], variants.items(), strict=True):
            overall = variant["overall"]
            matrix = np.array(overall["matrix"])
            axes.imshow(matrix, vmin=0, vmax=1, cmap="RdBu")
            for i, j in np.ndindex(matrix.shape):
                colour = "#ffffff" if abs(matrix[i, j] - 0.5) > 0.3 else "#1a1a1a"
                axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color=colour)
            axes.set_xticks(range(len(styles)), styles)
            axes.set_yticks(range(len(styles)), styles)
            levels = ", ".join(f"{level} {overall[level]['mean']:.2f}" for level in LEVELS)
            axes.set_title(f"{name}\n{levels}", fontsize=10)
            axes.set(xlabel="style of the wrong answer", ylabel="style of the right answer")
        return png(figure)


def subset_scores(content: Mapping[str, Any]) -> bytes:
    """Draws the score and interval of every subset and variant in rewardbench2.json, as a PNG."""
    variants = content["variants"]
    subsets = list(variants["plain"]["subsets"])
    with theme(dark=False):
        height = 1.6 + 0.3 * len(subsets) * len(variants)
        figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
        for number, (name, variant) in enumerate(variants.items()):
            offset = (number - (len(variants) - 1) / 2) * 0.8 / len(variants)
            for line, subset in enumerate(subsets):
                score = variant["subsets"][subset]["score"]
                y, colour = line + offset, VARIANTS[name]
                axes.plot(
                    [score["mean"]], [y], "o", label=name if line == 0 else None, color=colour
                )
                if score["low"] is not None:
                    axes.plot([score["low"], score["high"]], [y, y], linewidth=2, color=colour)
        axes.axvline(0.25, color="#888888", linestyle=":", label="chance, except for Ties")
        axes.set_yticks(range(len(subsets)), subsets)
        axes.invert_yaxis()
        axes.set(xlabel="score with 95 % interval")
        axes.grid(visible=True, axis="x")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        return png(figure)
