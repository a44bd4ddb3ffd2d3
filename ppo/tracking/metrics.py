"""The log of a run: metrics.csv, samples.jsonl, evaluations.jsonl, trackers, a progress bar.

A resumed run first drops the rows of steps that it will repeat, so that every step is logged once.
`docs/reference/metrics.md` gives the meaning and unit of each column.
"""

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ppo.tracking.metrics_csv import read_metrics
from ppo.tracking.trackers.start import TrackConfig, start_trackers
from ppo.tracking.trackers.tracker import Entry
from sarm_jax.features.feature_names import NO_NAMES, FeatureNames
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import read_bytes, replacing

EVALUATIONS = "evaluations.jsonl"
COLUMNS = (
    "step timestamp total_reward rm_score indicator_penalty kl_penalty ref_kl "
    "response_length_mean response_length_std eos_fraction ppo_loss policy_loss value_loss entropy "
    "approx_kl clip_fraction ratio_0_max_dev sampler_drift reward_mean reward_std reward_min "
    "reward_max advantage_mean advantage_std grad_norm disc_loss disc_acc time_rollout time_score "
    "time_update tokens_per_second"
).split()
LAST_COLUMNS = ("skipped_updates", "distinct_responses")  # after the columns of the features
GROUP_COLUMNS = ("zero_spread_groups",)  # of algorithms without a critic


class RunLog:
    """The log files in `workdir`, positioned at `first_step`. Use it as a context manager.

    `rows` are the rows of metrics.csv, those of earlier calls included.

    Raises:
        InputError: a tracker cannot be started.
    """

    def __init__(
        self,
        workdir: Path,
        features: Sequence[int],
        first_step: int,
        total_steps: int,
        algorithm: str = "ppo",
        further: Sequence[str] = (),
        tracking: TrackConfig | None = None,
        names: FeatureNames = NO_NAMES,
    ):
        self.columns = columns_of(features, algorithm, further)
        self._metrics_path = workdir / "metrics.csv"
        self._samples_path = workdir / "samples.jsonl"
        self._evaluations_path = workdir / EVALUATIONS
        begun = self._rewind(first_step)
        self._metrics = self._metrics_path.open("a", newline="", encoding="utf-8")
        self._samples = self._samples_path.open("a", encoding="utf-8")
        self._evaluated = self._stat_of_evaluations()
        self._writer = csv.DictWriter(self._metrics, self.columns)
        if not self._metrics.tell():
            self._writer.writeheader()
            self.flush()
        self.rows = read_metrics(self._metrics_path)
        self._trackers = start_trackers(
            tracking or TrackConfig(),
            workdir,
            first_step,
            begun=begun,
            descriptions=descriptions_of(features, names),
        )
        self._bar = tqdm(total=total_steps, initial=first_step, desc=algorithm.upper(), unit="step")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        with contextlib.ExitStack() as stack:  # closes all, even if one of them cannot be flushed
            for tracker in self._trackers:  # the last that are closed, as they may wait for uploads
                stack.callback(tracker.finish, failed=kind is not None)
            for file in (self._bar, self._metrics, self._samples):
                stack.callback(file.close)

    def write(self, row: dict[str, float], samples: Sequence[dict]) -> None:
        """Logs a step.

        Args:
            row: the metrics. Those of the discriminator are missing if β = 0, and the value loss
                without a critic; a column whose metric is missing is empty.
            samples: rows of samples.jsonl.

        Raises:
            InputError: a file was removed or exchanged, so the row would be lost.
            ValueError: a metric has no column, which would lose it; the message names it.
        """
        for path, file in (
            (self._metrics_path, self._metrics),
            (self._samples_path, self._samples),
        ):
            _check_present(path, os.fstat(file.fileno()))
        self._writer.writerow(row)
        for sample in samples:
            self._samples.write(json.dumps(sample, ensure_ascii=False) + "\n")
        self.flush()
        self.rows.append({name: float(row.get(name, "nan")) for name in self.columns})
        metrics = {k: v for k, v in row.items() if k not in ("step", "timestamp")}
        self._track(Entry(int(row["step"]), metrics, samples))
        self._bar.set_postfix_str(
            f"reward {row['total_reward']:.3f} rm {row['rm_score']:.3f} "
            f"penalty {row['indicator_penalty']:.3f} kl {row['kl_penalty']:.3f} "
            f"eos {row['eos_fraction']:.0%} {row['tokens_per_second']:.0f} tok/s"
        )
        self._bar.update()

    def write_evaluation(self, rows: Sequence[dict]) -> None:
        """Logs the responses of an evaluation, all of the same step; no rows leave no file."""
        if not rows:
            return
        if self._evaluated is not None:
            _check_present(self._evaluations_path, self._evaluated)
        with self._evaluations_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
            self._evaluated = os.fstat(file.fileno())
        means = _held_out_means(rows)
        scalars = {f"held_out/{name}": value for name, value in means.items()}
        self._track(Entry(rows[0]["step"], scalars, is_evaluation=True))

    def flush(self) -> None:
        """Writes metrics.csv and samples.jsonl through to disk."""
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())

    def _track(self, entry: Entry) -> None:
        for tracker in self._trackers:
            tracker.log(entry)

    def _stat_of_evaluations(self) -> os.stat_result | None:
        path = self._evaluations_path
        return path.stat() if path.exists() else None

    def _rewind(self, first_step: int) -> bool:
        """Drops everything that steps from `first_step` on have logged.

        Returns whether any step has been logged before.
        """
        begun = False
        if self._metrics_path.exists():
            text = read_bytes(self._metrics_path).decode("utf-8")
            reader = csv.DictReader(io.StringIO(text, newline=""))
            logged = list(reader)
            begun = bool(logged)
            rows = [row for row in logged if _is_before(row, first_step)]
            with replacing(self._metrics_path) as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)
        _keep_lines(self._samples_path, first_step - 1)
        # The evaluation of step n is that of the policy after n steps, and is written before the
        # checkpoint of n. Only a run that starts again from 0 repeats the evaluation of its step.
        _keep_lines(self._evaluations_path, first_step if first_step else -1)
        return begun


