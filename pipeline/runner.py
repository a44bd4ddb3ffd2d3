"""Run stages and keep their records: what is up to date is not done again.

A result that took long to make (the lab's models, a SARM, a policy) is never overwritten: if its
options or inputs have changed, the call is refused. Every other result is then made again.
"""

import contextlib
import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pipeline import stage as stages
from pipeline.changes import Provenance
from pipeline.experiments import runs_of, with_runs
from pipeline.preflight import check_inputs, naming_experiment
from pipeline.provenance import Records, check_claim, claim_workdir, provenance
from pipeline.stage import Stage
from pipeline.together import member, run_together
from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.io.workdir import lock_stage, open_workdir
from sarm_jax.parallel import processes
from sarm_jax.parallel.compilation import kept_programs

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The action of `--stage=all` on one stage; `seconds` is None if it did nothing."""

    stage: str
    output: Path
    action: str
    seconds: float | None = None


def run_stage(
    name: str, config: ConfigDict, workdir: Path, shorthands: Mapping[str, str] | None = None
) -> None:
    """Runs one stage, whether it is up to date or not, and records it.

    Args:
        name: name of the stage.
        config: the config, with "{workdir}" filled in.
        workdir: the working directory.
        shorthands: flags that were given, with the config fields that they set; those that the
            stage does not read are logged.

    Raises:
        InputError: bad options or inputs.
        TrainingStoppedError: a run of PPO stopped; other experiments have been trained.
    """
    stage = stages.load(name)
    if stage.output is None:
        stage.check_outputs(config, workdir)
        stage.run(config, workdir)
        return
    for flag, field in (shorthands or {}).items():
        if not stage.reads_option(field):
            LOG.info("%s: %s is not read by --stage=%s", flag, field, name)
    _warn_of_stale_inputs(stage, config, workdir)
    config = with_runs(config, workdir)
    stopped: list[TrainingStoppedError] = []
    check_runs(stage, config, workdir)
    runs = runs_of(stage, config, workdir)

    def train(run_name: str, run_config: ConfigDict, folder: Path) -> None:
        if run_name and member() is None:  # otherwise every message of the run has its name
            LOG.info("experiment %s", run_name)
        with continuing_with_others(run_name, stopped), _opened(folder):
            check_call(stage, run_config, workdir)
            made_from = provenance(stage, run_config, folder)
            _run(stage, run_config, folder, made_from)

    _run_all(runs, train, config)
    if stopped:
        raise stopped[0]


def run_stages(config: ConfigDict, workdir: Path, selected: Sequence[Stage]) -> list[Outcome]:
    """Runs those of the stages that the config asks for and that are not up to date, in order.

    Raises:
        InputError: names its stage; what is finished by then is kept.
        TrainingStoppedError: a run of PPO stopped. If there are several experiments, the others,
            the evaluation and the report come first.
    """
    outcomes: list[Outcome] = []
    stopped: list[TrainingStoppedError] = []
    config = with_runs(config, workdir)
    for stage in selected:
        check_runs(stage, config, workdir)
        outcomes += _update_runs(stage, config, workdir, stopped)
    if stopped:
        raise stopped[0]
    return outcomes


def _update_runs(
    stage: Stage, config: ConfigDict, workdir: Path, stopped: list[TrainingStoppedError]
) -> list[Outcome]:
    """Brings the runs of a stage that the config asks for up to date; returns them in order."""
    runs = runs_of(stage, config, workdir)
    wanted = processes.broadcast([stage.wanted(run_config) for _, run_config, _ in runs])
    runs = [run for run, is_wanted in zip(runs, wanted, strict=True) if is_wanted]
    outcomes: dict[str, Outcome] = {}

    def update(name: str, run_config: ConfigDict, folder: Path) -> None:
        with continuing_with_others(name, stopped), _opened(folder):
            outcome = _bring_up_to_date(stage, run_config, folder, workdir)
            title = f"{stage.name} {name}".strip()
            outcomes[name] = dataclasses.replace(outcome, stage=title)

    _run_all(runs, update, config)
    return [outcomes[name] for name, *_ in runs if name in outcomes]


def _run_all(
    runs: Sequence[tuple[str, ConfigDict, Path]],
    train: Callable[[str, ConfigDict, Path], None],
    config: ConfigDict,
) -> None:
    """Calls `train` for each run; of several runs, `experiments_at_once` at a time."""
    with kept_programs() if len(runs) > 1 else contextlib.nullcontext():
        if len(runs) > 1 and config.experiments_at_once > 1:
            works = [(f"experiment {run[0]}", partial(train, *run)) for run in runs]
            run_together(works, config.experiments_at_once)
            return
        for run in runs:
            train(*run)


def _opened(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Returns the context in which a stage writes to its folder, which process 0 alone does."""
    return processes.primary_only(open_workdir(folder))


def check_runs(stage: Stage, config: ConfigDict, workdir: Path) -> None:
    """Raises InputError for bad options of any of several experiments, before the first is run."""
    for run_name, run_config, folder in runs_of(stage, config, workdir):
        if run_name:
            with naming_experiment(run_name):
                check_call(stage, run_config, workdir)
                if stage.has_models(run_config):
                    stage.check_architectures(run_config)
                stage.check_outputs(run_config, folder)
                check_claim(stage, run_config, folder)


@contextlib.contextmanager
def continuing_with_others(run_name: str, stopped: list[TrainingStoppedError]) -> Iterator[None]:
    """Collects the error of an experiment that stopped, so that the others are still trained.

    Errors name the experiment. A run without a name has no others, and its error passes.
    """
    try:
        with naming_experiment(run_name):
            yield
    except TrainingStoppedError as error:
        if not run_name:
            raise
        if member() is None:
            LOG.error("experiment %s stopped: %s", run_name, error)
        else:
            LOG.error("stopped: %s", error)
        stopped.append(type(error)(f"experiment {run_name}: {error}"))


