"""Run `--stage=all` for the lab: every seed and condition of the study, then its page."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

from ml_collections import ConfigDict

from pipeline import stage as stages
from pipeline.cli import fill_in
from pipeline.feature_names import feature_names
from pipeline.preflight import check
from pipeline.runner import run_stages
from pipeline.stage import Stage
from pipeline.study_options import (
    SEEDED,
    all_conditions,
    check_pool,
    check_study,
    groups_of,
    ranked_conditions,
    trained_conditions,
)
from pipeline.study_pool import rank_pool
from pipeline.study_records import (
    SeedOutcome,
    locked_seed,
    read_records,
    remove_record,
    seed_folder,
    study_options,
    write_record,
)
from pipeline.study_runs import preparation_config, run_group, train_reward_model
from pipeline.tasks import task_of, task_records
from pipeline.together import check_at_once
from ppo.options import train_config
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.io.files import check_target, locked_output
from sarm_jax.io.progress import show_progress
from sarm_jax.io.secrets import redact
from sarm_jax.io.signals import cleaning_up
from sarm_jax.lab.conditions import RETRAINED, parse_seeds
from sarm_jax.lab.page import write_study
from sarm_jax.parallel.compilation import kept_programs

LOG = logging.getLogger(__name__)


def run_study(template: ConfigDict, workdir: Path) -> None:
    """Runs every seed and condition of the lab, then writes lab.json, the figures and lab.html.

    Other seeds of the same options in the directory are on the page too: several commands can share
    it, and the last one that ends draws the page of all.
    """
    seeds = parse_seeds(template.lab.seeds)
    conditions = trained_conditions(template)
    check_study(template)
    check_pool(template)
    names = study_names(template, seeds)
    for name, is_folder in (("lab.json", False), ("lab.html", False), ("figures", True)):
        check_target(workdir / name, folder=is_folder)
    if template.lab.processes > 1:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # they share a GPU
    folder = seed_folder(workdir, seeds[0])
    config = preparation_config(fill_in(template, folder), folder, all_conditions(template))
    used = [*preparation(), stages.load("train")]
    check(config, folder, [stage for stage in used if stage.wanted(config)])
    at_once = config.lab.conditions_at_once
    check_at_once("lab.conditions_at_once", at_once, config, train_config(config))
    settings = template.to_dict()
    with kept_programs() if len(seeds) > 1 else contextlib.nullcontext():
        if template.lab.processes == 1 or len(seeds) == 1:
            level = LOG.getEffectiveLevel()
            outcomes = [run_seed(settings, workdir, seed, level) for seed in seeds]
        else:
            outcomes = run_seeds(settings, workdir, seeds, template.lab.processes)
    own = dict(zip(seeds, outcomes, strict=True))
    with locked_output(workdir / "lab.json", wait=True):
        page, result = draw_page(template, workdir, own, conditions, names)
    print(f"{result}\nThe page: {page}")
    stopped = {seed: outcome for seed, outcome in own.items() if outcome.stopped}
    if stopped:
        first, reason = next((seed, redact(o.stopped)) for seed, o in stopped.items())
        message = f"{len(stopped)} of {len(seeds)} seeds stopped; seed {first}: {reason}"
        in_training = all(outcome.in_training for outcome in stopped.values())
        raise TrainingStoppedError(message) if in_training else InputError(message)


def draw_page(
    template: ConfigDict,
    workdir: Path,
    own: Mapping[int, SeedOutcome],
    conditions: Sequence[str],
    names: FeatureNames,
) -> tuple[Path, str]:
    """Writes the page of a command's own seeds and of those that others have finished.

    Args:
        template: the config of the study.
        workdir: its directory, in which no other process draws meanwhile.
        own: the outcomes of the command's seeds.
        conditions: all conditions of the study, in order.
        names: names of features; they belong to one seed, so that others are left out.

    Returns:
        (path of the page, the result in one paragraph).
    """
    options = study_options(template.to_dict()) | task_records(template)
    others = {} if names else read_records(workdir, options)
    by_seed = dict(own)
    if others.keys() - own.keys():
        by_seed = dict(sorted((others | by_seed).items()))
    stopped = {seed: redact(o.stopped) for seed, o in by_seed.items() if o.stopped}
    return write_study(
        workdir,
        {seed: outcome.finished for seed, outcome in by_seed.items()},
        conditions,
        stopped,
        names,
        [seed for seed, outcome in by_seed.items() if outcome.pooled],
        task_of(template),
    )


def preparation() -> list[Stage]:
    """Returns the stages that run before training, once for all conditions of a seed."""
    order = stages.load_all()
    train = next(i for i, stage in enumerate(order) if stage.per_experiment)
    return [stage for stage in order[:train] if stage.output]


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
    try:
        with locked_seed(workdir, seed):
            remove_record(folder)
            outcome = _run_conditions(fill_in(template, folder), folder)
            write_record(folder, study_options(settings) | task_records(template), outcome)
    except InputError as error:
        LOG.error("stopped: %s", error)
        return SeedOutcome([], str(error))
    return outcome


def _run_conditions(config: ConfigDict, folder: Path) -> SeedOutcome:
    """Prepares a seed and runs all conditions."""
    finished: list[str] = []
    try:
        prepared = preparation_config(config, folder, all_conditions(config))
        run_stages(prepared, folder, preparation())
        stopped, unfinished = "", []
        at_once = config.lab.conditions_at_once
        for group in groups_of(trained_conditions(config), at_once):
            for condition, error in run_group(config, folder, group):
                if error is None:
                    finished.append(condition)
                else:  # the other conditions can still run
                    stopped = f"{condition}: {error}"
                    unfinished.append(condition)
        for condition in set(RETRAINED) & set(ranked_conditions(config)):
            train_reward_model(config, folder, condition)
        if pooled := config.lab.pool_responses > 0:
            ranked = [name for name in all_conditions(config) if name not in unfinished]
            rank_pool(config, folder, ranked)
    except InputError as error:
        LOG.error("stopped: %s", error)
        return SeedOutcome(finished, str(error))
    return SeedOutcome(finished, stopped, bool(stopped), pooled)
