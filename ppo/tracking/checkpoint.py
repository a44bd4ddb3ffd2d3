"""Checkpoints of everything that changes in a run, written by Orbax and verified when read.

A checkpoint holds the adapter, the value head, Adam's moments, the discriminator and its moments,
the score scale, and the number of finished steps. Random keys, prompt order and schedules are
functions of (seed, step), so the step restores them too.

Only the primary process reads and writes; it broadcasts what it reads.
"""

import contextlib
import dataclasses
import errno
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.args import (
    Composite,
    JsonRestore,
    JsonSave,
    StandardRestore,
    StandardSave,
)

from ppo.tracking.manifest import (
    ITEM,
    DamagedCheckpointError,
    ManifestArgs,
    ManifestHandler,
    check_manifest,
)
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import disk_is_full
from sarm_jax.io.signals import cleaning_up
from sarm_jax.parallel import processes
from sarm_jax.parallel.sharding import put_like

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Options of checkpoints, the section `checkpoint` of a config.

    Checkpoints of every `keep_every`-th PPO step are kept permanently; 0: none are. The stage
    train_sarm writes one every `train_sarm_every` steps; 0: only at a signal.

    Raises:
        InputError: an option is negative.
    """

    keep_every: int
    train_sarm_every: int = 500

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 0:
                raise InputError(f"checkpoint.{name}={value}: must not be negative")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        directory: the folder `checkpoints/` of the run.
        keep: how many of the newest checkpoints are kept.
        keep_every: checkpoints of every n-th step are kept as well; 0: none are.
    """

    def __init__(self, directory: Path, keep: int, keep_every: int = 0):
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        primary_only = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,  # left by a save that was killed
            enable_async_checkpointing=False,
            multiprocessing_options=primary_only,
            create=False,  # Orbax can create it only if all processes take part
        )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        arrays = ocp.StandardCheckpointHandler(multiprocessing_options=primary_only)
        facts = ocp.JsonCheckpointHandler(multiprocessing_options=primary_only)
        for item, handler, kinds in (
            ("state", arrays, (StandardSave, StandardRestore)),
            ("facts", facts, (JsonSave, JsonRestore)),
            (ITEM, ManifestHandler(), (ManifestArgs,)),  # last, since it covers the others
        ):
            for kind in kinds:
                registry.add(item, kind, handler)
        self._directory = directory.absolute()
        self._alias = contextlib.ExitStack()
        self._manager: ocp.CheckpointManager | None = None
        self._make_manager = partial(
            ocp.CheckpointManager, options=options, handler_registry=registry
        )

    def latest_step(self) -> int | None:
        """Returns the number of finished steps in the newest checkpoint; None without one."""
        return processes.broadcast(finished_steps(self._directory))

    def _open(self) -> ocp.CheckpointManager | None:
        """Returns the manager of the folder, which is created if necessary, in process 0."""
        if self._manager is None and processes.is_primary():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = self._make_manager(self._alias.enter_context(_alias(self._directory)))
        return self._manager

    def save(self, steps: int, state: Any, facts: dict) -> None:
        """Writes a checkpoint, and returns when it is complete.

        Args:
            steps: number of finished steps.
            state: a pytree of arrays. Their paths in it name them in the checkpoint.
            facts: everything else, as JSON.

        Raises:
            OSError: the disk is full. Earlier checkpoints are intact. The other processes get an
                InputError.
        """
        arrays = {name: on_primary_host(array) for name, array in named_arrays(state).items()}
        with processes.raising_on_all():
            manager = self._open()
            if manager is not None and manager.latest_step() != steps:
                self._write(manager, steps, arrays, facts)

    def _write(self, manager: ocp.CheckpointManager, steps: int, arrays: dict, facts: dict) -> None:
        """Writes a checkpoint of host arrays; raises OSError if the disk is full."""
        items = {
            "state": StandardSave(arrays),
            "facts": JsonSave(facts),
            ITEM: ManifestArgs(),
        }
        try:
            with _quiet():
                manager.save(steps, args=Composite(**items))
                manager.wait_until_finished()
        except Exception as error:
            if _disk_is_full(error):
                problem = f"no space for the checkpoint of step {steps}"
                raise OSError(errno.ENOSPC, problem, str(self._directory)) from error
            raise

    def restore(self, like: Any) -> tuple[int, Any, dict]:
        """Restores the newest checkpoint that is intact.

        Newer checkpoints that are damaged are moved out of the folder, with a warning.

        Args:
            like: a state of the same structure, whose arrays have the shapes, types and placement.

        Returns:
            The number of finished steps, the state and the facts.

        Raises:
            InputError: no checkpoint is intact, or the arrays are not those of `like`.
        """
        manager = self._open()
        read = None if manager is None else self._read_newest(manager, like)
        processes.raise_on_all()
        steps, facts = processes.broadcast(read and read[:2])
        leaves = []
        for name, expected in named_arrays(like).items():
            array = processes.broadcast_array(expected, read and read[2][name])
            leaves.append(put_like(array, expected))
        return steps, jax.tree.unflatten(jax.tree.structure(like), leaves), facts

    def close(self) -> None:
        """Stops the threads of Orbax."""
        if self._manager is not None:
            self._manager.close()
            self._alias.close()

    def _read_newest(
        self, manager: ocp.CheckpointManager, like: Any
    ) -> tuple[int, dict, dict[str, np.ndarray]]:
        """Returns (steps, facts, arrays by name) of the newest intact checkpoint."""
        steps, damaged = _newest_intact(self._directory)
        self._set_aside(manager, damaged, steps)
        self._check_fits(steps, like)
        named = {name: np.empty(x.shape, x.dtype) for name, x in named_arrays(like).items()}
        items = {"state": StandardRestore(named), "facts": JsonRestore()}
        restored = manager.restore(steps, args=Composite(**items))
        return steps, restored["facts"], restored["state"]

    def _check_fits(self, steps: int, like: Any) -> None:
        """Raises InputError unless the checkpoint has the arrays of `like`.

        Orbax itself would cast some types silently, and raise errors that do not name the array.
        """
        step = self._directory / str(steps)
        with _alias(self._directory) as directory:
            state = directory / str(steps) / "state"
            actual = _descriptions(ocp.StandardCheckpointHandler().metadata(state).tree)
        expected = _descriptions(named_arrays(like))
        for name in expected | actual:
            if actual.get(name) != expected.get(name):
                raise InputError(
                    f"{step}: a checkpoint of another model or configuration: {name} is "
                    f"{actual.get(name, 'not there')}, expected {expected.get(name, 'none')}"
                )

    def _set_aside(
        self, manager: ocp.CheckpointManager, damaged: dict[int, str], intact: int
    ) -> None:
        """Moves damaged checkpoints out of the folder, so that their steps are done again."""
        for steps, problem in damaged.items():
            target = self._directory.with_name(f"damaged_checkpoint_{steps}")
            LOG.warning(
                "checkpoint %d is damaged (%s): moved to %s; resuming from checkpoint %d",
                steps, problem, target, intact,
            )  # fmt: skip
            shutil.rmtree(target, ignore_errors=True)  # left by earlier damage to the same step
            (self._directory / str(steps)).rename(target)
        if damaged:
            manager.reload()


