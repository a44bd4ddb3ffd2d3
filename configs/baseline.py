"""The reward model alone: no penalty, no latent KL. The run that the others are compared with.

A diff from `configs/full_method.py`, which states hardware and preparation.
Command: python main.py --config=configs/baseline.py
"""

from ml_collections import ConfigDict

from configs import full_method


def get_config() -> ConfigDict:
    """One change to the full method."""
    config = full_method.get_config()
    config.reward.penalize_features = ""
    config.reward.tau_values = ""
    config.reward.alpha_values = ""
    config.reward.beta = 0.0
    return config
