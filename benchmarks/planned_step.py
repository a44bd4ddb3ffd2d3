"""Compare a PPO step with its plan: models of full size with random weights on the local devices.

    python -m benchmarks.planned_step --config=configs/full_method.py --config.plan.target=host \\
        --config.mesh.tensor=1 --batch_size=8 --config.ppo.max_prompt_tokens=512 [--workdir=DIR]

The options are those of `main.py --stage=plan`. Every prompt and response has the largest allowed
length, as in the plan. The seconds are the minimum of three iterations after one that compiles. The
seconds of a decoded token are those of the rollout without its prefill. The peak is the one that
the allocator reports, if it does, from the first weight to the last iteration. `planned_step.json`
contains all results.
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
from pipeline.models import placement
from pipeline.stages.plan import layout, make_planner
from ppo.planning.chips import GIB
from ppo.planning.plan import Planner, table
from ppo.planning.programs import Program
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import write_json
from sarm_jax.io.progress import show_progress
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel.devices import exact_float32, set_memory_share

ITERATIONS = 3
UPDATE = ("reference", "targets", "first_step", "step")


def main() -> None:
    """Prints the plan, and a row per program: planned and measured milliseconds."""
    template, _, workdir = command_line.parse(sys.argv)
    command_line.hosts("plan")  # refuses several processes
    config = command_line.fill_in(template, workdir)
    if config.plan.target != "host" or config.plan.search:
        raise InputError(
            f"plan.target={config.plan.target}, plan.search={config.plan.search}: expected "
            "plan.target=host and plan.search=False, because only this host can be measured"
        )
    show_progress()
    set_memory_share()
    if config.dtype == "float32":
        exact_float32()
    config.plan.prompt_lengths = ""  # every prompt has the largest length
    planner = make_planner(config)
    plan = planner.plan(layout(config))
    print(table(plan), flush=True)
    programs = planner.programs(layout(config), planner.config.max_prompt_tokens)
    prefill = next(p for p in programs if p.name == "prefill")
    decoded = planner.config.max_new_tokens - 1
    result = planned(plan, decoded) | measure(make_loop(config, planner), prefill)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "planned_step.json", result | {"plan": plan})
    show(result)


def planned(plan: dict, decoded: int) -> dict[str, Any]:
    """Returns the planned seconds of each phase of a step that decodes `decoded` tokens."""
    rows = {row["name"]: row for row in plan["programs"]}
    seconds = {name: rows[name]["seconds"] for name in ("rollout", "prefill")}
    seconds["decode"] = (seconds["rollout"] - seconds["prefill"]) / decoded
    seconds["score"] = rows["score"]["runs"] * rows["score"]["seconds"]
    update = (rows[name] for name in UPDATE if name in rows)
    seconds["update"] = sum(row["runs"] * row["seconds"] for row in update)
    seconds["total"] = plan["step_seconds"]
    return {"planned_seconds": seconds, "planned_peak_bytes": plan["peak_bytes"]}


def make_loop(config: ConfigDict, planner: Planner) -> JaxPPO:
    """Makes the PPO loop with models and prompts of the planned sizes."""
    ppo, placed = planner.config, placement(config)
    policy = random_weights(abstract_policy(planner.policy().config, config.dtype), placed)
    policy.remat, policy.placement = config.remat, placed
    sarm = random_weights(abstract_sarm(planner.sarm().config, config.dtype), placed)
    sarm.trunk.placement = placed
    tokenizer = word_tokenizer(policy.config.vocab_size)
    reward_model = RewardModel(
        sarm, tokenizer, max_length=config.sarm_max_length, batch_size=config.sarm_batch_size
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, TOKENS, (ppo.batch_size, ppo.max_prompt_tokens)).tolist()
    work = Workload(prompts, [ppo.max_new_tokens] * ppo.batch_size, epochs=ppo.ppo_epochs)
    return JaxPPO(
        ppo,
        planner.lora,
        policy=policy,
        reward_model=reward_model,
        work=work,
        watched=tuple(range(planner.watched)),
    )


def measure(loop: JaxPPO, prefill: Program) -> dict[str, Any]:
    """Measures the seconds of each phase of a step and the peak memory of the device."""
    start = time.perf_counter()
    loop.iteration()
    first = time.perf_counter() - start
    spans = [loop.iteration() for _ in range(ITERATIONS)]
    statistics: Any = jax.devices()[0].memory_stats() or {}
    seconds = {name: min(span[name] for span in spans) for name in spans[0]}
    compiled = prefill.lower().compile()
    tokens, mask = loop.learner.placement.rows((jnp.asarray(loop.tokens), jnp.asarray(loop.mask)))
    seconds["prefill"] = min_seconds(lambda: compiled(loop.state.params, loop.base, tokens, mask))
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


def min_seconds(run: Callable[[], Any]) -> float:
    """Returns the minimum of the seconds of several calls, without the first one."""
    seconds = []
    for _ in range(1 + ITERATIONS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def show(result: dict[str, Any]) -> None:
    """Prints planned and measured values as a Markdown table."""
    print(f"\n{result['device']}, jax {result['jax']}")
    print("\n| | planned, ms | measured, ms | measured / planned |\n|---|---|---|---|")
    rows = {
        name: (1e3 * seconds, 1e3 * result["measured_seconds"][name])
        for name, seconds in result["planned_seconds"].items()
    }
    if result["measured_peak_bytes"]:
        peaks = result["planned_peak_bytes"] / GIB, result["measured_peak_bytes"] / GIB
        rows["peak, GiB"] = peaks
    for name, (expected, measured) in rows.items():
        print(f"| {name} | {expected:.1f} | {measured:.1f} | {measured / expected:.2f} |")
    print(f"\nfirst iteration: {result['first_iteration_seconds']:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
