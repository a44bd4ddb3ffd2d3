"""The plan of a step of train_sarm: its program is the one that runs, and its costs by hand."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from ppo.planning.chips import FLOPS, GIB, Chip
from ppo.planning.plan import Layout
from ppo.planning.preference_plan import (
    OPTIMIZER_BYTES,
    PreferencePlanner,
    abstract_sarm,
    head_cost,
    preference_table,
    step_cost,
)
from sarm_jax.models.llama import Llama
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.models.sarm import SARMConfig
from sarm_jax.parallel.sharding import MeshConfig, Placement, make_mesh
from sarm_jax.training import head_training, preference_training
from sarm_jax.training.activations import Conversation
from sarm_jax.training.sarm_options import TrainSARMConfig
from sarm_jax.training.train_sarm import assemble, truncate
from tests.meshes import divisible_llama_config, place_parameters
from tests.sarm_jax.training.test_train_sarm import SMALL
from tests.tiny_models import COUNTED

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("mode", "shape", "pieces"), [(3, (1, 2, 1), 2), (1, (2, 1, 2), 1)])
def test_the_program_is_the_one_that_runs(tokenizer, monkeypatch, mode, shape, pieces):
    placement = Placement(make_mesh(MeshConfig(*shape)))
    config = dataclasses.replace(
        SMALL, mode=mode, gradient_accumulation_steps=pieces, epochs=1, warmup_fraction=0.0
    )
    options, policy_config = config.preference_training(), divisible_llama_config(tokenizer)
    policy = place_parameters(Llama(policy_config, rngs=nnx.Rngs(0)), placement)
    policy.placement = placement
    texts, make = [], preference_training.compiled_step

    def recorded(*arguments, **options):
        step = make(*arguments, **options)

        def run(*state):
            texts.append(step.lower(*state).as_text())
            return step(*state)

        return run

    monkeypatch.setattr(preference_training, "compiled_step", recorded)
    sarm = assemble(truncate(policy, 2), SAE(SAEConfig(32, 48, 6), rngs=nnx.Rngs(0)))
    rows = [Conversation(list(range(1, n)), 3) for n in range(9, 25)]
    pairs_p2 = np.arange(16).reshape(8, 2)
    preference_training.fine_tune(sarm, rows, pairs_p2, options, log=lambda row: None)
    monkeypatch.undo()
    planned = abstract_sarm(config, nnx.eval_shape(lambda: policy), placement)
    lowered = preference_training.lower_step(planned, options, length=32).as_text()
    assert len(texts) == 2 and set(texts) == {texts[0]}
    # The plan has another number of steps, of which only the learning rates depend.
    numbers = [[line for line in text.splitlines() if "constant dense" not in line]
               for text in (texts[0], lowered)]  # fmt: skip
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(("mode", "products"), [(1, 0), (2, 12), (3, 10)])
def test_costs_by_hand(mode, products):
    """A layer has 120 weights; of 6 rows of 5 tokens it takes 2 · 30 · 120 + 4 · 6 · 15 · 4."""
    config = dataclasses.replace(
        SMALL, mode=mode, batch_size=3, gradient_accumulation_steps=3, latent_size=8
    )
    sarm = SARMConfig(COUNTED, SAEConfig(4, latent_size=8, k=2))
    mesh = MeshConfig(data=3, fsdp=2, tensor=2)
    cost, of_float32 = step_cost(config, sarm, 5, mesh=mesh, remat="full", bytes_per_weight=2)
    trunk = 4 * 2 * (2 * 30 * 120 + 4 * 6 * 15 * 4)
    sae = 6 * 32 * (6 + 5 * products)
    assert of_float32 == sae / 12 and cost.flops == (trunk + sae) / 12
    passes = 3 * 3 * 240 * 2 + 4 * (32 if mode == 1 else 64)
    trained = 240 + 40 + (0 if mode == 1 else 64)
    assert cost.inherent_bytes == passes / 2 + OPTIMIZER_BYTES * trained / 4


def make_planner(tokenizer, **changes) -> PreferencePlanner:
    options = {"mode": 3, "max_length": 30} | changes
    config: TrainSARMConfig = dataclasses.replace(SMALL, **options)
    return PreferencePlanner(
        "host",
        config,
        lambda: nnx.eval_shape(lambda: Llama(divisible_llama_config(tokenizer), rngs=nnx.Rngs(0))),
        pairs=10,
    )


def test_pieces_take_less_memory_and_every_layout_divides_the_batch(tokenizer, monkeypatch):
    chip = Chip("chip", FLOPS["bfloat16"], 1e12, GIB, 1e11)

    def stand_in(name, devices, dtype):
        return chip, make_mesh(MeshConfig(data=devices)).devices.flatten(), "cpu"

    monkeypatch.setattr("ppo.planning.plan.target", stand_in)
    planner = make_planner(tokenizer, latent_size=512)
    plans = [planner.plan(Layout(MeshConfig(data=2), "full", n)) for n in (1, 4)]
    temporaries = [plan["programs"][0]["temp_bytes"] for plan in plans]
    assert temporaries[1] < temporaries[0] and plans[0]["fits"] and plans[0]["tokens"] == 32
    assert plans[0]["held_bytes"] > 4 * 2 * 32 * 512  # at least the SAE
    text = preference_table(plans[0])
    assert "train_sarm.mode=3, mesh data=2" in text and "(fits)" in text
    assert "pretraining of the SAE on 64 activations a step: peak" in text
    sae = plans[0]["sae"]
    assert sae["steps"] == 40 and sae["run_seconds"] == pytest.approx(40 * sae["step_seconds"])
    assert sae["disk_bytes"] == 300 * 32 * 4
    # Parameters, two moments and the gradient; the policy and the trunk stay beside it.
    assert sae["program"]["peak_bytes"] > 4 * 4 * 2 * 32 * 512
    assert sae["peak_bytes"] - sae["program"]["peak_bytes"] == plans[0]["held_bytes"] - 4 * (
        2 * 32 * 512 + 32 + 512
    )
    collect = plans[0]["collect"]
    assert collect["steps"] == 1 and collect["batch"] == 64  # of 32 tokens each
    assert collect["peak_bytes"] - collect["program"]["peak_bytes"] == plans[0]["held_bytes"]
    assert "once more at the end, collection of the activations: peak" in text
    layouts = list(planner.layouts(2))
    assert {layout.accumulation for layout in layouts} == {1, 2, 4}
    rows = [8 / layout.accumulation / layout.mesh.batch_parts for layout in layouts]
    assert all(row % 1 == 0 for row in rows) and len(layouts) == 3 * 3 * 2


def test_mode_0_trains_the_head_on_latents_that_every_device_has(tokenizer):
    planner = make_planner(tokenizer, mode=0, use_topk=False, latent_size=512)
    plan = planner.plan(Layout(MeshConfig(data=2), "full", 1))
    (row,) = plan["programs"]
    # Values and feature ids of both sides of ten pairs, and the row numbers of a batch.
    assert row["argument_bytes"] == 20 * 512 * 8 + SMALL.batch_size * 2 * 4 / 2
    many = dataclasses.replace(planner, pairs=1000).plan(Layout(MeshConfig(data=2), "full", 1))
    assert many["sae"]["disk_bytes"] == 2 * 1000 * 32 * 4  # more pooled states than sae_tokens
    assert plan["sae"]["steps"] == 40 and "once more" not in preference_table(plan)
    layouts = list(planner.layouts(2))
    assert len(layouts) == 3 and {(one.remat, one.accumulation) for one in layouts} == {("full", 1)}


@pytest.mark.parametrize(("batch", "shared"), [(8, 8 / 4), (6, 6)])
def test_costs_of_a_head_by_hand(batch, shared):
    config = dataclasses.replace(SMALL, mode=0, batch_size=batch, k=3, latent_size=8)
    cost = head_cost(config, MeshConfig(data=2, fsdp=2))
    assert cost.flops == 3 * 2 * 2 * shared * 3
    assert cost.inherent_bytes == 2 * shared * 3 * 8 + 28 * 8


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1)])
def test_the_program_of_mode_0_is_the_one_that_runs(monkeypatch, shape):
    placement = Placement(make_mesh(MeshConfig(*shape)))
    options = dataclasses.replace(SMALL, mode=0, epochs=1).preference_training()
    texts, steps = [], head_training._head_steps

    def recorded(*arguments, **options):
        texts.append(steps.lower(*arguments, **options).as_text())
        return steps(*arguments, **options)

    monkeypatch.setattr(head_training, "_head_steps", recorded)
    config = SAEConfig(32, 48, 6)
    x_rd = np.random.default_rng(0).standard_normal((2 * options.batch_size, 32), np.float32)
    pairs_p2 = np.arange(2 * options.batch_size).reshape(-1, 2)
    sae = SAE(config, rngs=nnx.Rngs(0))
    head_training.train_head(sae, x_rd, pairs_p2, options, lambda row: None, placement=placement)
    monkeypatch.undo()
    abstract = nnx.eval_shape(lambda: SAE(config, rngs=nnx.Rngs(0)))
    abstract.placement = placement
    lowered = head_training.lower_head_step(abstract, options, options.batch_size).as_text()
    # The schedule of the learning rate depends on the number of steps.
    numbers = [[line for line in text.splitlines() if "constant dense" not in line]
               for text in (*texts, lowered)]  # fmt: skip
    assert len(texts) == 1 and numbers[0] == numbers[1]
