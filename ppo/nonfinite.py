"""What is kept of a step whose numbers were not finite, for somebody to look at."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppo.rollout import Rollout
from ppo.scoring import Scored
from ppo.tracking.checkpoint import named_arrays
from ppo.update import Batch
from sarm_jax.io.files import replacing
from sarm_jax.parallel.processes import fetch


def dump(
    workdir: Path,
    row: Mapping[str, float],
    rollout: Rollout,
    scored: Scored,
    batch: Batch,
    state: Any,
) -> Path:
    """Writes nonfinite_step_{n}.npz: texts, tokens, scores, latents, rewards, metrics, state.

    `state` is that after the step: of its updates only the finite ones were applied.
    """
    path = workdir / f"nonfinite_step_{row['step']}.npz"
    arrays: dict[str, Any] = {f"metrics.{name}": value for name, value in row.items()}
    for name, part in (("batch", batch), ("scored", scored)):
        for field in dataclasses.fields(part):
            arrays[f"{name}.{field.name}"] = getattr(part, field.name)
    arrays |= {f"state.{name}": value for name, value in named_arrays(state).items()}
    arrays["sampler.logp_br"] = rollout.generation.logp_br
    arrays |= {"prompts": rollout.prompts, "responses": rollout.responses}
    with replacing(path, "wb") as file:
        np.savez(file, **fetch(arrays))
    return path
