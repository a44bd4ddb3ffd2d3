"""Plans a PPO run: compiles every program of a step for a machine, and estimates what it takes.

The memory is what the compiler reports. Traffic, kernels and collectives are counted in the
compiled programs. The time is an estimate: the roofline at the shares of the peak in `ASSUMPTIONS`,
plus collectives and kernel launches, none of which overlap. The roofline of a rollout is the sum of
those of its prefill and its decoding.

Programs are compiled for each length that a run pads prompts to. The time of a step is the
expectation over these lengths; its memory is the largest of all lengths.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from jax.sharding import AxisType, Mesh
from jax.stages import Compiled

from ppo.config import PPOConfig
from ppo.planning.chips import GIB, Chip, target
from ppo.planning.costs import Cost, open_loops, step_costs
from ppo.planning.hlo import Collective, by_kind, read_traffic
from ppo.planning.programs import Program, RunState, step_programs, weight_bytes
from sarm_jax.io.errors import InputError
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.sarm import SARM
from sarm_jax.parallel.devices import MEMORY_SHARE
from sarm_jax.parallel.sharding import AXES, MeshConfig, Placement, make_mesh

LOG = logging.getLogger(__name__)

ASSUMPTIONS = {
    "share_of_peak_flops": 0.5,
    "share_of_peak_bandwidth": 0.8,
    "seconds_per_kernel": 1.5e-6,
    "seconds_per_collective": 1e-5,
    "share_of_memory": MEMORY_SHARE,
}
HALVES = ("prefill", "decode")  # parts of the program `rollout`, whose memory covers both
NO_STATE = RunState(total=0, adapter=0)  # the programs of a single run hold all of its state


@dataclasses.dataclass(frozen=True)
class Layout:
    """A device mesh, rematerialisation and accumulation, which a search varies."""

    mesh: MeshConfig
    remat: str
    accumulation: int

    def __str__(self) -> str:
        return f"{self.mesh}, remat {self.remat}, accumulation {self.accumulation}"


@dataclasses.dataclass(frozen=True)
class Planner:
    """Plans runs on one target.

    Attributes:
        name: the target, as in `ppo.planning.chips.target`.
        config: options of PPO.
        lora: options of the adapter.
        policy: makes an abstract policy.
        sarm: makes an abstract SARM.
        score_batch: conversations that are scored at a time.
        watched: number of latents that the reward reads.
        shares: share of the batches by padded prompt length; if empty, every batch is padded to
            `config.max_prompt_tokens`.
        runs: runs that are trained at a time over one copy of the models.
    """

    name: str
    config: PPOConfig
    lora: LoRAConfig
    policy: Callable[[], Llama]
    sarm: Callable[[], SARM | LinearReward]
    score_batch: int
    watched: int
    shares: Mapping[int, float] = dataclasses.field(default_factory=dict)
    runs: int = 1
    _rows: dict[tuple, dict] = dataclasses.field(default_factory=dict, init=False, compare=False)

    def plan(self, layout: Layout) -> dict:
        """Returns the content of plan.json for one layout."""
        shares = self.shares or {self.config.max_prompt_tokens: 1.0}
        rows: list[dict] = []
        for length in shares:
            config = self._config(layout, length)
            policy, sarm, chip = self._models(config, layout)
            weights = {  # the same for all lengths; the policy has no adapter yet
                name: weight_bytes(model, policy.placement)
                for name, model in (("policy", policy), ("sarm", sarm))
            }
            rows += self._rows_of(config, layout=layout, policy=policy, sarm=sarm, chip=chip)
        return _summary(
            name=self.name,
            layout=layout,
            config=self.config,
            chip=chip,
            shares=shares,
            rows=rows,
            weights=weights,
            runs=self.runs,
            state=self._state(),
        )

    def _state(self) -> RunState:
        """Returns the bytes that each of several runs adds; none for a single run."""
        if self.runs == 1:
            return NO_STATE
        return RunState.of(self.config, self.lora, self.policy())

    def programs(self, layout: Layout, prompt_tokens: int) -> Iterator[Program]:
        """Yields the programs that `plan` compiles for prompts padded to `prompt_tokens`."""
        config = self._config(layout, prompt_tokens)
        policy, sarm, _ = self._models(config, layout)
        return self._programs(config, policy, sarm)

    def _rows_of(
        self,
        config: PPOConfig,
        *,
        layout: Layout,
        policy: Llama,
        sarm: SARM | LinearReward,
        chip: Chip,
    ) -> list[dict]:
        """Compiles the programs under `config`; returns their rows of plan.json."""
        mesh, prompt_tokens = layout.mesh, config.max_prompt_tokens
        inherent = partial(
            step_costs,
            lora=self.lora,
            policy=policy.config,
            sarm=sarm.config,
            mesh=mesh,
            score_rows=min(config.batch_size, self.score_batch),
            remat=layout.remat,
            bytes_per_weight=policy.embed_tokens.dtype.itemsize,
        )
        costs = inherent(config)
        if self.runs > 1 and not config.rollout_slots:  # one program decodes the rows of all runs
            wider = dataclasses.replace(config, batch_size=self.runs * config.batch_size)
            costs |= {"rollout": inherent(wider)["rollout"]}
        rows = []
        for program in self._programs(config, policy, sarm):
            # Several layouts of a search have the same program, which is compiled once.
            varying = (getattr(layout, field) for field in program.varies_with)
            key = prompt_tokens, program.name, *varying
            if key not in self._rows:
                LOG.info(
                    "compiling %s for %s on %s, prompts of %d tokens",
                    program.name, self.name, layout, prompt_tokens,
                )  # fmt: skip
                self._rows[key] = program_row(
                    program.name,
                    program.runs,
                    program.lower().compile(),
                    costs=costs[program.name],
                    chip=chip,
                    mesh=mesh,
                    tokens=prompt_tokens,
                    loops=open_loops(config),
                )
            rows.append(self._rows[key])
        return rows

    def _config(self, layout: Layout, prompt_tokens: int) -> PPOConfig:
        """Returns the options for one layout, with all prompts padded to `prompt_tokens`."""
        return dataclasses.replace(
            self.config,
            gradient_accumulation_steps=layout.accumulation,
            max_prompt_tokens=prompt_tokens,
        )

    def _programs(
        self, config: PPOConfig, policy: Llama, sarm: SARM | LinearReward
    ) -> Iterator[Program]:
        return step_programs(
            config,
            self.lora,
            policy=policy,
            sarm=sarm,
            score_batch=self.score_batch,
            watched=self.watched,
            runs=self.runs,
        )

    def _models(self, config: PPOConfig, layout: Layout) -> tuple[Llama, SARM | LinearReward, Chip]:
        """Makes abstract models on the mesh; raises InputError if it cannot divide them evenly."""
        mesh, policy, sarm = layout.mesh, self.policy(), self.sarm()
        mesh.check_model(policy.config)
        mesh.check_model(sarm.config.trunk)
        mesh.check_batch(
            config.batch_size // config.pieces,
            "ppo.batch_size / (ppo.num_minibatches × ppo.gradient_accumulation_steps)",
        )
        mesh.check_batch(config.prompts_per_batch, "ppo.batch_size / ppo.samples_per_prompt")
        mesh.check_batch(config.rollout_slots, "ppo.rollout_slots")
        placement, chip, backend = target_placement(self.name, mesh, policy.embed_tokens.dtype)
        policy.remat = layout.remat
        for model in (policy, sarm.trunk):
            model.backend, model.placement = backend, placement
        return policy, sarm, chip


class Plans(Protocol):
    """A planner of layouts on a target."""

    @property
    def name(self) -> str: ...

    def plan(self, layout: Layout) -> dict: ...


def search(planner: Plans, layouts: Sequence[Layout]) -> list[dict]:
    """Returns a plan for each possible layout: those that fit first, and the fastest of them."""
    plans = []
    for layout in layouts:
        try:
            plans.append(planner.plan(layout))
        except InputError as error:
            LOG.info("a layout is not possible: %s", error)
    if not plans:
        raise InputError(f"plan.target={planner.name}: no layout of the search is possible")
    return sorted(plans, key=lambda plan: (not plan["fits"], plan["step_seconds"]))


def layouts_for(
    devices: int, rows: int, accumulations: Sequence[int] = (1, 2, 4)
) -> Iterator[Layout]:
    """Yields every layout over `devices` devices that divides a batch of `rows` rows."""
    shapes = itertools.product(range(1, devices + 1), repeat=3)
    for shape in (shape for shape in shapes if math.prod(shape) == devices):
        mesh = MeshConfig(*shape)
        for remat, accumulation in itertools.product(("dots", "full"), accumulations):
            if rows % (accumulation * mesh.batch_parts) == 0:
                yield Layout(mesh, remat, accumulation)


def table(plan: dict) -> str:
    """Formats a plan as Markdown: totals, prompt lengths if there are several, all programs."""
    lengths, runs = plan["prompt_lengths"], plan["runs_at_once"]
    lines = [
        f"{plan['target']}, {plan['layout']}, batch {plan['batch']}"
        f"{f' of each of {runs} runs' if runs > 1 else ''}: "
        f"peak {plan['peak_bytes'] / GIB:.1f} of {plan['memory_bytes'] / GIB:.0f} GiB a device "
        f"({'fits' if plan['fits'] else 'DOES NOT FIT'}), "
        f"{plan['step_seconds']:.2f} s a step{' in expectation' if len(lengths) > 1 else ''}, "
        f"{plan['tokens_per_second']:.0f} tokens/s, "
        f"{plan['run_seconds'] / 60:.1f} min for {plan['steps']} steps",
        "",
    ]
    if len(lengths) > 1:
        lines += [
            "| longest prompt, padded | share of batches | peak GiB | s a step |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {row['padded']} | {100 * row['share']:.1f} % | {row['peak_bytes'] / GIB:.1f} "
            f"| {row['step_seconds']:.3f} |"
            for row in lengths
        ]
        lines.append("")
    lines += [
        "| program | prompt | runs | arguments GiB | temporaries GiB | peak GiB | TFLOP | GB moved "
        "| × inherent | collectives | GB sent | roofline ms | inherent share | ms a run "
        "| s a step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in plan["programs"]:
        count = sum(total["count"] for total in row["collectives"].values())
        sent = sum(total["bytes"] for total in row["collectives"].values())
        lines.append(
            f"| {row['name']} | {row['prompt_tokens']} | {row['runs'] or '–'} "
            f"| {row['argument_bytes'] / GIB:.2f} "
            f"| {row['temp_bytes'] / GIB:.2f} | {row['peak_bytes'] / GIB:.2f} "
            f"| {row['flops'] / 1e12:.2f} | {row['bytes'] / 1e9:.2f} "
            f"| {row['bytes'] / row['inherent_bytes']:.2f} | {count} | {sent / 1e9:.3f} "
            f"| {1e3 * row['roofline_seconds']:.2f} | {100 * row['inherent_share']:.0f} % "
            f"| {1e3 * row['seconds']:.2f} | {row['runs'] * row['seconds']:.3f} |"
        )
    return "\n".join(lines)


def candidates(plans: Sequence[dict]) -> str:
    """Formats the layouts of a search as a Markdown table."""
    lines = ["| layout | peak GiB | fits | s a step | tokens/s |", "|---|---|---|---|---|"]
    lines += [
        f"| {plan['layout']} | {plan['peak_bytes'] / GIB:.1f} | {'yes' if plan['fits'] else 'no'} "
        f"| {plan['step_seconds']:.2f} | {plan['tokens_per_second']:.0f} |"
        for plan in plans
    ]
    return "\n".join(lines)


def target_placement(name: str, mesh: MeshConfig, dtype: Any) -> tuple[Placement, Chip, str]:
    """Returns (the mesh of a target, the rates of its devices, their backend), see `target`."""
    chip, devices, backend = target(name, mesh.devices, dtype)
    on_host = name == "host"  # the programs are then those of a run, on the same mesh
    placement = Placement(make_mesh(mesh, devices) if on_host else _mesh(mesh, devices))
    return placement, chip, backend


def _mesh(mesh: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """Returns a mesh of devices that are not present."""
    grid = np.asarray(devices).reshape(mesh.data, mesh.fsdp, mesh.tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def program_row(
    name: str,
    runs: int,
    compiled: Compiled,
    *,
    costs: tuple[Cost, ...],
    chip: Chip,
    mesh: MeshConfig,
    tokens: int,
    loops: tuple[int, ...] = (),
) -> dict:
    """Returns the row of plan.json for a compiled program.

    Args:
        name: its name.
        runs: how often a step runs it.
        compiled: the program.
        costs: the costs of its parts.
        chip: rates of one device.
        mesh: the device mesh.
        tokens: the length that prompts are padded to, or conversations.
        loops: how often its loops of unknown length run.
    """
    memory: Any = compiled.memory_analysis()
    traffic = read_traffic(compiled.as_text() or "", open_loops=loops)
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
    flops = [cost.flops for cost in costs]
    inherent_bytes = [cost.inherent_bytes for cost in costs]
    moved = [traffic.bytes]
    if len(costs) > 1:  # decoding is a loop of unknown length, until all responses have ended
        moved = [traffic.bytes - traffic.open_bytes, traffic.open_bytes]
    roofline = chip.seconds(flops, moved)
    achieved = dataclasses.replace(
        chip,
        flops=chip.flops * ASSUMPTIONS["share_of_peak_flops"],
        bandwidth=chip.bandwidth * ASSUMPTIONS["share_of_peak_bandwidth"],
    )
    launches = traffic.kernels * ASSUMPTIONS["seconds_per_kernel"]
    collectives = sum(
        collective.count * _collective_seconds(collective, chip, mesh)
        for collective in traffic.collectives
    )
    return {
        "name": name,
        "prompt_tokens": tokens,
        "runs": runs,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
        "flops": sum(flops),
        "compiler_flops": _compiler_flops(compiled),
        "bytes": traffic.bytes,
        "inherent_bytes": sum(inherent_bytes),
        "kernels": traffic.kernels,
        "collectives": by_kind(traffic.collectives),
        "roofline_seconds": roofline,
        "inherent_share": chip.seconds(flops, inherent_bytes) / roofline,
        "seconds": achieved.seconds(flops, moved) + launches + collectives,
    }


def _compiler_flops(compiled: Compiled) -> float | None:
    """Returns the compiler's own count, in which loops run once; None if it has none."""
    analysis: Any = compiled.cost_analysis()
    return float(analysis["flops"]) if analysis and "flops" in analysis else None


