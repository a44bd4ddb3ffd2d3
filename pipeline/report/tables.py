"""The report's tables. Values may be numbers or {mean, low, high}; keys that are not known by name
are shown under their own."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.report import recordings
from pipeline.report.evaluations import BASE, Evaluation
from pipeline.report.numbers import NOTHING, change, estimate, number
from pipeline.report.runs import Run

GLANCE = {
    "total_reward": "R_total",
    "rm_score": "R_SARM",
    "indicator_penalty": "penalties",
    "kl_penalty": "latent KL, β · D",
    "ref_kl": "KL to the reference, nats",
    "response_length_mean": "length, tokens",
    "eos_fraction": "share that ended",
    "entropy": "entropy, nats per token",
    "disc_acc": "discriminator accuracy",
}
OPTIONS = (
    "ppo.total_steps ppo.batch_size ppo.learning_rate ppo.kl_coef ppo.seed reward.unit "
    "reward.penalize_features reward.tau_values reward.alpha_values reward.clamp_features "
    "reward.beta reward.latent_indices reward.penalty_cap"
).split()
POLICY = {
    "score": "R_SARM",
    "controlled_score": "R_SARM under the controls",
    "score_without": "R_SARM without the controlled features",
    "penalty": "penalties",
    "kl": "KL to the base, nats",
    "length": "length, tokens",
    "ended": "share that ended",
    "repetition": "share of repeated trigrams",
    "win_rate": "wins against the base",
    "win_rate_controlled": "wins under the controls",
    "win_rate_without": "wins without the controlled features",
    "length_score_correlation": "correlation of length and R_SARM",
}
FEATURE = re.compile(r"(penalty|latent|active)_(\d+)")
FEATURE_MEASURES = {
    "active": "share of responses with z above 0",
    "latent": "mean z",
    "penalty": "penalty before the cap",
}
VARIANTS = {
    "plain": "without controls",
    "without_controls": "without controls",
    "controlled": "with controls",
    "with_controls": "with controls",
    "penalised": "with penalties",
}
STYLES = ("concise", "detailed, plain", "detailed, markdown")


@dataclasses.dataclass(frozen=True)
class Table:
    """`rows` of texts; the first of each is its name, columns from `numeric` on are numbers."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: int = 1


def glance(runs: Sequence[Run]) -> Table:
    """The start and the end of every run."""
    rows = [["steps", *(number(run.steps) for run in runs)]]
    for name, title in GLANCE.items():
        if any(run.has(name) for run in runs):
            cells = (_ends(run, name) if run.has(name) else NOTHING for run in runs)
            rows.append([title, *cells])
    rows.append(["minutes", *(_minutes(run) for run in runs)])
    caption = "Means over the first and over the last five steps, of short runs over their halves"
    return Table(caption, ["", *(run.title for run in runs)], rows)


def guard_warnings(runs: Sequence[Run]) -> Table | None:
    """What the guards said while the runs were trained."""
    fields = "guard", "first_step", "steps", "message"
    rows = [
        [run.name, *(str(warning.get(field, NOTHING)) for field in fields)]
        for run in runs
        for warning in run.warnings
    ]
    header = ["run", "guard", "from step", "on steps", "what it means"]
    return Table("Warnings of the guards", header, rows, numeric=len(header)) if rows else None


def options(runs: Sequence[Run]) -> Table | None:
    """What our runs differ in; of a single one, its reward."""
    runs = [run for run in runs if run.origin == recordings.OURS]
    flat = [_flatten(run.options) for run in runs]
    names = list(dict.fromkeys(name for found in flat for name in found))
    if len(runs) > 1:
        names = [n for n in names if len({repr(found.get(n, "")) for found in flat}) > 1]
    else:
        names = [n for n in OPTIONS if any(found.get(n, "") != "" for found in flat)]
    if not names:
        return None
    rows = [[n, *(str(found.get(n, NOTHING)) or NOTHING for found in flat)] for n in names]
    caption = "Options in which the runs differ" if len(runs) > 1 else "Options"
    return Table(caption, ["option", *(run.name for run in runs)], rows, numeric=len(runs) + 1)


