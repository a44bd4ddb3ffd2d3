"""A SARM on benchmarks and under steering, with and without its controls."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from conversion.hub import locate_file
from conversion.load import read_sarm_config
from pipeline.shared import given, required, reward_model, write_json
from pipeline.stages.policies import evaluate_policies, policy_inputs, response_config
from ppo.options import reward_config
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
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.models.reward_model import RewardModel

LOG = logging.getLogger(__name__)


def options(config: ConfigDict) -> SteeringConfig:
    """The section evaluate; its sampling options are `policies.response_config`'s."""
    required(config, "sarm_model")
    reward_config(config.reward)
    response_config(config)
    return steering_config(config)


def run(config: ConfigDict, workdir: Path) -> None:
    """What the config names files for → eval/*.json and eval/*.png.

    Every file is read, and refused if it is bad, before the model is loaded.
    """
    steering, section = options(config), config.evaluate
    answers = read_answer_sets(named_files(given(section.data_jsonl), "evaluate.data_jsonl"))
    styled = [r for src in given(section.rm_bench) for r in read_rm_bench(locate_file(src), src)]
    choices = [
        r for src in given(section.rewardbench2) for r in read_rewardbench2(locate_file(src), src)
    ]
    policies = policy_inputs(config, workdir)
    if not (answers or styled or choices or policies):
        raise InputError(
            "nothing to evaluate: name evaluate.data_jsonl, evaluate.rm_bench, "
            "evaluate.rewardbench2 or evaluate.prompts_jsonl with evaluate.runs"
        )
    check_ties(choices, f"evaluate.rewardbench2={section.rewardbench2}")
    controls = controls_of(config)
    if answers:
        check_steering(steering, answers, controls)
    folder = workdir / "eval"
    LOG.info("evaluating %s, for %s", config.sarm_model, folder)
    model = reward_model(config)
    folder.mkdir(exist_ok=True)
    if answers:
        evaluate_on_answers(steering, model, answers, controls, folder)
    if styled:
        evaluate_on_rm_bench(model, styled, controls, folder)
    if choices:
        evaluate_on_rewardbench2(model, choices, controls, folder)
    if policies:
        evaluate_policies(config, model, controls, policies, folder)


def evaluate_on_answers(
    config: SteeringConfig,
    model: RewardModel,
    answers: Sequence[Answer],
    controls: Controls,
    folder: Path,
) -> None:
    """Scores before and after steering: steering.json, steering_rows.jsonl, a figure per set."""
    found = evaluate_steering(config, model, answers, controls)
    for number, (name, content) in enumerate(found.summary["sets"].items(), 1):
        content["figure"] = f"steering_{number}.png"
        write_figure(folder / content["figure"], figures.before_after(name, content))
        LOG.info("%s: %d responses, %s", name, content["responses"], shown(content["change"]))
    write_jsonl(folder / "steering_rows.jsonl", found.rows)
    write_json(folder / "steering.json", found.summary)
    specificity = found.summary["specificity"]
    if specificity["mean"] is None:
        LOG.info("no specificity: %s", specificity["why"])
    else:
        LOG.info("specificity %s", shown(specificity))
    LOG.info("steering in %s", folder / "steering.json")


def evaluate_on_rm_bench(
    model: RewardModel, rows: Sequence[StyledRow], controls: Controls, folder: Path
) -> None:
    """The 3 × 3 style matrices: rm_bench.json and its figure."""
    found = evaluate_rm_bench(model, rows, controls)
    write_figure(folder / "rm_bench.png", figures.style_matrices(found))
    write_json(folder / "rm_bench.json", found)
    for name, content in found["variants"].items():
        means = ", ".join(f"{m} {content['overall'][m]['mean']:.3f}" for m in MEASURES)
        LOG.info("RM-Bench, %s: %s", name, means)
    log_missing("RM-Bench", found["missing_domains"])
    LOG.info("RM-Bench in %s", folder / "rm_bench.json")


def evaluate_on_rewardbench2(
    model: RewardModel, rows: Sequence[ChoiceRow], controls: Controls, folder: Path
) -> None:
    """Scores per subset: rewardbench2.json and its figure."""
    found = evaluate_rewardbench2(model, rows, controls)
    write_figure(folder / "rewardbench2.png", figures.subset_scores(found))
    write_json(folder / "rewardbench2.json", found)
    for name, content in found["variants"].items():
        LOG.info("RewardBench 2, %s: %s", name, shown(content["score"]))
    log_missing("RewardBench 2", found["missing_subsets"])
    LOG.info("RewardBench 2 in %s", folder / "rewardbench2.json")


def log_missing(benchmark: str, parts: Sequence[str]) -> None:
    """Says what a score lacks to be the benchmark's own."""
    if parts:
        LOG.info("%s: no rows of %s: this is the mean of the others", benchmark, ", ".join(parts))


def steering_config(config: ConfigDict) -> SteeringConfig:
    """The steering part of the section evaluate."""
    section = config.evaluate
    targets = parse_targets(section.steering_targets)
    return SteeringConfig(section.num_example, targets, section.resamples, section.seed)


def controls_of(config: ConfigDict) -> Controls:
    """Clamps and penalties of the section reward, and the steering file."""
    reward = reward_config(config.reward)
    size = read_sarm_config(config.sarm_model).sae.latent_size
    reward.check_features(size)
    path = config.evaluate.steering_json
    steering = read_steering(path) if path else {}
    try:
        change = reward.clamp(size, steering)
    except InputError as error:  # the clamps alone are sound
        raise InputError(f"evaluate.steering_json={path}: {error}") from None
    return Controls(
        change,
        reward.penalize_features,
        reward.tau_values,
        reward.alpha_values,
        reward.unit,
        reward.penalty_cap,
    )


def write_figure(path: Path, content: bytes) -> None:
    """A PNG, written atomically."""
    with replacing(path, "wb") as file:
        file.write(content)


def shown(found: dict) -> str:
    """A mean with its interval."""
    if found["low"] is None:
        return f"{found['mean']:+.4f}"
    return f"{found['mean']:+.4f} (95 % {found['low']:+.4f} to {found['high']:+.4f})"
