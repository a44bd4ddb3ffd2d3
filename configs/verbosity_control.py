"""The full method with features of verbosity in place of harmful ones: do responses stay short?

Source: verbosity control of the reference implementation, nikhilk7153/cpsc4710.
Before: as for `configs/full_method.py`.
Command: python main.py --config=configs/verbosity_control.py
Hardware and time: as for `configs/full_method.py`.
Expected result: not run with the real models. `configs/verbosity_smollm2.py` asks the same question
        on a model that two CPU cores can train.
"""

from ml_collections import ConfigDict

from configs import full_method


def get_config() -> ConfigDict:
    """Returns the full method with other features."""
    config = full_method.get_config()
    features = "29733,53553,3402"
    config.reward.penalize_features = features
    config.reward.latent_indices = features
    return config
