"""Ablation: a later threshold (tau 4.0): fewer responses are penalised.

A diff from `configs/full_method.py`, which states hardware and preparation.
Command: python main.py --config=configs/ablation_tau_4.py
"""

from ml_collections import ConfigDict

from configs import full_method


def get_config() -> ConfigDict:
    """One change to the full method."""
    config = full_method.get_config()
    config.reward.tau_values = "4.0,4.0,4.0"
    return config