def features(run: Run) -> Table | None:
    """Every penalised feature of a run, from the start to the end."""
    if not run.features:
        return None

    def known(values: Sequence[float] | None, place: int) -> str:
        return number(values[place]) if values else NOTHING

    rows = [
        [
            str(i),
            known(run.taus, place),
            known(run.alphas, place),
            change(run.ends(f"feat_{i}_above_tau")),
            change(run.ends(f"feat_{i}_activation")),
        ]
        for place, i in enumerate(run.features)
    ]
    header = ["feature", "τ", f"α, in {_unit(run)}", "share above τ", "mean z"]
    return Table(f"{run.title}: penalised features", header, rows)


def policy(evaluation: Evaluation) -> list[Table]:
    """policy.json: every policy's means, and the paired differences from the base."""
    content = evaluation.parts.get("policy", {})
    titles = {
        "runs": "Held-out prompts: means with 95 % intervals",
        "paired": f"The same, minus {BASE}, paired by prompt",
        "between": "One adapter minus another, paired by prompt",
    }
    tables = []
    for part, title in titles.items():
        columns = _dicts(content.get(part))
        measures = {m for found in columns.values() for m in found}
        of_features = [m for m in measures if FEATURE.fullmatch(m)]
        whole = {name: _without(found, of_features) for name, found in columns.items()}
        tables.append(_table_of(whole, title, known=POLICY))
        tables += [_feature_table(columns, measure, title) for measure in FEATURE_MEASURES]
    return [table for table in tables if table]


def _feature_table(
    columns: Mapping[str, Mapping[str, Any]], measure: str, title: str
) -> Table | None:
    """A measure of every controlled feature; those that are 0 everywhere are only named."""
    by_name: dict[str, dict[str, Any]] = {name: {} for name in columns}
    for name, found in columns.items():
        for full_name, value in found.items():
            match = FEATURE.fullmatch(full_name)
            if match and match[1] == measure:
                by_name[name][f"feature {match[2]}"] = value
    features = dict.fromkeys(i for found in by_name.values() for i in found)
    silent = [i for i in features if all(_is_zero(f[i]) for f in by_name.values() if i in f)]
    caption = f"{title}: {FEATURE_MEASURES[measure]}"
    if silent:
        caption += f"; 0 everywhere: {', '.join(silent)}"
    return _table_of({n: _without(found, silent) for n, found in by_name.items()}, caption)


def rm_bench(evaluation: Evaluation) -> list[Table]:
    """The levels of every variant, the change under controls, domains and 3 × 3 matrices."""
    content = evaluation.parts.get("rm_bench", {})
    variants = {name: _overall(part) for name, part in _variants(content).items()}
    limits = _missing(content.get("missing_domains")) + _halves(content)
    tables = [_table_of(variants, f"RM-Bench: accuracy{limits}", rows_are_names=True)]
    changes = {name: _overall(part) for name, part in _dicts(content.get("change")).items()}
    caption = f"RM-Bench: change under controls{limits}"
    tables.append(_table_of(changes, caption, rows_are_names=True))
    for name, part in _variants(content).items():
        title = VARIANTS.get(name, name)
        domains = _dicts(part.get("domains"))
        if len(domains) > 1:
            tables.append(_table_of(domains, f"RM-Bench by domain, {title}", rows_are_names=True))
        matrix = _overall(part).get("matrix")
        if isinstance(matrix, list) and _is_square(matrix):
            styles = list(content.get("styles") or STYLES)[: len(matrix)]
            rows = [[s, *map(number, line)] for s, line in zip(styles, matrix, strict=True)]
            caption = f"RM-Bench, {title}: style of the right answer (rows) against the wrong one"
            tables.append(Table(caption, ["right \\ wrong", *styles], rows))
    return [table for table in tables if table]


def rewardbench2(evaluation: Evaluation) -> list[Table]:
    """Subsets by variant, and the change under controls."""
    content = evaluation.parts.get("rewardbench2", {})
    tables = []
    for found, caption in (
        (_variants(content), "RewardBench 2: score"),
        (_dicts(content.get("change")), "RewardBench 2: change under controls"),
    ):
        columns = {}
        for name, part in found.items():
            subsets = {
                subset: value.get("score", value) if isinstance(value, Mapping) else value
                for subset, value in _mapping(part.get("subsets")).items()
            }
            whole = part.get("score", part.get("average"))
            columns[name] = subsets | ({"all subsets": whole} if whole is not None else {})
        tables.append(_table_of(columns, caption + _missing(content.get("missing_subsets"))))
    return [table for table in tables if table]