def _collective_seconds(collective: Collective, chip: Chip, mesh: MeshConfig) -> float:
    """Returns the seconds of a collective in a ring, which an all-reduce passes twice."""
    passes = 2 if collective.kind == "all-reduce" else 1
    ring = (mesh.devices - 1) / mesh.devices
    return ASSUMPTIONS["seconds_per_collective"] + passes * ring * collective.bytes / chip.link


def _length_row(length: int, share: float, rows: list[dict], held: Mapping[str, int]) -> dict:
    """Returns the time and memory of a step whose prompts are padded to one length.

    Args:
        length: the length.
        share: share of the batches with this length.
        rows: the rows of its programs.
        held: bytes on a device, by program, that are not among the arguments of the program.
    """
    peaks = (row["peak_bytes"] + held[row["name"]] for row in rows if row["name"] not in HALVES)
    return {
        "padded": length,
        "share": share,
        "step_seconds": sum(row["runs"] * row["seconds"] for row in rows),
        "peak_bytes": max(peaks),
    }


def _summary(
    *,
    name: str,
    layout: Layout,
    config: PPOConfig,
    chip: Chip,
    shares: Mapping[int, float],
    rows: list[dict],
    weights: dict[str, int],
    runs: int = 1,
    state: RunState = NO_STATE,
) -> dict:
    """Returns the content of plan.json.

    Args:
        name: the target.
        layout: mesh, rematerialisation and accumulation.
        config: options of PPO.
        chip: rates of one device.
        shares: share of the batches by padded prompt length.
        rows: the rows of all programs.
        weights: bytes of the weights of "policy" and "sarm" on one device.
        runs: runs that are trained at a time.
        state: bytes of the state that each run has of its own; needed for several runs.
    """
    held = {  # both models and the state of every run stay on the device
        row["name"]: weights["policy" if row["name"] == "score" else "sarm"]
        + state.beside(row["name"], runs)
        for row in rows
    }
    lengths = [
        _length_row(length, share, [row for row in rows if row["prompt_tokens"] == length], held)
        for length, share in shares.items()
    ]
    peak = max(row["peak_bytes"] for row in lengths)
    seconds = sum(row["share"] * row["step_seconds"] for row in lengths)
    return {
        "target": name,
        "mesh": dataclasses.asdict(layout.mesh),
        "layout": str(layout),
        "batch": config.batch_size,
        "runs_at_once": runs,
        "algorithm": config.algorithm,
        "prompt_tokens": max(shares),
        "prompt_lengths": lengths,
        "new_tokens": config.max_new_tokens,
        "fits": peak <= ASSUMPTIONS["share_of_memory"] * chip.memory,
        "peak_bytes": peak,
        "memory_bytes": chip.memory,
        "step_seconds": seconds,
        "tokens_per_second": runs * config.batch_size * config.max_new_tokens / seconds,
        "steps": config.total_steps,
        "run_seconds": config.total_steps * seconds,
        "assumptions": ASSUMPTIONS,
        "programs": rows,
    }
