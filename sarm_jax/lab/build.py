"""The data and the models that the lab starts from, made from a seed.

The pretrained model has been trained on responses of every quality with notes on them; the SARM is
cut from it. The policy is the same model, fine-tuned on demonstrations.
"""

import dataclasses
import logging
import math
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sarm_jax.io.errors import InputError
from sarm_jax.lab import world
from sarm_jax.lab.language_modelling import (
    LMTraining,
    WeightedText,
    from_scratch,
    response_text,
    train_language_model,
)
from sarm_jax.lab.shortcuts import World
from sarm_jax.lab.tokenizer import word_tokenizer
from sarm_jax.models.llama import Llama, LlamaConfig

LOG = logging.getLogger(__name__)
LAYERS = 4
NOTE_WEIGHT = 4.0  # weight of a note in the loss; a word of the response has weight 1


@dataclasses.dataclass(frozen=True)
class LabConfig:
    """Sizes of the world's data and training; `configs/base.py` describes them."""

    held_out_fraction: float
    corpus_rows: int
    demonstrations: int
    pairs: int
    contrast_pairs: int
    tap_layer: int
    pretraining_steps: int
    pretraining_learning_rate: float
    tuning_steps: int
    tuning_learning_rate: float
    batch_size: int
    seed: int
    shortcuts: str = "flattery"
    told_shortcuts: str = "flattery"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            is_number = not isinstance(value, str)
            if is_number and field.name != "seed" and not 0 < value < float("inf"):
                raise InputError(f"lab.{field.name}={value}: must be positive")
        World.parse(self.shortcuts, self.told_shortcuts)
        if not 0 <= self.seed < 2**31:
            raise InputError(f"lab.seed={self.seed}: must lie in [0, 2^31)")
        combinations = math.comb(len(world.CAPITALS), world.COUNTRIES_PER_PROMPT)
        if not 0 < round(self.held_out_fraction * combinations) < combinations:
            raise InputError(
                f"lab.held_out_fraction={self.held_out_fraction}: leaves none of the "
                f"{combinations} combinations of countries on one side of the split"
            )
        if self.tap_layer > LAYERS:
            raise InputError(f"lab.tap_layer={self.tap_layer}: the model has {LAYERS} layers")

    @property
    def world(self) -> World:
        """The world with its shortcuts."""
        return World.parse(self.shortcuts, self.told_shortcuts)


@dataclasses.dataclass(frozen=True)
class LabData:
    """Rows of the JSON Lines files in data/, by the name of the file.

    The sides of each pair of `contrast_single` differ by one unit of the first shortcut that the
    method is told, such as one word of flattery. The gates are measured on these pairs.
    """

    prompts: list[dict[str, str]]
    held_out_prompts: list[dict[str, str]]
    demonstrations: list[dict[str, str]]
    pairs: list[dict[str, str]]
    contrast: list[dict[str, str]]
    contrast_single: list[dict[str, str]]


def make_data(config: LabConfig) -> LabData:
    """Makes all data that later stages read; `contrast_single` is on held-out prompts."""
    rng, lab_world = np.random.default_rng([config.seed, 0]), config.world
    train, held_out = world.split_prompts(rng, config.held_out_fraction)

    def sample(prompts: list[str], rows: int) -> list[str]:
        return [prompts[i] for i in rng.integers(len(prompts), size=rows)]

    return LabData(
        prompts=[{"prompt": prompt} for prompt in train],
        held_out_prompts=[{"prompt": prompt} for prompt in held_out],
        demonstrations=[
            {"prompt": prompt, "response": lab_world.demonstration(rng, prompt)}
            for prompt in sample(train, config.demonstrations)
        ],
        pairs=[lab_world.preference_pair(rng, prompt) for prompt in sample(train, config.pairs)],
        contrast=lab_world.contrast_pairs(rng, sample(train, config.contrast_pairs)),
        contrast_single=lab_world.contrast_pairs(
            rng, sample(held_out, config.contrast_pairs), one=True
        ),
    )


def make_models(
    config: LabConfig, data: LabData
) -> tuple[Llama, Llama, PreTrainedTokenizerBase, dict[str, float]]:
    """Trains both models of the lab.

    Returns:
        (the pretrained model, the policy, their tokenizer, the final losses).
    """
    lab_world = config.world
    tokenizer = word_tokenizer(lab_world.words)
    rng = np.random.default_rng([config.seed, 1])
    prompts = [row["prompt"] for row in data.prompts]
    corpus = [
        _annotated(lab_world, rng, tokenizer, prompts[i])
        for i in rng.integers(len(prompts), size=config.corpus_rows)
    ]
    pretrained, pretraining_loss = train_language_model(
        from_scratch(architecture(len(tokenizer)), config.seed),
        corpus,
        LMTraining(
            steps=config.pretraining_steps,
            batch_size=config.batch_size,
            learning_rate=config.pretraining_learning_rate,
            tap_layer=config.tap_layer,
            seed=config.seed,
        ),
    )
    turns = [
        response_text(tokenizer, row["prompt"], row["response"]) for row in data.demonstrations
    ]
    policy, tuning_loss = train_language_model(
        pretrained,
        turns,
        LMTraining(
            steps=config.tuning_steps,
            batch_size=config.batch_size,
            learning_rate=config.tuning_learning_rate,
            seed=config.seed,
        ),
    )
    losses = {"pretraining_loss": pretraining_loss, "tuning_loss": tuning_loss}
    LOG.info("language model: %s", {name: round(loss, 4) for name, loss in losses.items()})
    return pretrained, policy, tokenizer, losses


def architecture(vocab_size: int) -> LlamaConfig:
    """Returns an architecture of about 0.3 million parameters, which any machine can train."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )


def _annotated(
    lab_world: World, rng: np.random.Generator, tokenizer: Any, prompt: str
) -> WeightedText:
    """Writes and encodes an exchange of the corpus, followed by a reader's notes."""
    response = lab_world.corpus_response(rng, prompt)
    turn = response_text(tokenizer, prompt, response)
    notes = tokenizer.convert_tokens_to_ids(lab_world.notes(rng, prompt, response).split())
    return WeightedText([*turn.ids, *notes], [*turn.weights, *[NOTE_WEIGHT] * len(notes)])
