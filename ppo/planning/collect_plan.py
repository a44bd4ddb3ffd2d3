"""Plans the forward passes of `identify`, which collects the latents of both sides of all pairs.

Memory, traffic and time are those of `ppo.planning.plan`. No two responses are the same, and every
conversation has the longest length. What is collected stays in the memory of the host.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator

from flax import nnx

from ppo.planning.chips import GIB
from ppo.planning.costs import Cost, score_work
from ppo.planning.plan import ASSUMPTIONS, Layout, layouts_for, program_row, target_placement
from sarm_jax.models.chat import scored_length
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.models.reward_model import lower_code
from sarm_jax.models.sarm import SARM

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CollectPlanner:
    """Plans the collection of latents on one target.

    Attributes:
        name: the target, as in `ppo.planning.chips.target`.
        sarm: makes the abstract reward model, which has an SAE.
        pairs: number of pairs.
        batch: conversations that are run together.
        tokens: the most tokens of a conversation.
    """

    name: str
    sarm: Callable[[], SARM | LinearReward]
    pairs: int
    batch: int
    tokens: int

    def layouts(self, devices: int) -> Iterator[Layout]:
        """Yields every mesh over `devices` devices that divides a batch."""
        for layout in layouts_for(devices, self.batch, (1,)):
            if layout.remat == "dots":  # a forward pass keeps nothing for a backward pass
                yield layout

    def plan(self, layout: Layout) -> dict:
        """Returns the content of plan.json for one layout.

        Raises:
            InputError: the layout does not divide the model or the batch.
        """
        model, mesh = self.sarm(), layout.mesh
        mesh.check_model(model.config.trunk)
        mesh.check_batch(self.batch, "sarm_batch_size")
        dtype = model.score.dtype
        placement, chip, backend = target_placement(self.name, mesh, dtype)
        model.trunk.backend, model.trunk.placement = backend, placement
        most = min(self.tokens, model.config.trunk.max_position_embeddings)
        length = min(scored_length(most), most)
        flops, weights = score_work(model.config, self.batch, length)
        cost = Cost(flops / mesh.devices, weights * dtype.itemsize / mesh.tensor)
        LOG.info("compiling the collection of latents for %s on %s", self.name, mesh)
        compiled = lower_code(*nnx.split(model), placement, self.batch, length).compile()
        row = program_row(
            "latents", 1, compiled, costs=(cost,), chip=chip, mesh=mesh, tokens=length
        )
        return self._summary(layout, row, memory=chip.memory, host_bytes=self._host_bytes(model))

    def _host_bytes(self, model: SARM | LinearReward) -> int:
        """Returns the bytes of what is kept: k values with their features, or float32 states."""
        assert model.sae is not None
        sae = model.sae.config
        return 2 * self.pairs * (8 * sae.k if sae.use_topk else 4 * sae.hidden_size)

    def _summary(self, layout: Layout, row: dict, *, memory: float, host_bytes: int) -> dict:
        """Returns the content of plan.json; `memory` is that of one device, in bytes."""
        batches = math.ceil(2 * self.pairs / self.batch)
        return {
            "target": self.name,
            "mesh": dataclasses.asdict(layout.mesh),
            "layout": str(layout.mesh),
            "batch": self.batch,
            "tokens": row["prompt_tokens"],
            "fits": row["peak_bytes"] <= ASSUMPTIONS["share_of_memory"] * memory,
            "peak_bytes": row["peak_bytes"],
            "memory_bytes": memory,
            "host_bytes": host_bytes,
            "step_seconds": row["seconds"],
            "tokens_per_second": self.batch * row["prompt_tokens"] / row["seconds"],
            "steps": batches,
            "run_seconds": batches * row["seconds"],
            "assumptions": ASSUMPTIONS,
            "programs": [row],
        }


def collect_table(plan: dict) -> str:
    """Formats a plan as Markdown."""
    (row,) = plan["programs"]
    sent = sum(total["bytes"] for total in row["collectives"].values())
    return "\n".join(
        [
            f"{plan['target']}, identify, {plan['layout']}, {plan['batch']} conversations of "
            f"{plan['tokens']} tokens: peak {plan['peak_bytes'] / GIB:.1f} of "
            f"{plan['memory_bytes'] / GIB:.0f} GiB a device "
            f"({'fits' if plan['fits'] else 'DOES NOT FIT'}), "
            f"{plan['step_seconds']:.2f} s a batch, "
            f"{plan['run_seconds'] / 60:.1f} min for {plan['steps']} batches; "
            f"{plan['host_bytes'] / GIB:.2f} GiB of latents on the host",
            "",
            "| arguments GiB | temporaries GiB | TFLOP | GB moved | GB sent |",
            "|---|---|---|---|---|",
            f"| {row['argument_bytes'] / GIB:.2f} | {row['temp_bytes'] / GIB:.2f} "
            f"| {row['flops'] / 1e12:.1f} | {row['bytes'] / 1e9:.1f} | {sent / 1e9:.1f} |",
        ]
    )
