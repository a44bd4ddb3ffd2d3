"""Verbosity features instead of harmful ones: does the penalty keep responses short?

A diff from `configs/full_method.py`, which states hardware and preparation.
Command: python main.py --config=configs/verbosity_control.py
"""

from ml_collections import ConfigDict

from configs import full_method


def get_config() -> ConfigDict:
    """One change to the full method."""
    config = full_method.get_config()
    features = "29733,53553,3402"
    config.reward.penalize_features = features
    config.reward.latent_indices = features
    return config
