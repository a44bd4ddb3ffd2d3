"""Constants and helpers for the tiny models and runs of the fixtures in `conftest.py`."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from configs import base
from ppo.options import guard_config
from ppo.tracking.guards import GuardConfig
from sarm_jax.models.llama import LlamaConfig
from sarm_jax.rewards.density_ratio import DiscriminatorConfig
from sarm_jax.rewards.options import reward_config
from sarm_jax.rewards.reward_config import RewardConfig

PROMPTS = [f"say {i}" for i in range(10)]
HELD_OUT = [f"what about {i}" for i in range(6)]
ACTIVE = (3, 4, 5, 8, 9, 13)  # features with z > 0; the latent KL of constant zeros is undefined
DISCRIMINATOR = DiscriminatorConfig(1e-3, hidden_size=8, steps=2, batch_size=8, weight_decay=0.0)

# Changes of PPOConfig by algorithm, for tests that hold for all of them. GRPO has refilled slots.
ALGORITHMS: dict[str, dict] = {
    "ppo": {},
    "rloo": {"algorithm": "rloo", "samples_per_prompt": 2},
    "grpo": {
        "algorithm": "grpo",
        "samples_per_prompt": 2,
        "loss_average": "responses",
        "clip_range_high": 0.3,
        "rollout_slots": 2,
    },
}

# Model types, for tests that hold for all of them; Mistral computes the same as Llama.
MODEL_TYPES = ("llama", "qwen2", "qwen3")

# An architecture whose weights and costs are counted by hand.
COUNTED = LlamaConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=2,
)


def reward_options(**changes) -> RewardConfig:
    """Returns the reward options of the base config, with the given fields changed."""
    return dataclasses.replace(reward_config(base.get_config().reward), **changes)


def guard_options(**changes) -> GuardConfig:
    """Returns the guard options of the base config, with the given fields changed."""
    return dataclasses.replace(guard_config(base.get_config().guards), **changes)


REWARD = reward_options(
    penalize_features=(3, 5), tau_values=(0.1, 0.2), alpha_values=(0.2, 0.1), beta=0.05
)


def scale_matrices(module: nnx.Module, factor: float = 10.0) -> nnx.Module:
    """Scales the matrices of a fresh model up, so that attention and logits are not flat.

    Biases and the norms of heads are changed too; fresh ones have no effect.
    """
    for path, value in nnx.to_flat_state(nnx.state(module)):
        if {"bias", "q_norm", "k_norm"} & set(path):
            wave = jnp.cos(jnp.arange(value[...].size)).reshape(value[...].shape)
            value[...] = value[...] + (0.5 * wave).astype(value.dtype)
        elif value[...].ndim >= 2 and value[...].shape[-2] > 3:
            value[...] = value[...] * factor
    return module
