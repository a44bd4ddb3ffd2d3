"""The compound reward: terms, human latents, and the discriminator behind the latent KL."""

from sarm_jax.rewards.compound import ScoreScale
from sarm_jax.rewards.controlled import ControlledReward, controlled_reward
from sarm_jax.rewards.density_ratio import DiscriminatorConfig
from sarm_jax.rewards.human_latents import load_human_latents
from sarm_jax.rewards.options import reward_config
from sarm_jax.rewards.reward_config import RewardConfig

__all__ = [
    "ControlledReward",
    "DiscriminatorConfig",
    "RewardConfig",
    "ScoreScale",
    "controlled_reward",
    "load_human_latents",
    "reward_config",
]
