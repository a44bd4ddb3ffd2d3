"""The figures of the study, in a light and a dark version."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sarm_jax.lab.conditions import DRAWS, GRID, KL_COEFS
from sarm_jax.lab.findings import Runs
from sarm_jax.reporting.plotting import by_step, png, theme
from sarm_jax.reporting.statistics import mean_interval

ALPHA_COLOURS = {0.25: "#A6CEE3", 0.5: "#6BAED6", 1.0: "#3182BD", 2.0: "#08519C"}
KL_DASHES = {0.0: ":", 0.02: "-", 0.1: "--"}
# The first ones are those of Okabe and Ito, which colour-blind readers can distinguish; dashes tell
# all others apart.
COLOURS = {
    "baseline": "#D55E00",
    "penalty": "#0072B2",
    "full": "#009E73",
    "latent_kl": "#CC79A7",
    "clamp": "#E69F00",
    "random": "#888888",
    "ties": "#56B4E9",
    "worst_of_four": "#B8A100",
    "oracle": "#882255",
    "screen": "#44AA99",
    "probe": "#332288",
    "mean_difference": "#6699CC",
    "distance": "#117733",
    "length": "#661100",
    "bounded": "#AA3377",
    "penalty_no_kl": "#003355",
    "untold": "#DDAA33",
    **dict(zip(KL_COEFS, ("#AA4499", "#994488", "#883377", "#772266", "#661155"), strict=True)),
    **{name: ALPHA_COLOURS[alpha] for name, (alpha, _) in GRID.items()},
    **dict.fromkeys(DRAWS, "#888888"),
}
DASHES = {
    **dict.fromkeys(("latent_kl", "ties", "screen", "probe", "penalty_no_kl"), "--"),
    **dict.fromkeys(("clamp", "worst_of_four", "mean_difference", "length", "untold"), "-."),
    **dict.fromkeys(("random", "distance", "bounded", "oracle", *DRAWS), ":"),
    **dict.fromkeys(KL_COEFS, "-."),
    **{name: KL_DASHES[kl] for name, (_, kl) in GRID.items()},
}
LEGEND_COLUMNS = 6
BAND_SEEDS = 5  # fewest seeds for a band: that of fewer hides everything else
SEED_STYLE = {"linewidth": 0.7, "alpha": 0.25}  # style of the thin line of a single seed


def goodhart(runs: Runs, dark: bool = False) -> bytes:
    """Draws gold and SARM score over the steps, and gold over the KL to the reference policy."""
    with theme(dark):
        figure, (gold, score, kl) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        _over_steps(gold, runs, "gold")
        _over_steps(score, runs, "score")
        for condition, results in runs.items():
            x_st, y_st = _curves(results, "ref_kl"), _curves(results, "gold")
            style = _line_style(condition)
            for x_t, y_t in zip(x_st, y_st, strict=True):
                kl.plot(x_t, y_t, **style | SEED_STYLE)
            kl.plot(x_st.mean(axis=0), y_st.mean(axis=0), **style)
        by_step(gold, title="what is wanted", ylabel="gold reward, at most 1")
        by_step(score, title="what is rewarded", ylabel="SARM score, sd")
        kl.set(title="the Goodhart plot", xlabel="KL to the reference, nats per response")
        kl.set_ylabel("gold reward")
        ref_kl = np.concatenate([_curves(results, "ref_kl").ravel() for results in runs.values()])
        kl.set_xlim(-1, 1.1 * np.quantile(ref_kl, 0.99))  # the estimate has a heavy tail
        _add_grid_and_legend(figure, columns=len(runs))
        return png(figure)


def final_gold(runs: Runs, dark: bool = False) -> bytes:
    """Draws the final gold of every seed, with mean and 95 % interval."""
    with theme(dark):
        size = (12, 1.2 + 0.45 * len(runs))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        for y, (condition, results) in enumerate(runs.items()):
            values = [run["gold_final"] for run in results]
            colour = COLOURS[condition]
            axes.plot(values, [y] * len(values), "o", alpha=0.4, color=colour)
            axes.plot([np.mean(values)], [y], "|", markersize=18, color=colour)
        limits = axes.get_xlim()  # kept, because an interval over two seeds can be very wide
        for y, (condition, results) in enumerate(runs.items()):
            interval = mean_interval([run["gold_final"] for run in results])
            if interval["low"] is not None and interval["high"] is not None:
                ends, colour = [interval["low"], interval["high"]], COLOURS[condition]
                axes.plot(ends, [y, y], linewidth=3, color=colour)
        axes.set_xlim(limits)
        starts = [run["gold_start"] for results in runs.values() for run in results]
        axes.axvline(np.mean(starts), color="#888888", linestyle=":", label="before PPO")
        axes.set_yticks(range(len(runs)), list(runs))
        axes.invert_yaxis()
        axes.set(xlabel="final gold reward: seeds, mean and 95 % interval")
        axes.grid(visible=True, axis="x")
        axes.legend(frameon=False)
        return png(figure)


def frontier(
    runs: Runs, rankings: Sequence[Mapping[str, Any]], kl_n: Sequence[float], dark: bool = False
) -> bytes:
    """Draws gold over the KL to the reference: best of n on a pool, and during training.

    Args:
        runs: the results of all conditions.
        rankings: rows of `rivals.pool_table`.
        kl_n: KL of the best of n, in nats, for each n.
        dark: draw for a dark page.
    """
    with theme(dark):
        columns = 2 if runs else 1
        figure, panels = plt.subplots(
            1, columns, figsize=(4 + 4 * columns, 5), layout="constrained", squeeze=False
        )
        pool = panels[0, 0]
        for row in rankings:
            if not row["weight"] == row["tau"] == 1:
                continue
            style, gold = _line_style(row["condition"]), [g["mean"] for g in row["gold"]]
            if row["condition"] in DRAWS:  # points, since they are draws of one condition
                pool.plot(kl_n[-1:], gold[-1:], ".", color=style["color"])
            else:
                pool.plot(kl_n, gold, label=row["condition"], **style)
        for condition, results in runs.items():
            trained = panels[0, 1]
            x_st, y_st = _curves(results, "ref_kl"), _curves(results, "gold")
            style = _line_style(condition)
            trained.plot(x_st.mean(axis=0), y_st.mean(axis=0), label=condition, **style)
            trained.plot(x_st[:, -1].mean(), y_st[:, -1].mean(), "o", color=style["color"])
            trained.set(title="as RL trains; the dot is the end", xlabel="KL, nats per response")
        pool.set(title="best of n on one pool", ylabel="gold reward, mean over seeds")
        pool.set_xlabel("KL, nats per response: log n − (n − 1) / n")
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            axes.grid(visible=True)
            lines, labels = axes.get_legend_handles_labels()
            handles |= dict(zip(labels, lines, strict=True))
        # Beside a single panel, which is too narrow for a legend below it.
        below = {"loc": "outside lower center", "ncols": min(len(handles), LEGEND_COLUMNS)}
        place = below if runs else {"loc": "outside right upper"}
        figure.legend(handles.values(), handles.keys(), frameon=False, **place)
        return png(figure)


def detected(runs: Runs, dark: bool = False) -> bytes:
    """Draws how often a detector fires and how often its shortcut is used, over the steps.

    The second panel has the words of flattery per response in the world of capitals, and in other
    tasks the share of the responses with a shortcut that the method is told.
    """
    point = next(iter(runs.values()))[0]["curve"][0]
    name = "flattery" if "flattery" in point else "told"
    with theme(dark):
        figure, (share, shortcut) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        _over_steps(share, runs, "detected")
        _over_steps(shortcut, runs, name)
        by_step(share, ylabel="share of responses", title="a detector fires")
        if name == "told":
            by_step(shortcut, ylabel="share of responses", title="a told shortcut")
        else:
            by_step(shortcut, ylabel="words per response", title="flattery")
        _add_grid_and_legend(figure, columns=len(runs))
        return png(figure)


def shortcuts(runs: Runs, dark: bool = False) -> bytes:
    """Draws the share of the responses that have each shortcut, over the steps."""
    names = shortcut_rates(runs)
    with theme(dark):
        size = (3.4 * len(names), 3.6)
        figure, panels = plt.subplots(
            1, len(names), figsize=size, sharey=True, squeeze=False, layout="constrained"
        )
        for axes, name in zip(panels[0], names, strict=True):
            _over_steps(axes, runs, name)
            by_step(axes, ylabel="share of responses", title=name.removeprefix("rate_"))
        highest = max(_curves(rows, name).max() for rows in runs.values() for name in names)
        panels[0, 0].set_ylim(0, 1.05 * highest or 1)  # the panels share the axis
        _add_grid_and_legend(figure, columns=len(runs))
        return png(figure)


def shortcut_rates(runs: Runs) -> list[str]:
    """Lists the metrics `rate_{shortcut}` of the runs; [] in a world of flattery alone."""
    points = [run["curve"][0] for results in runs.values() for run in results]
    return [name for name in points[0] if name.startswith("rate_")] if points else []


def _add_grid_and_legend(figure: Figure, columns: int) -> None:
    """Adds a grid to every panel, and a legend of the first panel's lines below all of them."""
    for axes in figure.axes:
        axes.grid(visible=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(columns, LEGEND_COLUMNS)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _over_steps(axes: Axes, runs: Runs, name: str) -> None:
    """Draws the mean over seeds, its 95 % interval as a band, and every seed as a thin line."""
    for condition, results in runs.items():
        step_t, value_st = _curves(results, "step")[0], _curves(results, name)
        style = _line_style(condition)
        axes.plot(step_t, value_st.mean(axis=0), label=condition, **style)
        if len(value_st) > 1:
            axes.plot(step_t, value_st.T, **style | SEED_STYLE)
    limits = axes.get_ylim()  # kept, because an interval over few seeds can be very wide
    for condition, results in runs.items():
        step_t, value_st = _curves(results, "step")[0], _curves(results, name)
        if len(value_st) >= BAND_SEEDS:
            band = [mean_interval(value_s) for value_s in value_st.T]
            low_t, high_t = (np.asarray([b[end] for b in band], float) for end in ("low", "high"))
            colour = COLOURS[condition]
            axes.fill_between(step_t, low_t, high_t, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(limits)


def _line_style(condition: str) -> dict[str, Any]:
    """Returns the style of a condition's mean line."""
    dashes = DASHES.get(condition, "-")
    return {"color": COLOURS[condition], "linestyle": dashes, "linewidth": 2}


def _curves(results: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Collects one metric of every evaluation, `[seeds, evaluations]`."""
    return np.asarray([[point[name] for point in run["curve"]] for run in results], np.float64)
