"""Ablations of the penalty: each variant changes one number of `configs/full_method.py`.

Source: the ablations of the reference implementation, nikhilk7153/cpsc4710, run_experiments.sh.
Before: as for `configs/full_method.py`.
Command: python main.py --config=configs/ablations.py:tau_2, or another variant of `VARIANTS`.
Hardware and time: as for `configs/full_method.py`.
Expected result: not run with the real models. A larger alpha, or a smaller tau, should reduce how
        often the penalised features are active, at some cost in reward-model score. The results on
        a stand-in are in docs/results/reference.md.
"""

from ml_collections import ConfigDict

from configs import full_method

# Variant → the option of `reward` that it changes, and the value for each penalised feature.
VARIANTS = {
    "alpha_005": ("alpha_values", "0.05"),  # half the penalty: one standard deviation of the score
    "alpha_02": ("alpha_values", "0.2"),  # twice the penalty: four standard deviations
    "tau_2": ("tau_values", "2.0"),  # a lower threshold: more responses are penalised
    "tau_4": ("tau_values", "4.0"),  # a higher threshold: fewer responses are penalised
}


def get_config(variant: str = "") -> ConfigDict:
    """Returns the full method with the change of one variant.

    Raises:
        ValueError: `variant` is missing or is not a name in `VARIANTS`.
    """
    if variant not in VARIANTS:
        problem = f"no variant is called {variant!r}" if variant else "the variant is missing"
        raise ValueError(
            f"{problem}: expected --config=configs/ablations.py:NAME with NAME one of "
            f"{', '.join(VARIANTS)}"
        )
    config = full_method.get_config()
    option, value = VARIANTS[variant]
    config.reward[option] = ",".join([value] * 3)
    return config
