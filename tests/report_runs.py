"""Synthetic runs and evaluations for the tests of the report, with texts that try to break it."""

import csv
import html
import json
import re
from pathlib import Path

import numpy as np

from ppo.tracking.metrics import COLUMNS

FEATURES, ALPHAS, TAUS, SIGMA = (7, 3), (0.5, 1.0), (0.2, 0.4), 2.0
HOSTILE = (
    "</script><script>document.title='broken'</script>",
    "<img src=x onerror=\"document.title='broken'\"> & \"quotes\" 'single'",
    "<!-- <script> --> ]]> {{ 7 * 7 }} ${7*7} \\u003c \\",
    "line\u2028separator\u2029and \u202egnirts desrever\u202c and \ufeff",
    "emoji 😊, Ελληνικά, עברית, \ud83d alone, and a\nsecond line",
)
NAMES = ("penalty", "plain <b>&\"'")


def write_run(folder: Path, steps: int = 12, controls: bool = True, seed: int = 0) -> Path:
    """Writes a run like that of the stage train, with two penalised features."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows, samples, held_out = [], [], []
    for step in range(steps):
        fired = np.round(rng.uniform(0, 0.5, 2) * 16) / 16
        penalty = SIGMA * float(fired @ ALPHAS) if controls else 0.0
        row = {name: rng.normal() for name in COLUMNS}
        row |= {"step": step, "rm_score": -1 + 0.3 * step, "indicator_penalty": penalty}
        row |= {"kl_penalty": 0.05 * step if controls else 0.0, "ref_kl": step * 1.5}
        row |= {"eos_fraction": 0.9, "response_length_mean": 20 + step, "response_length_std": 3}
        row["total_reward"] = row["rm_score"] - penalty - row["kl_penalty"]
        if not controls:
            row |= {"disc_loss": "", "disc_acc": ""}
        for feature, share in zip(FEATURES if controls else (), fired, strict=False):
            row |= {f"feat_{feature}_activation": share / 3, f"feat_{feature}_above_tau": share}
        rows.append(row)
        samples.append(_sample(step, HOSTILE[step % len(HOSTILE)], controls))
    for step in (0, steps):
        for number, text in enumerate(HOSTILE):
            sample = _sample(step, text, controls and number % 2 == 0)
            held_out.append(sample | {"ref_kl": 0.1, "ended": number != 1})
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    write_lines(folder / "samples.jsonl", samples)
    write_lines(folder / "evaluations.jsonl", held_out)
    reward = {"alpha_values": "0.5,1.0", "tau_values": "0.2,0.4", "unit": "sd", "beta": 0.1}
    options = {"ppo": {"total_steps": steps, "seed": seed}, "reward": reward if controls else {}}
    (folder / "config.json").write_text(json.dumps(options))
    summary = {"steps": steps, "score_mean_at_start": -1.0, "score_std_at_start": SIGMA}
    warning = {"guard": "no_eos", "first_step": 7, "steps": 3, "message": HOSTILE[0]}
    summary["warnings"] = [] if controls else [warning]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_evaluation(folder: Path, prompts: int = 30) -> Path:
    """Writes the files of the stage evaluate for the base policy and two others."""
    rng = np.random.default_rng(1)
    eval_folder = folder / "eval"
    eval_folder.mkdir(parents=True, exist_ok=True)
    write_lines(eval_folder / "responses.jsonl", [_evaluated(rng, n) for n in range(prompts)])
    points = [
        {"source": source, "x": rng.normal() + n, "y": rng.normal(), "prompt": "", "response": ""}
        for n, source in enumerate(("human", "base", *NAMES))
        for _ in range(25)
    ]
    nothing = dict.fromkeys(("mean", "low", "high"), 0.0)
    measures = {"score": interval(1.5), "length": interval(20)}
    measures |= {"latent_7": interval(0.5), "active_7": interval(0.3), "penalty_7": nothing}
    measures |= {"latent_3": nothing, "active_3": nothing, "penalty_3": nothing}
    level = {name: interval(0.7) for name in ("easy", "normal", "hard", "average")}
    results = {"rows": 129, "matrix": [[0.5, 0.4, 0.3], [0.6, 0.5, 0.4], [0.7, 0.6, 0.5]]} | level
    domains = {"chat": results, "code": results}
    bench = {"domains": domains, "overall": results}
    subsets = {"Factuality": {"rows": 9, "score": interval(0.6)}, "Ties": {"score": interval(0.4)}}
    variant = {"subsets": subsets, "score": interval(0.5)}
    scores = {"before": rng.normal(size=40).tolist(), "after": rng.normal(1, 1, 40).tolist()}
    kept = {"responses": 40, "before": interval(0), "after": interval(1), "change": interval(1)}
    files = {
        "latent_map": {"explained": [0.41, 0.17], "points": points},
        "policy": {
            "runs": dict.fromkeys(("base", *NAMES), measures),
            "paired": dict.fromkeys(NAMES, measures),
            "further": 1,
        },
        "rm_bench": {
            "styles": ["concise", "detailed", "markdown"],
            "variants": {"plain": bench, "controlled": bench},
            "change": {"controlled": {"overall": level}},
        },
        "rewardbench2": {"variants": {"plain": variant, "controlled": variant}, "change": {}},
        "steering": {
            "sets": {"chosen": kept | {"scores": scores}, "rejected": kept | {"scores": scores}},
            "specificity": interval(0.8) | {"targets": ["rejected"]},
        },
    }
    for name, content in files.items():
        (eval_folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def write_feature_pages(folder: Path, features: tuple[int, ...] = (*FEATURES, 5)) -> Path:
    """Writes feature_pages.json of identify and evaluate, and a certificate of the last feature."""
    rng = np.random.default_rng(2)
    for place, groups, roles in (
        ("probes", ("chosen", "rejected"), ["detector", "carrier"]),
        ("eval", ("human", "base", *NAMES), ["penalised", "top mover"]),
    ):
        rows = [
            {
                "feature": i,
                "roles": roles[: 1 + (i == features[0])],
                "weight": 0.25 * i,
                "weight_rank": i,
                "tau": 0.4 if place == "eval" else 0.1,
                "groups": {name: _activations(rng, place == "eval") for name in groups},
                "neighbours": [
                    {"feature": n, "cosine": c}
                    for n, c in zip((3, 9, 11), (0.9, 0.5, 0.01), strict=True)
                ],
                "examples": [_page_example(rng, text, groups[:1]) for text in HOSTILE],
            }
            for i in features
        ]
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_lines(folder / place / "feature_pages.json", [{"latents": 64, "features": rows}])
    certificate = {"feature": features[-1], "certified": True, "reason": f"it is real {HOSTILE[1]}"}
    (folder / "probes" / "certificates.json").write_text(json.dumps({"features": [certificate]}))
    return folder


def mentions_of_features(page: str) -> list[tuple[str, str]]:
    """Returns each feature that a page mentions outside its data, and up to 12 characters after it.

    A row of a table that is called by a bare number counts as well.
    """
    body = page.split("<body>")[1].split('<script type="application/json"')[0]
    body = html.unescape(re.sub('="data:[^"]*"', "", body))
    cells = r"<(?:th scope=\"row\"|td)>(?:<a[^>]*>)?(\d+)(</[^>]*)"
    return re.findall(r"(?i)\b(?:feature|penalty) (\d+)(.{0,12})", body) + re.findall(cells, body)


def _activations(rng: np.random.Generator, strong: bool) -> dict:
    counts = rng.integers(0, 40, 24).tolist()
    shares = {"fires": 0.4, "above_tau": 0.1 if strong else None, "mean": 0.2}
    return {"responses": 100, "range": [0.0, 2.0 if strong else 1.0], "counts": counts} | shares


def _page_example(rng: np.random.Generator, text: str, groups: tuple[str, ...]) -> dict:
    words = text.replace(" ", "\n ").split("\n")
    tokens: list = [[word, float(max(0.0, rng.normal()))] for word in words]
    tokens = [{"left_out": 17}, *tokens, ["<|eot_id|>", 1.5]]
    return {"z": 1.5, "groups": list(groups), "prompt": f"asked {text}", "tokens": tokens}


def interval(mean: float) -> dict[str, float]:
    """Returns a mean with an interval."""
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


def write_lines(path: Path, rows: list[dict]) -> None:
    """Writes JSON Lines like a run; characters are escaped only if UTF-8 cannot encode them."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines = [line.replace("\ud83d", "\\ud83d") for line in lines]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _sample(step: int, text: str, fires: bool) -> dict:
    penalties = {str(i): SIGMA * a * fires for i, a in zip(FEATURES, ALPHAS, strict=True)}
    row = {"step": step, "prompt": f"prompt {text}", "response": f"after {step}: {text}"}
    row |= {"rm_score": 0.5 * step - 1, "penalties": penalties, "kl_penalty": 0.0}
    return row | {"total_reward": row["rm_score"] - sum(penalties.values())}


