"""The plan: traffic of hand-written HLO, costs by hand, and the choice of layouts."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from conversion.keys import abstract_policy, abstract_sarm
from ppo.config import PPOConfig
from ppo.planning import hlo, programs
from ppo.planning import plan as plan_module
from ppo.planning.chips import Chip, target
from ppo.planning.costs import (
    adapted_widths,
    computed_tokens,
    forward_flops,
    layer_weights,
    open_loops,
    refills,
    step_costs,
    step_flops,
)
from ppo.planning.hlo import Collective, array_bytes, read_traffic
from ppo.planning.plan import layouts_for
from sarm_jax.io.errors import InputError
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARMConfig
from sarm_jax.parallel.sharding import MeshConfig
from tests.tiny_models import COUNTED

HLO = """HloModule jit_f, is_scheduled=true

%slice_layer (p0: bf16[4,8,8], p1: s32[]) -> bf16[8,8] {
  %p0 = bf16[4,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %ds = bf16[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %b = bf16[8,8]{1,0} bitcast(%ds)
}

%write_row (p0: f32[16,8], p1: f32[1,8], p2: s32[]) -> f32[16,8] {
  %p0.1 = f32[16,8]{1,0} parameter(0)
  %p1.1 = f32[1,8]{1,0} parameter(1)
  %p2.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %dus = f32[16,8]{1,0} dynamic-update-slice(%p0.1, %p1.1, %p2.1, %zero.1)
}

%inner (q: bf16[8,8]) -> bf16[8,8] {
  %q = bf16[8,8]{1,0} parameter(0)
  ROOT %copy = bf16[8,8]{1,0} copy(%q)
}

%body (arg: (s32[], bf16[4,8,8])) -> (s32[], bf16[4,8,8]) {
  %arg = (s32[], bf16[4,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %w = bf16[4,8,8]{2,1,0} get-tuple-element(%arg), index=1
  %layer = bf16[8,8]{1,0} fusion(%w, %i), kind=kLoop, calls=%slice_layer
  %ar = bf16[8,8]{1,0} all-reduce-start(%layer), to_apply=%add
  %called = bf16[8,8]{1,0} call(%layer), to_apply=%inner
  %done = bf16[8,8]{1,0} all-reduce-done(%ar)
  ROOT %out = (s32[], bf16[4,8,8]{2,1,0}) tuple(%i, %w)
}

%cond (arg.1: (s32[], bf16[4,8,8])) -> pred[] {
  %arg.1 = (s32[], bf16[4,8,8]{2,1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[16,8], row: f32[1,8], n: s32[], w: bf16[4,8,8]) -> f32[16,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %w.1 = bf16[4,8,8]{2,1,0} parameter(3)
  %t = (s32[], bf16[4,8,8]{2,1,0}) tuple(%n, %w.1)
  %loop = (s32[], bf16[4,8,8]{2,1,0}) while(%t), condition=%cond, body=%body, TRIPS
  %gathered = f32[64]{0} all-gather(%row), dimensions={0}
  ROOT %y = f32[16,8]{1,0} fusion(%x, %row, %n), kind=kLoop, calls=%write_row
}
"""


@pytest.mark.parametrize(
    ("trips", "times"), [('backend_config={"known_trip_count":{"n":"4"}}', 4), ("x=1", 7)]
)
def test_traffic_by_hand(trips, times):
    traffic = read_traffic(HLO.replace("TRIPS", trips), open_loops=(7,))
    # In the loop: a slice of 128 bytes and the index of 4 are read, and 128 bytes written; a copy
    # reads and writes 128. Outside: a row of 32 bytes and an index are read, 32 written in place.
    looped = times * (128 + 4 + 128 + 256)
    assert traffic.bytes == looped + 32 + 4 + 32
    assert traffic.open_bytes == (looped if times == 7 else 0)
    assert traffic.kernels == times * 2 + 1
    assert traffic.collectives == (
        Collective("all-reduce", 128, times, overlapped=True),
        Collective("all-gather", 256, 1, overlapped=False),
    )


NESTED = """
%refill (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %y.2 = f32[4]{0} get-tuple-element(%t), index=1
  ROOT %refilled = f32[4]{0} negate(%y.2)
}

%decode (u: (s32[], f32[4])) -> (s32[], f32[4]) {
  %u = (s32[], f32[4]{0}) parameter(0)
  %y.1 = f32[4]{0} get-tuple-element(%u), index=1
  %inner = (s32[], f32[4]{0}) while(%u), condition=%free, body=%refill
  ROOT %decoded = f32[4]{0} copy(%y.1)
}

ENTRY %main (n: s32[], y: f32[4]) -> f32[4] {
  %n = s32[] parameter(0)
  %y = f32[4]{0} parameter(1)
  %v = (s32[], f32[4]{0}) tuple(%n, %y)
  ROOT %outer = (s32[], f32[4]{0}) while(%v), condition=%busy, body=%decode
}
"""


def test_loops_within_loops_run_as_often_as_they_do_in_all():
    traffic = read_traffic(NESTED, open_loops=(100, 3))
    assert traffic.kernels == 100 + 3
    assert traffic.bytes == (100 + 3) * 32 and traffic.open_bytes == 100 * 32


COMBINED = """
ENTRY %main (a: f32[4], b: f32[2]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %b = f32[2]{0} parameter(1)
  %both = (f32[4]{0}, f32[2]{0}) all-reduce(%a, %b), to_apply=%add
  %started = (f32[4]{0}, f32[2]{0}) all-reduce-start(%a, %b), to_apply=%add
  %reduced = (f32[4]{0}, f32[2]{0}) all-reduce-done(%started)
  %gathering = ((f32[4]{0}, f32[2]{0}), (f32[8]{0}, f32[4]{0})) all-gather-start(%a, %b)
  %gathered = (f32[8]{0}, f32[4]{0}) all-gather-done(%gathering)
  %scattered = f32[1]{0} reduce-scatter(%a), dimensions={0}, to_apply=%add
  ROOT %first = f32[4]{0} get-tuple-element(%both), index=0
}
"""


def test_combined_collectives_send_all_that_they_combine():
    collectives = read_traffic(COMBINED).collectives
    assert [(collective.kind, collective.bytes) for collective in collectives] == [
        ("all-reduce", 24),
        ("all-reduce", 24),
        ("all-gather", 48),
        ("reduce-scatter", 16),
    ]


def test_array_bytes():
    assert array_bytes("bf16[8,4096]{1,0}") == 65536
    assert array_bytes("(s32[], pred[3]{0}, f32[2,2]{1,0})") == 4 + 3 + 16


def test_costs_by_hand(ppo_config):
    # q and o 4 × 4, k and v 4 × 2, three products 4 × 6
    assert layer_weights(COUNTED) == 16 + 16 + 8 + 8 + 72 == 120
    assert adapted_widths(COUNTED, LoRAConfig()) == 2 * (8 + 6 + 6 + 8)
    # 3 rows of 5 tokens: 15 tokens and 3 · 15 causal pairs; 4 FLOPs per pair and attention width
    layer = 2 * 15 * 120 + 4 * 45 * 4
    assert forward_flops(COUNTED, 3, 5, logits=3) == 2 * layer + 2 * 3 * 40
    config: PPOConfig = ppo_config(batch_size=4, max_new_tokens=6, max_prompt_tokens=5)
    sarm = SARMConfig(COUNTED, SAEConfig(4, latent_size=8, k=2))
    all_one, all_two = (
        step_costs(
            config,
            LoRAConfig(rank=3),
            policy=COUNTED,
            sarm=sarm,
            mesh=mesh,
            score_rows=4,
            remat="dots",
            bytes_per_weight=2,
        )
        for mesh in (MeshConfig(), MeshConfig(data=2, tensor=2))
    )
    prefill, tokens = all_one["rollout"]
    assert (prefill,) == all_one["prefill"]
    one, two = ({name: costs[-1] for name, costs in all_.items()} for all_ in (all_one, all_two))
    assert tokens.flops == 5 * one["decode"].flops
    assert tokens.inherent_bytes == 5 * one["decode"].inherent_bytes
    # Weights without the embedding 2 · 120 + 40; 4 rows of 5 + 6 / 2 tokens with 2 · 2 · 2 each.
    assert one["decode"].inherent_bytes == 2 * (280 + 4 * 8 * 8)
    assert two["decode"].inherent_bytes == 2 * (280 / 2 + 4 * 8 * 8 / 4)
    assert one["score"].inherent_bytes == 2 * (240 + 32)
    assert two["step"].flops == one["step"].flops / 4
    forward = forward_flops(COUNTED, 4, 11, logits=24)
    assert one["step"].flops == 2 * forward + 3 * 2 * 4 * 11 * 3 * 56


def test_a_shared_prompt_counts_once(ppo_config):
    sizes = {"batch_size": 8, "samples_per_prompt": 4, "num_minibatches": 2}
    packed = ppo_config(pack_levels=1, max_new_tokens=6, max_prompt_tokens=5, **sizes)
    padded = dataclasses.replace(packed, pack_levels=0)
    assert computed_tokens(padded) == 8 * 11
    assert computed_tokens(packed) == 2 * 5 + 8 * 6
    assert computed_tokens(packed, parts=2) == 4 * 5 + 8 * 6  # two responses on a device
    on_two, on_one = (
        step_costs(
            packed,
            LoRAConfig(rank=3),
            policy=COUNTED,
            sarm=SARMConfig(COUNTED, SAEConfig(4, latent_size=8, k=2)),
            mesh=MeshConfig(data=data),
            score_rows=8,
            remat="dots",
            bytes_per_weight=2,
        )
        for data in (2, 1)
    )
    more = 2 * 2 * 5 * layer_weights(COUNTED) * 2  # two prompts more, in two layers
    assert 2 * on_two["reference"][0].flops - on_one["reference"][0].flops == more
    assert 2 * on_two["step"][0].flops > on_one["step"][0].flops
    alone, shared = (
        step_flops(config, LoRAConfig(rank=3), COUNTED, remat="dots") for config in (padded, packed)
    )
    left_out = (8 - 2) // 2 * 5  # prompt tokens of a minibatch
    assert alone - shared == left_out * 2 * (2 * 2 * layer_weights(COUNTED) + 3 * 3 * 56)


def test_refilled_slots_run_prompts_several_times(ppo_config):
    config = ppo_config(batch_size=32, max_new_tokens=6, max_prompt_tokens=5)
    slots = dataclasses.replace(config, rollout_slots=8)
    sarm = SARMConfig(COUNTED, SAEConfig(4, latent_size=8, k=2))
    at_once, refilled = (
        step_costs(
            own,
            LoRAConfig(rank=3),
            policy=COUNTED,
            sarm=sarm,
            mesh=MeshConfig(),
            score_rows=4,
            remat="dots",
            bytes_per_weight=2,
        )
        for own in (config, slots)
    )
    assert refilled["prefill"] == at_once["prefill"]  # the program that runs all prompts once
    prefills, tokens = refilled["rollout"]
    assert refills(slots) == 32 and open_loops(slots) == (5 * 4, 32)  # one prompt at a time
    assert prefills.flops == at_once["prefill"][0].flops
    assert prefills.inherent_bytes == 32 * at_once["prefill"][0].inherent_bytes
    assert tokens.flops == 20 * refilled["decode"][0].flops


def test_layouts_of_a_search():
    layouts = list(layouts_for(4, rows=8))
    assert {(x.mesh.data, x.mesh.fsdp, x.mesh.tensor) for x in layouts} == {
        (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2),
    }  # fmt: skip
    assert all(8 % (x.accumulation * x.mesh.batch_parts) == 0 for x in layouts)


@pytest.mark.parametrize(
    ("name", "devices", "message"),
    [
        ("a100x4", 4, "plan.target='a100x4': expected host, or h100xN"),
        ("h100x4", 2, "plan.target=h100x4: the mesh takes 2 devices, not 4"),
        ("host", 64, "xla_force_host_platform_device_count=64"),
    ],
)
def test_impossible_targets(name, devices, message):
    with pytest.raises(InputError, match=message):
        target(name, devices, "bfloat16")


def test_without_the_cuda_extra(monkeypatch):
    from jax.experimental import topologies

    def missing(*_, **__):
        raise RuntimeError("no plugin")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"needs the CUDA extra of JAX \(pip install 'jax\[cuda12"):
        target("h100x4", 4, "bfloat16")


def test_a_plan_that_fits_comes_first():
    plans = [
        {"fits": False, "step_seconds": 1.0},
        {"fits": True, "step_seconds": 3.0},
        {"fits": True, "step_seconds": 2.0},
    ]
    planner = SimpleNamespace(plan=lambda layout: plans[layout], name="x")
    ranked = plan_module.search(planner, range(3))
    assert [plan["step_seconds"] for plan in ranked] == [2.0, 3.0, 1.0]


ROW = {"runs": 1, "seconds": 1.0, "prompt_tokens": 16}


def test_the_time_is_an_expectation_and_the_memory_the_largest(ppo_config):
    """By hand: 2 + 3 · 1 seconds for 3/4 of the steps, 4 + 3 · 8 for the others, without halves."""
    rows = [
        {"name": name, "prompt_tokens": n, "runs": runs, "seconds": seconds, "peak_bytes": peak}
        for n, name, runs, seconds, peak in (
            (16, "score", 1, 2.0, 10),
            (16, "step", 3, 1.0, 20),
            (104, "score", 1, 4.0, 15),
            (104, "step", 3, 8.0, 99),
            (104, "prefill", 0, 99.0, 999),
        )
    ]
    plan = plan_module._summary(
        name="c",
        layout=plan_module.Layout(MeshConfig(), "dots", 1),
        config=ppo_config(batch_size=4, max_new_tokens=6, total_steps=8, max_prompt_tokens=120),
        chip=Chip("c", 1.0, 1.0, 130, 1.0),
        shares={16: 0.75, 104: 0.25},
        rows=rows,
        weights={"policy": 100, "sarm": 30},
    )
    assert plan["prompt_lengths"] == [
        {"padded": 16, "share": 0.75, "step_seconds": 5.0, "peak_bytes": 110},
        {"padded": 104, "share": 0.25, "step_seconds": 28.0, "peak_bytes": 129},
    ]
    assert plan["step_seconds"] == 0.75 * 5 + 0.25 * 28 == 10.75
    assert plan["run_seconds"] == 8 * 10.75 and plan["tokens_per_second"] == 4 * 6 / 10.75
    assert plan["peak_bytes"] == 129 and not plan["fits"] and plan["prompt_tokens"] == 104
    shown = plan_module.candidates([plan])
    assert "10.75" in shown and "| no |" in shown


def test_the_peak_counts_the_other_models_weights_and_jaxs_share(ppo_config):
    layout = plan_module.Layout(MeshConfig(), "dots", 1)

    def of(score, step, memory):
        rows = [
            {"name": "score", "peak_bytes": score, **ROW},
            {"name": "step", "peak_bytes": step, **ROW},
        ]
        chip = Chip("c", 1.0, 1.0, memory, 1.0)
        weights = {"policy": 100, "sarm": 30}
        return plan_module._summary(
            name="c",
            layout=layout,
            config=ppo_config(),
            chip=chip,
            shares={16: 1.0},
            rows=rows,
            weights=weights,
        )

    assert of(10, 20, 1000)["peak_bytes"] == 110  # the score's, beside the policy
    assert of(10, 90, 1000)["peak_bytes"] == 120
    assert not of(10, 90, 125)["fits"] and of(10, 90, 131)["fits"]  # 92 % of the memory


def test_an_all_reduce_passes_twice():
    chip, mesh = Chip("c", 1.0, 1.0, 1, link=1e6), MeshConfig(data=4)
    seconds = [
        plan_module._collective_seconds(Collective(k, 8_000_000, 1, False), chip, mesh)
        for k in ("all-reduce", "all-gather")
    ]
    np.testing.assert_allclose(seconds, [12 + 1e-5, 6 + 1e-5])


def test_more_costs_by_hand(ppo_config):
    config = ppo_config(batch_size=4, max_new_tokens=6, max_prompt_tokens=5)
    sarm = SARMConfig(COUNTED, SAEConfig(4, latent_size=8, k=2))
    dots, full = (
        step_costs(
            config,
            LoRAConfig(rank=3),
            policy=COUNTED,
            sarm=sarm,
            mesh=MeshConfig(),
            score_rows=4,
            remat=remat,
            bytes_per_weight=2,
        )
        for remat in ("dots", "full")
    )
    forward = forward_flops(COUNTED, 4, 11, logits=24)
    assert full["step"][0].flops - dots["step"][0].flops == forward
    assert dots["reference"][0].flops == dots["targets"][0].flops == forward
    assert dots["score"][0].flops == forward_flops(COUNTED, 4, 11) + 2 * 4 * 4 * 8


def test_a_slice_outside_a_fusion_and_scratch_space():
    text = """HloModule m

ENTRY %main (x: f32[16,8], n: s32[]) -> f32[1,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %c = (f32[16,8]{1,0}, s8[4096]{0}) custom-call(%x), custom_call_target="gemm"
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%x, %n, %n), dynamic_slice_sizes={1,8}
}
"""
    assert hlo.read_traffic(text).bytes == (512 + 512) + 2 * 32


def tiny_planner(ppo_config, runs, **options):
    """A planner of the host, of two tiny models."""
    return plan_module.Planner(
        name="host",
        config=ppo_config(batch_size=4, max_new_tokens=6, max_prompt_tokens=5, **options),
        lora=LoRAConfig(rank=3),
        policy=lambda: abstract_policy(COUNTED, "float32"),
        sarm=lambda: abstract_sarm(
            SARMConfig(COUNTED, SAEConfig(4, latent_size=8, k=2)), "float32"
        ),
        score_batch=4,
        watched=2,
        runs=runs,
    )


def test_runs_that_are_trained_at_a_time(ppo_config):
    """They share the program of the rollout; the others run once for each of them."""
    layout = plan_module.Layout(MeshConfig(), "dots", 1)
    one, three = (tiny_planner(ppo_config, runs).plan(layout) for runs in (1, 3))
    alone, together = ({row["name"]: row for row in plan["programs"]} for plan in (one, three))
    assert alone.keys() - together.keys() == {"prefill", "decode"}
    for name in together.keys() - {"rollout"}:
        assert together[name] == alone[name] | {"runs": 3 * alone[name]["runs"]}
    rollout, rollout_alone = together["rollout"], alone["rollout"]
    assert rollout["runs"] == 1
    assert rollout["flops"] == pytest.approx(3 * rollout_alone["flops"])
    # The weights are read once for all runs; the keys and values are each run's own.
    weights = 4 * 6 * (2 * 120 + 40)
    cache = rollout_alone["inherent_bytes"] - weights
    assert rollout["inherent_bytes"] == weights + 3 * cache
    adapter = 4 * 3 * 2 * (8 + 6 + 6 + 8)
    prompts = 4 * 5 * (4 + 1)  # tokens and mask
    more = rollout["argument_bytes"] - rollout_alone["argument_bytes"]
    assert 2 * (adapter + prompts) <= more <= 2 * (adapter + prompts + 64)  # and a random key
    state = programs.RunState.of(
        ppo_config(), LoRAConfig(rank=3), abstract_policy(COUNTED, "float32")
    )
    head = 4 * (4 + 1)
    assert state.adapter == adapter
    assert 3 * (adapter + head) <= state.total <= 3 * (adapter + head) + 64  # counters of the steps
    peaks = [row["peak_bytes"] + state.beside(row["name"], 3) for row in together.values()]
    assert max(peaks) < three["peak_bytes"] < max(peaks) + 10**5  # with the other model's weights
    assert three["runs_at_once"] == 3 and one["runs_at_once"] == 1
    tokens = 3 * 4 * 6
    assert three["tokens_per_second"] == pytest.approx(tokens / three["step_seconds"])
    assert "of each of 3 runs" in plan_module.table(three)
    assert "runs:" not in plan_module.table(one)


def test_runs_with_refilled_slots_take_turns(ppo_config):
    layout = plan_module.Layout(MeshConfig(), "dots", 1)
    one, two = (tiny_planner(ppo_config, runs, rollout_slots=2).plan(layout) for runs in (1, 2))
    for row, alone in zip(two["programs"], one["programs"], strict=True):
        assert row == alone | {"runs": 2 * alone["runs"]}
    assert two["step_seconds"] == pytest.approx(2 * one["step_seconds"])
