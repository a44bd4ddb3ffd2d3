"""The plan of collecting activations: its program is the one that runs, and its costs by hand."""

import numpy as np
import pytest
from flax import nnx

from ppo.planning.activation_plan import collection_cost, plan_activations
from ppo.planning.chips import FLOPS, GIB, Chip
from sarm_jax.models.llama import Llama
from sarm_jax.parallel.sharding import MeshConfig, Placement, make_mesh
from sarm_jax.training import activations
from sarm_jax.training.activations import Conversation, collect_pooled, lower_states
from sarm_jax.training.train_sarm import truncate
from tests.meshes import divisible_llama_config, place_parameters
from tests.tiny_models import COUNTED

LENGTH = 32  # of a padded conversation


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2), (1, 4, 1)])
def test_the_program_is_the_one_that_runs(tokenizer, monkeypatch, shape):
    placement = Placement(make_mesh(MeshConfig(*shape)))
    config = divisible_llama_config(tokenizer)
    policy = place_parameters(Llama(config, rngs=nnx.Rngs(0)), placement)
    policy.placement = placement
    texts, states = [], activations._standardised

    class Recorded:
        lower = states.lower

        def __call__(self, *arguments):
            texts.append(states.lower(*arguments).as_text())
            return states(*arguments)

    monkeypatch.setattr(activations, "_standardised", Recorded())
    trunk = truncate(policy, 2)
    collect_pooled(trunk, [Conversation(list(range(1, LENGTH)), 3)])
    monkeypatch.undo()
    assert texts == [lower_states(nnx.eval_shape(lambda: trunk), LENGTH).as_text()]


def test_costs_by_hand_and_all_batches():
    """A layer has 120 weights; of 6 rows of 5 tokens it takes 2 · 30 · 120 + 4 · 6 · 15 · 4."""
    trunk = nnx.eval_shape(lambda: Llama(COUNTED, rngs=nnx.Rngs(0)))
    cost = collection_cost(trunk, 6, 5, MeshConfig(data=3, tensor=2))
    assert cost.flops == 2 * (2 * 30 * 120 + 4 * 6 * 15 * 4) / 6
    assert cost.inherent_bytes == 240 * 4 / 2
    chip = Chip("chip", FLOPS["bfloat16"], 1e12, GIB, 1e11)
    plan = plan_activations(trunk, pairs=100, length=LENGTH, chip=chip, mesh=MeshConfig())
    assert plan["batch"] == 2048 // LENGTH and plan["steps"] == np.ceil(200 / 64)
    assert plan["run_seconds"] == plan["steps"] * plan["program"]["seconds"] > 0
