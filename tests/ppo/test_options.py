"""Every field of the sections that PPO reads has an effect, and an unknown field is an error."""

import dataclasses

import pytest

from configs import base
from ppo.comparison.responses import ResponseConfig
from ppo.config import PPOConfig
from ppo.options import split_names, train_config
from ppo.tracking.checkpoint import CheckpointConfig
from ppo.tracking.guards import GuardConfig
from ppo.tracking.profiling import ProfileConfig
from sarm_jax.features.certificates import CertificateConfig
from sarm_jax.features.identify import IdentifyConfig
from sarm_jax.io.errors import InputError
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.parallel.sharding import MeshConfig
from sarm_jax.rewards.density_ratio import DiscriminatorConfig
from sarm_jax.rewards.options import PARSERS
from sarm_jax.rewards.reward_config import RewardConfig

SECTIONS = {
    "ppo": PPOConfig,
    "lora": LoRAConfig,
    "reward": RewardConfig,
    "discriminator": DiscriminatorConfig,
    "guards": GuardConfig,
    "checkpoint": CheckpointConfig,
}
# Fields that are not in the dataclass of their section, because a stage reads them itself.
READ_BY_STAGES = {"reward": {"human_latents"}}


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [1, 1.0, "", True])
def test_a_field_that_nothing_reads_is_an_error(section, value):
    config = base.get_config()
    with config.unlocked():
        config[section].new_option = value
    with pytest.raises((TypeError, InputError), match="new_option"):
        train_config(config)


@pytest.mark.parametrize(("section", "kind"), [*SECTIONS.items(), ("profile", ProfileConfig)])
def test_every_field_of_the_base_config_reaches_a_dataclass(section, kind):
    fields = {field.name for field in dataclasses.fields(kind)}
    assert {*base.get_config()[section]} == fields | READ_BY_STAGES.get(section, set())


DEFAULTS = SECTIONS | {
    "identify": IdentifyConfig,
    "probe": CertificateConfig,
    "mesh": MeshConfig,
    "evaluate": ResponseConfig,
}


@pytest.mark.parametrize("section", DEFAULTS)
def test_defaults_in_python_are_those_of_the_base_config(section):
    """A dataclass may repeat a default of `configs/base.py`, for callers in Python."""
    options = base.get_config()[section]
    parsers = {"target_modules": split_names, "stop": split_names}
    for field in dataclasses.fields(DEFAULTS[section]):
        if field.default is dataclasses.MISSING:
            continue
        expected = options[field.name]
        if field.name in PARSERS:
            expected = PARSERS[field.name](field.name, expected)
        elif field.name in parsers:
            expected = parsers[field.name](expected)
        assert field.default == expected, field.name


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("ppo.top_p", 0.9, "ppo.top_p=0.9: PPO compares"),
        ("ppo.seed", -1, "ppo.seed=-1: must lie in"),
        ("ppo.num_minibatches", 3, "ppo.batch_size=8 is not divisible by ppo.num_minibatches × "),
        ("reward.tau_values", "1,x", "reward.tau_values: found 'x'"),
        ("reward.penalize_features", "1,1", "reward.tau_values has 0 values for 2 reward.penal"),
        ("reward.clamp_set_values", "0", r"reward.clamp_features=\(none\) with reward.clamp_set_v"),
        ("discriminator.learning_rate", 0.0, "discriminator.learning_rate=0.0: must be positive"),
        ("lora.rank", 0, "lora.rank=0"),
        ("guards.steps", 0, "guards.steps=0"),
        ("checkpoint.keep_every", -1, "checkpoint.keep_every=-1"),
    ],
)
def test_errors_name_the_option_in_full(field, text, message):
    config = base.get_config()
    section, name = field.split(".")
    config[section][name] = text
    with pytest.raises(InputError, match=f"^{message}"):
        train_config(config)
