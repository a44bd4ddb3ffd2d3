"""Figures of responses: before and after training, under steering, and where their latents lie."""

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
    label,
    legend,
    look,
    outline,
    picture,
)
from pipeline.report.samples import Pair


def distributions(pairs: Sequence[Pair], places: Mapping[str, int]) -> list[Picture]:
    """Scores, and lengths where they are known, before and after, for every run.

    `places` says which colour each run has. All runs have the same bins.
    """
    compared = [pair for pair in pairs if pair.before is not None]
    pictures = []
    for field, title in (("score", "SARM score"), ("length", "response length, tokens")):
        sides = {}
        for run in dict.fromkeys(pair.run for pair in compared):
            own = [pair for pair in compared if pair.run == run]
            found_n2 = np.array([[_number(p.before, field), _number(p.after, field)] for p in own])
            found_n2 = found_n2[np.isfinite(found_n2).all(axis=1)]
            if len(found_n2):
                sides[run] = found_n2
        every = np.concatenate([*sides.values(), np.empty((0, 2))])
        for run, found_n2 in sides.items():
            name, span = f"{field}s_{run}", (every.min(), every.max())
            pictures.append(before_and_after(name, run, title, found_n2.T, places[run], span))
    return pictures


def before_and_after(
    name: str,
    of: str,
    title: str,
    sides: np.ndarray,
    place: int,
    span: tuple[float, float] | None = None,
) -> Picture:
    """Histograms of `sides` `[2, N]`, before and after, over `span`; lines are the means."""
    before_n, after_n = sides

    def draw(axes: Axes) -> None:
        grey = {"color": "#888888", "linestyle": "--"}
        style = {"color": COLOURS[place % len(COLOURS)], "linestyle": "-"}
        groups = [("before", before_n, grey), ("after", after_n, style)]
        outline(axes, groups, span or (sides.min(), sides.max()))
        axes.set(xlabel=title)
        legend(axes, 2)

    moments = ", ".join(
        f"{side} mean {number(float(v.mean()))}, sd {number(float(v.std()))}"
        for side, v in (("before", before_n), ("after", after_n))
    )
    caption = f"{of}: {title}, {len(before_n)} responses before and after; lines are means"
    return picture(name, caption, f"{of}, distribution of the {title}: {moments}", draw)


def latent_map(evaluation: Evaluation, places: Mapping[str, int]) -> Picture | None:
    """The two main components of the pooled latents: human, base and trained responses.

    `places` says which colour each policy has.
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
        for place, (source, xy_n2) in enumerate(xy.items()):
            colour = colours.get(source) or look(places.get(source, place))["color"]
            mark = MARKS[place % len(MARKS)]
            axes.plot(*xy_n2.T, mark, color=colour, alpha=0.5, markersize=7, label=label(source))
            middle = xy_n2.mean(axis=0)
            axes.plot(*middle, mark, color=colour, markersize=16, markeredgecolor="#1a1a1a")
        shares = content.get("explained") or (None, None)
        for which, axis in enumerate((axes.xaxis, axes.yaxis)):
            share = shares[which]
            known = f", {number(100 * share, 2)} % of the variance" if share is not None else ""
            axis.set_label_text(f"component {which + 1}{known}")
        legend(axes, len(xy))

    middles = "; ".join(
        f"{source} ({len(xy_n2)}): middle at {', '.join(map(number, xy_n2.mean(axis=0).tolist()))}"
        for source, xy_n2 in xy.items()
    )
    caption = (
        f"{evaluation.name}: where the latents of responses lie (principal components); "
        "large marks are the middles"
    )
    return picture(f"latent_map_{evaluation.name}", caption, f"Latent map. {middles}", draw)


def steering_pictures(evaluation: Evaluation) -> list[Picture]:
    """Scores of each set before and after steering, where steering.json has them."""
    sets = evaluation.parts.get("steering", {}).get("sets", {})
    pictures = []
    for place, (kind, found) in enumerate(sets.items()):
        scores = found.get("scores") or {}
        before, after = (scores.get(side) or () for side in ("before", "after"))
        if 0 < len(before) == len(after) and np.isfinite([before, after]).all():
            name, title = f"steering_{evaluation.name}_{kind}", f"steering, {kind}"
            both = np.array([before, after], float)
            pictures.append(before_and_after(name, title, "SARM score", both, place))
    return pictures


def _number(response: Mapping[str, Any] | None, field: str) -> float:
    value = response[field] if response else None
    return float(value) if isinstance(value, (int, float)) else float("nan")
