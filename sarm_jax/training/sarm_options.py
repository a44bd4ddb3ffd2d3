"""Options of the stage train_sarm, and the checks that need no weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from sarm_jax.io.errors import InputError
from sarm_jax.models.conversation import Prompt
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARMConfig
from sarm_jax.parallel.sharding import MeshConfig, Placement
from sarm_jax.training.held_out import draw_held_out
from sarm_jax.training.option_checks import OptionChecks
from sarm_jax.training.preference_training import PreferenceTraining
from sarm_jax.training.sae_training import SAETraining


@dataclasses.dataclass(frozen=True)
class TrainSARMConfig:
    """Options of the stage train_sarm; `configs/base.py` describes them."""

    pairs_jsonl: tuple[str, ...]
    held_out_fraction: float  # of the prompts
    max_length: int  # in tokens; a longer conversation loses its beginning
    source_layer: int
    latent_size: int
    k: int
    use_topk: bool  # the reference's `sarm_use_activation`; False: the head reads pre-activations
    mode: int  # the reference's `sarm_train_mode`, see preference_training
    reconstruction_weight: float  # the reference's `sarm_rec_lambda`
    sae_tokens: int  # largest number of activations to collect
    sae_steps: int
    sae_batch_tokens: int
    sae_learning_rate: float
    dead_after_steps: int
    aux_k: int
    aux_weight: float
    epochs: int
    batch_size: int  # pairs
    learning_rate: float  # of the trunk and, in modes 2 and 3, of the SAE
    head_learning_rate: float
    weight_decay: float
    warmup_fraction: float
    seed: int
    tie_pairs_jsonl: tuple[str, ...] = ()
    tie_weight: float = 1.0
    heads: int = 1
    gradient_accumulation_steps: int = 1  # pieces of a batch of pairs

    def __post_init__(self) -> None:
        check = OptionChecks("train_sarm", self)
        check.require("mode", self.mode in (0, 1, 2, 3), "must be 0, 1, 2 or 3")
        check.of_an_sae()
        check.at_least(1, "source_layer", "sae_tokens", "sae_steps", "sae_batch_tokens")
        check.at_least(1, "epochs", "batch_size", "heads", "gradient_accumulation_steps")
        check.positive("sae_learning_rate", "learning_rate", "head_learning_rate")
        check.not_negative("reconstruction_weight", "weight_decay")
        check.positive("tie_weight")
        if self.mode > 0:
            rule = f"train_sarm.mode={self.mode} trains the trunk; several heads need mode=0"
            check.require("heads", self.heads == 1, rule)
        else:
            rule = "train_sarm.mode=0 trains the head on whole batches; expected 1"
            pieces = self.gradient_accumulation_steps
            check.require("gradient_accumulation_steps", pieces == 1, rule)
        self.preference_training().batch_of(self.batch_size)
        if self.tie_weight != 1 and not self.tie_pairs_jsonl:
            check.require("tie_weight", False, "train_sarm.tie_pairs_jsonl names no ties")

    def check_batch(self, mesh: MeshConfig, train_pairs: int) -> None:
        """Raises InputError if a mesh cannot divide the batches of so many training pairs."""
        if self.mode == 0:  # its batches are small; every device may hold a whole batch
            return
        batch = self.preference_training().batch_of(train_pairs)
        option = "2 × train_sarm.batch_size"
        if batch < self.batch_size:
            option = f"2 × {batch} training pairs (train_sarm.batch_size={self.batch_size})"
        rows = 2 * batch // self.gradient_accumulation_steps
        mesh.check_batch(rows, f"{option} / train_sarm.gradient_accumulation_steps")

    def check_sae(self, placement: Placement, hidden_size: int, split: bool = False) -> None:
        """Raises InputError if the mesh cannot divide the SAE.

        Args:
            placement: the mesh.
            hidden_size: dimensions of the states.
            split: True for an SAE that is loaded, which is split also if the trunk is not trained.
        """
        if self.mode > 0 or split:
            shape = (hidden_size, self.latent_size)
            placement.abstract_parameter("sae.encoder", shape, jnp.float32)

    def check_layers(self, layers: int) -> None:
        """Raises InputError if a model of so many layers does not contain the trunk."""
        check_source_layer(self.source_layer, layers)

    def held_out(
        self, pairs: Sequence[Mapping[str, Any]], ties: Sequence[Mapping[str, Any]] = ()
    ) -> set[Prompt]:
        """Draws the held-out prompts: those of the pairs, then those that only ties have.

        Raises:
            InputError: no prompt would be left for training or for evaluation, or no tie for
                training.
        """
        own = {pair["prompt"] for pair in pairs}
        held_out = draw_held_out(
            (pair["prompt"] for pair in pairs),
            fraction=self.held_out_fraction,
            seed=self.seed,
            stage="train_sarm",
        )
        others = [tie["prompt"] for tie in ties if tie["prompt"] not in own]
        count = len(set(others))
        if 0 < round(self.held_out_fraction * count) < count:
            held_out |= draw_held_out(
                others, fraction=self.held_out_fraction, seed=self.seed, stage="train_sarm"
            )
        if ties and all(tie["prompt"] in held_out for tie in ties):
            raise InputError(
                f"train_sarm.tie_pairs_jsonl: the prompts of all {len(ties)} ties are held out: "
                "none is left for training"
            )
        return held_out

    def sae_config(self, hidden_size: int) -> SAEConfig:
        """Returns the architecture of the SAE for states of so many dimensions."""
        return SAEConfig(
            hidden_size=hidden_size,
            latent_size=self.latent_size,
            k=self.k,
            activation="topk" if self.use_topk else "identity",
        )

    def check_sae_of(self, sarm: SARMConfig, hidden_size: int) -> None:
        """Raises InputError if the SAE of a SARM is not one for states of so many dimensions."""
        sae, expected = sarm.sae, self.sae_config(hidden_size)
        differences = (
            ("its SAE reads states of {} dimensions", sae.hidden_size, hidden_size,
             "the model's {}"),
            ("its SAE reads layer {}", sarm.trunk.num_hidden_layers, self.source_layer,
             "train_sarm.source_layer={}"),
            ("its SAE has {} latents", sae.latent_size, self.latent_size,
             "train_sarm.latent_size={}"),
            ("its SAE has k={}", sae.k, self.k, "train_sarm.k={}"),
            ("its head reads latents with use_topk={}", sae.use_topk, expected.use_topk,
             "train_sarm.use_topk={}"),
        )  # fmt: skip
        for text, value, wanted, option in differences:
            if value != wanted:
                raise InputError(f"{text.format(value)}, expected {option.format(wanted)}")

    def sae_training(self) -> SAETraining:
        """Returns the options of SAE pretraining."""
        return SAETraining(
            steps=self.sae_steps,
            batch_tokens=self.sae_batch_tokens,
            learning_rate=self.sae_learning_rate,
            warmup_fraction=self.warmup_fraction,
            dead_after_steps=self.dead_after_steps,
            aux_k=self.aux_k,
            aux_weight=self.aux_weight,
            seed=self.seed,
        )

    def preference_training(self) -> PreferenceTraining:
        """Returns the options of Bradley–Terry training."""
        shared = {f.name for f in dataclasses.fields(PreferenceTraining)}
        return PreferenceTraining(**{name: getattr(self, name) for name in shared})


def check_source_layer(source_layer: int, layers: int) -> None:
    """Raises InputError if a model of so many layers has no such source layer."""
    if not 1 <= source_layer <= layers:
        raise InputError(f"train_sarm.source_layer={source_layer}: the model has {layers} layers")
