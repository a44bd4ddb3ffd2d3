"""Figures of responses: before and after training, under steering, and a map of their latents."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from pipeline.report.evaluations import BASE, Evaluation
from pipeline.report.numbers import number
from pipeline.report.pictures import (
    COLOURS,
    MARKS,
    Picture,
    draw_histograms,
    label,
    legend,
    line_style,
    picture,
)
from pipeline.report.samples import Pair


def distributions(pairs: Sequence[Pair], positions: Mapping[str, int]) -> list[Picture]:
    """Draws scores, and lengths if they are known, before and after training for every run.

    Args:
        pairs: the responses; those without a response from before training are ignored.
        positions: the position of each run in the report, which selects its colour.

    Returns:
        Figures with the same bins for all runs.
    """
    compared = [pair for pair in pairs if pair.before is not None]
    pictures = []
    for field, title in (
        ("score", "score of the reward model"),
        ("length", "response length, tokens"),
    ):
        sides = {}
        for run in dict.fromkeys(pair.run for pair in compared):
            own = [pair for pair in compared if pair.run == run]
            value_n2 = np.array([[_number(p.before, field), _number(p.after, field)] for p in own])
            value_n2 = value_n2[np.isfinite(value_n2).all(axis=1)]
            if len(value_n2):
                sides[run] = value_n2
        values = np.concatenate([*sides.values(), np.empty((0, 2))])
        for run, value_n2 in sides.items():
            figure = before_and_after(
                f"{field}s_{run}",
                subject=run,
                title=title,
                sides=value_n2.T,
                position=positions[run],
                span=(values.min(), values.max()),
            )
            pictures.append(figure)
    return pictures


def before_and_after(
    name: str,
    *,
    subject: str,
    title: str,
    sides: np.ndarray,
    position: int,
    span: tuple[float, float] | None = None,
) -> Picture:
    """Draws histograms of values before and after, with lines at the means.

    Args:
        name: the name of the figure.
        subject: the run or set of responses.
        title: the measure.
        sides: values `[2, N]`, before and after.
        position: the position of the subject, which selects its colour.
        span: the range of the bins; None: that of the values.
    """
    before_n, after_n = sides

    def draw(axes: Axes) -> None:
        grey = {"color": "#888888", "linestyle": "--"}
        style = {"color": COLOURS[position % len(COLOURS)], "linestyle": "-"}
        groups = [("before", before_n, grey), ("after", after_n, style)]
        draw_histograms(axes, groups, span or (sides.min(), sides.max()))
        axes.set(xlabel=title)
        legend(axes, 2)

    moments = ", ".join(
        f"{side} mean {number(float(value_n.mean()))}, sd {number(float(value_n.std()))}"
        for side, value_n in (("before", before_n), ("after", after_n))
    )
    caption = f"{subject}: {title}, {len(before_n)} responses before and after; lines are means"
    alt = f"{subject}, distribution of the {title}: {moments}"
    return picture(name, caption=caption, alt=alt, draw=draw)


def latent_map(evaluation: Evaluation, positions: Mapping[str, int]) -> Picture | None:
    """Draws the two principal components of the latents of human, base and trained responses.

    Args:
        evaluation: the evaluation.
        positions: the position of each policy in the report, which selects its colour.

    Returns:
        The figure, or None if the evaluation has no latent map.
    """
    content = evaluation.parts.get("latent_map")
    if not (content and content["points"]):
        return None
    points = content["points"]
    sources = list(dict.fromkeys(point["source"] for point in points))
    colours = {"human": "#888888", BASE: COLOURS[-1]}
    first = [name for name in colours if name in sources]
    sources = first + [name for name in sources if name not in first]
    xy = {s: np.array([[p["x"], p["y"]] for p in points if p["source"] == s]) for s in sources}

    def draw(axes: Axes) -> None:
        for order, (source, xy_n2) in enumerate(xy.items()):
            position = positions.get(source, order)
            colour = colours.get(source) or line_style(position)["color"]
            mark = MARKS[order % len(MARKS)]
            name = label(source)
            axes.plot(*xy_n2.T, mark, color=colour, alpha=0.5, markersize=7, label=name)
            x, y = xy_n2.mean(axis=0)
            axes.plot(x, y, mark, color=colour, markersize=16, markeredgecolor="#1a1a1a")
        shares = content.get("explained") or (None, None)
        for component, axis in enumerate((axes.xaxis, axes.yaxis)):
            share = shares[component]
            text = f", {number(100 * share, 2)} % of the variance" if share is not None else ""
            axis.set_label_text(f"component {component + 1}{text}")
        legend(axes, len(xy))

    means = "; ".join(
        f"{source} ({len(xy_n2)}): mean at {', '.join(map(number, xy_n2.mean(axis=0).tolist()))}"
        for source, xy_n2 in xy.items()
    )
    caption = (
        f"{evaluation.name}: principal components of the latents of responses; "
        "large marks are means"
    )
    name = f"latent_map_{evaluation.name}"
    return picture(name, caption=caption, alt=f"Latent map. {means}", draw=draw)


def steering_pictures(evaluation: Evaluation) -> list[Picture]:
    """Draws the scores of each set in steering.json before and after steering."""
    sets = evaluation.parts.get("steering", {}).get("sets", {})
    pictures = []
    for position, (name, answer_set) in enumerate(sets.items()):
        scores = answer_set.get("scores") or {}
        before, after = (scores.get(side) or () for side in ("before", "after"))
        if 0 < len(before) == len(after) and np.isfinite([before, after]).all():
            figure = before_and_after(
                f"steering_{evaluation.name}_{name}",
                subject=f"steering, {name}",
                title="score of the reward model",
                sides=np.array([before, after], float),
                position=position,
            )
            pictures.append(figure)
    return pictures


def _number(response: Mapping[str, Any] | None, field: str) -> float:
    value = response[field] if response else None
    return float(value) if isinstance(value, (int, float)) else float("nan")