def check_call(stage: Stage, config: ConfigDict, workdir: Path) -> None:
    """Raises InputError for bad options or missing inputs of a stage that is about to run."""
    refuse_missing_inputs(stage, config, workdir)
    stage.validate(config)
    check_inputs(stage, config, workdir)


def refuse_missing_inputs(stage: Stage, config: ConfigDict, workdir: Path) -> None:
    """Raises InputError for an input that is missing, if another stage makes it in `workdir`."""
    for item in stage.inputs:
        for path in item.paths(config, workdir) if item.read_if(config) else ():
            if path.exists():
                continue
            for maker in stages.load_all():
                if maker is not stage and maker.makes_path(path, workdir):
                    advice = f"--stage={maker.name} makes it"
                    raise InputError(f"{item.field}={path}: no such file; {advice}")


def _warn_of_stale_inputs(stage: Stage, config: ConfigDict, workdir: Path) -> None:
    """Warns if features or human latents come from another reward model, or from other data."""
    records = Records(workdir)
    for maker in map(stages.load, stage.made_from):
        if maker.name not in records.stages:
            continue
        changed = records.stale(maker, provenance(maker, config, workdir), "sarm_model")
        if changed:
            output = maker.output_path(config, workdir)
            advice = f"--stage={maker.name} makes it again"
            LOG.warning("%s is out of date: %s; %s", output, changed, advice)


def _bring_up_to_date(stage: Stage, config: ConfigDict, folder: Path, workdir: Path) -> Outcome:
    """Runs a stage unless it is up to date; `folder` is the run's, within or equal to `workdir`."""
    output = stage.output_path(config, folder)
    try:
        done, changed, made_from = processes.on_primary(
            partial(_compare, stage, config, folder, workdir)
        )
        if done:
            return Outcome(stage.name, output, done)
        LOG.info(
            "stage %s: %s In %s%s",
            stage.name, stage.summary, folder, f"; {changed}" if changed else "",
        )  # fmt: skip
        seconds = _run_on_processes(stage, config, folder, Provenance(**made_from))
    except InputError as error:
        raise InputError(f"stage {stage.name}: {error}") from error
    reason = f", because {changed}" if changed else ""
    return Outcome(stage.name, output, f"done{reason}", seconds)


def _compare(
    stage: Stage, config: ConfigDict, folder: Path, workdir: Path
) -> tuple[str, str | None, dict[str, Any]]:
    """Compares a stage with its record.

    Returns:
        (why there is nothing to do, or "", what has changed since the stage ran, or None, what its
        result depends on now).
    """
    records, output = Records(folder), stage.output_path(config, folder)
    if output.exists() and stage.name not in records.stages and stage.costly(config):
        if stage.per_experiment:
            check_claim(stage, config, folder)
            claim_workdir(stage, config, folder)
        return "kept: made by a call that left no record", None, {}
    refuse_missing_inputs(stage, config, workdir)
    made_from = provenance(stage, config, folder)
    changed = records.difference(stage, made_from)
    up_to_date = output.exists() and records.finished(stage.name) and changed is None
    return "up to date" if up_to_date else "", changed, dataclasses.asdict(made_from)


def _run_on_processes(
    stage: Stage, config: ConfigDict, folder: Path, made_from: Provenance
) -> float:
    """Runs a stage on all processes of the run, or on process 0, as the stage says."""
    run = partial(_run, stage, config, folder, made_from)
    if not processes.connected():
        return run()
    if stage.processes == "primary":
        return processes.on_primary(run)
    if stage.processes == "one":
        raise InputError(
            f"runs in one process: run --stage={stage.name} before, without --num_processes"
        )
    seconds = run()
    await_output(stage.output_path(config, folder))
    return seconds


def await_output(path: Path, timeout: float = 90) -> None:
    """Waits until every process sees what a stage has written, in the directory that they share.

    Args:
        path: the file or folder.
        timeout: seconds. Other hosts see a new file of a network file system some time later.

    Raises:
        InputError: in every process, if one does not see it.
    """
    end = time.monotonic() + timeout
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # makes a network file system look again
    advice = "--stage=all needs one working directory for all hosts"
    processes.raise_on_all("" if path.exists() else f"{path}: is not there; {advice}")


def _run(stage: Stage, config: ConfigDict, workdir: Path, made_from: Provenance) -> float:
    """Runs a stage, alone in the working directory, and records it; returns the seconds it took."""
    start = time.monotonic()
    with processes.primary_only(_recording(stage, config, workdir, made_from)):
        stage.run(config, workdir)
    gc.collect()  # models have reference cycles; without this, their weights outlive the stage
    return round(time.monotonic() - start, 1)


@contextlib.contextmanager
def _recording(
    stage: Stage, config: ConfigDict, workdir: Path, made_from: Provenance
) -> Iterator[None]:
    """Checks that a stage may write to the working directory, and records that it runs there."""
    stage.check_outputs(config, workdir)
    with lock_stage(workdir, stage.name):
        records = Records(workdir)
        changed = records.difference(stage, made_from, continuing=True)
        if stage.costly(config) and changed and stage.has_begun(config, workdir):
            raise InputError(
                f"--workdir={workdir} holds a run of another configuration: {stage.name}: "
                f"{changed}; choose another --workdir, or delete it to start again"
            )
        with records.recording(stage.name, made_from):
            yield
