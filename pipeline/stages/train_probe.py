"""Fit dense probes of the reward model's pooled states, as rivals of the detectors."""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from pipeline.inputs import Input, Kind
from pipeline.models import check_conversations, check_reward_model, load_reward_model
from pipeline.options import required
from pipeline.provenance import check_same_everywhere
from pipeline.stage import Stage
from sarm_jax.features.contrast_statistics import assign_folds
from sarm_jax.features.dense_probe import (
    KINDS,
    FittedProbe,
    States,
    fit_probe,
    probe_file,
    save_probe,
)
from sarm_jax.features.identify import DETECTOR_FOLDS, number_values
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import write_json
from sarm_jax.io.path_lists import split_paths
from sarm_jax.models.conversation_rows import read_pairs
from sarm_jax.models.latent_store import Contrast
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel import processes

LOG = logging.getLogger(__name__)
SUMMARY = "dense_probes.json"


@dataclasses.dataclass(frozen=True)
class TrainProbeConfig:
    """Options of the stage train_probe.

    Attributes:
        l2: λ of the logistic regression.
        false_alarm_budget: share of the chosen responses on which a probe may fire.
        seed: seed of the folds.
    """

    l2: float
    false_alarm_budget: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.l2 < float("inf"):
            raise InputError(f"train_probe.l2={self.l2}: must be positive")
        if not 0 <= self.false_alarm_budget < 1:
            raise InputError(
                f"identify.false_alarm_budget={self.false_alarm_budget}: must lie in [0, 1)"
            )
        if self.seed < 0:
            raise InputError(f"identify.seed={self.seed}: must not be negative")


def validate(config: ConfigDict) -> TrainProbeConfig:
    """Validates the section train_probe, and what it shares with identify."""
    required(config, "identify.pairs_jsonl", "sarm_model")
    return TrainProbeConfig(
        l2=config.train_probe.l2,
        false_alarm_budget=config.identify.false_alarm_budget,
        seed=config.identify.seed,
    )


def run(config: ConfigDict, workdir: Path) -> None:
    """Fit a probe of every kind on all pairs, and measure it on held-out prompts."""
    options = validate(config)
    paths = split_paths(config.identify.pairs_jsonl)
    files = {path: read_pairs(path) for path in paths}
    pairs = [row for path in paths for row in files[path]]
    prompts = {path: [row["prompt"] for row in rows] for path, rows in files.items()}
    check_conversations(config.sarm_model, prompts)
    folder = workdir / "probes"
    LOG.info("dense probes of the states of %d pairs, for %s", len(pairs), folder)
    check_same_everywhere(STAGE, config, workdir)
    contrast = pair_states(load_reward_model(config, needs_features=False), pairs)
    prompt_p, _ = number_values([pair["prompt"] for pair in pairs])
    fold_p = assign_folds(prompt_p, options.seed) % DETECTOR_FOLDS
    budget = options.false_alarm_budget
    fitted = {
        kind: fit_probe(kind, contrast, fold_p, budget=budget, l2=options.l2) for kind in KINDS
    }
    probes = {kind: described(result) for kind, result in fitted.items()}
    summary = {
        "pairs": len(pairs),
        "prompts": int(prompt_p.max()) + 1,
        "options": dataclasses.asdict(options),
        "probes": probes,
    }

    def write() -> None:
        folder.mkdir(exist_ok=True)
        for kind, result in fitted.items():
            save_probe(folder / probe_file(kind), result.probe)
        # Last, because --stage=all takes it for the end of the stage.
        write_json(folder / SUMMARY, summary)

    processes.on_primary(write)
    for kind, content in probes.items():
        _report(kind, content, budget)
    LOG.info("probes in %s: name one of them as reward.probe", folder)


def pair_states(reward_model: RewardModel, pairs: list[dict[str, Any]]) -> Contrast:
    """Returns the pairs as a contrast of pooled states; every distinct text is run once."""
    texts = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    features = () if reward_model.has_features else None
    *_, x_nd = reward_model.score_with_states(
        [prompt for prompt, _ in row], [response for _, response in row], latent_indices=features
    )
    if not np.isfinite(x_nd).all():
        raise InputError("the reward model: states of the pairs are not finite")
    chosen_p, rejected_p = np.split(np.array([row[text] for text in texts]), 2)
    return Contrast(States(x_nd), chosen_p, rejected_p)


def described(result: FittedProbe) -> dict[str, float | None]:
    """Returns a probe's threshold and rates, under the names that detectors have."""
    detection, false_positives = (rate if np.isfinite(rate) else None for rate in result.held_out)
    return {
        "tau": result.probe.tau,
        "detection": result.detection_rate,
        "false_alarms": result.false_positive_rate,
        "detection_held_out": detection,
        "false_alarms_held_out": false_positives,
    }


def _report(kind: str, content: dict[str, float | None], budget: float) -> None:
    """Logs the rates on held-out prompts; warns if false positives exceed the budget."""
    false_positives = content["false_alarms_held_out"]
    if false_positives is None:
        return
    level = logging.WARNING if false_positives > budget else logging.INFO
    LOG.log(
        level,
        "probe %s: fires on %.3f of the rejected and %.3f of the chosen responses to held-out "
        "prompts (identify.false_alarm_budget=%g)",
        kind, content["detection_held_out"], false_positives, budget,
    )  # fmt: skip


def wanted(config: ConfigDict) -> bool:
    """Returns whether a run of the config names a probe that this stage makes."""
    own = [config.experiments[name].get("reward", {}) for name in config.experiments]
    named = [section.get("probe") for section in (config.reward, *own)]
    return any(path and Path(path).name in map(probe_file, KINDS) for path in named) and bool(
        config.identify.pairs_jsonl
    )


STAGE = Stage(
    name="train_probe",
    summary="Preference pairs → dense probes of the reward model's states, rivals of detectors.",
    validate=validate,
    run=run,
    check_architectures=partial(check_reward_model, needs_features=False),
    options=(
        "train_probe",
        "identify.pairs_jsonl",
        "identify.false_alarm_budget",
        "identify.seed",
        "sarm_model",
        "sarm_max_length",
        "dtype",
    ),
    inputs=(
        Input("identify.pairs_jsonl", Kind.FILES),
        Input("sarm_model", Kind.SCORER),
    ),
    output=f"probes/{SUMMARY}",
    makes=(f"probes/{SUMMARY}", *(f"probes/{probe_file(kind)}" for kind in KINDS)),
    after=("train_sarm", "train_sae"),
    wanted=wanted,
    processes="all",
)
