"""Figures over PPO steps; if runs can be compared, one figure has a line for each run."""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from pipeline.report import recordings
from pipeline.report.numbers import change, number
from pipeline.report.pictures import (
    COLOURS,
    Picture,
    label,
    legend,
    line_style,
    picture,
    smooth,
)
from pipeline.report.runs import Run, ends
from sarm_jax.reporting.plotting import by_step, spread_of_axis
from sarm_jax.rewards.reward_config import FURTHER_TERMS

MAX_PENALTIES = 5  # lines of penalties in a figure; more are drawn as a sum of the smallest
LOG_2 = float(np.log(2))


def reward_terms(runs: Sequence[Run]) -> list[Picture]:
    """Draws R_total and its terms for every run; runs of one program have the same scale."""
    shown = [run for run in runs if run.has("total_reward")]
    terms_of = {run.name: terms(run) for run in shown}
    limits = {
        origin: _limits([terms_of[run.name] for run in shown if run.origin == origin])
        for origin in {run.origin for run in shown}
    }

    def figure(run: Run) -> Picture:
        own = terms_of[run.name]

        def draw(axes: Axes) -> None:
            for position, (name, values_t) in enumerate(own.items()):
                style = line_style(position) | {"linewidth": 4.0 if name == "R_total" else 2.2}
                axes.plot(run.column("step"), values_t, label=label(name), **style)
            by_step(axes, ylabel="reward-model units", ylim=limits[run.origin])
            legend(axes, len(own))

        changes = "; ".join(f"{name} {change(ends(values))}" for name, values in own.items())
        content = "its terms; they add up to R_total"
        if run.origin == recordings.OTHER:
            content = "the terms that are recorded"
        return picture(
            f"reward_{run.name}",
            caption=f"{run.title}: the reward and {content}",
            alt=f"{run.title} over {run.steps} steps, from the start to the end: {changes}",
            draw=draw,
        )

    return [figure(run) for run in shown]


def _limits(terms_of_runs: Sequence[dict[str, np.ndarray]]) -> tuple[float, float]:
    """Returns a range of the y axis that holds all values."""
    values = np.concatenate([values_t for own in terms_of_runs for values_t in own.values()])
    finite = values[np.isfinite(values)]
    if not len(finite):
        return -1.0, 1.0
    margin = 0.05 * spread_of_axis(finite)
    return float(finite.min() - margin), float(finite.max() + margin)


def terms(run: Run) -> dict[str, np.ndarray]:
    """Returns R_total and its terms by label; what is taken from the score has a minus sign."""
    score = "R_SARM(clamp z)" if run.clamps else "R_SARM"
    lines = {"R_total": run.column("total_reward"), score: run.column("rm_score")}
    penalties = run.penalties()
    if penalties is None or (not penalties and _is_charged(run, "indicator_penalty")):
        lines["− penalties"] = -run.column("indicator_penalty")
    elif penalties:
        by_size = sorted(penalties, key=lambda i: -np.nansum(penalties[i]))
        drawn = by_size if len(by_size) <= MAX_PENALTIES else by_size[: MAX_PENALTIES - 1]
        for feature in sorted(drawn, key=list(penalties).index):
            lines[f"− penalty {run.names.show(feature)}"] = -penalties[feature]
        if len(drawn) < len(by_size):
            others = [penalties[i] for i in by_size[len(drawn) :]]
            lines["− other penalties"] = -np.sum(others, axis=0)
    if _is_charged(run, "kl_penalty"):
        lines["− β · D"] = -run.column("kl_penalty")
    for name in FURTHER_TERMS:
        if _is_charged(run, name):
            lines[f"− {name.replace('_', ' ')}"] = -run.column(name)
    return lines


def _is_charged(run: Run, name: str) -> bool:
    """Returns whether a cost is recorded and is not always 0."""
    return run.has(name) and bool(np.any(run.column(name)))


