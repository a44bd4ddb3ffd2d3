"""The study's figures, in a light and a dark version."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from sarm_jax.lab.findings import Runs
from sarm_jax.reporting.plotting import by_step, png, theme
from sarm_jax.reporting.statistics import mean_interval

COLOURS = {  # told apart by colour-blind readers: Okabe and Ito
    "baseline": "#D55E00",
    "penalty": "#0072B2",
    "full": "#009E73",
    "latent_kl": "#CC79A7",
    "clamp": "#E69F00",
    "random": "#888888",
}
DASHES = {"latent_kl": "--", "clamp": "-.", "random": ":"}


def goodhart(runs: Runs, dark: bool = False) -> bytes:
    """Gold and SARM score over the steps, and gold over the KL to the reference policy."""
    with theme(dark):
        figure, (gold, score, kl) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
        _over_steps(gold, runs, "gold")
        _over_steps(score, runs, "score")
        for condition, results in runs.items():
            x_st, y_st = _curves(results, "ref_kl"), _curves(results, "gold")
            look = _look(condition)
            for x_t, y_t in zip(x_st, y_st, strict=True):
                kl.plot(x_t, y_t, **look | {"linewidth": 0.7, "alpha": 0.25})
            kl.plot(x_st.mean(axis=0), y_st.mean(axis=0), **look)
        by_step(gold, title="what is wanted", ylabel="gold reward, at most 1")
        by_step(score, title="what is rewarded", ylabel="SARM score, sd")
        kl.set(title="the Goodhart plot", xlabel="KL to the reference, nats per response")
        kl.set_ylabel("gold reward")
        every = np.concatenate([_curves(results, "ref_kl").ravel() for results in runs.values()])
        kl.set_xlim(-1, 1.1 * np.quantile(every, 0.99))  # the estimate has a heavy tail
        for axes in (gold, score, kl):
            axes.grid(visible=True)
        handles, labels = gold.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(runs), frameon=False)
        return png(figure)


def final_gold(runs: Runs, dark: bool = False) -> bytes:
    """Final gold of every seed, with mean and 95 % interval."""
    with theme(dark):
        size = (12, 1.2 + 0.45 * len(runs))
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        for place, (condition, results) in enumerate(runs.items()):
            values = [run["gold_final"] for run in results]
            colour = COLOURS[condition]
            axes.plot(values, [place] * len(values), "o", alpha=0.4, color=colour)
            axes.plot([np.mean(values)], [place], "|", markersize=18, color=colour)
        frame = axes.get_xlim()  # an interval over two seeds can be enormous
        for place, (condition, results) in enumerate(runs.items()):
            found = mean_interval([run["gold_final"] for run in results])
            if found["low"] is not None and found["high"] is not None:
                ends, colour = [found["low"], found["high"]], COLOURS[condition]
                axes.plot(ends, [place, place], linewidth=3, color=colour)
        axes.set_xlim(frame)
        starts = [run["gold_start"] for results in runs.values() for run in results]
        axes.axvline(np.mean(starts), color="#888888", linestyle=":", label="before PPO")
        axes.set_yticks(range(len(runs)), list(runs))
        axes.invert_yaxis()
        axes.set(xlabel="final gold reward: seeds, mean and 95 % interval")
        axes.grid(visible=True, axis="x")
        axes.legend(frameon=False)
        return png(figure)


def detected(runs: Runs, dark: bool = False) -> bytes:
    """The share of responses on which a detector fires, and words of flattery, over the steps."""
    with theme(dark):
        figure, (share, words) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
        _over_steps(share, runs, "detected")
        _over_steps(words, runs, "flattery")
        by_step(share, ylabel="share of responses", title="a detector fires")
        by_step(words, ylabel="words per response", title="flattery")
        for axes in (share, words):
            axes.grid(visible=True)
        handles, labels = share.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(runs), frameon=False)
        return png(figure)


def _over_steps(axes: Axes, runs: Runs, name: str) -> None:
    """The mean over seeds, its 95 % interval as a band, and every seed as a thin line."""
    for condition, results in runs.items():
        step_t, value_st = _curves(results, "step")[0], _curves(results, name)
        look = _look(condition)
        axes.plot(step_t, value_st.mean(axis=0), label=condition, **look)
        if len(value_st) > 1:
            axes.plot(step_t, value_st.T, **look | {"linewidth": 0.7, "alpha": 0.25})
    frame = axes.get_ylim()  # an interval over two seeds can be enormous
    for condition, results in runs.items():
        step_t, value_st = _curves(results, "step")[0], _curves(results, name)
        if len(value_st) > 1:
            band = [mean_interval(value_s) for value_s in value_st.T]
            low_t, high_t = (np.asarray([b[side] for b in band], float) for side in ("low", "high"))
            colour = COLOURS[condition]
            axes.fill_between(step_t, low_t, high_t, color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(frame)


def _look(condition: str) -> dict[str, Any]:
    style = DASHES.get(condition, "-")
    return {"color": COLOURS[condition], "linestyle": style, "linewidth": 2}


def _curves(results: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """`[seeds, evaluations]`."""
    return np.asarray([[point[name] for point in run["curve"]] for run in results], np.float64)
