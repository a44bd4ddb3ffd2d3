"""Find features by their contrast between the sides of pairs, and measure the lab's gates."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from safetensors.numpy import save

from pipeline.feature_names import feature_names
from pipeline.inputs import Input, Kind
from pipeline.models import check_conversations, check_reward_model, load_reward_model
from pipeline.options import optional_paths, required
from pipeline.provenance import check_same_everywhere
from pipeline.stage import Stage
from pipeline.tasks import is_text, task_records, text_task_of
from sarm_jax.features.detectors import Detectors
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.features.feature_pages import PAGES, ResponseGroups, feature_pages
from sarm_jax.features.identify import Identified, IdentifyConfig, identify, verbose_features
from sarm_jax.features.naming_prompts import naming_prompts
from sarm_jax.features.strong_responses import StrongResponses
from sarm_jax.io.files import replacing
from sarm_jax.io.json_files import write_json
from sarm_jax.io.jsonl import read_jsonl, write_jsonl
from sarm_jax.io.path_lists import short_names, split_paths
from sarm_jax.lab.gate import Gate
from sarm_jax.lab.gates import measure_gates, measure_shortcuts
from sarm_jax.lab.shortcuts import World
from sarm_jax.lab.text.gates import measure_text_gates
from sarm_jax.models.conversation_rows import read_pairs
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel import processes

LOG = logging.getLogger(__name__)
# Lists of selected_features.json and the role of their features, in the order of their pages.
ROLES = {
    "detectors": "detector",
    "carriers": "carrier",
    "safety_harming": "harming",
    "safety_promoting": "promoting",
    "verbosity_features": "verbosity",
    "random_control": "random control",
    "alternative_safety_harming": "harming (other method)",
    "alternative_safety_promoting": "promoting (other method)",
}
GATES, SHORTCUTS = "gates.json", "shortcuts.json"  # of the lab
STEERED = 5  # harming features that steering_config.json sets to 0


def validate(config: ConfigDict) -> IdentifyConfig:
    """Validates the section identify, except for its files."""
    required(config, "identify.pairs_jsonl", "sarm_model")
    feature_names(config)  # raises for a malformed file
    section = config.identify.to_dict()
    del section["pairs_jsonl"], section["verbosity_jsonl"], section["feature_names"]
    return IdentifyConfig(**section)


def check_architectures(config: ConfigDict) -> FeatureNames:
    """Checks that the reward model has the latents that are named; returns their names."""
    return feature_names(config, check_reward_model(config).latent_size)


def run(config: ConfigDict, workdir: Path) -> None:
    """Find the latents that tell chosen from rejected responses, with thresholds."""
    options = validate(config)
    paths = split_paths(config.identify.pairs_jsonl)
    sources = short_names(paths)
    verbosity_paths = optional_paths(config.identify.verbosity_jsonl)
    files = {path: read_pairs(path) for path in (*paths, *verbosity_paths)}
    pairs = [{"source": sources[path]} | row for path in paths for row in files[path]]
    verbosity_pairs = [row for path in verbosity_paths for row in files[path]]
    prompts = {path: [row["prompt"] for row in rows] for path, rows in files.items()}
    check_conversations(config.sarm_model, prompts)
    names = check_architectures(config)
    folder = workdir / "probes"
    LOG.info("features that tell the sides of %d pairs apart, for %s", len(pairs), folder)
    check_same_everywhere(STAGE, config, workdir)
    model = load_reward_model(config)
    features = identify(options, model, pairs)
    selected = features.selected
    if verbosity_pairs:
        selected |= verbose_features(options, model, verbosity_pairs)
    pages, lab_files = pages_of(model, features, options.examples), {}
    if config.prepare_data.source == "lab":
        rates = features.analysis["detectors"]
        detectors = Detectors(
            features=tuple(selected["detectors"]),
            tau=tuple(selected["tau_detectors"]),
            detection_rate=rates["detection"],
            false_positive_rate=rates["false_alarms"],
        )
        lab_files = measure_lab_gates(config, workdir, model, detectors)

    def write() -> None:
        folder.mkdir(exist_ok=True)
        write_features(folder, features, options, names)
        write_json(folder / PAGES, pages, indent=1)
        write_lab_files(folder, lab_files)
        # Last, because --stage=all takes it for the end of the stage.
        write_json(folder / "selected_features.json", selected)

    processes.on_primary(write)
    report_detector_rates(features.analysis["detectors"], options.false_alarm_budget)
    LOG.info("features in %s", folder / "selected_features.json")


def write_features(
    folder: Path, features: Identified, options: IdentifyConfig, names: FeatureNames
) -> None:
    """Writes all files of the stage except the last one, selected_features.json.

    That file has no names: runs of PPO depend on its content.
    """
    write_json(folder / "feature_analysis.json", names.annotated(features.analysis))
    with replacing(folder / "feature_scores.safetensors", "wb") as file:
        file.write(save(features.scores))
    path = folder / "naming_prompts.jsonl"
    write_naming_prompts(path, features.strongest, options.naming_examples, names)
    steering = {str(i): ["*", 0.0] for i in features.selected["safety_harming"][:STEERED]}
    write_json(folder / "steering_config.json", steering)


def pages_of(model: RewardModel, features: Identified, examples: int) -> dict[str, Any]:
    """Returns the content of feature_pages.json: what all listed features read, token by token."""
    roles: dict[int, list[str]] = {}
    for name, role in ROLES.items():
        for i in features.selected.get(name, ()):
            roles.setdefault(i, []).append(role)
    contrast = features.contrast
    responses = ResponseGroups(
        texts=features.texts,
        latents=contrast.latents,
        groups={"chosen": contrast.chosen_p, "rejected": contrast.rejected_p},
    )
    tau = {i: float(features.tau_f[i]) for i in roles}
    return feature_pages(
        model,
        responses,
        roles,
        tau=tau,
        examples=examples,
        direction_fd=features.direction_fd,
    )


def write_naming_prompts(
    path: Path, strongest: Sequence[StrongResponses], most: int, names: FeatureNames
) -> None:
    """Writes a prompt per feature with at most `most` responses; no prompts, no file.

    The name of a feature, if it has one, stands beside its prompt: in it, it would bias the answer.
    """
    rows = names.annotated(naming_prompts(strongest, most)) if most else []
    if not rows:
        path.unlink(missing_ok=True)
        return
    write_jsonl(path, rows)
    LOG.info("%d prompts that ask for the names of features in %s", len(rows), path)


def report_detector_rates(detectors: dict[str, Any], budget: float) -> None:
    """Logs the detectors' rates on held-out prompts; warns if false positives exceed the budget."""
    detection, false_positives = detectors["detection_held_out"], detectors["false_alarms_held_out"]
    if detection is None:
        return
    rates = (
        f"detectors found in the same way as these {len(detectors['features'])} fire on "
        f"{detection:.3f} of the rejected and {false_positives:.3f} of the chosen responses to "
        "held-out prompts"
    )
    if false_positives > budget:
        advice = "more than identify.false_alarm_budget=%g: give more pairs, or a higher"
        LOG.warning(f"%s; {advice} identify.tau_quantile", rates, budget)
    else:
        LOG.info("%s", rates)