def finished_steps(directory: Path) -> int | None:
    """Returns the number of steps of the newest checkpoint, intact or not; None without one."""
    return max(_steps(directory), default=None)


def newest_facts(directory: Path) -> tuple[int, dict] | None:
    """Reads (steps, facts) of the checkpoint that a run would resume from; None without one.

    Changes nothing. Raises InputError if no checkpoint is intact.
    """
    if not _steps(directory):
        return None
    steps, _ = _newest_intact(directory)
    with _alias(directory.absolute()) as alias:
        return steps, ocp.JsonCheckpointHandler().restore(alias / str(steps) / "facts")


@contextlib.contextmanager
def _alias(directory: Path) -> Iterator[Path]:
    """Yields a path of the directory that Orbax and TensorStore take as it is.

    They take brackets for a pattern, backslashes and names such as `gs:` for other systems, and
    fail at bytes that are not UTF-8. Such a directory is reached through a link.
    """
    if re.fullmatch(r"[\w/., =@+%-]+", str(directory), re.ASCII):
        yield directory
        return
    folder = tempfile.mkdtemp(prefix="sarm_jax_")
    with cleaning_up(partial(shutil.rmtree, folder, ignore_errors=True)):
        link = Path(folder) / directory.name
        link.symlink_to(directory, target_is_directory=True)
        yield link


def _newest_intact(directory: Path) -> tuple[int, dict[int, str]]:
    """Returns the newest step whose files are intact, and the damage of each newer one."""
    damaged: dict[int, str] = {}
    for steps in sorted(_steps(directory), reverse=True):
        try:
            check_manifest(directory / str(steps))
        except DamagedCheckpointError as error:
            damaged[steps] = str(error)
            continue
        return steps, damaged
    problems = "; ".join(f"{steps}: {problem}" for steps, problem in damaged.items())
    raise InputError(
        f"{directory}: no checkpoint is intact ({problems}); restore a copy of one, or "
        "delete the working directory to start again"
    )


def _steps(directory: Path) -> list[int]:
    """Returns the steps of all complete checkpoints, the only ones whose name is a number."""
    if not directory.is_dir():
        return []
    return [int(path.name) for path in directory.iterdir() if path.name.isdecimal()]


def named_arrays(tree: Any) -> dict[str, Any]:
    """Returns the arrays of a tree by their paths, as in `train.params.value_head.bias`.

    The names do not depend on the kinds of containers in the tree: a dict with the key "train" and
    a dataclass with the field `train` give the same ones.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _array(leaf)
        for path, leaf in leaves
    }


def on_primary_host(array: Any) -> np.ndarray | None:
    """Gathers an array; returns it on the host of process 0, and None in the other processes."""
    gathered = processes.fetch(array)
    return gathered if processes.is_primary() else None


def _descriptions(arrays: Mapping[str, Any]) -> dict[str, str]:
    """Returns the type and shape of each array, as text."""
    return {name: f"{np.dtype(x.dtype)} {list(x.shape)}" for name, x in arrays.items()}


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (jax.Array, np.ndarray)) else np.asarray(leaf)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log of Orbax, whose threads log every error that is raised here anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _disk_is_full(error: BaseException | None) -> bool:
    """Returns whether an error or its cause is a full disk, which TensorStore says only in text."""
    while error is not None:
        if disk_is_full(error):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
