"""Figures of what a run recorded at every step, a line per run wherever runs can be compared."""

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
    look,
    picture,
    smooth,
)
from pipeline.report.runs import Run, ends
from sarm_jax.reporting.plotting import by_step

MOST = 5  # penalties drawn by themselves; where there are more, the least are drawn together
LOG_2 = float(np.log(2))


def reward_terms(runs: Sequence[Run]) -> list[Picture]:
    """For every run R_total and what it is made of; all of one program have the same scale."""
    shown = [run for run in runs if run.has("total_reward")]
    parts = {run.name: terms(run) for run in shown}
    limits = {
        origin: _limits([parts[run.name] for run in shown if run.origin == origin])
        for origin in {run.origin for run in shown}
    }

    def figure(run: Run) -> Picture:
        found = parts[run.name]

        def draw(axes: Axes) -> None:
            for place, (name, values_t) in enumerate(found.items()):
                width = 4.0 if name == "R_total" else 2.2
                axes.plot(run.column("step"), values_t, label=name, **look(place), linewidth=width)
            by_step(axes, ylabel="reward-model units", ylim=limits[run.origin])
            legend(axes, len(found))

        told = "; ".join(f"{name} {change(ends(values))}" for name, values in found.items())
        whole = "its terms; they add up to R_total"
        whole = "what is recorded of its terms" if run.origin == recordings.OTHER else whole
        return picture(
            f"reward_{run.name}",
            f"{run.title}: the reward and {whole}",
            f"{run.title} over {run.steps} steps, from the start to the end: {told}",
            draw,
        )

    return [figure(run) for run in shown]


def _limits(parts: Sequence[dict[str, np.ndarray]]) -> tuple[float, float]:
    """The range of the y axis that holds all values."""
    every = np.concatenate([values_t for found in parts for values_t in found.values()])
    finite = every[np.isfinite(every)]
    margin = 0.05 * (np.ptp(finite) or 1.0)
    return float(finite.min() - margin), float(finite.max() + margin)


def terms(run: Run) -> dict[str, np.ndarray]:
    """Label → values; penalties and the latent KL are negative where they cost something."""
    score = "R_SARM(clamp z)" if run.clamps else "R_SARM"
    found = {"R_total": run.column("total_reward"), score: run.column("rm_score")}
    parts = run.penalties()
    if parts is None or (not parts and _is_paid(run, "indicator_penalty")):
        found["− penalties"] = -run.column("indicator_penalty")
    elif parts:
        most = sorted(parts, key=lambda i: -np.nansum(parts[i]))
        alone = most if len(most) <= MOST else most[: MOST - 1]
        for feature in sorted(alone, key=list(parts).index):
            found[f"− penalty {feature}"] = -parts[feature]
        if len(alone) < len(most):
            rest = [parts[i] for i in most[len(alone) :]]
            found["− other penalties"] = -np.sum(rest, axis=0)
    if _is_paid(run, "kl_penalty"):
        found["− β · D"] = -run.column("kl_penalty")
    return found


def _is_paid(run: Run, name: str) -> bool:
    """Returns True if a cost is recorded that is not 0 throughout."""
    return run.has(name) and bool(np.any(run.column(name)))


def goodhart(runs: Sequence[Run]) -> Picture | None:
    """R_SARM and R_total against the KL to the reference policy."""
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
            kl_t, colour = smooth_kl[run.name], look(run.place)["color"]
            score_t, total_t = reward(run, "rm_score"), reward(run, "total_reward")
            axes.plot(run.column("ref_kl"), score_t, "o", color=colour, alpha=0.25, markersize=5)
            axes.plot(kl_t, smooth(score_t), color=colour, label=label(run.name))
            if not np.allclose(score_t, total_t, equal_nan=True):
                axes.plot(kl_t, smooth(total_t), ":", color=colour)
            known = np.flatnonzero(np.isfinite(kl_t + smooth(score_t)))
            if len(known):
                end = kl_t[known[-1]], smooth(score_t)[known[-1]]
                axes.plot(*end, "s", color=colour, markersize=11)
        axes.set(xlabel="KL to the reference, nats per response", xlim=(-0.03 * edge, edge))
        axes.set_ylabel("reward, sd of the reference" if in_sd else "reward-model units")
        legend(axes, len(shown))

    told = "; ".join(
        f"{run.name}: KL {change(run.ends('ref_kl'))} nats, reward {change(run.ends('rm_score'))}"
        for run in shown
    )
    caption = (
        "What is rewarded against how far the policy went. Dots are steps, lines medians of five, "
        "a square is the end; solid is R_SARM, as the run's clamp leaves it, dotted R_total where "
        "that is another"
    )
    if beyond:  # the estimate has a heavy tail
        caption += f". Steps beyond the right edge: {beyond}"
    return picture("goodhart", caption, f"Reward against KL to the reference policy. {told}", draw)


def over_steps(
    runs: Sequence[Run],
    name: str,
    title: str,
    unit: str,
    level: tuple[float, str] | None = None,
    spread: str = "",
) -> Picture | None:
    """A column of every run that has it. `level` is a line to compare with, and its name;
    `spread` the column of the standard deviation that makes a band."""
    shown = [run for run in runs if run.has(name)]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for run in shown:
            step_t, value_t, style = run.column("step"), run.column(name), look(run.place)
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

    told = "; ".join(f"{run.title} {change(run.ends(name))}" for run in shown)
    caption = title
    if any(recordings.differs(run.origin, name) for run in shown):
        caption += f"; † measured differently: {recordings.DIFFERS[name]}"
    against = f"; to compare with {level[1]}: {number(level[0])}" if level else ""
    return picture(name, caption, f"{title}, from the start to the end: {told}{against}", draw)


def features(run: Run) -> list[Picture]:
    """How often the penalised features that fire most fire, and how active they are."""
    order = sorted(run.features, key=lambda i: -_total(run.column(f"feat_{i}_above_tau")))
    chosen = [i for i in run.features if i in order[: len(COLOURS)]]
    if not chosen:
        return []
    rest = len(run.features) - len(chosen)
    which = f" (the {len(chosen)} that fire most, of {len(run.features)})" if rest else ""

    def lines(column: Callable[[int], np.ndarray], unit: str, taus: bool) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for place, i in enumerate(chosen):
                axes.plot(run.column("step"), column(i), label=f"feature {i}", **look(place))
                if taus and run.taus is not None:
                    tau = run.taus[run.features.index(i)]
                    axes.axhline(tau, color=COLOURS[place], linestyle=":", linewidth=1.4)
            by_step(axes, ylabel=unit)
            legend(axes, len(chosen))

        return draw

    def figure(what: str, title: str, unit: str, taus: bool) -> Picture:
        told = "; ".join(f"feature {i} {change(run.ends(f'feat_{i}_{what}'))}" for i in chosen)
        return picture(
            f"{what}_{run.name}",
            f"{run.title}: {title}{which}",
            f"{run.title}, {title}, from the start to the end: {told}",
            lines(lambda i: run.column(f"feat_{i}_{what}"), unit, taus),
        )

    dotted = "; dotted, their thresholds τ" if run.taus else ""
    return [
        figure("above_tau", "share of responses with z above τ", "share of responses", False),
        figure("activation", f"mean activation of the penalised features{dotted}", "mean z", True),
    ]


def _total(values_t: np.ndarray) -> float:
    return float(np.nansum(values_t))
