"""Tables of the report.

Values are numbers or {mean, low, high}. A measure without a title here is shown under its own name.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.changes import DEFAULTS
from pipeline.report import recordings
from pipeline.report.evaluations import BASE, Evaluation
from pipeline.report.numbers import NOTHING, change, estimate, number
from pipeline.report.runs import Run
from sarm_jax.features.feature_names import FeatureNames

GLANCE = {
    "total_reward": "R_total",
    "rm_score": "R_SARM",
    "indicator_penalty": "penalties",
    "kl_penalty": "latent KL, β · D",
    "ref_kl": "KL to the reference, nats",
    "response_length_mean": "length, tokens",
    "eos_fraction": "share that ended",
    "entropy": "entropy, nats per token",
    "zero_spread_groups": "groups whose responses all have the same reward",
    "disc_acc": "discriminator accuracy",
}
FURTHER_GLANCE = {  # columns that a run has only if its further terms are on
    "probe_penalty": "penalty of the dense probe",
    "distance_penalty": "penalty of the distance from human responses",
    "length_penalty": "penalty of the length",
    "bound_deduction": "deduction by the bound",
    "screened_fraction": "share that is screened",
}
OPTIONS = (
    "ppo.algorithm ppo.total_steps ppo.batch_size ppo.samples_per_prompt ppo.learning_rate "
    "ppo.kl_coef ppo.seed reward.unit reward.penalize_features reward.tau_values "
    "reward.alpha_values reward.clamp_features reward.beta reward.latent_indices "
    "reward.penalty_cap"
).split()
FURTHER_OPTIONS = (  # shown if they are on
    "reward.probe reward.probe_penalty reward.screen reward.human_states reward.distance_penalty "
    "reward.length_penalty reward.bound reward.ensemble"
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
    """A table of texts; the first cell of a row is its name.

    Columns from number `numeric` on hold numbers.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: int = 1


def glance(runs: Sequence[Run]) -> Table:
    """Returns the start and the end of every run."""
    rows = [["steps", *(number(run.steps) for run in runs)]]
    for name, title in (GLANCE | FURTHER_GLANCE).items():
        if any(run.has(name) for run in runs):
            cells = (_ends(run, name) if run.has(name) else NOTHING for run in runs)
            rows.append([title, *cells])
    rows.append(["minutes", *(_minutes(run) for run in runs)])
    caption = "Means over the first and the last five steps; over both halves of a short run"
    return Table(caption, ["", *(run.title for run in runs)], rows)


def guard_warnings(runs: Sequence[Run]) -> Table | None:
    """Returns the warnings of the guards during training; None without warnings."""
    fields = "guard", "first_step", "steps", "message"
    rows = [
        [run.name, *(str(warning.get(field, NOTHING)) for field in fields)]
        for run in runs
        for warning in run.warnings
    ]
    header = ["run", "guard", "from step", "on steps", "what it means"]
    return Table("Warnings of the guards", header, rows, numeric=len(header)) if rows else None


def options(runs: Sequence[Run]) -> Table | None:
    """Returns the options in which our runs differ or, for a single run, its main options.

    An option that is younger than a run has the value in it that stands for what was done before.
    """
    runs = [run for run in runs if run.origin == recordings.OURS]
    flat = [_flatten(run.options) for run in runs]
    names = list(dict.fromkeys(name for own in flat for name in own))
    if len(runs) > 1:
        flat = [_flatten(DEFAULTS) | own if own else {} for own in flat]
        names = [n for n in names if len({repr(own.get(n, "")) for own in flat}) > 1]
    else:
        names = [n for n in OPTIONS if any(own.get(n, "") != "" for own in flat)]
        names += [n for n in FURTHER_OPTIONS if any(own.get(n) for own in flat)]
    if not names:
        return None
    rows = [[n, *(str(own.get(n, NOTHING)) or NOTHING for own in flat)] for n in names]
    caption = "Options in which the runs differ" if len(runs) > 1 else "Options"
    return Table(caption, ["option", *(run.name for run in runs)], rows, numeric=len(runs) + 1)


def features(run: Run) -> Table | None:
    """Returns the start and the end of every penalised feature of a run; None without features."""
    if not run.features:
        return None

    def cell(values: Sequence[float] | None, index: int) -> str:
        return number(values[index]) if values else NOTHING

    rows = [
        [
            run.names.show(feature),
            cell(run.taus, index),
            cell(run.alphas, index),
            change(run.ends(f"feat_{feature}_above_tau")),
            change(run.ends(f"feat_{feature}_activation")),
        ]
        for index, feature in enumerate(run.features)
    ]
    header = ["feature", "τ", f"α, in {_unit(run)}", "share above τ", "mean z"]
    return Table(f"{run.title}: penalised features", header, rows)