def goodhart(runs: Sequence[Run]) -> Picture | None:
    """Draws R_SARM and R_total against the KL to the reference policy; None without data."""
    shown = [run for run in runs if run.has("rm_score") and run.has("ref_kl")]
    if not shown:
        return None
    in_sd = all(run.scale for run in shown)

    def reward(run: Run, name: str) -> np.ndarray:
        mean, deviation = run.scale if in_sd and run.scale else (0.0, 1.0)
        return (run.column(name) - mean) / deviation

    smooth_kl = {run.name: smooth(run.column("ref_kl")) for run in shown}
    edge = 1.1 * max(float(np.nanmax(kl_t)) for kl_t in smooth_kl.values()) or 1.0
    beyond = sum(int((run.column("ref_kl") > edge).sum()) for run in shown)

    def draw(axes: Axes) -> None:
        for run in shown:
            kl_t, colour = smooth_kl[run.name], line_style(run.position)["color"]
            score_t, total_t = reward(run, "rm_score"), reward(run, "total_reward")
            axes.plot(run.column("ref_kl"), score_t, "o", color=colour, alpha=0.25, markersize=5)
            axes.plot(kl_t, smooth(score_t), color=colour, label=label(run.name))
            if not np.allclose(score_t, total_t, equal_nan=True):
                axes.plot(kl_t, smooth(total_t), ":", color=colour)
            finite = np.flatnonzero(np.isfinite(kl_t + smooth(score_t)))
            if len(finite):
                last = finite[-1]
                axes.plot(kl_t[last], smooth(score_t)[last], "s", color=colour, markersize=11)
        axes.set(xlabel="KL to the reference, nats per response", xlim=(-0.03 * edge, edge))
        axes.set_ylabel("reward, sd of the reference" if in_sd else "reward-model units")
        legend(axes, len(shown))

    changes = "; ".join(
        f"{run.name}: KL {change(run.ends('ref_kl'))} nats, reward {change(run.ends('rm_score'))}"
        for run in shown
    )
    caption = (
        "Reward against the distance from the reference policy. Dots are steps, lines are medians "
        "of five steps, and a square is the end of a run. Solid lines are R_SARM (after the clamp, "
        "if the run has one); dotted lines are R_total, if it differs"
    )
    if beyond:  # the estimate of the KL has a heavy tail
        caption += f". Steps beyond the right edge: {beyond}"
    alt = f"Reward against KL to the reference policy. {changes}"
    return picture("goodhart", caption=caption, alt=alt, draw=draw)


def over_steps(
    runs: Sequence[Run],
    name: str,
    *,
    title: str,
    unit: str,
    level: tuple[float, str] | None = None,
    spread: str = "",
) -> Picture | None:
    """Draws a column of every run that has it; None if no run has it.

    Args:
        runs: the runs.
        name: the column.
        title: the title of the figure.
        unit: the unit of the column.
        level: a constant to compare with, and its name.
        spread: a column with standard deviations, which are drawn as a band.
    """
    shown = [run for run in runs if run.has(name)]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for run in shown:
            step_t, value_t = run.column("step"), run.column(name)
            style = line_style(run.position)
            axes.plot(step_t, value_t, label=label(run.name) + run.mark, **style)
            if spread and run.has(spread):
                low_t, high_t = value_t - run.column(spread), value_t + run.column(spread)
                axes.fill_between(
                    step_t, low_t, high_t, color=style["color"], alpha=0.12, linewidth=0
                )
        if level:
            axes.axhline(level[0], color="#888888", linestyle=":", label=level[1])
        by_step(axes, ylabel=unit)
        legend(axes, len(shown) + bool(level))

    changes = "; ".join(f"{run.title} {change(run.ends(name))}" for run in shown)
    caption = title
    if any(recordings.differs(run.origin, name) for run in shown):
        caption += f"; † measured differently: {recordings.DIFFERS[name]}"
    comparison = f"; to compare with {level[1]}: {number(level[0])}" if level else ""
    alt = f"{title}, from the start to the end: {changes}{comparison}"
    return picture(name, caption=caption, alt=alt, draw=draw)


def features(run: Run) -> list[Picture]:
    """Draws how often the penalised features exceed τ, and their mean activation.

    If there are more features than colours, those that exceed τ most often are drawn.
    """
    order = sorted(run.features, key=lambda i: -_total(run.column(f"feat_{i}_above_tau")))
    chosen = [i for i in run.features if i in order[: len(COLOURS)]]
    if not chosen:
        return []
    which = ""
    if len(chosen) < len(run.features):
        which = f" (the {len(chosen)} of {len(run.features)} that exceed τ most often)"

    def lines(column: Callable[[int], np.ndarray], unit: str, taus: bool) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for position, i in enumerate(chosen):
                style = line_style(position)
                axes.plot(
                    run.column("step"),
                    column(i),
                    label=label(f"feature {run.names.show(i)}"),
                    **style,
                )
                if taus and run.taus is not None:
                    tau = run.taus[run.features.index(i)]
                    axes.axhline(tau, color=COLOURS[position], linestyle=":", linewidth=1.4)
            by_step(axes, ylabel=unit)
            legend(axes, len(chosen))

        return draw

    def figure(measure: str, *, title: str, unit: str, taus: bool) -> Picture:
        changes = "; ".join(
            f"feature {run.names.show(i)} {change(run.ends(f'feat_{i}_{measure}'))}" for i in chosen
        )
        return picture(
            f"{measure}_{run.name}",
            caption=f"{run.title}: {title}{which}",
            alt=f"{run.title}, {title}, from the start to the end: {changes}",
            draw=lines(lambda i: run.column(f"feat_{i}_{measure}"), unit, taus),
        )

    share = "share of responses with z above τ"
    activation = "mean activation of the penalised features"
    if run.taus:
        activation += "; dotted lines are their thresholds τ"
    return [
        figure("above_tau", title=share, unit="share of responses", taus=False),
        figure("activation", title=activation, unit="mean z", taus=True),
    ]


def _total(values_t: np.ndarray) -> float:
    return float(np.nansum(values_t))
