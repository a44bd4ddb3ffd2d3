"""Refuse bad options and missing inputs before a stage runs; all of them with `--stage=all`.

Hours later is too late for a typing error. Files that an earlier stage writes are not there yet,
and lists that are read from them are checked later.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from pipeline import stage as stages
from pipeline.experiments import runs_of
from pipeline.inputs import MODELS, Input, Kind, files_of_list, is_within
from pipeline.models import check_remat, mesh_config
from pipeline.stage import Stage
from sarm_jax.io.errors import InputError
from sarm_jax.parallel import processes
from sarm_jax.parallel.sharding import make_mesh
from sarm_jax.rewards.options import PARSERS
from sarm_jax.rewards.reward_config import check_screens_alone

ADDRESS = re.compile(r"(?!hf:)[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # as in https://, as a path


def check(config: ConfigDict, workdir: Path, wanted: Sequence[Stage]) -> None:
    """Checks the options of the stages `wanted`, and the inputs of all stages.

    Raises:
        InputError: an option is out of range or does not fit a model, there is no such file or
            model and no stage is going to write it, or something is in the way of what a stage
            writes.
    """
    for item in inputs():
        needed = any(item.kind is i.kind for stage in wanted for i in stage.inputs)
        if item.kind is not Kind.SARM or needed:  # only some stages need the features of an SAE
            check_input(item, config, workdir)
    check_remat(config.remat)
    make_mesh(mesh_config(config))
    for stage in wanted:
        for name, run_config, folder in runs_of(stage, config, workdir):
            with naming_experiment(name):
                ready = without_future_lists(run_config, workdir)
                stage.validate(ready)
                if stage.has_models(ready):  # a list that is there may be made again by then
                    later = without_future_lists(run_config, workdir, makers=wanted)
                    stage.check_architectures(later)
                if processes.is_primary():
                    stage.check_outputs(ready, folder)


@contextlib.contextmanager
def naming_experiment(name: str) -> Iterator[None]:
    """Adds the name of an experiment, if there is one, to the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"experiment {name}: {error}" if name else str(error)) from error


def inputs() -> list[Input]:
    """Returns the declared inputs of all stages that `--stage=all` can run.

    Each field is there once, or twice if some stages need more of a model than others.
    """
    used = [stage for stage in stages.load_all() if stage.output]
    items = [item for stage in used for item in stage.inputs]
    return list({(item.field, item.kind): item for item in items}.values())


def check_input(item: Input, config: ConfigDict, workdir: Path) -> None:
    """Raises InputError for a file or a model that is not there and is outside of `workdir`."""
    if item.kind is Kind.LIST:
        return  # the parsers of lists read their files
    paths = item.paths(config, workdir)
    _check_paths(item, [path for path in paths if not is_within(path, workdir)])


def check_inputs(stage: Stage, config: ConfigDict, workdir: Path) -> None:
    """Raises InputError, with its option, for a file or a model of one stage that is not there."""
    for item in stage.inputs:
        if item.kind not in (Kind.LIST, Kind.RUNS) and item.read_if(config):
            _check_paths(item, item.paths(config, workdir))


def _check_paths(item: Input, paths: Sequence[Path]) -> None:
    """Raises InputError for a path that is not there, or for a model that cannot be read."""
    if item.kind in MODELS:
        for path in paths:
            _check_model(item, path)
        return
    for path in paths:
        if not path.exists() and not ADDRESS.match(str(path)):  # reading tells what is expected
            advice = f"; make it with {item.maker}" if item.maker else ""
            raise InputError(f"{item.field}={path}: no such file{advice}")


def _check_model(item: Input, path: Path) -> None:
    """Raises InputError for a model that cannot be read, with the option that names it."""
    try:
        MODELS[item.kind](str(path))
    except InputError as error:
        if str(error).startswith(f"{path}: "):  # another message names a file of the model
            raise InputError(f"{item.field}={error}") from error
        raise


def without_future_lists(
    config: ConfigDict, workdir: Path, makers: Sequence[Stage] = ()
) -> ConfigDict:
    """Returns a copy without the lists whose files are yet to be written; checks all others.

    Args:
        config: the config of a run.
        workdir: the working directory.
        makers: stages that will run. A list in a file of theirs is left out, too.
    """
    config = config.copy_and_resolve_references()
    waiting = [name for name in PARSERS if _is_future(config.reward[name], workdir, makers)]
    if waiting:  # the other lists are emptied as well, since they must be of the same length
        for name, parse in PARSERS.items():
            if name not in waiting:
                parse(f"reward.{name}", config.reward[name])
            config.reward[name] = ""
        if config.reward.screen:
            check_screens_alone(config.reward.alpha_values, config.reward.probe_penalty)
        config.reward.screen = False  # which needs the features
    if _is_future(config.probe.feature, workdir, makers):
        config.probe.feature = "0"
    return config


def _is_future(text: str, workdir: Path, makers: Sequence[Stage] = ()) -> bool:
    """Returns whether a list is read from a file that a stage has yet to write or to renew."""
    files = [path for path in files_of_list(text) if is_within(path, workdir)]
    return any(
        not file.exists() or any(maker.makes_path(file, workdir) for maker in makers)
        for file in files
    )