def _check_present(path: Path, opened: os.stat_result) -> None:
    """Raises InputError unless the file that was opened is still at its path."""
    try:
        present = os.path.samestat(opened, path.stat())
    except OSError:
        present = False
    if not present:
        raise InputError(f"{path}: was removed or exchanged while the run wrote it; restore it")


def columns_of(
    features: Sequence[int], algorithm: str = "ppo", further: Sequence[str] = ()
) -> list[str]:
    """Returns the columns of metrics.csv.

    Args:
        features: the penalised features.
        algorithm: `ppo.algorithm`.
        further: the columns of further terms of the reward, `RewardConfig.further_columns`.
    """
    per_feature = [f"feat_{i}_{name}" for i in features for name in ("activation", "above_tau")]
    of_groups = () if algorithm == "ppo" else GROUP_COLUMNS
    return [*COLUMNS, *per_feature, *LAST_COLUMNS, *of_groups, *further]


def descriptions_of(features: Sequence[int], names: FeatureNames) -> dict[str, str]:
    """Returns what the columns of the features that have a name mean, for trackers."""
    meanings = {"activation": "mean z of", "above_tau": "share of responses above τ of"}
    return {
        f"feat_{i}_{column}": f"{meaning} feature {names.show(i)}"
        for i in features
        if names.of([i])
        for column, meaning in meanings.items()
    }


def check_log(
    workdir: Path,
    features: Sequence[int],
    done: int,
    checkpoint_every: int,
    algorithm: str = "ppo",
    further: Sequence[str] = (),
) -> None:
    """Checks that metrics.csv belongs to the newest checkpoint, before a run rewrites it.

    Args:
        workdir: working directory of the run.
        features: the penalised features.
        algorithm: `ppo.algorithm`.
        further: the columns of further terms of the reward.
        done: steps of the newest checkpoint; 0 if there is none.
        checkpoint_every: steps between checkpoints.

    Raises:
        InputError: the columns are another run's, rows before the checkpoint are missing, or there
            are more rows than a run without a checkpoint can have.
    """
    path = workdir / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    if rows and list(rows[0]) != columns_of(features, algorithm, further):
        raise InputError(f"{path}:1: does not have the columns of this run: restore its own file")
    steps = [row["step"] for row in rows]
    if steps[:done] != list(range(done)):
        raise InputError(
            f"{path}: does not have a row for each of the {done} steps before the checkpoint: "
            "restore the run's own file, or choose another --workdir"
        )
    if not done and len(rows) > checkpoint_every:
        raise InputError(
            f"--workdir={workdir}: metrics.csv has {len(rows)} steps, but there is no checkpoint: "
            "restore checkpoints/, or choose another --workdir"
        )


