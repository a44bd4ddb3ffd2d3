"""The runs of a study: the config of every condition of a seed, and what is made for it."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from conversion.load import read_sarm_config
from pipeline import stage as stages
from pipeline.models import load_reward_model
from pipeline.provenance import Records
from pipeline.runner import run_stages
from pipeline.tasks import task_of
from pipeline.together import member, run_together
from ppo.options import train_config
from ppo.tracking.metrics import read_evaluations
from sarm_jax.features.dense_probe import probe_file
from sarm_jax.features.human_support import human_support
from sarm_jax.features.identify import further_random_control
from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.io.json_files import read_json, write_json
from sarm_jax.io.path_lists import split_paths
from sarm_jax.lab.conditions import (
    DRAWS,
    PROBES,
    RETRAINED,
    UNTOLD_FILE,
    other_options,
    reward_options,
)
from sarm_jax.lab.results import run_result
from sarm_jax.models.conversation_rows import read_pairs
from sarm_jax.rewards.human_latents import LATENTS_FILE, load_human_latents

LOG = logging.getLogger(__name__)


def preparation_config(config: ConfigDict, folder: Path, conditions: Sequence[str]) -> ConfigDict:
    """Returns the config of the stages before training, which make what the conditions read."""
    config = config.copy_and_resolve_references()
    config.human_latents.states |= "distance" in conditions
    if probes := [name for name in PROBES if name in conditions]:
        config.reward.probe = str(folder / "probes" / probe_file(PROBES[probes[0]]))
    return config


def condition_config(config: ConfigDict, folder: Path, condition: str) -> ConfigDict:
    """Returns the config of a condition; draws its random features if it has some of its own.

    Args:
        config: the config of the seed.
        folder: the folder of the seed, whose features have been identified.
        condition: name of the condition.
    """
    lab, counts = config.lab.to_dict(), range(0)
    lists = folder / "probes" / "selected_features.json"
    config = config.copy_and_resolve_references()
    own = other_options(condition, folder, lab, config.ppo.total_steps, config.sarm_model)
    if pretrained_own_sae(folder / condition):
        own.pop("train_sarm.sae_model", None)
    config.update_from_flattened_dict(own)
    if condition in DRAWS:
        selected, lists = lists, folder / "probes" / f"{condition}.json"
        draw_random_control(config, selected, lists, DRAWS[condition])
    if condition == "untold":
        write_human_support(folder)
    if condition == "oracle":
        latents = read_sarm_config(config.sarm_model).latent_size
        counts = range(latents, latents + len(task_of(config).shortcuts))
    config.reward.update(reward_options(condition, lists, lab, counts))
    return config


def pretrained_own_sae(workdir: Path) -> bool:
    """Returns whether a SARM was made here before conditions took the SAE of the shared SARM.

    Its SAE has the same numbers, because it was pretrained on the same states.
    """
    record = Records(workdir).stages.get("train_sarm")
    return record is not None and not record["options"]["train_sarm"].get("sae_model")


def draw_random_control(config: ConfigDict, selected: Path, path: Path, draw: int) -> None:
    """Writes a further draw of random features, with thresholds by the rule of identify.

    A file that is newer than the lists of identify is kept.
    """
    if path.exists() and path.stat().st_mtime_ns >= selected.stat().st_mtime_ns:
        return
    options = stages.load("identify").validate(config)
    pairs = [row for file in split_paths(config.identify.pairs_jsonl) for row in read_pairs(file)]
    detectors = read_json(selected)["detectors"]
    control = further_random_control(
        options, load_reward_model(config), pairs, detectors=detectors, draw=draw
    )
    write_json(
        path,
        {"random_control": list(control.features), "tau_random_control": list(control.tau)},
    )


def write_human_support(folder: Path) -> None:
    """Writes all features of a seed, each with a threshold that human responses seldom reach."""
    human = load_human_latents(folder / LATENTS_FILE)
    tau = human_support(human.z_ns)
    path = folder / "probes" / UNTOLD_FILE
    write_json(path, {"features": list(human.latent_indices), "tau": tau.tolist()})


def train_reward_model(config: ConfigDict, folder: Path, condition: str) -> None:
    """Trains the reward model of a condition that has one of its own, and no policy."""
    workdir = folder / condition
    workdir.mkdir(exist_ok=True)
    LOG.info("reward model of condition %s", condition)
    run_stages(condition_config(config, folder, condition), workdir, [stages.load("train_sarm")])


def run_group(
    config: ConfigDict, folder: Path, conditions: Sequence[str]
) -> Iterator[tuple[str, TrainingStoppedError | None]]:
    """Trains the policy under one condition, or under several that share the models at a time.

    Args:
        config: the config of the seed.
        folder: the folder of the seed.
        conditions: names of the conditions.

    Yields:
        (condition, error) of each condition that has ended. The error is that of a guard that
        stopped the run, or None; then the result.json has been written.

    Raises:
        InputError: some conditions cannot be trained. The message names them, and comes once the
            others have ended.
    """
    ended: dict[str, TrainingStoppedError | None] = {}
    failed: dict[str, InputError] = {}
    runs: dict[str, ConfigDict] = {}
    for name in conditions:
        with _collecting(failed, name):
            runs[name] = condition_config(config, folder, name)

    def train(name: str) -> None:
        try:
            with _collecting(failed, name):
                train_condition(runs[name], folder / name, name)
                ended[name] = None
        except TrainingStoppedError as error:
            LOG.error("stopped: %s", error)
            ended[name] = error

    if len(runs) == 1:
        train(*runs)
    elif runs:
        run_together([(f"condition {name}", partial(train, name)) for name in runs], len(runs))
    for name in sorted(ended, key=conditions.index):
        if ended[name] is None:
            with _collecting(failed, name):
                write_result(runs[name], folder, name)
        if name not in failed:
            yield name, ended[name]
    if failed:
        names: dict[str, list[str]] = {}  # reason → conditions, which often share it
        for name in sorted(failed, key=conditions.index):
            names.setdefault(str(failed[name]), []).append(name)
        raise InputError("; ".join(f"condition {', '.join(n)}: {r}" for r, n in names.items()))


@contextlib.contextmanager
def _collecting(failed: dict[str, InputError], condition: str) -> Iterator[None]:
    """Collects the error of a condition, so that the others of its group are still trained."""
    try:
        yield
    except InputError as error:
        if member() is not None:  # others of the group go on for long
            LOG.error("stopped: %s", error)
        failed[condition] = error


def train_condition(config: ConfigDict, workdir: Path, condition: str) -> None:
    """Trains the policy under one condition, and its reward model if it has one of its own."""
    workdir.mkdir(exist_ok=True)
    LOG.info("condition %s", condition)
    names = ("train_sarm", "train") if condition in RETRAINED else ("train",)
    run_stages(config, workdir, [stages.load(name) for name in names])


def write_result(config: ConfigDict, folder: Path, condition: str) -> None:
    """Writes the result.json of a condition whose policy has been trained.

    If a guard stopped the run once and it was resumed, there is an evaluation of that step, too. It
    is left out, since a further point could only raise the peak.
    """
    workdir = folder / condition
    summary = read_json(workdir / "summary.json")
    features = read_json(folder / "probes" / "selected_features.json")
    ppo = train_config(config).ppo
    rows = [row for row in read_evaluations(workdir) if ppo.evaluates(row["step"])]
    model = load_reward_model(config).with_ensemble(config.reward.ensemble)
    result = run_result(rows, model, features, seconds=summary["seconds"], task=task_of(config))
    write_json(workdir / "result.json", {"seed": config.ppo.seed} | result)
