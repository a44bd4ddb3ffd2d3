"""Run `--stage=all` for the lab: every seed and condition of the study, then its page."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

from ml_collections import ConfigDict

from conversion.load import read_sarm_config
from pipeline import stage as stages
from pipeline.cli import fill_in
from pipeline.feature_names import feature_names
from pipeline.models import load_reward_model
from pipeline.option_bounds import OPTIONS
from pipeline.preflight import check
from pipeline.runner import run_stages
from pipeline.stage import Stage
from ppo.tracking.metrics import read_evaluations
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.features.identify import further_random_control
from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.io.files import check_target
from sarm_jax.io.json_files import read_json, write_json
from sarm_jax.io.path_lists import split_paths
from sarm_jax.io.progress import show_progress
from sarm_jax.io.secrets import redact
from sarm_jax.io.signals import cleaning_up
from sarm_jax.lab.conditions import (
    DRAWS,
    RETRAINED,
    other_options,
    parse_conditions,
    parse_seeds,
    reward_options,
)
from sarm_jax.lab.page import write_study
from sarm_jax.lab.results import run_result
from sarm_jax.lab.shortcuts import World
from sarm_jax.models.conversation_rows import read_pairs
from sarm_jax.parallel.compilation import kept_programs

LOG = logging.getLogger(__name__)
SEEDED = ("lab", "train_sarm", "identify", "ppo")  # sections whose seed the study sets
# Options of the reward that may be the same for all conditions; the conditions set the others.
COMMON = ("unit", "penalty_cap", "human_latents")
# Options outside of the reward that conditions set, with the value that leaves them to these.
OF_CONDITIONS = {
    "train_sarm.tie_pairs_jsonl": "",
    "train_sarm.tie_weight": 1.0,
    "train_sarm.heads": 1,
    "lab.oracle": False,
}


@dataclasses.dataclass(frozen=True)
class SeedOutcome:
    """The conditions that a seed has finished and, if it stopped, the reason."""

    finished: list[str]
    stopped: str = ""
    in_training: bool = False


def run_study(template: ConfigDict, workdir: Path) -> None:
    """Runs every seed and condition of the lab, then writes lab.json, the figures and lab.html."""
    seeds = parse_seeds(template.lab.seeds)
    conditions = parse_conditions(template.lab.conditions)
    check_study(template)
    names = study_names(template, seeds)
    for name, is_folder in (("lab.json", False), ("lab.html", False), ("figures", True)):
        check_target(workdir / name, folder=is_folder)
    if template.lab.processes > 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share a GPU
    folder = seed_folder(workdir, seeds[0])
    config = fill_in(template, folder)
    used = [*preparation(), stages.load("train")]
    check(config, folder, [stage for stage in used if stage.wanted(config)])
    settings = template.to_dict()
    with kept_programs() if len(seeds) > 1 else contextlib.nullcontext():
        if template.lab.processes == 1 or len(seeds) == 1:
            level = LOG.getEffectiveLevel()
            outcomes = [run_seed(settings, workdir, seed, level) for seed in seeds]
        else:
            outcomes = run_seeds(settings, workdir, seeds, template.lab.processes)
    by_seed = dict(zip(seeds, outcomes, strict=True))
    finished = {seed: outcome.finished for seed, outcome in by_seed.items()}
    stopped = {seed: outcome for seed, outcome in by_seed.items() if outcome.stopped}
    reasons = {seed: redact(outcome.stopped) for seed, outcome in stopped.items()}
    page, result = write_study(workdir, finished, conditions, reasons, names)
    print(f"{result}\nThe page: {page}")
    if stopped:
        first = next(iter(stopped))
        message = f"{len(stopped)} of {len(seeds)} seeds stopped; seed {first}: {reasons[first]}"
        in_training = all(outcome.in_training for outcome in stopped.values())
        raise TrainingStoppedError(message) if in_training else InputError(message)


def preparation() -> list[Stage]:
    """Returns the stages that run before training, once for all conditions of a seed."""
    order = stages.load_all()
    train = next(i for i, stage in enumerate(order) if stage.per_experiment)
    return [stage for stage in order[:train] if stage.output]


def check_study(template: ConfigDict) -> None:
    """Raises InputError for options out of range, and for options that the study sets itself."""
    if template.lab.processes < 1:
        raise InputError(f"lab.processes={template.lab.processes}: must be at least 1")
    if not 0 < template.lab.tie_weight < float("inf"):
        raise InputError(f"lab.tie_weight={template.lab.tie_weight}: must be positive and finite")
    for name in ("alpha", "beta"):
        if not 0 <= template.lab[name] < float("inf"):
            raise InputError(f"lab.{name}={template.lab[name]}: must be 0 or positive, and finite")
    retrained = [c for c in parse_conditions(template.lab.conditions) if c in RETRAINED]
    if retrained and template.train_sarm.mode != 0:
        raise InputError(
            f"lab.conditions: {retrained[0]} trains a head on the same trunk and SAE, which needs "
            f"train_sarm.mode=0, found {template.train_sarm.mode}"
        )
    options = template.to_dict()
    set_by_conditions = {
        f"reward.{name}": OPTIONS.reward[name] for name in OPTIONS.reward if name not in COMMON
    }
    for field, default in (set_by_conditions | OF_CONDITIONS).items():
        section, name = field.split(".")
        if options[section][name] != default:
            raise InputError(
                f"{field}={options[section][name]}: the conditions of the study set it, with "
                "lab.alpha, lab.beta and lab.tie_weight"
            )
    for section in SEEDED:
        if template[section].seed:
            raise InputError(
                f"{section}.seed={template[section].seed}: the study takes its seeds from lab.seeds"
            )


def study_names(template: ConfigDict, seeds: Sequence[int]) -> FeatureNames:
    """Reads the names of features; raises InputError if there are several reward models."""
    names = feature_names(template)
    if names and len(seeds) > 1:
        raise InputError(
            f"identify.feature_names={template.identify.feature_names}: names the latents of one "
            f"reward model, and lab.seeds={template.lab.seeds} trains one for each seed"
        )
    return names


def run_seeds(
    settings: dict, workdir: Path, seeds: Sequence[int], processes: int
) -> list[SeedOutcome]:
    """Runs every seed in a process of its own, `processes` of them at a time."""
    os.environ["TQDM_DISABLE"] = "1"  # several processes would write bars to one line
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:

        def stop() -> None:
            """Terminates the seeds in progress, which save a checkpoint."""
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in active_children():
                worker.terminate()

        with cleaning_up(stop):
            level = LOG.getEffectiveLevel()
            futures = [pool.submit(run_seed, settings, workdir, seed, level) for seed in seeds]
            return [future.result() for future in futures]


def run_seed(settings: dict, workdir: Path, seed: int, level: int = logging.INFO) -> SeedOutcome:
    """Runs one seed of the study; shows messages of severity `level` and above."""
    show_progress(f"seed {seed}: ", level)
    folder = seed_folder(workdir, seed)
    folder.mkdir(parents=True, exist_ok=True)
    template = ConfigDict(settings)
    for section in SEEDED:
        template[section].seed = seed
    config = fill_in(template, folder)
    finished: list[str] = []
    try:
        run_stages(config, folder, preparation())
        stopped = ""
        for condition in parse_conditions(config.lab.conditions):
            try:
                run_condition(config, folder, condition)
                finished.append(condition)
            except TrainingStoppedError as error:  # the other conditions can still run
                stopped = f"{condition}: {error}"
                LOG.error("stopped: %s", stopped)
    except InputError as error:
        LOG.error("stopped: %s", error)
        return SeedOutcome(finished, str(error))
    return SeedOutcome(finished, stopped, bool(stopped))


def seed_folder(workdir: Path, seed: int) -> Path:
    """Returns the folder of a seed's world and runs."""
    return workdir / f"seed_{seed}"


