"""A run as its working directory tells it: metrics, samples, options; and what is not there.
Of a run of another program there are metrics alone (`recordings`).

The share of a penalty that each feature has at a step follows from how often it fired and its α:

    penalty_i(t) = indicator_penalty(t) · α_i f_i(t) / Σ_j α_j f_j(t),   f_i = feat_{i}_above_tau

which is α_i f_i in reward units, whatever the unit of α; where a response's penalties were scaled
down to reward.penalty_cap, it is their total shared out in proportion. The parts add up to it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report import recordings
from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.features.feature_lists import parse_values
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import line_of, parse_jsonl
from sarm_jax.io.strict_json import parse_json

SAMPLE = {"step": int, "prompt": str, "rm_score": float, "penalties": dict, "total_reward": float}
EDGE = (
    5  # steps at the start and the end of a run, whose mean is its start and its end; at most half
)
TRAIN = "python main.py --config=CONFIG --stage=train --workdir="


@dataclasses.dataclass(frozen=True)
class Run:
    """`place` is its number in the report, by which figures colour it.

    `column_t` maps the columns of metrics.csv to `[T]`, NaN where a step has no value. `samples`
    and `held_out` are the rows of samples.jsonl and evaluations.jsonl. `alphas` and `taus` are
    those of `features`, None where the options cannot be read any more. `scale` is the mean and
    deviation of the reference responses' scores. `warnings` are those of the guards, by the names
    of summary.json. `missing` are sentences on what is not there, each with the command that makes
    it. `origin` is the program that wrote the metrics, as `recordings.origin_of` says.
    """

    name: str
    place: int
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

    @property
    def mark(self) -> str:
        """The mark behind the name of a run that another program recorded."""
        return "" if self.origin == recordings.OURS else recordings.RUN_MARK

    @property
    def title(self) -> str:
        """The name with its mark."""
        return self.name + self.mark

    @property
    def steps(self) -> int:
        """Finished steps."""
        return len(self.column_t.get("step", ()))

    def column(self, name: str) -> np.ndarray:
        """A column `[T]`; NaN throughout where metrics.csv does not have it."""
        return self.column_t.get(name, np.full(self.steps, np.nan))

    def has(self, name: str) -> bool:
        """Whether any step has a value of `name`."""
        return bool(np.isfinite(self.column(name)).any())

    @property
    def clamps(self) -> bool:
        """Whether its `rm_score` is of clamped latents."""
        reward = self.options.get("reward", {})
        return isinstance(reward, Mapping) and bool(reward.get("clamp_features"))

    @property
    def seconds(self) -> float:
        """Duration of all steps together; NaN if it is not recorded."""
        if self.origin == recordings.REFERENCE:
            time_t = self.column("timestamp")
            return float(np.nanmax(time_t)) if self.has("timestamp") else float("nan")
        columns = [f"time_{part}" for part in ("rollout", "score", "update")]
        if not any(map(self.has, columns)):
            return float("nan")
        return float(np.nansum([self.column(name) for name in columns]))

    def ends(self, name: str) -> tuple[float, float]:
        """The mean of a column over the first and over the last steps, see `ends`."""
        return ends(self.column(name))

    def penalties(self) -> dict[int, np.ndarray] | None:
        """Feature → its part of the indicator penalty `[T]`; None where α is not known."""
        if self.alphas is None or not self.features:
            return None if self.features else {}
        fired_nt = np.array([self.column(f"feat_{i}_above_tau") for i in self.features])
        weight_nt = np.array(self.alphas)[:, None] * fired_nt
        total_t = weight_nt.sum(axis=0)
        share_nt = np.divide(weight_nt, total_t, out=np.zeros_like(weight_nt), where=total_t != 0)
        return dict(zip(self.features, share_nt * self.column("indicator_penalty"), strict=True))


def ends(values_t: np.ndarray) -> tuple[float, float]:
    """The means over the first and the last five steps, of those with a value; NaN: none.

    Of fewer than ten steps over either half of them.
    """
    edge = max(1, min(EDGE, len(values_t) // 2))
    return _mean(values_t[:edge]), _mean(values_t[-edge:])


def read_run(name: str, folder: Path, place: int = 0) -> Run:
    """Reads the run in `folder`, or a run's metrics alone.

    Raises InputError for a directory without a run, or with several, and for bad files.
    """
    recording = recordings.metrics_file(folder)
    if recording:
        return _read_recording(name, folder, recording, place)
    if not folder.is_dir():
        raise InputError(f"report.runs: {folder} is not a directory")
    if not any((folder / part).exists() for part in ("metrics.csv", "samples.jsonl", "eval")):
        raise InputError(
            f"report.runs: {folder} holds no run (no metrics.csv or NAME_metrics.csv, "
            "samples.jsonl or eval/); "
            f"{TRAIN}{folder} makes one"
        )
    missing: list[str] = []

    def lacks(found: bool, what: str) -> None:
        if not found:
            missing.append(f"{folder} has {what}; {TRAIN}{folder} makes it.")

    path = folder / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    lacks(path.exists(), "no metrics.csv")
    lacks(bool(rows) or not path.exists(), "a metrics.csv without a finished step")
    samples = _rows(folder / "samples.jsonl", SAMPLE | {"kl_penalty": float}, lacks)
    held_out = []
    if (folder / "evaluations.jsonl").exists():
        fields = SAMPLE | {"ref_kl": float, "ended": bool}
        held_out = _rows(folder / "evaluations.jsonl", fields, lacks)
    summary = read_object(folder / "summary.json")
    if summary is None:
        lacks(False, "no summary.json: the run did not finish, its log alone has any warnings")
    elif summary.get("stopped"):
        done, of = summary.get("steps"), summary.get("total_steps")
        missing.append(f"{folder} was stopped by {summary['stopped']} after {done} of {of} steps.")
    options = read_object(folder / "config.json") or {}
    columns, origin = _columns(rows)
    features = _features(columns)
    reward = options.get("reward", {})
    return Run(
        name=name,
        place=place,
        folder=folder,
        column_t=columns,
        samples=samples,
        held_out=held_out,
        options=options,
        features=features,
        alphas=_option(reward, "alpha_values", features, folder),
        taus=_option(reward, "tau_values", features, folder),
        scale=_scale(summary or {}),
        warnings=_objects((summary or {}).get("warnings")),
        missing=tuple(missing),
        origin=origin,
    )


def _read_recording(name: str, given: Path, path: Path, place: int) -> Run:
    """Reads the metrics of a run of which nothing else is known; `given` is what the user named."""
    rows = read_metrics(path)
    missing = [] if rows else [f"{path} has no finished step."]
    if given != path:
        summary = recordings.summary_file(path)
        total = (read_object(summary) or {}).get("total_steps", len(rows))
        if not summary.is_file():
            missing.append(f"{name}: no {summary.name}, so the run may not have finished.")
        elif total != len(rows):
            missing.append(f"{name}: {len(rows)} of {total} steps are recorded.")
    columns, origin = _columns(rows)
    return Run(
        name=name,
        place=place,
        folder=given,
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
    """Returns the columns `[T]` that may be compared with ours, steps from 0, and their origin."""
    names = tuple(rows[0]) if rows else ()
    origin = recordings.origin_of(names) if rows else recordings.OURS
    kept = (name for name in names if recordings.is_compared(origin, name))
    columns = {name: np.array([row[name] for row in rows]) for name in kept}
    if rows:
        columns["step"] = columns["step"] - recordings.FIRST_STEP.get(origin, 0)
    return columns, origin


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    if not path.is_file():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"), constants=True, unicode=False)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _rows(path: Path, fields: Mapping[str, type], lacks: Callable[[bool, str], None]) -> list[dict]:
    """The rows of a file that a run appends to, without half a line that an interruption left."""
    if not path.exists():
        lacks(False, f"no {path.name}")
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    lacks(bool(whole.strip()), f"an empty {path.name}")
    rows = parse_jsonl(whole, fields, str(path), own=True) if whole.strip() else []
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("response"), str):  # unlike a prompt, it may be empty
            raise InputError(f"{path}:{line_of(path, number)}: field 'response' must be str")
        if not all(isinstance(value, (int, float)) for value in row["penalties"].values()):
            place = f"{path}:{line_of(path, number)}"
            raise InputError(f"{place}: field 'penalties' must map features to numbers")
    return rows


def _features(names: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    found = (re.fullmatch(r"feat_(\d+)_above_tau", name) for name in names)
    return tuple(int(match[1]) for match in found if match)


def _option(
    reward: Mapping[str, Any], name: str, features: Sequence[int], folder: Path
) -> tuple[float, ...] | None:
    """A list of values that belong to the features; None where it cannot be read.

    A relative path is from where the run was started, which is looked for above its directory
    first, and here at last.
    """

    def find(match: re.Match) -> str:
        starts = (*folder.resolve().parents, Path())
        found = (start / match[1] for start in starts if (start / match[1]).is_file())
        return f"@{next(found, match[1])}:"

    try:
        text = re.sub(r"@([^,:]+):", find, str(reward.get(name, "")))
        values = parse_values(f"reward.{name}", text)
    except InputError:  # a file that the options name has been moved
        return None
    return values if len(values) == len(features) else None


def _scale(summary: Mapping[str, Any]) -> tuple[float, float] | None:
    mean, deviation = (summary.get(f"score_{what}_at_start") for what in ("mean", "std"))
    if isinstance(mean, (int, float)) and isinstance(deviation, (int, float)) and deviation > 0:
        return float(mean), float(deviation)
    return None


def _objects(values: Any) -> list[dict]:
    found = values if isinstance(values, list) else []
    return [value for value in found if isinstance(value, dict)]


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