def policy(evaluation: Evaluation) -> list[Table]:
    """Returns the tables of policy.json: means of every policy, and paired differences."""
    content = evaluation.parts.get("policy", {})
    titles = {
        "runs": "Held-out prompts: means with 95 % intervals",
        "paired": f"The same, minus {BASE}, paired by prompt",
        "between": "One adapter minus another, paired by prompt",
    }
    tables = []
    for part, title in titles.items():
        columns = _dicts(content.get(part))
        measures = {m for column in columns.values() for m in column}
        of_features = [m for m in measures if FEATURE.fullmatch(m)]
        overall = {name: _without(column, of_features) for name, column in columns.items()}
        tables.append(_table_of(overall, title, titles=POLICY))
        tables += [
            _feature_table(columns, measure, title, evaluation.names)
            for measure in FEATURE_MEASURES
        ]
    return [table for table in tables if table]


def _feature_table(
    columns: Mapping[str, Mapping[str, Any]], measure: str, title: str, names: FeatureNames
) -> Table | None:
    """Returns a measure of every controlled feature; features that are always 0 are only named."""
    by_name: dict[str, dict[str, Any]] = {name: {} for name in columns}
    for name, column in columns.items():
        for full_name, value in column.items():
            match = FEATURE.fullmatch(full_name)
            if match and match[1] == measure:
                by_name[name][f"feature {names.show(int(match[2]))}"] = value
    features = dict.fromkeys(i for column in by_name.values() for i in column)
    silent = [i for i in features if all(_is_zero(c[i]) for c in by_name.values() if i in c)]
    caption = f"{title}: {FEATURE_MEASURES[measure]}"
    if silent:
        caption += f"; 0 everywhere: {', '.join(silent)}"
    shown = {name: _without(column, silent) for name, column in by_name.items()}
    return _table_of(shown, caption, titles={i: i for i in features})


def rm_bench(evaluation: Evaluation) -> list[Table]:
    """Returns the tables of rm_bench.json: levels, change under controls, domains and matrices."""
    content = evaluation.parts.get("rm_bench", {})
    variants = {name: _overall(variant) for name, variant in _variants(content).items()}
    suffix = _missing(content.get("missing_domains")) + _old_safety_note(content)
    tables = [_table_of(variants, f"RM-Bench: accuracy{suffix}", rows_are_names=True)]
    changes = {name: _overall(variant) for name, variant in _dicts(content.get("change")).items()}
    caption = f"RM-Bench: change under controls{suffix}"
    tables.append(_table_of(changes, caption, rows_are_names=True))
    for name, variant in _variants(content).items():
        title = VARIANTS.get(name, name)
        domains = _dicts(variant.get("domains"))
        if len(domains) > 1:
            tables.append(_table_of(domains, f"RM-Bench by domain, {title}", rows_are_names=True))
        matrix = _overall(variant).get("matrix")
        if isinstance(matrix, list) and _is_square(matrix):
            styles = list(content.get("styles") or STYLES)[: len(matrix)]
            rows = [[style, *map(number, row)] for style, row in zip(styles, matrix, strict=True)]
            caption = f"RM-Bench, {title}: style of the right answer (rows) against the wrong one"
            tables.append(Table(caption, ["right \\ wrong", *styles], rows))
    return [table for table in tables if table]


def rewardbench2(evaluation: Evaluation) -> list[Table]:
    """Returns the tables of rewardbench2.json: scores by subset, and the change under controls."""
    content = evaluation.parts.get("rewardbench2", {})
    tables = []
    for variants, caption in (
        (_variants(content), "RewardBench 2: score"),
        (_dicts(content.get("change")), "RewardBench 2: change under controls"),
    ):
        columns = {}
        for name, variant in variants.items():
            subsets = {
                subset: value.get("score", value) if isinstance(value, Mapping) else value
                for subset, value in _mapping(variant.get("subsets")).items()
            }
            score = variant.get("score", variant.get("average"))
            columns[name] = subsets | ({"all subsets": score} if score is not None else {})
        tables.append(_table_of(columns, caption + _missing(content.get("missing_subsets"))))
    return [table for table in tables if table]


