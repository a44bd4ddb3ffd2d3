"""The experiments of the 8B models are valid, and the ablations differ in one number."""

import importlib

import pytest

from configs import ablations
from ppo.options import train_config

THREE = 3  # penalised features of the full method
EXPERIMENTS = {  # config → (alpha, tau) of each penalised feature
    "baseline": ((), ()),
    "full_method": ((0.1,) * THREE, (3.0,) * THREE),
    "verbosity_control": ((0.1,) * THREE, (3.0,) * THREE),
    "ablations:alpha_005": ((0.05,) * THREE, (3.0,) * THREE),
    "ablations:alpha_02": ((0.2,) * THREE, (3.0,) * THREE),
    "ablations:tau_2": ((0.1,) * THREE, (2.0,) * THREE),
    "ablations:tau_4": ((0.1,) * THREE, (4.0,) * THREE),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid(name):
    module, _, variant = name.partition(":")
    get_config = importlib.import_module(f"configs.{module}").get_config
    config = get_config(variant) if variant else get_config()
    options = train_config(config)
    assert config.policy_model == "meta-llama/Llama-3.1-8B-Instruct"
    assert options.ppo.batch_size == 8 and options.ppo.total_steps == 100
    options.reward.check_features(65536)
    assert (options.reward.alpha_values, options.reward.tau_values) == EXPERIMENTS[name]


def test_every_variant_of_the_ablations_is_tested():
    assert {f"ablations:{name}" for name in ablations.VARIANTS} <= set(EXPERIMENTS)


@pytest.mark.parametrize(
    ("variant", "problem"), [("", "the variant is missing"), ("tau_3", "no variant is called")]
)
def test_a_missing_or_unknown_variant_is_refused_with_a_list(variant, problem):
    with pytest.raises(ValueError, match=f"{problem}.*alpha_005, alpha_02, tau_2, tau_4"):
        ablations.get_config(variant)
