"""From the config's sections to validated options."""

from collections.abc import Mapping
from typing import Any

from ppo.config import PPOConfig
from ppo.density_ratio import DiscriminatorConfig
from ppo.reward import RewardConfig
from ppo.tracking.checkpoint import CheckpointConfig
from ppo.tracking.guards import GuardConfig
from ppo.train import TrainConfig
from sarm_jax.features.feature_lists import parse_bounds, parse_features, parse_values
from sarm_jax.models.lora import LoRAConfig

PARSERS = {
    "penalize_features": parse_features,
    "tau_values": parse_values,
    "alpha_values": parse_values,
    "clamp_features": parse_features,
    "clamp_set_values": parse_bounds,
    "clamp_min_values": parse_bounds,
    "clamp_max_values": parse_bounds,
    "latent_indices": parse_features,
}


def train_config(config: Mapping[str, Any]) -> TrainConfig:
    """The options of the train stage; raises InputError for the first that cannot be."""
    return TrainConfig(
        ppo=PPOConfig(**config["ppo"]),
        lora=lora_config(config["lora"]),
        reward=reward_config(config["reward"]),
        discriminator=DiscriminatorConfig(**config["discriminator"]),
        guards=guard_config(config["guards"]),
        checkpoint=CheckpointConfig(**config["checkpoint"]),
        experiment_name=config["experiment_name"],
    )


def guard_config(section: Mapping[str, Any]) -> GuardConfig:
    """The guards section; the names in `stop` are comma-separated."""
    return GuardConfig(**{**section, "stop": split_names(section["stop"])})


def lora_config(section: Mapping[str, Any]) -> LoRAConfig:
    """The lora section; target modules are comma-separated."""
    return LoRAConfig(**{**section, "target_modules": split_names(section["target_modules"])})


def split_names(text: str) -> tuple[str, ...]:
    """Comma-separated names; none from an empty string."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def reward_config(section: Mapping[str, Any]) -> RewardConfig:
    """The reward section with its lists parsed, files behind "@" read."""
    options: dict[str, Any] = {name: parse(name, section[name]) for name, parse in PARSERS.items()}
    plain = {name: section[name] for name in ("beta", "unit", "penalty_cap")}
    return RewardConfig(**plain, **options)
