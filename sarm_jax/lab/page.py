"""The files of the study: lab.json, figures/*.png, and lab.html, which is self-contained."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sarm_jax.features.feature_names import NO_NAMES, FeatureNames
from sarm_jax.io.files import replacing
from sarm_jax.io.json_files import read_json, write_json
from sarm_jax.lab import figures, rivals
from sarm_jax.lab.conditions import DESCRIPTIONS
from sarm_jax.lab.findings import Runs, check_claims, check_gates, difference, headline
from sarm_jax.lab.gate import Gate, limits_of
from sarm_jax.lab.shortcuts import FLATTERY_ALONE, World
from sarm_jax.lab.task import Task
from sarm_jax.reporting.page import environment, picture_uri
from sarm_jax.reporting.statistics import format_interval, mean_interval

FIGURES = {
    "goodhart": (
        figures.goodhart,
        "Gold reward and SARM score over the PPO steps, and gold over the KL to the reference, "
        "a line per condition",
    ),
    "final_gold": (figures.final_gold, "Final gold reward of every seed in every condition"),
    "detected": (figures.detected, "Share of responses with a detector firing, and the shortcut"),
}
SHORTCUT_FIGURES = {  # only of tasks with several shortcuts
    "shortcuts": (
        figures.shortcuts,
        "Share of responses with each shortcut, by the rule that counts its words",
    )
}
SHORTCUT_COLUMNS = {  # key in shortcuts.json → title of the column
    "r2": "probe, R²",
    "gain": "gain, sd",
    "paid": "paid",
    "detection": "detected",
    "detection_kept_back": "detected in other phrasings",
    "false_alarms": "false alarms",
}
FRONTIER_TEXT = (
    "Gold over the KL to the reference: the best of n responses of one pool, and while PPO trains"
)


def write_study(
    workdir: Path,
    finished: Mapping[int, Sequence[str]],
    conditions: Sequence[str],
    stopped: Mapping[int, str],
    names: FeatureNames = NO_NAMES,
    pooled: Sequence[int] = (),
    task: Task = FLATTERY_ALONE,
) -> tuple[Path, str]:
    """Reads the results of the seeds under `workdir` and writes the files of the study.

    Args:
        workdir: directory of the study.
        finished: the conditions that each seed has finished. Other results in the directory, which
            may stem from other options, are left out.
        conditions: all conditions of the study, in order.
        stopped: the reason of each seed that did not finish.
        names: names of the reward model's features, if there is only one seed.
        pooled: the seeds that have a best_of_n.json, the rankings of a pool.
        task: the task. Some claims are about the world of capitals and checked only there.

    Returns:
        (path of the page, the result in one paragraph).
    """
    seeds, runs = list(finished), _read_runs(workdir, finished, conditions)
    pools = {seed: read_json(workdir / f"seed_{seed}" / "best_of_n.json") for seed in pooled}
    study = _content(workdir, seeds, runs, pools, task)
    study["stopped"] = {str(seed): reason for seed, reason in stopped.items()}
    write_json(workdir / "lab.json", study, indent=1)
    pictures = _draw(workdir / "figures", runs, study["best_of_n"])
    with replacing(workdir / "lab.html") as file:
        file.write(_render(study, pictures, workdir=workdir, seeds=seeds, names=names, task=task))
    return workdir / "lab.html", study["headline"]


def _content(
    workdir: Path,
    seeds: Sequence[int],
    runs: Runs,
    pools: Mapping[int, Mapping[str, Any]],
    task: Task,
) -> dict[str, Any]:
    """Returns the content of lab.json, except for the field `stopped`."""
    gates = {
        str(seed): {name: gate["value"] for name, gate in content.items()}
        for seed in seeds
        if (content := _read_if_present(workdir / f"seed_{seed}" / "probes" / "gates.json"))
    }
    limits = limits_of(name for values in gates.values() for name in values)
    claims = [check_gates(gates, seeds)]
    if isinstance(task, World):
        claims += check_claims(runs, seeds)
    claims += rivals.check_rivals(runs, pools)
    empty: Mapping[str, Any] = {"n": [], "kl": []}
    pool = next(iter(pools.values()), empty)
    return {
        "headline": headline(runs) if runs else _without_runs(pools),
        "conclusion": rivals.conclusion(runs, pools),
        "gates": {
            name: {
                "limit": " ".join(map(str, limits[name])),
                "seeds": {
                    seed: {"value": values[name], "passed": Gate(name, values[name]).passed}
                    for seed, values in gates.items()
                },
            }
            for name in limits
        },
        "conditions": runs,
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "comparison": rivals.table(runs),
        "grid": rivals.grid(runs),
        "best_of_n": {
            "n": pool["n"],
            "kl": pool["kl"],
            "seeds": list(pools),
            "rankings": rivals.pool_table(pools),
        },
        "evading_gain": {str(seed): pool["evading_gain"] for seed, pool in pools.items()},
        "random_draws": {str(seed): pool["random_draws"] for seed, pool in pools.items()},
        "final_gold": {
            name: mean_interval([run["gold_final"] for run in results])
            for name, results in runs.items()
        },
    }


def _draw(folder: Path, runs: Runs, pool: Mapping[str, Any]) -> list[dict[str, str]]:
    """Draws the figures into a folder; returns them for the page."""
    folder.mkdir(exist_ok=True)
    drawn: dict[str, tuple[Callable[..., bytes], str]] = dict(FIGURES) if runs else {}
    if figures.shortcut_rates(runs):
        drawn |= SHORTCUT_FIGURES
    if pool["rankings"]:
        frontier = partial(figures.frontier, rankings=pool["rankings"], kl_n=pool["kl"])
        drawn["frontier"] = (frontier, FRONTIER_TEXT)
    pictures = []
    for name, (draw, text) in drawn.items():
        light, dark = draw(runs), draw(runs, dark=True)
        with replacing(folder / f"{name}.png", "wb") as file:
            file.write(light)
        pictures.append({"light": picture_uri(light), "dark": picture_uri(dark), "text": text})
    return pictures


def _read_runs(
    workdir: Path, finished: Mapping[int, Sequence[str]], conditions: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Reads the results of all finished runs, by condition."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for condition in conditions:
        seeds = [seed for seed in finished if condition in finished[seed]]
        paths = [workdir / f"seed_{seed}" / condition / "result.json" for seed in seeds]
        results = [result for path in paths if (result := _read_if_present(path))]
        if results:
            runs[condition] = results
    return runs


def _render(
    study: Mapping[str, Any],
    pictures: Sequence[Mapping[str, str]],
    *,
    workdir: Path,
    seeds: Sequence[int],
    names: FeatureNames,
    task: Task,
) -> str:
    """Renders the page; the first seed that finished is shown in detail."""
    runs: Runs = study["conditions"]
    failed = {seed for claim in study["claims"] for seed in claim["failed"]}
    shown = next((seed for seed in seeds if str(seed) not in study["stopped"]), seeds[0])
    folder = workdir / f"seed_{shown}"
    features = _features(folder)
    shortcuts = _shortcuts(runs, _read_if_present(folder / "probes" / "shortcuts.json"))
    return (
        environment(Path(__file__).parent)
        .get_template("page.html")
        .render(
            **study,
            pictures=pictures,
            band_seeds=figures.BAND_SEEDS,
            conditions_table=[_condition_row(runs, name) for name in runs],
            seeds=sorted(seeds, key=lambda seed: (seed not in failed, seed)),
            failed=failed,
            runs={name: {run["seed"]: run for run in results} for name, results in runs.items()},
            shown=shown,
            features=features,
            probed=_probed(features),
            descriptions=DESCRIPTIONS,
            shortcuts=shortcuts,
            paid=_names(shortcuts) if shortcuts else "flattery",
            told=_names([r for r in shortcuts if r.get("told")]) if shortcuts else "flattery",
            told_differs=not isinstance(task, World) and len(seeds) > 1,
            shortcut_columns={
                key: title if any(key in row for row in shortcuts) else ""
                for key, title in SHORTCUT_COLUMNS.items()
            },
            task=task,
            has_untold=bool(task.untold),
            is_text=not isinstance(task, World),
            names=names,
            interval=format_interval,
        )
    )


def _without_runs(pools: Mapping[int, Mapping[str, Any]]) -> str:
    """Summarises a study in which no policy was trained."""
    if not pools:
        return "No seed has a finished run."
    return (
        f"No policy was trained: the conditions rank the samples of a pool of each of "
        f"{len(pools)} seed(s)."
    )


def _condition_row(runs: Runs, name: str) -> dict[str, Any]:
    """Returns the row of one condition in the table of gold rewards."""
    results = runs[name]

    def mean(field: str) -> str:
        return f"{mean_interval([run[field] for run in results])['mean']:.2f}"

    has_gain = name != "baseline" and "baseline" in runs
    return {
        "name": name,
        "start": mean("gold_start"),
        "peak": mean("gold_peak"),
        "final": format_interval(mean_interval([run["gold_final"] for run in results])),
        "worst": f"{min(run['gold_final'] for run in results):.2f}",
        "score": mean("score_final"),
        "ref_kl": mean("ref_kl_final"),
        "gain": format_interval(difference(runs, name, "baseline")) if has_gain else "",
    }


def _names(shortcuts: Sequence[Mapping[str, Any]]) -> str:
    """Lists shortcuts in words."""
    return ", ".join(row["name"].replace("_", " ") for row in shortcuts)


def _shortcuts(runs: Runs, measured: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Returns a row for each shortcut: how one seed's reward model rates it, and its rates."""
    rows = []
    for metric in figures.shortcut_rates(runs):
        name = metric.removeprefix("rate_")
        rates = {
            condition: [np.mean([run["curve"][end][metric] for run in results]) for end in (0, -1)]
            for condition, results in runs.items()
        }
        rows.append({"name": name, "rates": rates, **(measured or {}).get(name, {})})
    return rows


def _features(folder: Path) -> list[dict[str, Any]]:
    """Lists the detectors and carriers of a seed, with the effect of probing each on the reward."""
    selected = _read_if_present(folder / "probes" / "selected_features.json")
    summary = _read_if_present(folder / "probes" / "probe_summary.json")
    if not (selected and summary):
        return []
    probes = {row["feature"]: row for row in summary["features"]}
    return [
        {"list": title, **probes[feature]}
        for title, key in (("detector", "detectors"), ("carrier", "carriers"))
        for feature in selected[key]
        if feature in probes
    ]


def _probed(features: Sequence[Mapping[str, Any]]) -> str:
    """Describes what the probes did to each feature, as the beginning of a sentence."""
    row = features[0] if features else {"set_value": 0.0}
    names = (("min_value", "at least"), ("max_value", "at most"))
    bounds = [f"{words} {row[name]:g}" for name, words in names if row.get(name) is not None]
    if bounds:
        return f"Keeping a feature {' and '.join(bounds)}"
    return f"Setting a feature to {row['set_value']:g}"


def _read_if_present(path: Path) -> dict[str, Any] | None:
    """Reads a JSON file, or returns None if there is no such file."""
    return read_json(path) if path.exists() else None
