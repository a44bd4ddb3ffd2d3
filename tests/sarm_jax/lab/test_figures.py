"""The figures of the study: nothing is cut off, neither a line nor what is written beside it."""

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from sarm_jax.lab import figures
from sarm_jax.lab.conditions import DESCRIPTIONS, is_ranked
from tests.further import further

RANKED = [name for name in DESCRIPTIONS if is_ranked(name)]
POINT = {"gold": 0.5, "score": 1.0, "ref_kl": 2.0, "flattery": 0.1, "told": 0.2}


def runs_of(conditions: list[str], seeds: int = 2) -> dict[str, Any]:
    """Returns runs of each condition, two points each."""
    curve = [POINT | {"step": step} for step in (0, 2)]
    return {
        name: [{"seed": seed, "curve": curve, "gold_final": 0.5} for seed in range(seeds)]
        for name in conditions
    }


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, as long as they are open."""
    seen: list[Figure] = []

    def png(figure: Figure) -> bytes:
        figure.canvas.draw()
        seen.append(figure)
        return b""

    monkeypatch.setattr(figures, "png", png)
    yield seen
    for figure in seen:
        figures.plt.close(figure)


@pytest.mark.parametrize("count", [1, 7, len(RANKED), further(5), further(12)])
@pytest.mark.parametrize("trained", [0, 2, len(DESCRIPTIONS), further(12)])
def test_legends_are_whole(drawn, count: int, trained: int):
    rankings = [
        {"condition": name, "weight": 1.0, "tau": 1.0, "gold": [{"mean": 0.1}, {"mean": 0.2}]}
        for name in RANKED[:count]
    ]
    runs = runs_of(list(DESCRIPTIONS)[:trained])
    figures.frontier(runs, rankings, [0.0, 1.0])
    if runs:
        figures.goodhart(runs)
    for figure in drawn:
        whole = figure.bbox
        for legend in figure.legends:
            box = legend.get_window_extent()
            inside = [
                box.x0 >= whole.x0,
                box.y0 >= whole.y0,
                box.x1 <= whole.x1,
                box.y1 <= whole.y1,
            ]
            assert all(inside), (np.round(box.extents), np.round(whole.extents))
        assert all(axes.get_window_extent().width > 200 for axes in figure.axes)


@pytest.mark.parametrize(("seeds", "bands"), [(1, 0), (2, 0), (4, 0), (5, 4)])
def test_few_seeds_have_lines_and_no_band(drawn, seeds, bands):
    figures.goodhart(runs_of(["baseline", "penalty"], seeds))
    gold, score, _ = drawn[0].axes
    assert len(gold.collections) + len(score.collections) == bands
    assert len(gold.lines) == 2 * (1 + seeds * (seeds > 1))


@pytest.mark.parametrize("rates", [(0.5, 0.1), (0.1, 0.5), (0.0, 0.0), (1.0, 0.0)])
def test_the_lines_of_all_shortcuts_are_inside_their_panels(drawn, rates):
    """The panels share an axis, and shortcuts are used at very different rates."""
    runs = runs_of(["baseline", "penalty"], seeds=3)
    for results in runs.values():
        for result in results:
            result["curve"] = [
                point | dict(zip(("rate_length", "rate_emoji"), rates, strict=True))
                for point in result["curve"]
            ]
    figures.shortcuts(runs)
    for axes, rate in zip(drawn[0].axes, rates, strict=True):
        low, high = axes.get_ylim()
        assert low <= rate <= high
        assert all(low <= line.get_ydata().min() <= high for line in axes.lines)
