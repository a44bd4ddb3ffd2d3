"""Which reward model a plan is made for; nothing is compiled."""

import math

import jax
import pytest
from flax import nnx

from configs import base, full_method
from pipeline.stages.plan import make_planner, reward_architecture
from sarm_jax.io.errors import InputError
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.sarm import SARMConfig

SHAPES = "configs/architectures"
# Parameters of the published classifiers, in billions: of Llama-3.2-3B, whose embedding is counted
# once, and of Llama-3.1-8B without its output head.
CLASSIFIERS = {"skywork_reward_v2_llama_3_2_3b": 3.21, "skywork_reward_v2_llama_3_1_8b": 7.50}


def config_of(name, **train_sae):
    config = full_method.get_config()
    config.plan.sarm_config = f"{SHAPES}/{name}"
    config.train_sae.update({"latent_size": 65536, "k": 192} | train_sae)
    return config


@pytest.mark.parametrize("policy", ["qwen3_4b", "llama_3_1_8b_instruct"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_without_an_sae_is_planned_with_one(name, policy):
    config = config_of(name)
    config.plan.policy_config = f"{SHAPES}/{policy}"
    planner = make_planner(config)
    state = nnx.state(planner.sarm())
    sizes = {
        path[0]: 0 for path, _ in nnx.to_flat_state(state)
    }  # parameters of each part of the model
    for path, variable in nnx.to_flat_state(state):
        sizes[path[0]] += math.prod(variable.shape)
    assert round(sizes["trunk"] / 1e9, 2) == CLASSIFIERS[name]
    width = sizes["score"]
    assert sizes["sae"] == 2 * 65536 * width + 65536 + width
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("changes", "has_sae"),
    [
        ({}, False),
        ({"length_penalty": 0.1}, False),
        ({"probe_penalty": 0.1, "probe": "probe.safetensors"}, False),
        ({"latent_indices": "3"}, True),
        ({"clamp_features": "3", "clamp_max_values": "1"}, True),
        ({"penalize_features": "3", "tau_values": "1", "alpha_values": "1"}, True),
    ],
)
def test_a_classifier_gets_an_sae_only_if_the_reward_reads_features(changes, has_sae):
    config = config_of("skywork_reward_v2_llama_3_2_3b")
    config.plan.policy_config = f"{SHAPES}/qwen3_4b"
    config.reward.update(base.get_config().reward.to_dict() | changes)
    planner = make_planner(config)
    assert (planner.sarm().sae is not None) == has_sae
    assert planner.watched == (1 if has_sae and "clamp_features" not in changes else 0)


def test_a_sarm_is_planned_as_it_is():
    assert isinstance(reward_architecture(full_method.get_config()), SARMConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 65537}, "train_sae.k=65537: must be at most train_sae.latent_size=65536"),
        ({"latent_size": 0}, "train_sae.latent_size=0: must be at least 1"),
        ({"latent_size": 40000}, "48659"),
    ],
)
def test_an_sae_that_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_planner(config_of("skywork_reward_v2_llama_3_2_3b", **changes))


def test_the_activation_of_the_sae_is_that_of_train_sae():
    config = config_of("skywork_reward_v2_llama_3_2_3b", activation="topk_relu")
    reward = reward_architecture(config)
    assert isinstance(reward, LinearRewardConfig) and reward.sae.activation == "topk_relu"
