"""The study's files: lab.json, figures/*.png, and lab.html, which needs nothing but itself."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sarm_jax.io.files import replacing
from sarm_jax.lab import figures
from sarm_jax.lab.conditions import DESCRIPTIONS
from sarm_jax.lab.findings import Runs, claims, difference, gates_passed, headline, show
from sarm_jax.lab.gates import LIMITS, Gate
from sarm_jax.reporting.page import environment, picture_uri
from sarm_jax.reporting.statistics import mean_interval

FIGURES = {
    "goodhart": (
        figures.goodhart,
        "Gold reward and SARM score over the PPO steps, and gold over the KL to the reference, "
        "a line per condition",
    ),
    "final_gold": (figures.final_gold, "Final gold reward of every seed in every condition"),
    "detected": (figures.detected, "Share of responses with a detector firing, and flattery"),
}


def write_study(
    workdir: Path,
    finished: Mapping[int, Sequence[str]],
    conditions: Sequence[str],
    stopped: Mapping[int, str],
) -> tuple[Path, str]:
    """Reads what the seeds left under `workdir` and writes the files: (the page, the result).

    `finished` says which conditions of each seed belong to this study, `stopped` why seeds did not
    finish. What else lies there, of other options perhaps, is left out.
    """
    seeds = list(finished)
    gates = {
        str(seed): {name: gate["value"] for name, gate in found.items()}
        for seed in seeds
        if (found := _json(workdir / f"seed_{seed}" / "probes" / "gates.json"))
    }
    runs: dict[str, list[dict[str, Any]]] = {}
    for condition in conditions:
        having = [seed for seed in seeds if condition in finished[seed]]
        paths = [workdir / f"seed_{seed}" / condition / "result.json" for seed in having]
        results = [found for path in paths if (found := _json(path))]
        if results:
            runs[condition] = results
    found_claims = [gates_passed(gates, seeds), *claims(runs, seeds)]
    content: dict[str, Any] = {
        "headline": headline(runs) if runs else "No seed has a finished run.",
        "gates": {
            name: {
                "limit": " ".join(map(str, LIMITS[name])),
                "seeds": {
                    seed: {"value": values[name], "passed": Gate(name, values[name]).passed}
                    for seed, values in gates.items()
                },
            }
            for name in LIMITS
        },
        "conditions": runs,
        "claims": [dataclasses.asdict(claim) for claim in found_claims],
        "stopped": {str(seed): why for seed, why in stopped.items()},
        "final_gold": {
            name: mean_interval([run["gold_final"] for run in results])
            for name, results in runs.items()
        },
    }
    with replacing(workdir / "lab.json") as file:
        json.dump(content, file, indent=1)
    (workdir / "figures").mkdir(exist_ok=True)
    pictures = []
    for name, (draw, text) in FIGURES.items() if runs else ():
        light, dark = draw(runs), draw(runs, dark=True)
        with replacing(workdir / "figures" / f"{name}.png", "wb") as file:
            file.write(light)
        pictures.append({"light": picture_uri(light), "dark": picture_uri(dark), "text": text})
    with replacing(workdir / "lab.html") as file:
        file.write(_render(content, pictures, workdir, seeds))
    return workdir / "lab.html", content["headline"]


def _render(content: Mapping[str, Any], pictures, workdir: Path, seeds: Sequence[int]) -> str:
    runs: Runs = content["conditions"]
    failed = {seed for claim in content["claims"] for seed in claim["failed"]}
    shown = next((seed for seed in seeds if str(seed) not in content["stopped"]), seeds[0])
    features = _features(workdir / f"seed_{shown}")
    return (
        environment(Path(__file__).parent)
        .get_template("page.html")
        .render(
            **content,
            pictures=pictures,
            conditions_table=[_condition_row(runs, name) for name in runs],
            seeds=sorted(seeds, key=lambda seed: (seed not in failed, seed)),
            failed=failed,
            runs={name: {run["seed"]: run for run in results} for name, results in runs.items()},
            shown=shown,
            features=features,
            probed=_probed(features),
            descriptions=DESCRIPTIONS,
        )
    )


def _condition_row(runs: Runs, name: str) -> dict[str, Any]:
    results = runs[name]

    def mean(field: str) -> str:
        return f"{mean_interval([run[field] for run in results])['mean']:.2f}"

    against = "" if name == "baseline" or "baseline" not in runs else "baseline"
    return {
        "name": name,
        "start": mean("gold_start"),
        "peak": mean("gold_peak"),
        "final": show(mean_interval([run["gold_final"] for run in results])),
        "worst": f"{min(run['gold_final'] for run in results):.2f}",
        "score": mean("score_final"),
        "ref_kl": mean("ref_kl_final"),
        "gain": show(difference(runs, name, against)) if against else "",
    }


def _features(folder: Path) -> list[dict[str, Any]]:
    """The detectors and carriers of a seed, with what probing each does to the reward."""
    selected = _json(folder / "probes" / "selected_features.json")
    summary = _json(folder / "probes" / "probe_summary.json")
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
    """What the probes did to each feature, as the beginning of a sentence."""
    row = features[0] if features else {"set_value": 0.0}
    names = (("min_value", "at least"), ("max_value", "at most"))
    bounds = [f"{words} {row[name]:g}" for name, words in names if row.get(name) is not None]
    if bounds:
        return f"Keeping a feature {' and '.join(bounds)}"
    return f"Setting a feature to {row['set_value']:g}"


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