def steering(evaluation: Evaluation) -> list[Table]:
    """Sets of responses before and after."""
    content = evaluation.parts.get("steering", {})
    names = ("source", "responses", "before", "after", "change", "absolute_change", "unchanged")
    sets = {
        kind: {name: found[name] for name in names if name in found}
        for kind, found in _dicts(content.get("sets")).items()
    }
    table = _table_of(sets, "Steering: score before and after", rows_are_names=True)
    if table and "source" in table.header:
        table = dataclasses.replace(table, numeric=2)
    tables = [table]
    specificity = content.get("specificity")
    if isinstance(specificity, Mapping) and specificity.get("mean") is not None:
        targets = ", ".join(map(str, specificity.get("targets", ()))) or "the targets"
        caption = f"Steering: share of the change that falls on {targets} (0.5: as much elsewhere)"
        tables.append(Table(caption, ["", "share"], [["specificity", estimate(specificity)]]))
    return [table for table in tables if table]


def _table_of(
    columns: Mapping[str, Any] | None,
    caption: str,
    rows_are_names: bool = False,
    known: Mapping[str, str] | None = None,
) -> Table | None:
    """Name → measure → value as a table: names are columns, or rows; `known` titles measures."""
    known = known or {}
    flat = {VARIANTS.get(n, n): _flatten(found) for n, found in _dicts(columns).items()}
    measures = list(dict.fromkeys(m for found in flat.values() for m in found))
    measures = [m for m in measures if m not in ("matrix", "domains", "scores")]
    if not measures:
        return None
    titles = [known.get(m, m.replace("_", " ").replace(".", " ")) for m in measures]
    if rows_are_names:
        rows = [[n, *(estimate(found.get(m)) for m in measures)] for n, found in flat.items()]
        return Table(caption, ["", *titles], rows)
    rows = [
        [title, *(estimate(found.get(m)) for found in flat.values())]
        for m, title in zip(measures, titles, strict=True)
    ]
    return Table(caption, ["", *flat], rows)


def _flatten(found: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """ "a.b" → value; {mean, …} is a value, lists and what is in a list are left as they are."""
    flat: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, Mapping) and "mean" not in value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _variants(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Without controls, with them, and so on: under "variants", or at the top."""
    parts = _dicts(content.get("variants", content))
    return {
        name: part
        for name, part in parts.items()
        if {"overall", "matrix", "subsets", "average"} & set(part)
    }


def _overall(part: Mapping[str, Any]) -> Mapping[str, Any]:
    whole = part.get("overall", part)
    return {name: value for name, value in whole.items() if name != "domains"}


def _missing(parts: Any) -> str:
    """The end of a caption if a benchmark's score lacks some of its parts."""
    return f"; no rows of {', '.join(map(str, parts))}" if parts else ""


def _halves(content: Mapping[str, Any]) -> str:
    """The end of a caption if an older version wrote the overall of RM-Bench, in its own way."""
    halves = {"safety-refuse", "safety-response"}
    for part in _variants(content).values():
        domains = _dicts(part.get("domains"))
        if halves <= domains.keys() and "safety" not in domains:
            return "; safety-refuse and safety-response count half of safety each"
    return ""


def _dicts(found: Any) -> dict[str, Mapping[str, Any]]:
    return {str(n): value for n, value in _mapping(found).items() if isinstance(value, Mapping)}


def _mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def _without(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in names}


def _is_zero(value: Any) -> bool:
    numbers = value.values() if isinstance(value, Mapping) else [value]
    return all(found == 0 for found in numbers)


def _is_square(matrix: Sequence[Any]) -> bool:
    return all(isinstance(row, list) and len(row) == len(matrix) for row in matrix)


def _ends(run: Run, name: str) -> str:
    mark = recordings.CELL_MARK if recordings.differs(run.origin, name) else ""
    return change(run.ends(name)) + mark


def _minutes(run: Run) -> str:
    known = np.isfinite(run.seconds) and recordings.differs(run.origin, "minutes")
    return number(run.seconds / 60) + (recordings.CELL_MARK if known else "")


def _unit(run: Run) -> str:
    unit = run.options.get("reward", {}).get("unit", "score")
    return "sd of the score" if unit == "sd" else "reward-model units"
