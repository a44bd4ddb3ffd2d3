"""Evaluate a SARM on benchmarks and under steering, and trained policies against their base."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from ml_collections import ConfigDict

from pipeline.feature_names import feature_names
from pipeline.inputs import Input, Kind
from pipeline.models import check_reward_model, lacks_features, load_reward_model
from pipeline.options import optional_paths, required
from pipeline.policy_evaluation import evaluate_policies, policy_inputs, response_config
from pipeline.provenance import check_same_everywhere
from pipeline.reward_inputs import REWARD_FILES, REWARD_LISTS
from pipeline.stage import Stage, never
from sarm_jax.evaluation import figures
from sarm_jax.evaluation.benchmark_files import (
    ChoiceRow,
    StyledRow,
    named_files,
    read_rewardbench2,
    read_rm_bench,
)
from sarm_jax.evaluation.controls import Controls, read_steering
from sarm_jax.evaluation.rewardbench2 import check_ties, evaluate_rewardbench2
from sarm_jax.evaluation.rm_bench import MEASURES, evaluate_rm_bench
from sarm_jax.evaluation.steering import (
    Answer,
    SteeringConfig,
    check_steering,
    evaluate_steering,
    parse_targets,
    read_answer_sets,
)
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing
from sarm_jax.io.json_files import write_json
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.io.path_lists import escaped, split_entries
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import check_ensemble
from sarm_jax.parallel import processes
from sarm_jax.reporting.statistics import format_interval
from sarm_jax.rewards.options import reward_config

LOG = logging.getLogger(__name__)
NUMBER_FORMAT = "+.4f"  # of logged means and intervals
FILES = (
    "steering.json steering_rows.jsonl rm_bench.json rm_bench.png rewardbench2.json "
    "rewardbench2.png policy.json responses.jsonl latent_map.json feature_pages.json"
).split()
FORMAT = 2  # version of eval/; 2 pools RM-Bench's safety rows and has a steering set per file


def validate(config: ConfigDict) -> SteeringConfig:
    """Validates the section evaluate and returns its steering part."""
    required(config, "sarm_model")
    feature_names(config)  # raises for a malformed file
    reward_config(config.reward)
    response_config(config)
    return steering_config(config)


def check_architectures(config: ConfigDict) -> FeatureNames:
    """Compares controls and names with the reward model; returns the names."""
    reward, architecture = reward_config(config.reward), check_reward_model(config)
    reward.check_features(architecture.latent_size)
    check_ensemble(reward.ensemble, architecture)
    return feature_names(config, architecture.latent_size)


def run(config: ConfigDict, workdir: Path) -> None:
    """Run every evaluation that the config names files for.

    All files are read and checked before the model is loaded.
    """
    steering, section = validate(config), config.evaluate
    files = named_files(split_entries(section.data_jsonl), "evaluate.data_jsonl")
    answers = read_answer_sets(files)
    styled = [row for name in optional_paths(section.rm_bench) for row in read_rm_bench(name)]
    choices = [
        row for name in optional_paths(section.rewardbench2) for row in read_rewardbench2(name)
    ]
    policies = policy_inputs(config, workdir)
    if not (answers or styled or choices or policies):
        raise InputError(
            "nothing to evaluate: name evaluate.data_jsonl, evaluate.rm_bench, "
            "evaluate.rewardbench2 or evaluate.prompts_jsonl with evaluate.runs"
        )
    check_ties(choices, f"evaluate.rewardbench2={section.rewardbench2}")
    controls, names = controls_of(config), check_architectures(config)
    if answers:
        check_steering(steering, answers, controls)
    folder = workdir / "eval"
    LOG.info("evaluating %s, for %s", config.sarm_model, folder)
    check_same_everywhere(STAGE, config, workdir)
    model = load_reward_model(config).with_ensemble(config.reward.ensemble)
    processes.on_primary(partial(folder.mkdir, exist_ok=True))
    if answers:
        evaluate_on_answers(steering, model, answers, controls=controls, names=names, folder=folder)
    if styled:
        evaluate_on_rm_bench(model, styled, controls, folder)
    if choices:
        evaluate_on_rewardbench2(model, choices, controls, folder)
    if policies:
        evaluate_policies(config, model, policies, controls=controls, names=names, folder=folder)


def evaluate_on_answers(
    config: SteeringConfig,
    model: RewardModel,
    answers: Sequence[Answer],
    *,
    controls: Controls,
    names: FeatureNames,
    folder: Path,
) -> None:
    """Writes scores before and after steering: steering.json, steering_rows.jsonl, figures."""
    result = evaluate_steering(config, model, answers, controls)

    def write() -> None:
        for number, (name, content) in enumerate(result.summary["sets"].items(), 1):
            content["figure"] = f"steering_{number}.png"
            write_figure(folder / content["figure"], figures.before_after(name, content))
        write_jsonl(folder / "steering_rows.jsonl", result.rows)
        named = names.field(controls.changed_features)
        write_json(folder / "steering.json", result.summary | named)

    processes.on_primary(write)
    for name, content in result.summary["sets"].items():
        change = format_interval(content["change"], NUMBER_FORMAT)
        LOG.info("%s: %d responses, %s", name, content["responses"], change)
    specificity = result.summary["specificity"]
    if specificity["mean"] is None:
        LOG.info("no specificity: %s", specificity["why"])
    else:
        LOG.info("specificity %s", format_interval(specificity, NUMBER_FORMAT))
    LOG.info("steering in %s", folder / "steering.json")


def evaluate_on_rm_bench(
    model: RewardModel, rows: Sequence[StyledRow], controls: Controls, folder: Path
) -> None:
    """Writes the 3 × 3 style matrices: rm_bench.json and its figure."""
    result = evaluate_rm_bench(model, rows, controls)

    def write() -> None:
        write_figure(folder / "rm_bench.png", figures.style_matrices(result))
        write_json(folder / "rm_bench.json", result)

    processes.on_primary(write)
    for name, content in result["variants"].items():
        means = ", ".join(f"{m} {content['overall'][m]['mean']:.3f}" for m in MEASURES)
        LOG.info("RM-Bench, %s: %s", name, means)
    log_missing("RM-Bench", result["missing_domains"])
    LOG.info("RM-Bench in %s", folder / "rm_bench.json")


def evaluate_on_rewardbench2(
    model: RewardModel, rows: Sequence[ChoiceRow], controls: Controls, folder: Path
) -> None:
    """Writes scores per subset: rewardbench2.json and its figure."""
    result = evaluate_rewardbench2(model, rows, controls)

    def write() -> None:
        write_figure(folder / "rewardbench2.png", figures.subset_scores(result))
        write_json(folder / "rewardbench2.json", result)

    processes.on_primary(write)
    for name, content in result["variants"].items():
        LOG.info("RewardBench 2, %s: %s", name, format_interval(content["score"], NUMBER_FORMAT))
    log_missing("RewardBench 2", result["missing_subsets"])
    LOG.info("RewardBench 2 in %s", folder / "rewardbench2.json")


def log_missing(benchmark: str, missing: Sequence[str]) -> None:
    """Logs the parts of a benchmark that the files have no rows of, if any."""
    if missing:
        LOG.info("%s: no rows of %s: this is the mean of the others", benchmark, ", ".join(missing))


def steering_config(config: ConfigDict) -> SteeringConfig:
    """Returns the steering part of the section evaluate."""
    section = config.evaluate
    targets = parse_targets(section.steering_targets)
    return SteeringConfig(
        num_example=section.num_example,
        steering_targets=targets,
        resamples=section.resamples,
        seed=section.seed,
    )


def controls_of(config: ConfigDict) -> Controls:
    """Returns the clamps and penalties of the section reward, with those of the steering file."""
    reward = reward_config(config.reward)
    check_architectures(config)
    further = [*reward.further_terms, *(["screen"] if reward.screen else [])]
    if further:
        LOG.info(
            "of section reward, only clamps and penalties of features are evaluated, not %s",
            ", ".join(further),
        )
    path = config.evaluate.steering_json
    steering = read_steering(path) if path else {}
    try:
        change = reward.clamp(check_reward_model(config).latent_size, steering)
    except InputError as error:  # the clamps alone have been checked: it is the file
        raise InputError(f"evaluate.steering_json={path}: {error}") from None
    return Controls(
        intervention=change,
        penalize_features=() if reward.screen else reward.penalize_features,
        tau_values=() if reward.screen else reward.tau_values,
        alpha_values=reward.alpha_values,
        unit=reward.unit,
        penalty_cap=reward.penalty_cap,
    )


def write_figure(path: Path, content: bytes) -> None:
    """Writes a PNG atomically."""
    with replacing(path, "wb") as file:
        file.write(content)


def wanted(config: ConfigDict) -> bool:
    """Returns whether the config names anything to evaluate.

    `eval_prompts_jsonl` alone, which training reads too, asks for it only if the reward model has
    features.
    """
    section = config.evaluate
    files = (section.data_jsonl, section.rm_bench, section.rewardbench2, section.prompts_jsonl)
    if any(files):
        return True
    if not config.prompts_jsonl or not (config.eval_prompts_jsonl or section.runs):
        return False
    if section.runs or not lacks_features(config.sarm_model):
        return True
    _log_skipped(config.sarm_model)
    return False


@cache
def _log_skipped(sarm_model: str) -> None:
    """Logs why `--stage=all` does not evaluate, once, although `wanted` is called often."""
    LOG.info(
        "evaluate is skipped: sarm_model=%s has no SAE, so no features; --stage=train_sae trains "
        "one", sarm_model,
    )  # fmt: skip


def compares_policies(config: ConfigDict) -> bool:
    """Returns whether policies are compared even if the working directory has no adapter."""
    return bool(config.evaluate.prompts_jsonl or config.evaluate.runs)


def records(config: ConfigDict, workdir: Path) -> dict:
    """Names the runs that are compared, and the version of what eval/ holds."""
    runs = config.evaluate.runs or escaped(str(workdir))
    return {"evaluate": config.evaluate.to_dict() | {"runs": runs}, "format": FORMAT}


STAGE = Stage(
    name="evaluate",
    summary="The SARM on benchmarks and under steering; policies against their base → eval/.",
    validate=validate,
    run=run,
    check_architectures=check_architectures,
    options=(
        "evaluate",
        "reward",
        "policy_model",
        "eval_prompts_jsonl",
        "sarm_model",
        "sarm_max_length",
        "dtype",
        "ppo.max_new_tokens",
        "ppo.max_prompt_tokens",
        "ppo.long_prompts",
    ),
    inputs=(
        Input("evaluate.data_jsonl", Kind.NAMED_FILES),
        Input("evaluate.steering_json"),
        Input("evaluate.rm_bench", Kind.FILES),
        Input("evaluate.rewardbench2", Kind.FILES),
        Input("evaluate.prompts_jsonl", Kind.ROWS),
        Input("evaluate.human_jsonl", Kind.ROWS, read_if=compares_policies),
        Input("evaluate.runs", Kind.RUNS, ("adapter/*",)),
        Input(
            "eval_prompts_jsonl",
            Kind.ROWS,
            read_if=lambda config: compares_policies(config) and not config.evaluate.prompts_jsonl,
        ),
        *REWARD_LISTS,
        *(dataclasses.replace(item, read_if=never) for item in REWARD_FILES),
        Input("policy_model", Kind.POLICY, read_if=compares_policies),
        Input("sarm_model", Kind.SARM),
    ),
    output="eval",
    makes=("eval/", *(f"eval/{name}" for name in FILES)),
    after=("train",),
    wanted=wanted,
    records=records,
    made_from=("identify", "human_latents"),
    processes="all",
)
