"""Several runs of PPO from one config: `config.experiments` holds each run's changes by its name.

The runs share the preparation, the evaluation and the report of the working directory; each is
trained in {workdir}/experiments/NAME.
"""

import re
from pathlib import Path
from typing import Any

from jax.tree_util import keystr, tree_leaves_with_path
from ml_collections import ConfigDict

from pipeline.stage import Stage
from sarm_jax.io.errors import InputError
from sarm_jax.io.path_lists import escaped

FOLDER = "experiments"
CHANGEABLE = "ppo reward discriminator lora guards checkpoint prompts_jsonl".split()
# Names that the evaluation and the report use for other groups of responses.
RESERVED = ("base", "human", "chosen", "rejected")


def runs_of(stage: Stage, config: ConfigDict, workdir: Path) -> list[tuple[str, ConfigDict, Path]]:
    """Returns (name, config, working directory) of each run that a stage consists of.

    That is one run without a name, unless the stage runs per experiment and the config has some.
    """
    if not (stage.per_experiment and config.experiments):
        return [("", config, workdir)]
    return [
        (name, with_changes(config, name), folder)
        for name, folder in folders(config, workdir).items()
    ]


def folders(config: ConfigDict, workdir: Path) -> dict[str, Path]:
    """Returns the working directory of each experiment by name."""
    for name in config.experiments:
        if name in RESERVED:
            raise InputError(f"experiments.{name}: the evaluation has something else of this name")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(f"experiments.{name}: expected a name of letters, digits, '_' and '-'")
    return {name: workdir / FOLDER / name for name in config.experiments}


def with_changes(config: ConfigDict, name: str) -> ConfigDict:
    """Returns a copy of the config with the changes of an experiment.

    Raises:
        InputError: the experiment changes an option that does not exist, or its type.
    """
    changed = config.copy_and_resolve_references()
    changes = changed.experiments[name]
    if not isinstance(changes, ConfigDict):
        raise InputError(f"experiments.{name}={changes!r}: expected options and their values")
    for field in changes:
        if field not in CHANGEABLE:
            raise InputError(
                f"experiments.{name}.{field}: an experiment changes {', '.join(CHANGEABLE)}, which "
                "training alone reads"
            )
    _change(changed, changes, f"experiments.{name}")
    changed.experiment_name = "/".join(part for part in (config.experiment_name, name) if part)
    return changed


def _change(config: ConfigDict, changes: ConfigDict, path: str) -> None:
    """Sets the options of `changes` in the config; errors call the section `path`."""
    for field, value in changes.items():
        place = f"{path}.{field}"
        if field not in config:
            raise InputError(f"{place}: no such option")
        before = config[field]
        if isinstance(before, ConfigDict) != isinstance(value, ConfigDict):
            raise InputError(f"{place}={value!r}: expected {_kind(before)}")
        if isinstance(value, ConfigDict):
            _change(before, value, place)
            continue
        try:
            config[field] = value
        except TypeError:
            raise InputError(f"{place}={value!r}: expected {_kind(before)}") from None


def _kind(value: Any) -> str:
    return "options" if isinstance(value, ConfigDict) else type(value).__name__


def changed_fields(config: ConfigDict) -> dict[str, str]:
    """Returns the name of an experiment that changes a field, by field such as reward.beta."""
    fields: dict[str, str] = {}
    for name in config.experiments:
        changes = config.experiments[name]
        if isinstance(changes, ConfigDict):
            leaves = tree_leaves_with_path(changes.to_dict())
            fields |= {keystr(parts, simple=True, separator="."): name for parts, _ in leaves}
    return fields


def with_runs(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns the config with `evaluate.runs` and `report.runs` naming its experiments.

    A config that names runs itself keeps them.
    """
    if not config.experiments:
        return config
    config = config.copy_and_resolve_references()
    runs = folders(config, workdir).items()
    named = ",".join(f"{name}={escaped(str(folder))}" for name, folder in runs)
    config.report.runs = config.report.runs or named
    if config.evaluate.prompts_jsonl or config.eval_prompts_jsonl:
        config.evaluate.runs = config.evaluate.runs or named
    return config
