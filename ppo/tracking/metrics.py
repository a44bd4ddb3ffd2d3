"""What a run writes while it goes: metrics.csv, samples.jsonl, TensorBoard events, a bar; and
evaluations.jsonl, where the policy is evaluated on held-out prompts.

Rows of steps that a resumed run will repeat are dropped first, so that every step stands once.
The meaning and unit of each column is in README's glossary.
"""

import contextlib
import csv
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ppo.tracking.metrics_csv import read_metrics
from ppo.tracking.tensorboard import Board
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing

EVALUATIONS = "evaluations.jsonl"
COLUMNS = (
    "step timestamp total_reward rm_score indicator_penalty kl_penalty ref_kl "
    "response_length_mean response_length_std eos_fraction ppo_loss policy_loss value_loss entropy "
    "approx_kl clip_fraction ratio_0_max_dev sampler_drift reward_mean reward_std reward_min "
    "reward_max advantage_mean advantage_std grad_norm disc_loss disc_acc time_rollout time_score "
    "time_update tokens_per_second"
).split()
LAST_COLUMNS = ("skipped_updates", "distinct_responses")  # after those of the features


class RunLog:
    """The log files of `workdir`, positioned at `first_step`; use as a context manager."""

    def __init__(self, workdir: Path, features: Sequence[int], first_step: int, total_steps: int):
        self.columns = columns_of(features)
        self._metrics_path = workdir / "metrics.csv"
        self._samples_path = workdir / "samples.jsonl"
        self._evaluations_path = workdir / EVALUATIONS
        self._rewind(first_step)
        self._metrics = self._metrics_path.open("a", newline="", encoding="utf-8")
        self._samples = self._samples_path.open("a", encoding="utf-8")
        self._writer = csv.DictWriter(self._metrics, self.columns)
        if not self._metrics.tell():
            self._writer.writeheader()
            self.flush()
        self._board = Board(workdir, first_step)
        self._bar = tqdm(total=total_steps, initial=first_step, desc="PPO", unit="step")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.ExitStack() as stack:  # where one cannot be flushed, the others are closed
            for file in (self._bar, self._metrics, self._samples, self._board):
                stack.callback(file.close)

    def earlier_rows(self) -> list[dict[str, float]]:
        """The rows of the steps before the first one."""
        return read_metrics(self._metrics_path)

    def write(self, row: dict[str, float], samples: Sequence[dict]) -> None:
        """One step: `row` holds every column (disc_* and feat_* may be absent → empty)."""
        self._writer.writerow({name: row.get(name, "") for name in self.columns})
        for sample in samples:
            self._samples.write(json.dumps(sample, ensure_ascii=False) + "\n")
        self.flush()
        step = int(row["step"])
        self._board.write({k: v for k, v in row.items() if k not in ("step", "timestamp")}, step)
        self._bar.set_postfix_str(
            f"reward {row['total_reward']:.3f} rm {row['rm_score']:.3f} "
            f"penalty {row['indicator_penalty']:.3f} kl {row['kl_penalty']:.3f} "
            f"eos {row['eos_fraction']:.0%} {row['tokens_per_second']:.0f} tok/s"
        )
        self._bar.update()

    def write_evaluation(self, rows: Sequence[dict]) -> None:
        """Appends the responses of one evaluation, all of the same step; none: no file."""
        if not rows:
            return
        with self._evaluations_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        means = _held_out_means(rows)
        self._board.write({f"held_out/{name}": x for name, x in means.items()}, rows[0]["step"])

    def flush(self) -> None:
        """Brings both files to disk."""
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())

    def _rewind(self, first_step: int) -> None:
        if self._metrics_path.exists():
            with self._metrics_path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if _is_before(row, first_step)]
            with replacing(self._metrics_path) as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)
        _keep_lines(self._samples_path, first_step - 1)
        # An evaluation of step n looks at what n steps have made, and comes before the checkpoint
        # of n: a run that starts afresh repeats the one at 0.
        _keep_lines(self._evaluations_path, first_step if first_step else -1)


def columns_of(features: Sequence[int]) -> list[str]:
    """The columns of metrics.csv of a run that penalises these features."""
    per_feature = [f"feat_{i}_{what}" for i in features for what in ("activation", "above_tau")]
    return [*COLUMNS, *per_feature, *LAST_COLUMNS]


def check_log(workdir: Path, features: Sequence[int], done: int, checkpoint_every: int) -> None:
    """Raises InputError where metrics.csv is not what a run leaves that has a checkpoint of `done`
    steps, or none (0): going on would write its rows anew."""
    path = workdir / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    if rows and list(rows[0]) != columns_of(features):
        raise InputError(f"{path}:1: has not the columns of this run: put its own back")
    steps = [row["step"] for row in rows]
    if steps[:done] != list(range(done)):
        raise InputError(
            f"{path}: has not a row for each of the {done} steps before the checkpoint: put the "
            "run's own back, or choose another --workdir"
        )
    if not done and len(rows) > checkpoint_every:
        raise InputError(
            f"--workdir={workdir}: metrics.csv has {len(rows)} steps, but there is no checkpoint: "
            "put checkpoints/ back, or choose another --workdir"
        )


def read_evaluations(workdir: Path) -> list[dict]:
    """The rows of evaluations.jsonl, in the order of the steps."""
    with (workdir / EVALUATIONS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _held_out_means(rows: Sequence[dict]) -> dict[str, float]:
    means = {
        name: float(np.mean([row[name] for row in rows]))
        for name in ("total_reward", "rm_score", "kl_penalty", "ref_kl")
    }
    means["indicator_penalty"] = float(np.mean([sum(row["penalties"].values()) for row in rows]))
    means["eos_fraction"] = float(np.mean([row["ended"] for row in rows]))
    return means


def summarise_evaluations(rows: Sequence[dict]) -> dict[str, Any]:
    """Means over the held-out prompts before the first step and after the last."""
    steps = sorted({row["step"] for row in rows})
    first, last = ([row for row in rows if row["step"] == step] for step in (steps[0], steps[-1]))
    return {
        "steps": [steps[0], steps[-1]],
        "responses": len(first),
        "first": _held_out_means(first),
        "last": _held_out_means(last),
    }


def _keep_lines(path: Path, last_step: int) -> None:
    """Drops the lines of later steps, and half a line that an interruption left."""
    if path.exists():
        lines = path.read_bytes().split(b"\n")  # bytes: the cut can be within a character
        with replacing(path, "wb") as file:
            file.writelines(line + b"\n" for line in lines if _sample_step(line) <= last_step)


def _is_before(row: dict[str, str], first_step: int) -> bool:
    """Whether a metrics row is complete and of an earlier step."""
    return all(cell is not None for cell in row.values()) and int(row["step"]) < first_step


def _sample_step(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def summarise(rows: Sequence[dict[str, float]], score_mean: float, score_std: float) -> dict:
    """summary.json: where the run started and ended, and what it cost.

    Start and end are means over five steps, of fewer than ten steps over either half of them.
    Steps with a number that was not finite do not count where that number is asked for.
    """
    edge = max(1, min(5, len(rows) // 2))

    def finite(part, name):
        return [row[name] for row in part if math.isfinite(row[name])] or [float("nan")]

    def mean(part, name):
        return float(np.mean(finite(part, name)))

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
