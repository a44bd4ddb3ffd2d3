"""Validates the sections of a config that PPO reads.

Every field of a section reaches its dataclass, so a field that none of them has is an error.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ppo.config import PPOConfig
from ppo.tracking.checkpoint import CheckpointConfig
from ppo.tracking.guards import GuardConfig
from ppo.tracking.trackers.start import TrackConfig
from ppo.train import TrainConfig
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.rewards.density_ratio import DiscriminatorConfig
from sarm_jax.rewards.options import reward_config


def train_config(config: Mapping[str, Any]) -> TrainConfig:
    """Validates the options of the stage `train`; raises InputError for the first invalid one."""
    return TrainConfig(
        ppo=PPOConfig(**config["ppo"]),
        lora=lora_config(config["lora"]),
        reward=reward_config(config["reward"]),
        discriminator=DiscriminatorConfig(**config["discriminator"]),
        guards=guard_config(config["guards"]),
        checkpoint=CheckpointConfig(**config["checkpoint"]),
        tracking=track_config(config),
        experiment_name=config["experiment_name"],
    )


def lora_config(section: Mapping[str, Any]) -> LoRAConfig:
    """Validates the section `lora`, whose target modules are comma-separated."""
    return LoRAConfig(**{**section, "target_modules": split_names(section["target_modules"])})


def guard_config(section: Mapping[str, Any]) -> GuardConfig:
    """Validates the section `guards`, in which `stop` holds comma-separated names."""
    return GuardConfig(**{**section, "stop": split_names(section["stop"])})


def track_config(config: Mapping[str, Any]) -> TrackConfig:
    """Validates `track`, in which trackers are comma-separated, and `track_project`."""
    options = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return TrackConfig(split_names(config["track"]), config["track_project"], options)


def split_names(text: str) -> tuple[str, ...]:
    """Splits comma-separated names; an empty string holds none."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