def measure_lab_gates(
    config: ConfigDict, workdir: Path, model: RewardModel, detectors: Detectors
) -> dict[str, Any]:
    """Measures the gates of the lab's task, and logs them.

    Returns:
        The contents of gates.json and, if there are several shortcuts, of shortcuts.json.
    """
    measure = text_gates if is_text(config) else world_gates
    gates, shortcuts = measure(config, workdir / "data", model, detectors)
    for gate in gates:
        LOG.info("gate %s: %s", "passed" if gate.passed else "FAILED", gate)
    values = {gate.name: {"value": gate.value, "passed": gate.passed} for gate in gates}
    for name, values_of in shortcuts.items():
        LOG.info("shortcut %s: %s", name, {key: round(v, 3) for key, v in values_of.items()})
    return {GATES: values} | ({SHORTCUTS: shortcuts} if shortcuts else {})


def world_gates(
    config: ConfigDict, data: Path, model: RewardModel, detectors: Detectors
) -> tuple[list[Gate], dict[str, dict[str, float]]]:
    """Measures the gates of the world of capitals, and its shortcuts if it has several."""
    prompts, held_out = (
        [row["prompt"] for row in read_jsonl(data / name, {"prompt": str})]
        for name in ("prompts.jsonl", "held_out_prompts.jsonl")
    )
    contrast = read_pairs(str(data / "contrast_single.jsonl"))
    world = World.parse(config.lab.shortcuts, config.lab.told_shortcuts)
    arguments: dict[str, Any] = {
        "prompts": prompts,
        "held_out_prompts": held_out,
        "seed": config.lab.seed,
        "lab_world": world,
    }
    gates = measure_gates(model, detectors, contrast, **arguments)
    if len(world.shortcuts) == 1:
        return gates, {}
    return gates, measure_shortcuts(model, detectors, **arguments)


def text_gates(
    config: ConfigDict, data: Path, model: RewardModel, detectors: Detectors
) -> tuple[list[Gate], dict[str, dict[str, float]]]:
    """Measures the gates of a task in English on the samples of its policy."""
    fields = {"prompt": str, "response": str, "ended": bool}
    return measure_text_gates(
        model,
        detectors,
        text_task_of(config),
        samples=list(read_jsonl(data / "samples.jsonl", fields)),
        held_out_samples=list(read_jsonl(data / "held_out_samples.jsonl", fields)),
        seed=config.lab.seed,
    )


def write_lab_files(folder: Path, contents: dict[str, Any]) -> None:
    """Writes what `measure_lab_gates` returns, if anything, and removes an old shortcuts.json."""
    for name, content in contents.items():
        write_json(folder / name, content)
    if contents and SHORTCUTS not in contents:
        (folder / SHORTCUTS).unlink(missing_ok=True)


def records(config: ConfigDict, workdir: Path) -> dict:
    """Returns the section without the names of features, which change no result.

    The gates depend on the content of a task's file.
    """
    section = config.identify.to_dict()
    del section["feature_names"]
    return {"identify": section, **task_records(config)}


STAGE = Stage(
    name="identify",
    summary="Preference pairs → latents that tell chosen from rejected, with thresholds.",
    validate=validate,
    run=run,
    check_architectures=check_architectures,
    options=(
        "identify",
        "sarm_model",
        "sarm_max_length",
        "dtype",
        "lab.annotator_bias",
        "lab.seed",
        "lab.shortcuts",
        "lab.task",
        "lab.told_shortcuts",
    ),
    inputs=(
        Input("identify.pairs_jsonl", Kind.FILES),
        Input("identify.verbosity_jsonl", Kind.FILES),
        Input("sarm_model", Kind.SARM),
    ),
    output="probes/selected_features.json",
    makes=(
        "probes/selected_features.json",
        "probes/steering_config.json",
        "probes/naming_prompts.jsonl",
        f"probes/{PAGES}",
        "probes/feature_analysis.json",
        "probes/feature_scores.safetensors",
        f"probes/{GATES}",
        f"probes/{SHORTCUTS}",
    ),
    after=("train_sarm", "train_sae"),
    wanted=lambda config: bool(config.identify.pairs_jsonl),
    records=records,
    processes="all",
)
