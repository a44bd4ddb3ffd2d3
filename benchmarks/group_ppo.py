"""PPO iterations of several runs in one process, over one copy of the weights.

`build` makes a side of `many_runs`. With one run there is no group.
"""

import time
from functools import partial
from typing import Any

from flax import nnx

from benchmarks.jax_ppo import JaxPPO
from benchmarks.jax_ppo import build as build_one
from benchmarks.workload import Workload
from ppo.run_group import Member, RunGroup


class GroupPPO:
    """The runs, which differ in their seeds: a group samples equal runs only once."""

    def __init__(self, runs: list[JaxPPO]):
        self.runs = runs

    def iteration(self) -> dict[str, float]:
        """Runs an iteration of every run; returns the seconds and the CPU seconds of all."""
        start, cpu_start = time.perf_counter(), time.process_time()
        if len(self.runs) == 1:
            self.runs[0].iteration()
        else:
            errors = RunGroup().run([partial(_iterate, run) for run in self.runs])
            for error in errors:
                if error is not None:
                    raise error
        return {"total": time.perf_counter() - start, "cpu": time.process_time() - cpu_start}


def _iterate(run: JaxPPO, member: Member) -> None:
    run.member = member
    run.iteration()


def build(model_dir: str, work: Workload, runs: int, **options: Any) -> GroupPPO:
    """Loads the models once, for all runs."""
    first = build_one(model_dir, work, **options)
    learner = first.learner
    sides = [first]
    for seed in range(1, runs):
        policy = nnx.merge(learner.reference_graph, first.base)
        sides.append(
            JaxPPO(
                learner.config,
                first.lora,
                policy=policy,
                reward_model=first.reward_model,
                work=work,
                seed=seed,
            )
        )
    return GroupPPO(sides)
