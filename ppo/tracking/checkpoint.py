"""Checkpoints: everything that changes during a run, through Orbax, verified before it is used.

LoRA, value head, Adam's moments, the discriminator and its moments, the score scale, and the
number of finished steps. Random keys, prompt order and schedules are functions of (seed, step),
so the step restores them too.

Of several processes the first one alone reads and writes; every other is told what it read.
"""

import contextlib
import dataclasses
import errno
import logging
import shutil
from collections.abc import Iterator, Mapping
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
from sarm_jax.parallel import processes
from sarm_jax.parallel.sharding import put_like

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """`keep_every`: checkpoints of every n-th step are kept for good; 0: none are."""

    keep_every: int = 0

    def __post_init__(self) -> None:
        if self.keep_every < 0:
            raise InputError(f"checkpoint.keep_every={self.keep_every}: must not be negative")


class Checkpoints:
    """The `checkpoints/` folder of a run.

    Keeps the newest `keep`, and for good those of every `keep_every`-th step; 0: no others.
    """

    def __init__(self, directory: Path, keep: int, keep_every: int = 0):
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,  # of a save that was killed
            enable_async_checkpointing=False,
            multiprocessing_options=alone,
            create=False,  # Orbax would only for all processes
        )
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        arrays = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        facts = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        for item, handler, kinds in (
            ("state", arrays, (StandardSave, StandardRestore)),
            ("facts", facts, (JsonSave, JsonRestore)),
            (ITEM, ManifestHandler(), (ManifestArgs,)),  # last: it is of the others
        ):
            for kind in kinds:
                registry.add(item, kind, handler)
        self._directory = directory.absolute()
        self._manager: ocp.CheckpointManager | None = None
        if processes.is_first():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, handler_registry=registry
            )

    def latest_step(self) -> int | None:
        """Finished PPO steps of the newest checkpoint, None when there is none."""
        own = None if self._manager is None else self._manager.latest_step()
        return processes.from_first(own)

    def save(self, steps: int, state: Any, facts: dict) -> None:
        """Writes `state` (a pytree of arrays) and `facts` (JSON) after `steps` steps; blocks.

        Raises OSError where the disk is full; the checkpoints before this one stay.
        """
        if self._manager is None or self._manager.latest_step() == steps:
            return
        items = {
            "state": StandardSave(jax.device_get(named_arrays(state))),
            "facts": JsonSave(facts),
            ITEM: ManifestArgs(),
        }
        try:
            with _quiet():
                self._manager.save(steps, args=Composite(**items))
                self._manager.wait_until_finished()
        except Exception as error:
            if _disk_is_full(error):
                text = f"no space for the checkpoint of step {steps}"
                raise OSError(errno.ENOSPC, text, str(self._directory)) from error
            raise

    def restore(self, like: Any) -> tuple[int, Any, dict]:
        """(steps, state, facts) of the newest checkpoint whose files are those written.

        `like` gives structure and placement. Damaged checkpoints that are newer are set aside,
        with a warning. Raises InputError where none is whole, or where it does not fit `like`.
        """
        read = None if self._manager is None else self._read_newest(self._manager, like)
        processes.agree()
        steps, facts = processes.from_first(read and read[:2])
        leaves = []
        for name, wanted in named_arrays(like).items():
            array = processes.array_from_first(wanted, read and read[2][name])
            leaves.append(put_like(array, wanted))
        return steps, jax.tree.unflatten(jax.tree.structure(like), leaves), facts

    def close(self) -> None:
        """Ends Orbax's threads."""
        if self._manager is not None:
            self._manager.close()

    def _read_newest(
        self, manager: ocp.CheckpointManager, like: Any
    ) -> tuple[int, dict, dict[str, np.ndarray]]:
        """(steps, facts, arrays by name) of the newest whole checkpoint."""
        steps, damaged = _newest_whole(self._directory)
        self._set_aside(manager, damaged, steps)
        self._check_fits(steps, like)
        named = {name: np.empty(x.shape, x.dtype) for name, x in named_arrays(like).items()}
        items = {"state": StandardRestore(named), "facts": JsonRestore()}
        restored = manager.restore(steps, args=Composite(**items))
        return steps, restored["facts"], restored["state"]

    def _check_fits(self, steps: int, like: Any) -> None:
        """Raises InputError unless the arrays are those of `like`: Orbax would cast some of them,
        and say of the others what no user can read."""
        step = self._directory / str(steps)
        found = _descriptions(ocp.StandardCheckpointHandler().metadata(step / "state").tree)
        wanted = _descriptions(named_arrays(like))
        for name in wanted | found:
            if found.get(name) != wanted.get(name):
                raise InputError(
                    f"{step}: a checkpoint of another model or configuration: {name} is "
                    f"{found.get(name, 'not there')}, expected {wanted.get(name, 'none')}"
                )

    def _set_aside(
        self, manager: ocp.CheckpointManager, damaged: dict[int, str], intact: int
    ) -> None:
        """Moves damaged checkpoints out of Orbax's folder: their steps are done again."""
        for steps, problem in damaged.items():
            place = self._directory.with_name(f"damaged_checkpoint_{steps}")
            LOG.warning(
                "checkpoint %d is damaged (%s): moved to %s; going on from checkpoint %d",
                *(steps, problem, place, intact),
            )
            shutil.rmtree(place, ignore_errors=True)  # of an earlier damage to the same step
            (self._directory / str(steps)).rename(place)
        if damaged:
            manager.reload()


def newest_facts(directory: Path) -> tuple[int, dict] | None:
    """(steps, facts) of the checkpoint that a run would go on from; None where none was made.

    Only reads. Raises InputError where no checkpoint is whole.
    """
    if not _steps(directory):
        return None
    steps, _ = _newest_whole(directory)
    return steps, ocp.JsonCheckpointHandler().restore(directory.absolute() / str(steps) / "facts")


def _newest_whole(directory: Path) -> tuple[int, dict[int, str]]:
    """The newest step whose files are those written, and what is wrong with each newer one."""
    damaged: dict[int, str] = {}
    for steps in sorted(_steps(directory), reverse=True):
        try:
            check_manifest(directory / str(steps))
        except DamagedCheckpointError as error:
            damaged[steps] = str(error)
            continue
        return steps, damaged
    found = "; ".join(f"{steps}: {problem}" for steps, problem in damaged.items())
    raise InputError(
        f"{directory}: no checkpoint is whole ({found}); put back a copy of one, or "
        "delete the working directory to start again"
    )


def _steps(directory: Path) -> list[int]:
    """Those of the checkpoints that were finished: only they have a number for a name."""
    if not directory.is_dir():
        return []
    return [int(path.name) for path in directory.iterdir() if path.name.isdecimal()]


def named_arrays(tree: Any) -> dict[str, Any]:
    """A flat {path: array}: readable in the checkpoint, whatever containers the tree is made of."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _array(leaf) for path, leaf in paths
    }


def _descriptions(arrays: Mapping[str, Any]) -> dict[str, str]:
    """{path: type and shape}."""
    return {name: f"{np.dtype(x.dtype)} {list(x.shape)}" for name, x in arrays.items()}


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (jax.Array, np.ndarray)) else np.asarray(leaf)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax's threads log with a traceback each what is raised here anyway."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether this, or what it came from, says so; TensorStore tells only in words."""
    while error is not None:
        if disk_is_full(error):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
