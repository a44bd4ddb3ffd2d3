"""Ablation: an earlier threshold (tau 2.0): more responses are penalised.

A diff from `configs/full_method.py`, which states hardware and preparation.
Command: python main.py --config=configs/ablation_tau_2.py
"""

from ml_collections import ConfigDict

from configs import full_method


def get_config() -> ConfigDict:
    """One change to the full method."""
    config = full_method.get_config()
    config.reward.tau_values = "2.0,2.0,2.0"
    return config
