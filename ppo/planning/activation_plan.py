"""Plans the collection of the states that the SAE of `train_sarm` learns from.

It is a forward pass of the trunk over both sides of all pairs, before the SAE is trained; if the
trunk is trained, it is run once more at the end. Every conversation has the longest length. Writing
the states to files is not planned.
"""

import math

from ppo.planning.chips import Chip
from ppo.planning.costs import Cost, forward_flops, layer_weights
from ppo.planning.plan import program_row
from sarm_jax.models.llama import Llama
from sarm_jax.parallel.sharding import MeshConfig
from sarm_jax.training.activations import batch_rows, lower_states


def plan_activations(
    trunk: Llama, *, pairs: int, length: int, chip: Chip, mesh: MeshConfig
) -> dict:
    """Compiles the forward pass of a batch.

    Args:
        trunk: the abstract trunk, on its mesh.
        pairs: number of pairs.
        length: tokens of a padded conversation.
        chip: rates of one device.
        mesh: the mesh.

    Returns:
        Conversations and seconds of a batch, number and seconds of all batches, and the row of the
        program.
    """
    rows = batch_rows(length, trunk.placement)
    compiled = lower_states(trunk, length).compile()
    cost = collection_cost(trunk, rows, length, mesh)
    row = program_row("states", 1, compiled, costs=(cost,), chip=chip, mesh=mesh, tokens=length)
    batches = math.ceil(2 * pairs / rows)
    return {
        "batch": rows,
        "step_seconds": row["seconds"],
        "steps": batches,
        "run_seconds": batches * row["seconds"],
        "program": row,
    }


def collection_cost(trunk: Llama, rows: int, length: int, mesh: MeshConfig) -> Cost:
    """Returns the cost of a batch on one device."""
    weights = layer_weights(trunk.config) * trunk.config.num_hidden_layers
    itemsize = trunk.embed_tokens.dtype.itemsize
    flops = forward_flops(trunk.config, rows, length)
    return Cost(flops / mesh.devices, weights * itemsize / mesh.tensor)
