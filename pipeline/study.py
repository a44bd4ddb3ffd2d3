"""Run `--stage=all` for the lab: every seed and condition of the study, then its page."""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
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
from pipeline.study_processes import run_seeds
from pipeline.study_records import (
    SeedOutcome,
    drawn_results,
    locked_seed,
    read_records,
    remove_record,
    replace_record,
    results_of,
    seed_folder,
    study_options,
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
from sarm_jax.lab.conditions import RETRAINED, parse_seeds
from sarm_jax.lab.page import write_study
from sarm_jax.parallel.compilation import kept_programs

LOG = logging.getLogger(__name__)


def run_study(template: ConfigDict, workdir: Path) -> None:
    """Runs every seed and condition of the lab, then writes lab.json, the figures and lab.html.

    Several commands with other seeds and otherwise the same options can share the directory. Each
    draws the page of all seeds that have finished so far.

    Args:
        template: the config of the study; "{workdir}" is not filled in yet.
        workdir: its directory.

    Raises:
        InputError: an option or a file is bad, or a seed stopped for such a reason.
        TrainingStoppedError: all seeds that stopped did so in training.
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
    run = partial(
        run_seed,
        template.to_dict(),
        workdir,
        level=LOG.getEffectiveLevel(),
        task_file=task_records(template),
    )
    with kept_programs() if len(seeds) > 1 else contextlib.nullcontext():
        if template.lab.processes == 1 or len(seeds) == 1:
            outcomes = [run(seed) for seed in seeds]
        else:
            outcomes = run_seeds(run, seeds, template.lab.processes)
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
    """Writes the page of a command's own seeds and of those that other commands have finished.

    A call that is refused, for example because an option differs from that of the finished runs,
    leaves the page as it was if results would be lost.

    Args:
        template: the config of the study.
        workdir: its directory, which the caller has locked against other processes that draw.
        own: the outcomes of the command's seeds.
        conditions: all conditions of the study, in order.
        names: names of features. They belong to one reward model: if there are names, the seeds of
            other commands are left out.

    Returns:
        (path of the page, the result in one paragraph).
    """
    options = study_options(template.to_dict()) | task_records(template)
    others = {} if names else read_records(workdir, options, without=own.keys())
    by_seed = dict(sorted((others | dict(own)).items())) if others else dict(own)
    stopped = {seed: redact(o.stopped) for seed, o in by_seed.items() if o.stopped}
    page = workdir / "lab.html"
    refused = any(outcome.refused for outcome in own.values())
    if refused and page.exists() and drawn_results(workdir) - results_of(by_seed):
        return page, "The page is left as it was: it has results that this call does not have."
    return write_study(
        workdir,
        {seed: outcome.finished for seed, outcome in by_seed.items()},
        conditions,
        stopped=stopped,
        names=names,
        pooled=[seed for seed, outcome in by_seed.items() if outcome.pooled],
        task=task_of(template),
    )


def preparation() -> list[Stage]:
    """Returns the stages that run before training, once for all conditions of a seed."""
    order = stages.load_all()
    train = next(i for i, stage in enumerate(order) if stage.per_experiment)
    return [stage for stage in order[:train] if stage.output]


def study_names(template: ConfigDict, seeds: Sequence[int]) -> FeatureNames:
    """Reads the names of features; raises InputError if the study has several reward models."""
    names = feature_names(template)
    if names and len(seeds) > 1:
        raise InputError(
            f"identify.feature_names={template.identify.feature_names}: names the latents of one "
            f"reward model, and lab.seeds={template.lab.seeds} trains one for each seed"
        )
    return names


def run_seed(
    settings: dict,
    workdir: Path,
    seed: int,
    level: int = logging.INFO,
    task_file: dict[str, str] | None = None,
) -> SeedOutcome:
    """Runs one seed of the study.

    Args:
        settings: the options of the study.
        workdir: its directory.
        seed: the seed.
        level: severity from which messages are shown.
        task_file: `task_records` at the start of the study; None: those of now.
    """
    show_progress(f"seed {seed}: ", level)
    folder = seed_folder(workdir, seed)
    folder.mkdir(parents=True, exist_ok=True)
    template = ConfigDict(settings)
    for section in SEEDED:
        template[section].seed = seed
    task_file = task_records(template) if task_file is None else task_file
    try:
        with locked_seed(workdir, seed):
            check_task_file(template, task_file)
            earlier = remove_record(folder)
            outcome = _run_conditions(fill_in(template, folder), folder)
            check_task_file(template, task_file)
            replace_record(folder, study_options(settings) | task_file, outcome, earlier)
    except InputError as error:
        LOG.error("stopped: %s", error)
        return SeedOutcome([], str(error))
    return outcome


def check_task_file(template: ConfigDict, task_file: Mapping[str, str]) -> None:
    """Raises InputError if the task's file has changed since the study began."""
    if task_records(template) != task_file:
        raise InputError(
            f"lab.task={template.lab.task}: the file has changed while the study ran, and results "
            "may be of either content; put it back and run the same command again, or choose "
            "another --workdir"
        )


def _run_conditions(config: ConfigDict, folder: Path) -> SeedOutcome:
    """Prepares a seed, runs all conditions, and ranks a pool under those that have not stopped."""
    finished: list[str] = []
    stopped: dict[str, str] = {}  # condition → reason; the others can still run
    try:
        prepared = preparation_config(config, folder, all_conditions(config))
        run_stages(prepared, folder, preparation())
        at_once = config.lab.conditions_at_once
        for group in groups_of(trained_conditions(config), at_once):
            for condition, error in run_group(config, folder, group):
                if error is None:
                    finished.append(condition)
                else:
                    stopped[condition] = str(error)
        for condition in set(RETRAINED) & set(ranked_conditions(config)):
            try:
                train_reward_model(config, folder, condition)
            except TrainingStoppedError as error:
                LOG.error("condition %s stopped: %s", condition, error)
                stopped[condition] = str(error)
        if pooled := config.lab.pool_responses > 0:
            rank_pool(config, folder, [n for n in all_conditions(config) if n not in stopped])
    except (InputError, TrainingStoppedError) as error:
        LOG.error("stopped: %s", error)
        in_training = isinstance(error, TrainingStoppedError)
        return SeedOutcome(finished, _reasons(stopped, str(error)), in_training)
    return SeedOutcome(finished, _reasons(stopped), bool(stopped), pooled)


def _reasons(stopped: Mapping[str, str], *errors: str) -> str:
    """Joins the reasons why conditions stopped and, after them, why the seed itself stopped."""
    return "; ".join([*(f"{name}: {reason}" for name, reason in stopped.items()), *errors])
