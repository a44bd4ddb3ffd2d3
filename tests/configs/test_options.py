"""Defaults of dataclasses, if there are any, agree with `configs/base.py`."""

import dataclasses

import pytest

from configs import base
from pipeline.reference_flags import SHORTHANDS
from ppo.comparison.responses import ResponseConfig
from sarm_jax.features.certificates import CertificateConfig
from sarm_jax.features.identify import IdentifyConfig
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.parallel.sharding import MeshConfig

SECTIONS = [
    (ResponseConfig, "evaluate"),
    (CertificateConfig, "probe"),
    (IdentifyConfig, "identify"),
    (LoRAConfig, "lora"),
    (MeshConfig, "mesh"),
]


@pytest.mark.parametrize("kind, section", SECTIONS)
def test_defaults_are_those_of_base(kind, section):
    options = base.get_config()[section]
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING:
            continue
        value = options[field.name]
        if isinstance(field.default, tuple):  # comma-separated in a config
            value = tuple(name for name in value.split(",") if name)
        assert field.default == value, field.name


ALIASES = {
    "human_latents": "reward.human_latents",
    "disc_lr": "discriminator.learning_rate",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
}


def test_reference_flags_name_fields_of_the_same_name():
    config = base.get_config()
    for flag, (_, field) in SHORTHANDS.items():
        assert field == ALIASES.get(flag, field) and (
            flag in ALIASES or field.split(".")[-1] == flag
        )
        value = config
        for part in field.split("."):
            value = value[part]
