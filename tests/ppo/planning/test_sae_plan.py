"""The plan of SAE pretraining: its program is the one that runs, and its costs by hand."""

import numpy as np
import pytest
from flax import nnx

from ppo.planning.chips import FLOPS, GIB, Chip
from ppo.planning.sae_plan import plan_sae, sae_cost
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.parallel.sharding import MeshConfig, Placement, make_mesh
from sarm_jax.training import sae_training
from sarm_jax.training.activations import Activations
from sarm_jax.training.sae_training import SAETraining

OPTIONS = SAETraining(
    steps=20, batch_tokens=16, learning_rate=3e-3, warmup_fraction=0.1, dead_after_steps=3, aux_k=8,
    aux_weight=1 / 32, seed=0,
)  # fmt: skip
CONFIG = SAEConfig(32, 48, 4)


def abstract(placement):
    sae = nnx.eval_shape(lambda: SAE(CONFIG, rngs=nnx.Rngs(0)))
    sae.placement = placement
    return sae


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2), (3, 1, 1)])
def test_the_program_is_the_one_that_runs(monkeypatch, shape):
    placement = Placement(make_mesh(MeshConfig(*shape)))
    texts, steps = [], sae_training._sae_steps

    def recorded(*arguments, **options):
        texts.append(steps.lower(*arguments, **options).as_text())
        return steps(*arguments, **options)

    monkeypatch.setattr(sae_training, "_sae_steps", recorded)
    x_nd = np.random.default_rng(0).standard_normal((100, 32), np.float32)
    states = Activations(x_nd, np.arange(100) % 5 == 4)
    sae = SAE(CONFIG, rngs=nnx.Rngs(0))
    sae_training.pretrain_sae(sae, states, states, OPTIONS, lambda row: None, placement)
    monkeypatch.undo()
    assert texts == [sae_training.lower_steps(abstract(placement), OPTIONS).as_text()]


def test_costs_by_hand():
    """A product takes 2 · 32 · 48 FLOPs an activation; weights are 2 · 32 · 48 + 32 + 48."""
    cost = sae_cost(abstract(Placement()), 16, MeshConfig(data=2, fsdp=2, tensor=2))
    assert cost.flops == 9 * 2 * 32 * 48 * 4
    assert cost.inherent_bytes == 28 * (2 * 32 * 48 + 32 + 48)
    not_shared = sae_cost(abstract(Placement()), 15, MeshConfig(data=2))
    assert not_shared.flops == 9 * 2 * 32 * 48 * 15


def test_a_step_takes_its_share_of_a_call():
    chip = Chip("chip", FLOPS["tensorfloat32"], 1e12, GIB, 1e11)
    plan = plan_sae(abstract(Placement()), OPTIONS, chip=chip, mesh=MeshConfig())
    row = plan["program"]
    assert plan["step_seconds"] == row["seconds"] / 20 and plan["run_seconds"] == row["seconds"]
    assert row["flops"] == 20 * 9 * 2 * 32 * 48 * 16
    assert row["argument_bytes"] > 4 * (3 * 2 * 32 * 48 + 20 * 16 * 32)
