"""The policy and the SARM of a config, on their mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from conversion import load_policy, load_sarm
from conversion.load import (
    check_dtype,
    load_hf_tokenizer,
    load_scorer,
    read_policy_config,
    read_sarm_config,
    read_scorer_config,
)
from sarm_jax.io.errors import InputError
from sarm_jax.models.conversation import Prompt
from sarm_jax.models.conversation_rows import check_turns
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.llama import REMAT, Llama
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import SARMConfig
from sarm_jax.parallel.sharding import MeshConfig, Placement, make_mesh


def load_policy_model(config: ConfigDict) -> tuple[Llama, Any]:
    """Loads the policy of the config onto its mesh, and its tokenizer."""
    mesh_config(config).check_model(read_policy_config(config.policy_model))
    placed = placement(config)
    model, tokenizer = load_policy(config.policy_model, config.dtype, placed.load)
    model.placement = placed
    return model, tokenizer


def load_reward_model(config: ConfigDict, needs_features: bool = True) -> RewardModel:
    """Loads the reward model of the config onto its mesh, with the config's scoring options.

    Raises:
        InputError: the reward model has no SAE, but `needs_features`; or as `load_sarm`.
    """
    check_reward_model(config, needs_features)
    placed = placement(config)
    load = load_sarm if needs_features else load_scorer
    model = load(config.sarm_model, config.dtype, placed.load)
    positions = model.model.config.trunk.max_position_embeddings
    model.max_length = min(config.sarm_max_length, positions)
    model.batch_size = config.sarm_batch_size
    model.model.trunk.placement = placed
    return model


def check_reward_model(
    config: ConfigDict, needs_features: bool = True
) -> SARMConfig | LinearRewardConfig:
    """Reads the architecture of the reward model, and checks that the mesh can divide its trunk.

    Raises:
        InputError: the mesh cannot; or the reward model has no SAE, but `needs_features`.
    """
    read = read_sarm_config if needs_features else read_scorer_config
    architecture = read(config.sarm_model)
    mesh_config(config).check_model(architecture.trunk)
    return architecture


def lacks_features(sarm_model: str) -> bool:
    """Returns True if a reward model has no SAE; False if it cannot be read, or not yet."""
    try:
        return bool(sarm_model) and read_scorer_config(sarm_model).sae is None
    except InputError:
        return False


def check_conversations(model: str, files: Mapping[str, Sequence[Prompt]]) -> None:
    """Checks that the chat template of a model takes all conversations, without loading a weight.

    Args:
        model: a policy or a SARM.
        files: the prompts of every file, one for each row.

    Raises:
        InputError: names the file and the row whose turns the template refuses.
    """
    if all(isinstance(prompt, str) for prompts in files.values() for prompt in prompts):
        return
    tokenizer = load_hf_tokenizer(model)
    for path, prompts in files.items():
        check_turns(tokenizer, prompts, path)


def check_scoring(config: ConfigDict) -> None:
    """Raises InputError for a dtype or for scoring options that no stage can use."""
    check_dtype(config.dtype)
    for name, least in (("sarm_max_length", 2), ("sarm_batch_size", 1)):
        if config[name] < least:
            raise InputError(f"{name}={config[name]}: must be at least {least}")


def check_remat(name: str) -> None:
    """Raises InputError for a rematerialisation policy that `Llama` does not have."""
    if name not in REMAT:
        raise InputError(f"remat={name!r}: expected one of {', '.join(REMAT)}")


def mesh_config(config: ConfigDict) -> MeshConfig:
    """Returns the validated section mesh."""
    return MeshConfig(**config.mesh)


def placement(config: ConfigDict) -> Placement:
    """Returns the places of weights and batches on the mesh of the config."""
    return Placement(make_mesh(mesh_config(config)))
