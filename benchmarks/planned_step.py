"""A PPO step beside its plan: the models at full size with random weights, on the devices here.

    python -m benchmarks.planned_step --config=configs/full_method.py --config.plan.target=host \\
        --config.mesh.tensor=1 --batch_size=8 --config.ppo.max_prompt_tokens=512 [--workdir=DIR]

Options are those of `main.py --stage=plan`. Every prompt and response is as long as it may be, as
the plan has it. The seconds are the least of three iterations after one that compiles; a decoded
token is what the rollout takes beyond its prefill. The peak is the allocator's, where it has any,
from the first weight to the last iteration. All of it goes to `planned_step.json` too.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.jax_ppo import JaxPPO
from benchmarks.random_weights import random_weights
from benchmarks.word_tokenizer import word_tokenizer
from benchmarks.workload import TOKENS, Workload
from conversion.keys import abstract_policy, abstract_sarm
from pipeline import cli as command_line
from pipeline.shared import placement, write_json
from pipeline.stages.plan import layout, make_planner
from ppo.planning.chips import GIB
from ppo.planning.plan import Planner, table
from ppo.planning.programs import Program
from sarm_jax.io.errors import InputError
from sarm_jax.io.progress import show_progress
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel.devices import exact_float32, set_memory_share

ITERATIONS = 3
UPDATE = ("reference", "targets", "first_step", "step")


def main() -> None:
    """Prints the plan, and a row per program: planned and measured milliseconds."""
    template, _, workdir = command_line.parse(sys.argv)
    command_line.hosts("plan")  # there are none
    config = command_line.fill_in(template, workdir)
    if config.plan.target != "host" or config.plan.search:
        raise InputError("what is here is measured: --config.plan.target=host, and no search")
    show_progress()
    set_memory_share()
    if config.dtype == "float32":
        exact_float32()
    config.plan.prompt_lengths = ""  # every prompt is as long as it may be
    planner = make_planner(config)
    plan = planner.plan(layout(config))
    print(table(plan), flush=True)
    programs = planner.programs(layout(config), planner.config.max_prompt_tokens)
    prefill = next(p for p in programs if p.name == "prefill")
    decoded = planner.config.max_new_tokens - 1
    found = planned(plan, decoded) | measure(make_loop(config, planner), prefill)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "planned_step.json", found | {"plan": plan})
    show(found)


def planned(plan: dict, decoded: int) -> dict[str, Any]:
    """Seconds of a step's parts, as `measure` has them; a rollout decodes `decoded` tokens."""
    rows = {row["name"]: row for row in plan["programs"]}
    seconds = {name: rows[name]["seconds"] for name in ("rollout", "prefill")}
    seconds["decode"] = (seconds["rollout"] - seconds["prefill"]) / decoded
    seconds["score"] = rows["score"]["runs"] * rows["score"]["seconds"]
    update = (rows[name] for name in UPDATE if name in rows)
    seconds["update"] = sum(row["runs"] * row["seconds"] for row in update)
    seconds["total"] = plan["step_seconds"]
    return {"planned_seconds": seconds, "planned_peak_bytes": plan["peak_bytes"]}


def make_loop(config: ConfigDict, planner: Planner) -> JaxPPO:
    """The step, with models and prompts that are as large as planned."""
    ppo, placed = planner.config, placement(config)
    policy = random_weights(abstract_policy(planner.policy().config, config.dtype), placed)
    policy.remat, policy.placement = config.remat, placed
    sarm = random_weights(abstract_sarm(planner.sarm().config, config.dtype), placed)
    sarm.trunk.placement = placed
    tokenizer = word_tokenizer(policy.config.vocab_size)
    options = config.sarm_max_length, config.sarm_batch_size
    reward_model = RewardModel(sarm, tokenizer, *options)
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, TOKENS, (ppo.batch_size, ppo.max_prompt_tokens)).tolist()
    work = Workload(prompts, [ppo.max_new_tokens] * ppo.batch_size, ppo.ppo_epochs)
    return JaxPPO(ppo, planner.lora, policy, reward_model, work, tuple(range(planner.watched)))


def measure(loop: JaxPPO, prefill: Program) -> dict[str, Any]:
    """Seconds of a step's parts, and what they took of the device."""
    start = time.perf_counter()
    loop.iteration()
    first = time.perf_counter() - start
    spans = [loop.iteration() for _ in range(ITERATIONS)]
    statistics: Any = jax.devices()[0].memory_stats() or {}
    seconds = {name: min(span[name] for span in spans) for name in spans[0]}
    compiled = prefill.lower().compile()
    tokens, mask = loop.learner.placement.rows((jnp.asarray(loop.tokens), jnp.asarray(loop.mask)))
    seconds["prefill"] = least(lambda: compiled(loop.state.params, loop.base, tokens, mask))
    decoded = loop.learner.config.max_new_tokens - 1
    seconds["decode"] = (seconds["rollout"] - seconds["prefill"]) / decoded
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "first_iteration_seconds": first,
        "measured_seconds": seconds,
        "measured_peak_bytes": statistics.get("peak_bytes_in_use"),
        "iterations": spans,
    }


def least(run: Callable[[], Any]) -> float:
    """Seconds of a call, the first not counted."""
    seconds = []
    for _ in range(1 + ITERATIONS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def show(found: dict[str, Any]) -> None:
    """Planned beside measured, as a Markdown table."""
    print(f"\n{found['device']}, jax {found['jax']}")
    print("\n| | planned, ms | measured, ms | measured / planned |\n|---|---|---|---|")
    for name, planned_seconds in found["planned_seconds"].items():
        ours, theirs = 1e3 * planned_seconds, 1e3 * found["measured_seconds"][name]
        print(f"| {name} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |")
    if found["measured_peak_bytes"]:
        ours, theirs = found["planned_peak_bytes"] / GIB, found["measured_peak_bytes"] / GIB
        print(f"| peak, GiB | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |")
    print(f"\nfirst iteration: {found['first_iteration_seconds']:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
