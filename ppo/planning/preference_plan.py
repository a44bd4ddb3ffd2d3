"""Plans `train_sarm`: compiles a step on preferences for a machine from shapes alone.

Memory, traffic and time are those of `ppo.planning.plan`. All conversations of a batch have the
longest length. While the step runs, the device also holds the policy that the trunk was cut from,
and the trunk and the SAE before training, whose SAE is on every device. `ppo.planning.sae_plan` and
`ppo.planning.activation_plan` plan what comes before. In mode 0 a step trains the head alone, on
latents of all pairs that every device has.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator

import jax
from flax import nnx

from ppo.planning.activation_plan import plan_activations
from ppo.planning.chips import FLOPS, GIB, Chip
from ppo.planning.costs import Cost, forward_flops, layer_weights
from ppo.planning.plan import ASSUMPTIONS, Layout, layouts_for, program_row, target_placement
from ppo.planning.programs import weight_bytes
from ppo.planning.sae_plan import plan_sae
from sarm_jax.models.chat import bucket_length, scored_length
from sarm_jax.models.llama import Llama
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.parallel.sharding import MeshConfig, Placement
from sarm_jax.training.head_training import lower_head_step
from sarm_jax.training.preference_training import lower_step
from sarm_jax.training.sarm_options import TrainSARMConfig

LOG = logging.getLogger(__name__)
# AdamW reads a parameter, its gradient and its two moments, and writes all but the gradient.
OPTIMIZER_BYTES = 7 * 4


@dataclasses.dataclass(frozen=True)
class PreferencePlanner:
    """Plans steps of `train_sarm` on one target.

    Attributes:
        name: the target, as in `ppo.planning.chips.target`.
        config: options of the training.
        policy: makes the abstract policy, from whose first layers the SARM is trained.
        pairs: number of pairs.
    """

    name: str
    config: TrainSARMConfig
    policy: Callable[[], Llama]
    pairs: int

    def layouts(self, devices: int) -> Iterator[Layout]:
        """Yields every layout over `devices` devices that divides a batch of pairs."""
        size, is_head = self.config.batch_size, self.config.mode == 0
        pieces = [n for n in range(1, size + 1) if size % n == 0 and not (is_head and n > 1)]
        for layout in layouts_for(devices, 2 * size, pieces):
            if not (is_head and layout.remat == "dots"):  # there is no backward pass of the trunk
                yield layout

    def plan(self, layout: Layout) -> dict:
        """Returns the content of plan.json for one layout.

        Raises:
            InputError: the layout does not divide the model or the batch.
        """
        config = dataclasses.replace(self.config, gradient_accumulation_steps=layout.accumulation)
        policy = self.policy()
        config.check_layers(policy.config.num_hidden_layers)
        layout.mesh.check_model(policy.config)
        config.check_batch(layout.mesh, config.batch_size)
        dtype = policy.embed_tokens.dtype
        placement, chip, backend = target_placement(self.name, layout.mesh, dtype)
        config.check_sae(placement, policy.config.hidden_size)
        sarm = abstract_sarm(config, policy, placement)
        sarm.trunk.remat, sarm.trunk.backend = layout.remat, backend
        most = min(config.max_length, policy.config.max_position_embeddings)
        length = min(bucket_length(most), policy.config.max_position_embeddings)
        LOG.info("compiling a step of mode %d for %s on %s", config.mode, self.name, layout)
        row = self._step_row(config, sarm, length, layout=layout, chip=chip)
        held = weight_bytes(policy, placement) + weight_bytes(sarm.trunk, placement)
        of_sae = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(sarm.sae)))
        in_float32 = dataclasses.replace(chip, flops=min(chip.flops, FLOPS["tensorfloat32"]))
        sae = plan_sae(sarm.sae, config.sae_training(), chip=in_float32, mesh=layout.mesh)
        sae["peak_bytes"] = sae["program"]["peak_bytes"] + held
        kept = max(config.sae_tokens, 2 * self.pairs)  # the pooled states are always among them
        sae["disk_bytes"] = 4 * kept * policy.config.hidden_size
        collect = plan_activations(
            sarm.trunk,
            pairs=self.pairs,
            length=scored_length(most),
            chip=chip,
            mesh=layout.mesh,
        )
        collect["peak_bytes"] = collect["program"]["peak_bytes"] + held + of_sae
        return self._summary(layout, row, sae, collect, chip=chip, held=held + of_sae)

    def _step_row(
        self, config: TrainSARMConfig, sarm: SARM, length: int, *, layout: Layout, chip: Chip
    ) -> dict:
        """Compiles a step on preferences and returns its row."""
        options, mesh = config.preference_training(), layout.mesh
        if config.mode == 0:
            assert sarm.sae is not None
            lowered, slow_flops = lower_head_step(sarm.sae, options, self.pairs), 0.0
            cost = head_cost(config, mesh)
        else:
            lowered = lower_step(sarm, options, length)
            cost, slow_flops = step_cost(
                config,
                sarm.config,
                length,
                mesh=mesh,
                remat=layout.remat,
                bytes_per_weight=sarm.trunk.embed_tokens.dtype.itemsize,
            )
        row = program_row(
            "step", 1, lowered.compile(), costs=(cost,), chip=chip, mesh=mesh, tokens=length
        )
        row["seconds"] += _slower_seconds(slow_flops, chip)
        return row

    def _summary(
        self, layout: Layout, row: dict, sae: dict, collect: dict, *, chip: Chip, held: int
    ) -> dict:
        """Returns the content of plan.json; `held` is in bytes, beside those of the step."""
        config, peak = self.config, row["peak_bytes"] + held
        usable = ASSUMPTIONS["share_of_memory"] * chip.memory
        tokens = 2 * config.batch_size * row["prompt_tokens"]
        return {
            "target": self.name,
            "mesh": dataclasses.asdict(layout.mesh),
            "layout": str(layout),
            "mode": config.mode,
            "batch": config.batch_size,
            "tokens": row["prompt_tokens"],
            "fits": max(peak, sae["peak_bytes"], collect["peak_bytes"]) <= usable,
            "peak_bytes": peak,
            "held_bytes": held,
            "memory_bytes": chip.memory,
            "step_seconds": row["seconds"],
            "tokens_per_second": tokens / row["seconds"],
            "assumptions": ASSUMPTIONS,
            "programs": [row],
            "sae": sae,
            "collect": collect,
        }


def abstract_sarm(config: TrainSARMConfig, policy: Llama, placement: Placement) -> SARM:
    """Makes the abstract SARM that `train_sarm` trains: its SAE and its head are float32."""
    trunk = dataclasses.replace(policy.config, num_hidden_layers=config.source_layer)
    activation = "topk" if config.use_topk else "identity"
    sae = SAEConfig(trunk.hidden_size, config.latent_size, config.k, activation)
    sarm = nnx.eval_shape(lambda: SARM(SARMConfig(trunk, sae), rngs=nnx.Rngs(0)))
    dtype = policy.embed_tokens.dtype
    sarm.trunk = nnx.eval_shape(
        lambda: Llama(trunk, dtype=dtype, rngs=nnx.Rngs(0), final_norm=False, head=False)
    )
    sarm.trunk.placement = sarm.sae.placement = placement
    return sarm


def step_cost(
    config: TrainSARMConfig,
    sarm: SARMConfig,
    length: int,
    *,
    mesh: MeshConfig,
    remat: str,
    bytes_per_weight: int,
) -> tuple[Cost, float]:
    """Returns the cost of a step on one device, and how many of its FLOPs are in float32.

    The SAE computes in float32. In mode 3 no gradient of the reconstruction is taken in x.
    """
    rows = 2 * config.batch_size
    encoder = sarm.trunk.hidden_size * sarm.latent_size
    again = 1 if remat == "full" else 0
    trunk_flops = (3 + again) * forward_flops(sarm.trunk, rows, length)
    products = {1: 0, 2: 12, 3: 10}[config.mode]  # encoder and decoder, forward and backward
    sae_flops = rows * encoder * (6.0 + products * length)
    weights = layer_weights(sarm.trunk) * sarm.trunk.num_hidden_layers
    passes = (2 + again) * config.gradient_accumulation_steps
    sae_weights = 4 * encoder * (1 if config.mode == 1 else 2)
    read = (passes * weights * bytes_per_weight + sae_weights) / mesh.tensor
    trained = weights + sarm.trunk.vocab_size * sarm.trunk.hidden_size
    trained += 0 if config.mode == 1 else 2 * encoder
    shards = mesh.fsdp * mesh.tensor
    cost = Cost((trunk_flops + sae_flops) / mesh.devices, read + OPTIMIZER_BYTES * trained / shards)
    return cost, sae_flops / mesh.devices


def head_cost(config: TrainSARMConfig, mesh: MeshConfig) -> Cost:
    """Returns the cost of a step of mode 0 on one device, which reads values and feature ids."""
    parts = mesh.batch_parts if config.batch_size % mesh.batch_parts == 0 else 1
    kept = 2 * config.batch_size * (config.k if config.use_topk else config.latent_size) / parts
    return Cost(3 * 2 * kept, 8 * kept + OPTIMIZER_BYTES * config.latent_size)


def _slower_seconds(flops: float, chip: Chip) -> float:
    """Returns how many seconds longer these FLOPs take in TF32 than at the chip's rate."""
    slower = max(1 / FLOPS["tensorfloat32"] - 1 / chip.flops, 0.0)
    return flops * slower / ASSUMPTIONS["share_of_peak_flops"]


