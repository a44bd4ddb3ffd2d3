"""The reward model alone: no penalty and no latent KL, for comparison with the other runs.

Source: the baseline of the reference implementation, nikhilk7153/cpsc4710, run_experiments.sh.
Before: as for `configs/full_method.py`.
Command: python main.py --config=configs/baseline.py
Hardware and time: as for `configs/full_method.py`.
Expected result: not run with the real models; docs/results/reference.md has a stand-in. Without
        controls the penalised features of the other runs stay free to grow.
"""

from ml_collections import ConfigDict

from configs import full_method


def get_config() -> ConfigDict:
    """Returns the full method without penalties and without the latent KL."""
    config = full_method.get_config()
    config.reward.penalize_features = ""
    config.reward.tau_values = ""
    config.reward.alpha_values = ""
    config.reward.beta = 0.0
    return config