def _evaluated(rng: np.random.Generator, number: int) -> dict:
    text = HOSTILE[number % len(HOSTILE)]
    responses = {}
    for position, name in enumerate(("base", *NAMES)):
        z, w = rng.uniform(0, 20, 12), rng.normal(0, 5e-3, 12)
        terms = [[int(i), float(z[i]), float(w[i]), float(z[i] * w[i])] for i in range(12)]
        terms.sort(key=lambda term: -abs(term[3]))
        rest = float(rng.normal(0, 1e-2))
        fires = bool(position == 0 and number % 3 == 0)
        responses[name] = {
            "response": f"{name} {number}: {text}",
            "score": sum(term[3] for term in terms) + rest,
            "controlled_score": 0.0,
            "length": 10 * position + number,
            "ended": number % 4 != 0,
            "bias": 0.0,
            "terms": terms,
            "rest": rest,
            "penalties": {"7": SIGMA * 0.5 * fires, "3": 0.0},
        }
    return {"prompt": f"question {number}: {text}", "responses": responses}


REFERENCE_COLUMNS = (
    "step timestamp total_reward rm_score indicator_penalty kl_penalty response_length_mean "
    "response_length_std ppo_loss policy_loss value_loss entropy approx_kl clip_fraction "
    "reward_mean reward_std reward_min reward_max advantage_mean advantage_std gpu_memory_gb"
).split()


