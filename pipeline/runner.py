"""Runs stages and keeps their records: what is up to date is not done again.

What took long to make (the lab's models, a SARM, a policy) is never overwritten: where its options
or inputs have changed the call is refused. Everything else is then made again.
"""

import contextlib
import dataclasses
import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pipeline import stages
from pipeline.experiments import runs_of, with_runs
from pipeline.provenance import ADAPTER, DEFAULTS, Provenance, Records, provenance, train_settings
from pipeline.shared import plain
from ppo.tracking.guards import TrainingStoppedError
from sarm_jax.io.errors import InputError
from sarm_jax.io.workdir import claim, is_claimed

LOG = logging.getLogger(__name__)
SCORING = ("sarm_model", "sarm_max_length", "dtype")
STUDY_FIELDS = "seeds conditions processes alpha beta ignore_failed_gates gates_json".split()
PREPARED = {"lab": "policy", "benchmarks": "data/data_summary.json"}  # else data/pairs.jsonl
EVALUATION_FORMAT = 2  # of eval/: 2 pools RM-Bench's safety, and has a steering set for each file
READ, READERS = ("identify", "human_latents"), ("train", "evaluate")
RUN_FILES = {  # what a stage reads of a run
    "evaluate": ("adapter/*",),
    "report": ("*metrics.csv", "*.jsonl", "*summary.json", "config.json", "eval/*.json*"),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The options that a stage reads, what it writes last, and whether the config asks for it.

    `others` are files that it writes before, for options of other stages to name.
    """

    options: dict[str, Any]
    output: str
    wanted: bool
    costly: bool = False
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `--stage=all` did about a stage; `seconds` is None where it did nothing."""

    stage: str
    output: Path
    what: str
    seconds: float | None = None


def recipes(config: ConfigDict, workdir: Path) -> dict[str, Recipe]:
    """Every stage that leaves something to later ones, in order."""
    source = config.prepare_data.source
    world = {}
    if source == "lab":
        world = {k: v for k, v in config.lab.to_dict().items() if k not in STUDY_FIELDS}
    data = _options(config, "prepare_data", "policy_model", "dtype") | {"lab": world}
    sarm = _options(config, "train_sarm", "policy_model", "dtype")
    found = _options(config, "identify", *SCORING)
    human = _options(config, "human_latents", "reward.latent_indices", *SCORING)
    effects = _options(config, "probe", *SCORING)
    asked = config.prompts_jsonl
    evaluated = ("data_jsonl", "rm_bench", "rewardbench2", "prompts_jsonl")
    policies = asked and (config.eval_prompts_jsonl or config.evaluate.runs)
    return {
        "prepare_data": Recipe(
            data,
            PREPARED.get(source, "data/pairs.jsonl"),
            source in PREPARED or bool(config.prepare_data.demos_jsonl),
            source == "lab",
        ),
        "train_sarm": Recipe(sarm, "sarm", bool(config.train_sarm.pairs_jsonl), True),
        "identify": Recipe(
            found | {"lab.seed": config.lab.seed},
            "probes/selected_features.json",
            bool(config.identify.pairs_jsonl),
            others=("probes/steering_config.json",),
        ),
        "human_latents": Recipe(
            human, "human_latents.safetensors", bool(config.human_latents.demos_jsonl)
        ),
        "probe": Recipe(effects, "probes/probe_summary.json", bool(config.probe.data_jsonl)),
        "train": Recipe(train_settings(config), ADAPTER, bool(asked), True),
        "evaluate": Recipe(
            _evaluation_options(config, workdir),
            "eval",
            any(config.evaluate[name] for name in evaluated) or bool(policies),
        ),
        "report": Recipe(
            {"report": plain(config.report) | _runs(config.report.runs, workdir)}
            | {"evaluations": str(workdir / "eval")},
            "report.html",
            bool(asked),
        ),
    }


def _evaluation_options(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    names = "evaluate", "reward", "policy_model", "eval_prompts_jsonl", *SCORING
    sampling = "ppo.max_new_tokens", "ppo.max_prompt_tokens", "ppo.long_prompts"
    options = _options(config, *names, *sampling)
    options["evaluate"] |= _runs(config.evaluate.runs, workdir)
    options["format"] = EVALUATION_FORMAT
    return options


def _runs(given: str, workdir: Path) -> dict[str, str]:
    return {"runs": given or str(workdir)}


def _options(config: ConfigDict, *names: str) -> dict[str, Any]:
    """Options by field, "section.field" among them."""
    found = {}
    for name in names:
        value = config
        for part in name.split("."):
            value = value[part]
        found[name] = plain(value)
    return found


def run_stage(
    name: str, config: ConfigDict, workdir: Path, shorthands: Mapping[str, str] | None = None
) -> None:
    """One stage, whether it is up to date or not, with its record.

    `shorthands` are flags that were given, by flag: the fields they set.
    """
    recipe = recipes(config, workdir).get(name)
    if recipe is None:  # plan leaves nothing to others
        stages.load(name).run(config, workdir)
        return
    for flag, field in (shorthands or {}).items():
        if not any(f"{field}.".startswith(f"{read}.") for read in recipe.options):
            LOG.info("%s: %s is not read by --stage=%s", flag, field, name)
    if name in READERS:
        _warn_of_what_is_stale(config, workdir)
    config = with_runs(config, workdir)
    stopped: list[TrainingStoppedError] = []
    try:
        check_runs(name, config, workdir)
        for run_name, run_config, folder in runs_of(name, config, workdir):
            if run_name:
                LOG.info("experiment %s", run_name)
                folder.mkdir(parents=True, exist_ok=True)
            recipe = recipes(run_config, folder)[name]
            made_from = _made_from(name, recipe, folder)
            with others_go_on(run_name, stopped):
                _run(name, recipe, run_config, folder, Records(folder), made_from)
    except InputError as error:
        raise InputError(f"{error}{_maker(str(error), config, workdir)}") from error
    if stopped:
        raise stopped[0]


def check_runs(name: str, config: ConfigDict, workdir: Path) -> None:
    """Raises InputError for options of any of several experiments, before the first is trained."""
    for run_name, run_config, folder in runs_of(name, config, workdir):
        if run_name:
            try:
                stages.load(name).options(run_config)
                is_claimed(folder, train_settings(run_config), DEFAULTS)
            except InputError as error:
                raise InputError(f"experiment {run_name}: {error}") from error


@contextlib.contextmanager
def others_go_on(run_name: str, stopped: list[TrainingStoppedError]) -> Iterator[None]:
    """Notes an experiment that stopped, so that the others are trained, and names it in errors."""
    try:
        yield
    except InputError as error:
        raise InputError(f"experiment {run_name}: {error}" if run_name else str(error)) from error
    except TrainingStoppedError as error:
        if not run_name:
            raise
        LOG.error("experiment %s stopped: %s", run_name, error)
        stopped.append(type(error)(f"experiment {run_name}: {error}"))


def _warn_of_what_is_stale(config: ConfigDict, workdir: Path) -> None:
    """Features and human latents may be those of another reward model, or of other data."""
    records = Records(workdir)
    for name in READ:
        recipe = recipes(config, workdir)[name]
        changed = records.stale(name, _made_from(name, recipe, workdir), "sarm_model")
        if changed:
            where = workdir / recipe.output
            LOG.warning("%s is out of date: %s; --stage=%s makes it again", where, changed, name)


def _maker(error: str, config: ConfigDict, workdir: Path) -> str:
    """The stage that makes what an error misses in the working directory, if one does."""
    for name, recipe in recipes(config, workdir).items():
        for path in (recipe.output, *recipe.others):
            output = workdir / path
            where = output.parent if output.parent.name == "data" else output
            if str(where) in error and not output.exists() and f"--stage={name}" not in error:
                return f"; --stage={name} makes it"
    return ""


def run_stages(config: ConfigDict, workdir: Path, names: Sequence[str]) -> list[Outcome]:
    """Runs those of the stages that the config asks for and that are not up to date, in order.

    Raises:
        InputError: names its stage; what is finished by then is kept.
        TrainingStoppedError: a run of PPO stopped. If there are several experiments, the others,
            the evaluation and the report come first.
    """
    outcomes = []
    stopped: list[TrainingStoppedError] = []
    config = with_runs(config, workdir)
    for name in names:
        check_runs(name, config, workdir)
        for run_name, run_config, folder in runs_of(name, config, workdir):
            recipe = recipes(run_config, folder)[name]  # anew: earlier stages write what it names
            if not recipe.wanted:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            with others_go_on(run_name, stopped):
                try:
                    done = _bring_up_to_date(name, recipe, run_config, folder)
                except InputError as error:
                    raise InputError(f"stage {name}: {error}") from error
                outcomes.append(dataclasses.replace(done, stage=f"{name} {run_name}".strip()))
    if stopped:
        raise stopped[0]
    return outcomes


def _bring_up_to_date(name: str, recipe: Recipe, config: ConfigDict, workdir: Path) -> Outcome:
    records, made_from = Records(workdir), _made_from(name, recipe, workdir)
    output = workdir / recipe.output
    if output.exists() and name not in records.stages and recipe.costly:
        if name == "train":
            claim(workdir, train_settings(config), DEFAULTS)
        return Outcome(name, output, "kept: made by a call that left no record")
    changed = records.difference(name, made_from)
    if output.exists() and records.finished(name) and changed is None:
        return Outcome(name, output, "up to date")
    why = f", because {changed}" if changed else ""
    does = (stages.load(name).run.__doc__ or name).splitlines()[0]
    LOG.info("stage %s: %s In %s%s", name, does, workdir, f"; {changed}" if changed else "")
    _run(name, recipe, config, workdir, records, made_from)
    return Outcome(name, output, f"done{why}", records.stages[name]["seconds"])


def _made_from(name: str, recipe: Recipe, workdir: Path) -> Provenance:
    return provenance(recipe.options, RUN_FILES.get(name, ()), workdir / recipe.output)


def _run(name, recipe, config, workdir: Path, records: Records, made_from: Provenance) -> None:
    changed = records.difference(name, made_from)
    begun = (workdir / recipe.output).exists() or (name == "train" and _has_run(workdir))
    if recipe.costly and changed and begun:
        raise InputError(
            f"--workdir={workdir} holds a run of another configuration: {name}: {changed}; "
            "choose another --workdir, or delete it to start again"
        )
    with records.recording(name, made_from):
        stages.load(name).run(config, workdir)
    gc.collect()  # models are cycles: without it theirs and the next stage's weights are alive


def _has_run(workdir: Path) -> bool:
    return (workdir / "config.json").exists()
