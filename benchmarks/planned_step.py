"""A PPO step beside its plan: the models at full size with random weights, on the devices here.

    python -m benchmarks.planned_step --config=configs/full_method.py --config.plan.target=host \\
        --config.mesh.tensor=1 --batch_size=8 --config.ppo.max_prompt_tokens=512 [--workdir=DIR]

Options are those of `main.py`, `--stage=plan` among them. Every prompt and response is as long as
it may be, as the plan has it. The seconds are the least of three iterations after one that
compiles; a decoded token is what the rollout takes beyond its prefill. Peaks are the allocator's,
where it has any; the table is written to `planned_step.json` too.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.jax_ppo import JaxPPO
from benchmarks.random_weights import random_weights
from benchmarks.word_tokenizer import word_tokenizer
from benchmarks.workload import TOKENS, Workload
from configs import command_line
from configs.shared import placement
from configs.stages.plan import layout, planner
from conversion.keys import abstract_policy, abstract_sarm
from ppo.plan import table
from ppo.programs import Program
from sarm_jax.chips import GIB, take_memory
from sarm_jax.progress import show_progress
from sarm_jax.reward_model import RewardModel

ITERATIONS = 3
UPDATE = ("reference", "targets", "first_step", "step")


def main() -> None:
    """Prints the plan, and a row per program: planned and measured milliseconds."""
    config, _, workdir = command_line.parse(sys.argv)
    show_progress()
    take_memory()
    plans = planner(config)
    plan = plans.plan(layout(config))
    print(table(plan), flush=True)
    placed = placement(config)
    policy = random_weights(abstract_policy(plans.policy().config, config.dtype), placed)
    policy.remat, policy.placement = config.remat, placed
    sarm = random_weights(abstract_sarm(plans.sarm().config, config.dtype), placed)
    sarm.trunk.placement = placed
    ppo = plans.config
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, TOKENS, (ppo.batch_size, ppo.max_prompt_tokens)).tolist()
    work = Workload(prompts, [ppo.max_new_tokens] * ppo.batch_size, ppo.ppo_epochs)
    tokenizer = word_tokenizer(plans.policy().config.vocab_size)
    reward_model = RewardModel(sarm, tokenizer, batch_size=config.sarm_batch_size)
    watched = tuple(range(plans.watched))
    loop = JaxPPO(ppo, plans.lora, policy, reward_model, work, watched)
    start = time.perf_counter()
    loop.iteration()
    first = time.perf_counter() - start
    spans = [loop.iteration() for _ in range(ITERATIONS)]
    least = {name: min(span[name] for span in spans) for name in spans[0]}
    half = next(p for p in plans.programs(layout(config)) if p.name == "prefill")
    prefill = _prefill(loop, half)
    rows = [dict(row) for row in plan["programs"]]
    planned = {row["name"]: row["seconds"] for row in rows}
    planned["update"] = sum(r["runs"] * r["seconds"] for r in rows if r["name"] in UPDATE)
    planned["score"] *= next(row["runs"] for row in rows if row["name"] == "score")
    planned["total"] = plan["step_seconds"]
    measured = least | {"prefill": prefill}
    measured["decode"] = (least["rollout"] - prefill) / (ppo.max_new_tokens - 1)
    names = ("rollout", "prefill", "decode", "score", "update", "total")
    device = jax.devices()[0]
    statistics: Any = device.memory_stats() or {}
    found = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "layout": plan["layout"],
        "batch": ppo.batch_size,
        "first_iteration_seconds": first,
        "planned_peak_bytes": plan["peak_bytes"],
        "measured_peak_bytes": statistics.get("peak_bytes_in_use"),
        "seconds": {n: {"planned": planned[n], "measured": measured[n]} for n in names},
        "iterations": spans,
        "plan": plan,
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "planned_step.json").write_text(json.dumps(found, indent=2))
    print(
        f"\n{device.device_kind}, jax {jax.__version__}, {plan['layout']}, batch {ppo.batch_size}"
    )
    print("\n| | planned, ms | measured, ms | measured / planned |\n|---|---|---|---|")
    for name in names:
        ours, theirs = 1e3 * planned[name], 1e3 * measured[name]
        print(f"| {name} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |")
    if statistics:
        peaks = plan["peak_bytes"] / GIB, statistics["peak_bytes_in_use"] / GIB
        print(f"| peak, GiB | {peaks[0]:.1f} | {peaks[1]:.1f} | {peaks[1] / peaks[0]:.2f} |")
    print(f"\nfirst iteration: {first:.1f} s", flush=True)


def _prefill(loop: JaxPPO, program: Program) -> float:
    """Seconds of the rollout's first half, by itself."""
    compiled = program.lower().compile()
    tokens, mask = loop.learner.placement.rows((jnp.asarray(loop.tokens), jnp.asarray(loop.mask)))
    return _least(lambda: compiled(loop.state.params, loop.base, tokens, mask))


def _least(run: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(1 + ITERATIONS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
