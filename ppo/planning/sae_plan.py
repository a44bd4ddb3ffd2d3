"""Plans a step of SAE pretraining, the phase of `train_sarm` before the one on preferences.

Every device holds the whole SAE with gradient and moments, and has its share of the minibatch. The
program is the one that runs, a scan over `STEPS_PER_CALL` steps. Beside it the device holds the
policy and the trunk that was cut from it. Activations are read from files of the host.
"""

import jax
from flax import nnx

from ppo.planning.chips import Chip
from ppo.planning.costs import Cost
from ppo.planning.plan import program_row
from sarm_jax.models.sae import SAE
from sarm_jax.parallel.sharding import MeshConfig
from sarm_jax.training.sae_training import STEPS_PER_CALL, SAETraining, lower_steps

# Adam reads a parameter, its gradient and its two moments, and writes all but the gradient.
ADAM_BYTES = 7 * 4
# Encoder and decoder, the gradients of both and of their inputs; then the decoder and two gradients
# once more for the latents that are dead.
PRODUCTS = 6 + 3


def plan_sae(sae: SAE, options: SAETraining, *, chip: Chip, mesh: MeshConfig) -> dict:
    """Compiles the steps of one call.

    Args:
        sae: the abstract SAE, on its mesh.
        options: options of the pretraining.
        chip: rates of one device in float32.
        mesh: the mesh.

    Returns:
        Seconds of a step and of all steps, activations of a step, and the row of the program.
    """
    steps = min(STEPS_PER_CALL, options.steps)
    compiled = lower_steps(sae, options).compile()
    one = sae_cost(sae, options.batch_tokens, mesh)
    cost = Cost(steps * one.flops, steps * one.inherent_bytes)
    row = program_row(
        "sae", 1, compiled, costs=(cost,), chip=chip, mesh=mesh, tokens=options.batch_tokens
    )
    seconds = row["seconds"] / steps
    return {
        "batch": options.batch_tokens,
        "step_seconds": seconds,
        "steps": options.steps,
        "run_seconds": seconds * options.steps,
        "program": row,
    }


def sae_cost(sae: SAE, batch_tokens: int, mesh: MeshConfig) -> Cost:
    """Returns the cost of a step on one device; a minibatch that does not divide is not shared."""
    weights = sum(x.size for x in jax.tree.leaves(nnx.state(sae)))
    parts = mesh.batch_parts if batch_tokens % mesh.batch_parts == 0 else 1
    product = 2 * sae.config.hidden_size * sae.config.latent_size * batch_tokens / parts
    return Cost(PRODUCTS * product, ADAM_BYTES * weights)
