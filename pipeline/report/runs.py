"""Reads a run from its working directory: metrics, samples and options, and what is missing.

Of a run of another program only the metrics exist (`recordings`).

The share of each feature in the penalty of a step follows from α and from how often it was active:

    penalty_i(t) = indicator_penalty(t) · α_i f_i(t) / Σ_j α_j f_j(t),   f_i = feat_{i}_above_tau

It equals α_i f_i in reward units, whatever the unit of α, unless the penalties of a response were
scaled down to reward.penalty_cap. The shares add up to the penalty.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.report import recordings
from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.features.feature_lists import parse_features, parse_values
from sarm_jax.features.feature_names import NO_NAMES, FeatureNames
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import read_bytes
from sarm_jax.io.json_files import read_json
from sarm_jax.io.jsonl import line_of, parse_jsonl
from sarm_jax.io.path_lists import relocated
from sarm_jax.io.workdir import VERSION_KEY
from sarm_jax.models.conversation_rows import prompt_of

SAMPLE = {"step": int, "rm_score": float, "penalties": dict, "total_reward": float}
Number = TypeVar("Number", int, float)
EDGE = 5  # steps whose mean stands for the start, or the end, of a run; at most half of the run
TRAIN = "python main.py --config=CONFIG --stage=train --workdir="


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of PPO, as far as its files exist.

    Attributes:
        name: its name in the report.
        position: its position in the report, which selects its colour in figures.
        folder: its working directory, or the file that the user named.
        column_t: the columns of metrics.csv `[T]`; NaN if a step has no value.
        samples: the rows of samples.jsonl.
        held_out: the rows of evaluations.jsonl.
        options: the content of config.json.
        features: the penalised features.
        alphas: the α of each feature; None if the options cannot be read any more.
        taus: the τ of each feature; None if the options cannot be read any more.
        scale: mean and standard deviation of the reference responses' scores.
        warnings: warnings of the guards, as in summary.json.
        missing: sentences on missing files, each with the command that makes the file.
        origin: the program that wrote the metrics, from `recordings.origin_of`.
        names: names of features.
        clamped: the clamped features, as far as the options can be read.
    """

    name: str
    position: int
    folder: Path
    column_t: Mapping[str, np.ndarray]
    samples: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    features: tuple[int, ...]
    alphas: tuple[float, ...] | None
    taus: tuple[float, ...] | None
    scale: tuple[float, float] | None
    warnings: Sequence[Mapping[str, Any]]
    missing: tuple[str, ...]
    origin: str = recordings.OURS
    names: FeatureNames = NO_NAMES
    clamped: tuple[int, ...] = ()

    @property
    def mark(self) -> str:
        """The mark behind the name of the run if another program recorded it."""
        return "" if self.origin == recordings.OURS else recordings.RUN_MARK

    @property
    def title(self) -> str:
        """Name and mark."""
        return self.name + self.mark

    @property
    def steps(self) -> int:
        """Number of finished steps."""
        return len(self.column_t.get("step", ()))

    def column(self, name: str) -> np.ndarray:
        """Returns a column `[T]`, all NaN if metrics.csv does not have it."""
        return self.column_t.get(name, np.full(self.steps, np.nan))

    def has(self, name: str) -> bool:
        """Returns whether any step has a value of `name`."""
        return bool(np.isfinite(self.column(name)).any())

    @property
    def clamps(self) -> bool:
        """True if `rm_score` is the score of clamped latents."""
        reward = self.options.get("reward", {})
        return isinstance(reward, Mapping) and bool(reward.get("clamp_features"))

    @property
    def screens(self) -> bool:
        """True if the features screen responses instead of penalising them."""
        reward = self.options.get("reward", {})
        return isinstance(reward, Mapping) and bool(reward.get("screen"))

    @property
    def seconds(self) -> float:
        """Duration of all steps in seconds; NaN if it is not recorded."""
        if self.origin == recordings.REFERENCE:
            time_t = self.column("timestamp")
            return float(np.nanmax(time_t)) if self.has("timestamp") else float("nan")
        columns = [f"time_{part}" for part in ("rollout", "score", "update")]
        if not any(map(self.has, columns)):
            return float("nan")
        return float(np.nansum([self.column(name) for name in columns]))

    def ends(self, name: str) -> tuple[float, float]:
        """Returns the means of a column at the start and at the end, see `ends`."""
        return ends(self.column(name))

    def penalties(self) -> dict[int, np.ndarray] | None:
        """Returns each feature's share of the indicator penalty `[T]`; None if α is unknown.

        Features that screen responses instead have no share.
        """
        if self.screens:
            return {}
        if self.alphas is None or not self.features:
            return None if self.features else {}
        fired_nt = np.array([self.column(f"feat_{i}_above_tau") for i in self.features])
        weight_nt = np.array(self.alphas)[:, None] * fired_nt
        total_t = weight_nt.sum(axis=0)
        share_nt = np.divide(weight_nt, total_t, out=np.zeros_like(weight_nt), where=total_t != 0)
        return dict(zip(self.features, share_nt * self.column("indicator_penalty"), strict=True))