def draw_random_control(config: ConfigDict, selected: Path, path: Path, draw: int) -> None:
    """Writes a further draw of random features, with thresholds by the rule of identify.

    A file that is newer than the lists of identify is kept.
    """
    if path.exists() and path.stat().st_mtime_ns >= selected.stat().st_mtime_ns:
        return
    options = stages.load("identify").validate(config)
    pairs = [row for file in split_paths(config.identify.pairs_jsonl) for row in read_pairs(file)]
    detectors = read_json(selected)["detectors"]
    control = further_random_control(options, load_reward_model(config), pairs, detectors, draw)
    write_json(
        path,
        {"random_control": list(control.features), "tau_random_control": list(control.tau)},
    )


def run_condition(config: ConfigDict, folder: Path, condition: str) -> None:
    """Trains under one condition of the study and writes its result.json."""
    selected, workdir = folder / "probes" / "selected_features.json", folder / condition
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(other_options(condition, folder, config.lab.to_dict()))
    lists, counts = selected, range(0)
    if condition in DRAWS:
        lists = folder / "probes" / f"{condition}.json"
        draw_random_control(config, selected, lists, DRAWS[condition])
    lab_world = World.parse(config.lab.shortcuts, config.lab.told_shortcuts)
    if condition == "oracle":
        latents = read_sarm_config(config.sarm_model).latent_size
        counts = range(latents, latents + len(lab_world.shortcuts))
    config.reward.update(reward_options(condition, lists, config.lab.to_dict(), counts))
    workdir.mkdir(exist_ok=True)
    LOG.info("condition %s", condition)
    names = ("train_sarm", "train") if condition in RETRAINED else ("train",)
    run_stages(config, workdir, [stages.load(name) for name in names])
    summary, features = read_json(workdir / "summary.json"), read_json(selected)
    rows = read_evaluations(workdir)
    model = load_reward_model(config).with_ensemble(config.reward.ensemble)
    result = run_result(rows, model, features, summary["seconds"], lab_world)
    write_json(workdir / "result.json", {"seed": config.ppo.seed} | result)
