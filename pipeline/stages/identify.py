"""Features found by their contrast, and in the lab its gates."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from safetensors.numpy import save

from pipeline.shared import PAIR, given, read_pairs, required, reward_model, split_paths, write_json
from ppo.prompts import read_prompts
from sarm_jax.features.detectors import Detectors
from sarm_jax.features.identify import IdentifyConfig, identify, verbose_features
from sarm_jax.features.naming_prompts import naming_prompts
from sarm_jax.features.strong_responses import StrongResponses
from sarm_jax.io.files import replacing
from sarm_jax.io.jsonl import read_jsonl, write_jsonl
from sarm_jax.lab.gates import measure_gates
from sarm_jax.models.reward_model import RewardModel

LOG = logging.getLogger(__name__)
STEERED = 5  # harming features that steering_config.json sets to 0


def options(config: ConfigDict) -> IdentifyConfig:
    """The section identify, but for its files."""
    required(config, "identify.pairs_jsonl", "sarm_model")
    section = config.identify.to_dict()
    del section["pairs_jsonl"], section["verbosity_jsonl"]
    return IdentifyConfig(**section)


def run(config: ConfigDict, workdir: Path) -> None:
    """Preference pairs → which latents tell chosen from rejected, with thresholds."""
    asked = options(config)
    paths = split_paths(config.identify.pairs_jsonl)
    names = source_names(paths)
    pairs = [{"source": names[path]} | row for path in paths for row in read_pairs((path,))]
    versions = read_pairs(given(config.identify.verbosity_jsonl))
    folder = workdir / "probes"
    LOG.info("features that tell the sides of %d pairs apart, for %s", len(pairs), folder)
    model = reward_model(config)
    found = identify(asked, model, pairs)
    analysis, selected = found.analysis, found.selected
    if versions:
        selected |= verbose_features(asked, model, versions)
    folder.mkdir(exist_ok=True)
    write_json(folder / "feature_analysis.json", analysis)
    with replacing(folder / "feature_scores.safetensors", "wb") as file:
        file.write(save(found.scores))
    write_naming_prompts(folder / "naming_prompts.jsonl", found.strongest, asked.naming_examples)
    steering = {str(i): ["*", 0.0] for i in selected["safety_harming"][:STEERED]}
    write_json(folder / "steering_config.json", steering)
    if config.prepare_data.source == "lab":
        detectors = Detectors(
            tuple(selected["detectors"]),
            tuple(selected["tau_detectors"]),
            analysis["detectors"]["detection"],
            analysis["detectors"]["false_alarms"],
        )
        check_lab(config, workdir, model, detectors)
    write_json(folder / "selected_features.json", selected)
    say_what_detectors_do(analysis["detectors"], asked.false_alarm_budget)
    LOG.info("features in %s", folder / "selected_features.json")


def source_names(paths: Sequence[str]) -> dict[str, str]:
    """Names each file by its stem, with as many folders as tell it from the others."""
    bare = {path: Path(path).with_suffix("") for path in paths}
    depth = max(len(path.parts) for path in bare.values())
    for count in range(1, depth + 1):
        names = {path: "/".join(short.parts[-count:]) for path, short in bare.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}


def write_naming_prompts(path: Path, strongest: Sequence[StrongResponses], most: int) -> None:
    """Writes a prompt per feature with at most `most` responses; without any, no file stays."""
    rows = naming_prompts(strongest, most) if most else []
    if not rows:
        path.unlink(missing_ok=True)
        return
    write_jsonl(path, rows)
    LOG.info("%d prompts that ask for the names of features in %s", len(rows), path)


def say_what_detectors_do(detectors: dict[str, Any], budget: float) -> None:
    """In the log, with a warning where the budget does not hold on other prompts."""
    detection, alarms = detectors["detection_held_out"], detectors["false_alarms_held_out"]
    if detection is None:
        return
    rates = (
        f"detectors found like the {len(detectors['features'])} here fire on {detection:.3f} of the"
        f" rejected and {alarms:.3f} of the chosen responses to other prompts"
    )
    if alarms > budget:
        what = "identify.false_alarm_budget=%g does not hold there: more pairs, or a higher"
        LOG.warning(f"%s; {what} identify.tau_quantile", rates, budget)
    else:
        LOG.info("%s", rates)


def check_lab(config: ConfigDict, workdir: Path, model: RewardModel, detectors: Detectors) -> None:
    """Measures the lab's gates on held-out prompts, says which hold, and writes gates.json."""
    data = workdir / "data"
    prompts, held_out = (
        read_prompts(str(data / name)) for name in ("prompts.jsonl", "held_out_prompts.jsonl")
    )
    contrast = read_jsonl(data / "contrast_single.jsonl", PAIR)
    gates = measure_gates(model, detectors, contrast, prompts, held_out, config.lab.seed)
    for gate in gates:
        LOG.info("gate %s: %s", "passed" if gate.passed else "FAILED", gate)
    values = {gate.name: {"value": gate.value, "passed": gate.passed} for gate in gates}
    write_json(workdir / "probes" / "gates.json", values)
