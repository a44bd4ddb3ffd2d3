"""Parses the options of the compound reward, the section `reward` of a config."""

from collections.abc import Mapping
from typing import Any

from sarm_jax.features.feature_lists import parse_bounds, parse_features, parse_values
from sarm_jax.rewards.reward_config import RewardConfig

# Fields that are lists, written as strings.
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


def reward_config(section: Mapping[str, Any]) -> RewardConfig:
    """Parses and validates the options, and reads the files that "@" names in its lists.

    Args:
        section: fields of the section `reward`, such as those in a run's config.json; a field that
            is missing has its default. `human_latents`, a path, is left to who reads the file.

    Raises:
        InputError: an option is invalid; the message names it in full.
    """
    options: dict[str, Any] = {
        name: PARSERS[name](f"reward.{name}", value) if name in PARSERS else value
        for name, value in section.items()
        if name != "human_latents"
    }
    return RewardConfig(**options)
