"""Dumps a PPO step whose numbers were not finite, so that it can be examined."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ppo.objectives import Batch
from ppo.rollout import Rollout
from ppo.run_state import RunState
from ppo.tracking.checkpoint import named_arrays
from sarm_jax.io.files import replacing
from sarm_jax.models.conversation import plain_text
from sarm_jax.parallel.processes import fetch
from sarm_jax.rewards.scoring import Scored


def dump_step(
    workdir: Path,
    *,
    row: Mapping[str, float],
    rollout: Rollout,
    scored: Scored,
    batch: Batch,
    state: RunState,
) -> Path:
    """Writes texts, tokens, scores, latents, rewards, metrics and state to nonfinite_step_{n}.npz.

    Args:
        workdir: where the file is written.
        row: metrics of the step.
        rollout: prompts and responses.
        scored: scores and latents of the responses.
        batch: input of the update.
        state: state of the run after the step, to which only the finite updates were applied.

    Returns:
        The path of the file.
    """
    path = workdir / f"nonfinite_step_{row['step']}.npz"
    arrays: dict[str, Any] = {f"metrics.{name}": value for name, value in row.items()}
    arrays |= {
        "batch.tokens_bt": batch.tokens_bt,
        "batch.mask_bt": batch.mask_bt,
        "batch.response_mask_br": batch.mask_br,
        "batch.ref_logp_br": batch.ref_logp_br,
        "batch.reward_b": batch.reward_b,
        "scored.score_b": scored.score_b,
        "scored.penalised_bn": scored.z_bn,
        "scored.subset_bs": scored.z_bs,
    }
    further = {
        "batch.keep_b": batch.keep_b,
        "scored.probe_margin_b": scored.states.margin_b,
        "scored.state_distance_b": scored.states.distance_b,
    }
    arrays |= {name: array for name, array in further.items() if array is not None}
    arrays |= {f"state.{name}": value for name, value in named_arrays(state).items()}
    arrays["sampler.logp_br"] = rollout.generation.logp_br
    prompts = [plain_text(prompt) for prompt in rollout.prompts]
    arrays |= {"prompts": prompts, "responses": rollout.responses}
    with replacing(path, "wb") as file:
        np.savez(file, **fetch(arrays))
    return path