def preference_table(plan: dict) -> str:
    """Formats a plan as Markdown."""
    (row,), sae, collect = plan["programs"], plan["sae"], plan["collect"]
    sent = sum(total["bytes"] for total in row["collectives"].values())
    again = "" if plan["mode"] == 0 else ", and once more at the end"
    return "\n".join(
        [
            f"{plan['target']}, train_sarm.mode={plan['mode']}, {plan['layout']}, "
            f"{plan['batch']} pairs of 2 × {plan['tokens']} tokens: peak "
            f"{plan['peak_bytes'] / GIB:.1f} of {plan['memory_bytes'] / GIB:.0f} GiB a device "
            f"({'fits' if plan['fits'] else 'DOES NOT FIT'}), {plan['step_seconds']:.3g} s a step",
            "",
            "| arguments GiB | temporaries GiB | held beside GiB | TFLOP | GB moved | GB sent |",
            "|---|---|---|---|---|---|",
            f"| {row['argument_bytes'] / GIB:.2f} | {row['temp_bytes'] / GIB:.2f} "
            f"| {plan['held_bytes'] / GIB:.2f} | {row['flops'] / 1e12:.1f} "
            f"| {row['bytes'] / 1e9:.1f} | {sent / 1e9:.1f} |",
            "",
            f"Before, pretraining of the SAE on {sae['batch']} activations a step: peak "
            f"{sae['peak_bytes'] / GIB:.1f} GiB, {sae['step_seconds']:.3f} s a step, "
            f"{sae['run_seconds'] / 60:.1f} min for {sae['steps']} steps; activations take at most "
            f"{sae['disk_bytes'] / 1e9:.1f} GB of disk",
            "",
            f"Before that{again}, collection of the activations: peak "
            f"{collect['peak_bytes'] / GIB:.1f} GiB, {collect['step_seconds']:.3f} s for "
            f"{collect['batch']} conversations, {collect['run_seconds'] / 60:.1f} min for "
            f"{collect['steps']} batches",
        ]
    )
