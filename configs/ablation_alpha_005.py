"""Ablation: half the penalty (alpha 0.05, one standard deviation of the score).

A diff from `configs/full_method.py`, which states hardware and preparation.
Command: python main.py --config=configs/ablation_alpha_005.py
"""

from ml_collections import ConfigDict

from configs import full_method


def get_config() -> ConfigDict:
    """One change to the full method."""
    config = full_method.get_config()
    config.reward.alpha_values = "0.05,0.05,0.05"
    return config