def ends(values_t: np.ndarray) -> tuple[float, float]:
    """Returns the mean over the first five and over the last five steps.

    With fewer than ten steps, the two halves are used. Steps without a value are ignored; if no
    step has a value, the mean is NaN.
    """
    edge = max(1, min(EDGE, len(values_t) // 2))
    return _mean(values_t[:edge]), _mean(values_t[-edge:])


def read_run(name: str, folder: Path, position: int = 0) -> Run:
    """Reads the run in `folder`, or a run of which only the metrics exist.

    Args:
        name: the name of the run in the report.
        folder: its working directory, or a file of metrics.
        position: its position in the report.

    Raises:
        InputError: the directory holds no run, or several, or a file is malformed.
    """
    recording = recordings.metrics_file(folder)
    if recording:
        return _read_recording(recording, name=name, folder=folder, position=position)
    if not folder.is_dir():
        raise InputError(f"report.runs: {folder} is not a directory")
    if not any((folder / part).exists() for part in ("metrics.csv", "samples.jsonl", "eval")):
        raise InputError(
            f"report.runs: {folder} holds no run (no metrics.csv or NAME_metrics.csv, "
            f"samples.jsonl or eval/); {TRAIN}{folder} makes one"
        )
    missing: list[str] = []
    rows = _metrics(folder, missing)
    samples = _rows(folder / "samples.jsonl", SAMPLE | {"kl_penalty": float}, missing)
    held_out = []
    if (folder / "evaluations.jsonl").exists():
        fields = SAMPLE | {"ref_kl": float, "ended": bool}
        held_out = _rows(folder / "evaluations.jsonl", fields, missing)
    summary = _summary(folder, missing, len(rows))
    options = read_object(folder / "config.json") or {}
    options.pop(VERSION_KEY, None)
    columns, origin = _columns(rows)
    features = _features(columns)
    reward = options.get("reward", {})
    return Run(
        name=name,
        position=position,
        folder=folder,
        column_t=columns,
        samples=samples,
        held_out=held_out,
        options=options,
        features=features,
        alphas=_read_values(reward, "alpha_values", folder=folder, count=len(features)),
        taus=_read_values(reward, "tau_values", folder=folder, count=len(features)),
        scale=_scale(summary),
        warnings=_objects(summary.get("warnings")),
        missing=tuple(missing),
        origin=origin,
        clamped=_read_list(reward, "clamp_features", folder=folder, parse=parse_features) or (),
    )


def _metrics(folder: Path, missing: list[str]) -> list[dict[str, float]]:
    """Reads metrics.csv if it exists; adds a sentence to `missing` if it has no rows."""
    path = folder / "metrics.csv"
    if not path.exists():
        missing.append(_lacks(folder, "no metrics.csv"))
        return []
    rows = read_metrics(path)
    if not rows:
        missing.append(_lacks(folder, "a metrics.csv without a finished step"))
    return rows


def _summary(folder: Path, missing: list[str], logged: int) -> dict[str, Any]:
    """Reads summary.json; adds a sentence to `missing` if the run did not reach its end.

    A summary of other steps than the `logged` ones is that of an earlier call.
    """
    summary = read_object(folder / "summary.json")
    if summary is None:
        what = "no summary.json: the run did not finish, and only its log has its warnings"
        missing.append(_lacks(folder, what))
        return {}
    if logged and isinstance(summary.get("steps"), int) and summary["steps"] != logged:
        what = f"a summary.json of {summary['steps']} of its {logged} steps: the run did not finish"
        missing.append(_lacks(folder, what))
    elif summary.get("stopped"):
        steps = f"{summary.get('steps')} of {summary.get('total_steps')} steps"
        missing.append(f"{folder} was stopped by {summary['stopped']} after {steps}.")
    return summary


def _lacks(folder: Path, what: str) -> str:
    """Describes what a run has instead of a file, and names the command that makes the file."""
    return f"{folder} has {what}; {TRAIN}{folder} makes it."


def _read_recording(path: Path, *, name: str, folder: Path, position: int) -> Run:
    """Reads a run of which only the metrics exist; `folder` is the path that the user named."""
    rows = read_metrics(path)
    missing = [] if rows else [f"{path} has no finished step."]
    if folder != path:
        summary = recordings.summary_file(path)
        total = (read_object(summary) or {}).get("total_steps", len(rows))
        if not summary.is_file():
            missing.append(f"{name}: no {summary.name}, so the run may not have finished.")
        elif total != len(rows):
            missing.append(f"{name}: {len(rows)} of {total} steps are recorded.")
    columns, origin = _columns(rows)
    return Run(
        name=name,
        position=position,
        folder=folder,
        column_t=columns,
        samples=(),
        held_out=(),
        options={},
        features=_features(columns),
        alphas=None,
        taus=None,
        scale=None,
        warnings=(),
        missing=tuple(missing),
        origin=origin,
    )


def _columns(rows: Sequence[Mapping[str, float]]) -> tuple[dict[str, np.ndarray], str]:
    """Returns the columns `[T]` that the report shows, with steps from 0, and their origin."""
    names = tuple(rows[0]) if rows else ()
    origin = recordings.origin_of(names) if rows else recordings.OURS
    kept = (name for name in names if recordings.is_compared(origin, name))
    columns = {name: np.array([row[name] for row in rows]) for name in kept}
    if rows:
        columns["step"] = columns["step"] - recordings.FIRST_STEP.get(origin, 0)
    return columns, origin


def read_object(path: Path) -> dict[str, Any] | None:
    """Reads a JSON object; returns None if there is no such file."""
    return read_json(path, allow_surrogates=True) if path.exists() else None


def _rows(path: Path, fields: Mapping[str, type], missing: list[str]) -> list[dict[str, Any]]:
    """Reads a file that a run appends to, without an incomplete line that an interruption left.

    The prompts of the rows are parsed.

    Adds a sentence to `missing` if the file does not exist or is empty.
    """
    if not path.exists():
        missing.append(_lacks(path.parent, f"no {path.name}"))
        return []
    content = read_bytes(path)
    complete_lines = content[: content.rfind(b"\n") + 1]
    if not complete_lines.strip():
        missing.append(_lacks(path.parent, f"an empty {path.name}"))
        return []
    rows = parse_jsonl(complete_lines, fields, str(path), lenient=True)
    for number, row in enumerate(rows, 1):
        try:
            row["prompt"] = prompt_of(row)
            _check_sample(row)
        except InputError as error:
            raise InputError(f"{path}:{line_of(path, number)}: {error}") from None
    return rows


def _check_sample(row: Mapping[str, Any]) -> None:
    if not isinstance(row.get("response"), str):  # unlike a prompt, it may be empty
        raise InputError("field 'response' must be str")
    if not all(isinstance(value, (int, float)) for value in row["penalties"].values()):
        raise InputError("field 'penalties' must map features to numbers")


def _features(names: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    matches = (re.fullmatch(r"feat_(\d+)_above_tau", name) for name in names)
    return tuple(int(match[1]) for match in matches if match)


def _read_values(
    reward: Mapping[str, Any], name: str, *, folder: Path, count: int
) -> tuple[float, ...] | None:
    """Returns an option of `count` values, one per feature; None if it cannot be read."""
    values = _read_list(reward, name, folder=folder, parse=parse_values)
    return values if values is not None and len(values) == count else None


def _read_list(
    reward: Mapping[str, Any],
    name: str,
    *,
    folder: Path,
    parse: Callable[[str, str], tuple[Number, ...]],
) -> tuple[Number, ...] | None:
    """Returns an option that is a list; None if it cannot be read.

    A relative path in the option is relative to the directory that the run was started in. The
    parents of the run's directory are tried first, the current directory last.
    """

    def locate(path: str) -> str:
        starts = (*folder.resolve().parents, Path())
        return str(next((start / path for start in starts if (start / path).is_file()), path))

    try:
        text = relocated(str(reward.get(name, "")), locate)
        return parse(f"reward.{name}", text)
    except InputError:  # a file that the option names has been moved
        return None


def _scale(summary: Mapping[str, Any]) -> tuple[float, float] | None:
    mean, deviation = (summary.get(f"score_{what}_at_start") for what in ("mean", "std"))
    if isinstance(mean, (int, float)) and isinstance(deviation, (int, float)) and deviation > 0:
        return float(mean), float(deviation)
    return None


def _objects(values: Any) -> list[dict]:
    items = values if isinstance(values, list) else []
    return [item for item in items if isinstance(item, dict)]


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
