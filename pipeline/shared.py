"""What several stages use: the two models on their mesh, preference pairs, paths, JSON files."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from conversion import load_policy, load_sarm
from conversion.load import check_dtype, read_policy_config, read_sarm_config
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing
from sarm_jax.io.jsonl import line_of, read_jsonl
from sarm_jax.models.llama import REMAT, Llama
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel.sharding import MeshConfig, Placement, make_mesh

DEMO = {"prompt": str, "response": str}
PAIR = {"prompt": str, "chosen": str, "rejected": str}


def policy_model(config: ConfigDict) -> tuple[Llama, Any]:
    """The policy of the config on the mesh, and its tokenizer."""
    mesh_config(config).check_model(read_policy_config(config.policy_model))
    placed = placement(config)
    model, tokenizer = load_policy(config.policy_model, config.dtype, placed.load)
    model.placement = placed
    return model, tokenizer


def reward_model(config: ConfigDict) -> RewardModel:
    """The SARM of the config on the mesh, with its scoring options."""
    mesh_config(config).check_model(read_sarm_config(config.sarm_model).trunk)
    placed = placement(config)
    model = load_sarm(config.sarm_model, config.dtype, placed.load)
    positions = model.model.config.trunk.max_position_embeddings
    model.max_length = min(config.sarm_max_length, positions)
    model.batch_size = config.sarm_batch_size
    model.model.trunk.placement = placed
    return model


def check_scoring(config: ConfigDict) -> None:
    """Raises InputError for a dtype or scoring options that no stage can use."""
    check_dtype(config.dtype)
    for name, least in (("sarm_max_length", 2), ("sarm_batch_size", 1)):
        if config[name] < least:
            raise InputError(f"{name}={config[name]}: must be at least {least}")


def check_remat(name: str) -> None:
    """Raises InputError for what `Llama` does not know."""
    if name not in REMAT:
        raise InputError(f"remat={name!r}: expected one of {', '.join(REMAT)}")


def required(config: ConfigDict, *fields: str) -> None:
    """Raises InputError for the first of these fields, such as "reward.beta", that is empty."""
    for field in fields:
        value = config
        for name in field.split("."):
            value = value[name]
        if not value:
            raise InputError(f"{field} is empty: name it with --config.{field}=…")


def mesh_config(config: ConfigDict) -> MeshConfig:
    """The mesh section."""
    return MeshConfig(**config.mesh)


def placement(config: ConfigDict) -> Placement:
    """Where weights and batches go."""
    return Placement(make_mesh(mesh_config(config)))


def read_pairs(paths: tuple[str, ...], unequal: bool = False) -> list[dict]:
    """The preference pairs of JSONL files, one after the other.

    InputError for a source that is no text and, if they have to be `unequal`, a pair of equals.
    """
    pairs = []
    for path in paths:
        for number, row in enumerate(read_jsonl(path, PAIR), 1):
            if not isinstance(row.get("source", ""), str):
                raise InputError(f"{path}:{line_of(path, number)}: field 'source' must be str")
            if unequal and row["chosen"] == row["rejected"]:
                place = f"{path}:{line_of(path, number)}"
                raise InputError(f"{place}: fields 'chosen' and 'rejected' are the same")
            pairs.append(row)
    return pairs


def split_paths(text: str) -> tuple[str, ...]:
    """Comma-separated paths; InputError for an empty one."""
    paths = tuple(path.strip() for path in text.split(","))
    if not all(paths):
        raise InputError(f"found {text!r}, expected file names with commas between them")
    return paths


def given(text: str) -> tuple[str, ...]:
    """The files of a field that may be empty."""
    return split_paths(text) if text else ()


def plain(value):
    """A config section as JSON-ready values."""
    return value.to_dict() if isinstance(value, ConfigDict) else value


def write_json(path: Path, content: dict) -> None:
    """Indented JSON, written atomically."""
    with replacing(path) as file:
        json.dump(content, file, indent=2)