def has_evaluations(workdir: Path) -> bool:
    """Returns whether the run has logged an evaluation."""
    path = workdir / EVALUATIONS
    return path.is_file() and path.stat().st_size > 0


def read_evaluations(workdir: Path) -> list[dict]:
    """Reads the rows of evaluations.jsonl, which are in the order of the steps."""
    lines = read_bytes(workdir / EVALUATIONS).split(b"\n")
    return [json.loads(line) for line in lines if line]


def _held_out_means(rows: Sequence[dict]) -> dict[str, float]:
    """Returns the means over the responses of an evaluation."""
    names = ["total_reward", "rm_score", "kl_penalty", "ref_kl"]
    names += [n for n, value in rows[0].items() if isinstance(value, float) and n not in names]
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    means["indicator_penalty"] = float(np.mean([sum(row["penalties"].values()) for row in rows]))
    means["eos_fraction"] = float(np.mean([row["ended"] for row in rows]))
    if "screened" in rows[0]:
        means["screened_fraction"] = float(np.mean([row["screened"] for row in rows]))
    return means


def summarise_evaluations(rows: Sequence[dict]) -> dict[str, Any]:
    """Returns means over the held-out responses, for the first and the last evaluation."""
    steps = sorted({row["step"] for row in rows})
    first, last = ([row for row in rows if row["step"] == step] for step in (steps[0], steps[-1]))
    return {
        "steps": [steps[0], steps[-1]],
        "responses": len(first),
        "first": _held_out_means(first),
        "last": _held_out_means(last),
    }


def _keep_lines(path: Path, last_step: int) -> None:
    """Drops the lines of later steps, and an incomplete line that an interruption left."""
    if path.exists():
        lines = read_bytes(path).split(b"\n")  # bytes, since a character may be incomplete
        with replacing(path, "wb") as file:
            file.writelines(line + b"\n" for line in lines if _step_of(line) <= last_step)


def _is_before(row: dict[str, str], first_step: int) -> bool:
    """Returns whether a row of metrics.csv is complete and of an earlier step."""
    return all(cell is not None for cell in row.values()) and int(row["step"]) < first_step


def _step_of(line: bytes) -> float:
    """Returns the step of a JSON line; infinity if the line is incomplete."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def summarise(rows: Sequence[dict[str, float]], score_mean: float, score_std: float) -> dict:
    """Summarises the metrics of a run for summary.json.

    The first and last steps are means over five steps, or over half of the steps if there are fewer
    than ten. A step in which a metric is not finite is left out for that metric.

    Args:
        rows: all rows of metrics.csv.
        score_mean: mean of the reference responses' scores.
        score_std: their standard deviation.
    """
    edge = max(1, min(5, len(rows) // 2))

    def finite(some_rows, name):
        return [row[name] for row in some_rows if math.isfinite(row[name])] or [float("nan")]

    def mean(some_rows, name):
        return float(np.mean(finite(some_rows, name)))

    names = (
        "total_reward rm_score indicator_penalty kl_penalty ref_kl eos_fraction "
        "response_length_mean entropy"
    ).split()
    first = {name: mean(rows[:edge], name) for name in names}
    last = {name: mean(rows[-edge:], name) for name in names}
    change = last["total_reward"] - first["total_reward"]
    seconds = [row["time_rollout"] + row["time_score"] + row["time_update"] for row in rows]
    return {
        "steps": len(rows),
        "first_steps": first,
        "last_steps": last,
        "score_mean_at_start": score_mean,
        "score_std_at_start": score_std,
        "total_reward_change_in_sd": change / score_std,
        "ratio_0_max_dev": max(finite(rows, "ratio_0_max_dev")),
        "approx_kl_min": min(finite(rows, "approx_kl")),
        "seconds_per_step_median": float(np.median(seconds)),
        "seconds": float(np.sum(seconds)),
    }
