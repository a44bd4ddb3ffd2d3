"""Several runs of PPO from one config: `config.experiments` holds the changes of each, by its name.

Preparation, evaluation and report are those of the working directory; each run is trained in
{workdir}/experiments/NAME.
"""

import re
from pathlib import Path

from ml_collections import ConfigDict

from sarm_jax.errors import InputError

FOLDER = "experiments"


def runs_of(stage: str, config: ConfigDict, workdir: Path) -> list[tuple[str, ConfigDict, Path]]:
    """Returns (name, config, working directory) of each run that a stage consists of.

    That is one run without a name, but for `train` of a config with experiments.
    """
    if stage != "train" or not config.experiments:
        return [("", config, workdir)]
    return [
        (name, with_changes(config, name), folder)
        for name, folder in folders(config, workdir).items()
    ]


def folders(config: ConfigDict, workdir: Path) -> dict[str, Path]:
    """Returns the working directory of each experiment by name."""
    for name in config.experiments:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(f"experiments.{name}: expected a name of letters, digits, '_' and '-'")
    return {name: workdir / FOLDER / name for name in config.experiments}


def with_changes(config: ConfigDict, name: str) -> ConfigDict:
    """Returns a copy of the config with the changes of an experiment.

    Raises:
        InputError: the experiment changes an option that there is not, or to another type.
    """
    changed = config.copy_and_resolve_references()
    changes = changed.experiments[name]
    if not isinstance(changes, ConfigDict):
        raise InputError(f"experiments.{name}={changes!r}: expected options and their values")
    try:
        changed.update(changes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"experiments.{name}: {reason}") from None
    if not changed.experiment_name:
        changed.experiment_name = name
    return changed


def with_runs(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns the config with `evaluate.runs` and `report.runs` naming its experiments.

    Where the config names runs already, it stays as it is.
    """
    if not config.experiments:
        return config
    config = config.copy_and_resolve_references()
    named = ",".join(f"{name}={folder}" for name, folder in folders(config, workdir).items())
    for section in (config.evaluate, config.report):
        section.runs = section.runs or named
    return config