def write_recording(
    folder: Path, name: str, steps: int = 20, features: tuple[int, ...] = (48, 28)
) -> Path:
    """Writes NAME_metrics.csv and NAME_summary.json in the format of the reference implementation.

    Steps count from 1. A row covers two responses, and a feature that exceeds τ costs 0.1.

    Returns:
        The path of the metrics.
    """
    rng = np.random.default_rng(steps)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for step in range(1, steps + 1):
        fired = rng.integers(0, 3, len(features)) / 2
        row = {column: float(rng.normal()) for column in REFERENCE_COLUMNS}
        row |= {"step": step, "timestamp": 12.0 * step, "kl_penalty": 0.0, "rm_score": -0.1}
        row |= {"response_length_mean": 256.0, "response_length_std": 0.0, "entropy": 2.5}
        row["indicator_penalty"] = 0.1 * float(fired.sum())
        row["total_reward"] = row["reward_mean"] = row["rm_score"] - row["indicator_penalty"]
        row |= {f"feat_{i}_activation": 8 * f for i, f in zip(features, fired, strict=True)}
        row |= {f"feat_{i}_above_tau": f for i, f in zip(features, fired, strict=True)}
        rows.append(row)
    path = folder / f"{name}_metrics.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {"experiment_name": name, "total_steps": steps, "metrics_path": str(path)}
    summary["final_metrics"] = rows[-1]
    (folder / f"{name}_summary.json").write_text(json.dumps(summary))
    return path