def steering(evaluation: Evaluation) -> list[Table]:
    """Returns the tables of steering.json: sets before and after, and the specificity."""
    content = evaluation.parts.get("steering", {})
    measures = ("source", "responses", "before", "after", "change", "absolute_change", "unchanged")
    sets = {
        name: {measure: own[measure] for measure in measures if measure in own}
        for name, own in _dicts(content.get("sets")).items()
    }
    table = _table_of(sets, "Steering: score before and after", rows_are_names=True)
    if table and "source" in table.header:
        table = dataclasses.replace(table, numeric=2)
    tables = [table]
    specificity = content.get("specificity")
    if isinstance(specificity, Mapping) and specificity.get("mean") is not None:
        targets = ", ".join(map(str, specificity.get("targets", ()))) or "the targets"
        caption = f"Steering: share of the change in {targets} (0.5: as much in the other sets)"
        tables.append(Table(caption, ["", "share"], [["specificity", estimate(specificity)]]))
    return [table for table in tables if table]


def _table_of(
    columns: Mapping[str, Any] | None,
    caption: str,
    rows_are_names: bool = False,
    titles: Mapping[str, str] | None = None,
) -> Table | None:
    """Makes a table from name → measure → value; returns None if there are no measures.

    Args:
        columns: the values; variants get their titles.
        caption: the caption.
        rows_are_names: True: a row per name; False: a column per name.
        titles: titles of measures; other measures are shown under their names.
    """
    titles = titles or {}
    flat = {VARIANTS.get(n, n): _flatten(column) for n, column in _dicts(columns).items()}
    measures = list(dict.fromkeys(m for column in flat.values() for m in column))
    measures = [m for m in measures if m not in ("matrix", "domains", "scores")]
    if not measures:
        return None
    shown = [titles.get(m, m.replace("_", " ").replace(".", " ")) for m in measures]
    if rows_are_names:
        rows = [[n, *(estimate(column.get(m)) for m in measures)] for n, column in flat.items()]
        return Table(caption, ["", *shown], rows)
    rows = [
        [title, *(estimate(column.get(m)) for column in flat.values())]
        for m, title in zip(measures, shown, strict=True)
    ]
    return Table(caption, ["", *flat], rows)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to "a.b" → value; {mean, …} counts as a value, lists are kept."""
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and "mean" not in value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _variants(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the results by variant, which are under "variants" or, in old files, at the top."""
    candidates = _dicts(content.get("variants", content))
    return {
        name: variant
        for name, variant in candidates.items()
        if {"overall", "matrix", "subsets", "average"} & set(variant)
    }


def _overall(variant: Mapping[str, Any]) -> Mapping[str, Any]:
    overall = variant.get("overall", variant)
    return {name: value for name, value in overall.items() if name != "domains"}


def _missing(names: Any) -> str:
    """Returns the end of a caption that names domains or subsets without rows."""
    return f"; no rows of {', '.join(map(str, names))}" if names else ""


def _old_safety_note(content: Mapping[str, Any]) -> str:
    """Returns the end of a caption for files of an older version, which did not pool safety."""
    halves = {"safety-refuse", "safety-response"}
    for variant in _variants(content).values():
        domains = _dicts(variant.get("domains"))
        if halves <= domains.keys() and "safety" not in domains:
            return "; safety-refuse and safety-response count half of safety each"
    return ""


def _dicts(content: Any) -> dict[str, Mapping[str, Any]]:
    """Returns the entries of `content` that are mappings; none if it is not a mapping itself."""
    return {str(n): value for n, value in _mapping(content).items() if isinstance(value, Mapping)}


def _mapping(content: Any) -> Mapping[str, Any]:
    return content if isinstance(content, Mapping) else {}


def _without(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


def _is_zero(value: Any) -> bool:
    numbers = value.values() if isinstance(value, Mapping) else [value]
    return all(item == 0 for item in numbers)


def _is_square(matrix: Sequence[Any]) -> bool:
    return all(isinstance(row, list) and len(row) == len(matrix) for row in matrix)


def _ends(run: Run, name: str) -> str:
    mark = recordings.CELL_MARK if recordings.differs(run.origin, name) else ""
    return change(run.ends(name)) + mark


def _minutes(run: Run) -> str:
    marked = np.isfinite(run.seconds) and recordings.differs(run.origin, "minutes")
    return number(run.seconds / 60) + (recordings.CELL_MARK if marked else "")


def _unit(run: Run) -> str:
    unit = run.options.get("reward", {}).get("unit", "score")
    return "sd of the score" if unit == "sd" else "reward-model units"
