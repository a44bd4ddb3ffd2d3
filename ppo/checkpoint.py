"""Checkpoints: everything that changes during a run, through Orbax.

LoRA, value head, Adam's moments, the discriminator and its moments, the score scale, and the
number of finished steps. Random keys, prompt order and schedules are functions of (seed, step),
so the step restores them too.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sarm_jax.errors import InputError


class Checkpoints:
    """The `checkpoints/` folder of a run; keeps the newest `keep`."""

    def __init__(self, directory: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        """Finished PPO steps of the newest checkpoint, None when there is none."""
        return self._manager.latest_step()

    def save(self, steps: int, state: Any, facts: dict) -> None:
        """Writes `state` (a pytree of arrays) and `facts` (JSON) after `steps` steps; blocks."""
        if self._manager.latest_step() == steps:
            return
        self._manager.save(
            steps,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named(state)), facts=ocp.args.JsonSave(facts)
            ),
        )
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any, dict]:
        """(steps, state, facts) of the newest checkpoint; `like` gives structure and placement."""
        steps = self._manager.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        try:
            restored = self._manager.restore(
                steps,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError) as error:
            raise InputError(
                f"checkpoint {steps} in {self._manager.directory} does not fit this configuration: "
                f"{str(error).splitlines()[0]}"
            ) from error
        leaves = [restored["state"][name] for name in _named(like)]
        return int(steps), jax.tree.unflatten(jax.tree.structure(like), leaves), restored["facts"]

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()


def _named(tree: Any) -> dict[str, Any]:
    """A flat {path: array}: readable in the checkpoint, whatever containers the tree is made of."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): _array(leaf) for path, leaf in paths
    }


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (jax.Array, np.ndarray)) else np.asarray(leaf)
