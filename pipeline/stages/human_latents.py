"""Collect what the latent KL and the distance penalty compare the policy with."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from pipeline.inputs import Input, Kind
from pipeline.models import check_conversations, check_reward_model, load_reward_model
from pipeline.options import required
from pipeline.provenance import check_same_everywhere
from pipeline.stage import Stage
from sarm_jax.io.errors import InputError
from sarm_jax.models.conversation_rows import read_demonstrations
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.sarm import SARMConfig
from sarm_jax.parallel import processes
from sarm_jax.rewards.human_latents import (
    LATENTS_FILE,
    collect_human_latents,
    collect_with_states,
    save_human_latents,
)
from sarm_jax.rewards.human_states import STATES_FILE, fit_human_states, save_human_states
from sarm_jax.rewards.options import reward_config
from sarm_jax.rewards.reward_config import RewardConfig

LOG = logging.getLogger(__name__)
FEWEST = 3  # demonstrations that a shrunk covariance needs


def validate(config: ConfigDict) -> RewardConfig:
    """Validates the section reward, which names the features whose latents are collected."""
    required(config, "human_latents.demos_jsonl", "sarm_model")
    return reward_config(config.reward)


def needs_features(config: ConfigDict) -> bool:
    """Returns whether the reward model must have an SAE."""
    reward = reward_config(config.reward)
    return not config.human_latents.states or reward.reads_features or bool(reward.latent_indices)


def check_architectures(config: ConfigDict) -> SARMConfig | LinearRewardConfig:
    """Checks that the reward model has the features; returns its architecture."""
    architecture = check_reward_model(config, needs_features(config))
    if needs_features(config):
        reward_config(config.reward).check_features(architecture.latent_size)
    return architecture


def run(config: ConfigDict, workdir: Path) -> None:
    """Score human demonstrations and save the latents that the discriminator compares with.

    With `human_latents.states`, mean and covariance of the pooled states are saved as well. A
    reward model without an SAE has these alone.
    """
    reward, states = validate(config), config.human_latents.states
    demonstrations = read_demonstrations(config.human_latents.demos_jsonl)
    if states and len(demonstrations) < FEWEST:
        raise InputError(
            f"human_latents.demos_jsonl={config.human_latents.demos_jsonl}: has "
            f"{len(demonstrations)} demonstrations: human_latents.states=True needs at least "
            f"{FEWEST}"
        )
    has_features = check_architectures(config).latent_size > 0
    prompts = [row["prompt"] for row in demonstrations]
    check_conversations(config.sarm_model, {config.human_latents.demos_jsonl: prompts})
    path = workdir / LATENTS_FILE
    targets = [path] * has_features + [workdir / STATES_FILE] * states
    LOG.info(
        "reading %d demonstrations, for %s",
        len(demonstrations), " and ".join(map(str, targets)),
    )  # fmt: skip
    check_same_everywhere(STAGE, config, workdir)
    model = load_reward_model(config, needs_features(config))
    if states:
        human, x_nd = collect_with_states(model, demonstrations, reward.latent_indices)
        source = f"human_latents.demos_jsonl={config.human_latents.demos_jsonl}"
        fitted = fit_human_states(x_nd, source)
    else:
        human = collect_human_latents(model, demonstrations, reward.latent_indices)

    def write() -> None:
        if human is not None:
            save_human_latents(path, human)
            LOG.info("latents %s in %s", human.z_ns.shape, path)
        if states:
            save_human_states(workdir / STATES_FILE, fitted)
            LOG.info("mean and covariance of the states in %s", workdir / STATES_FILE)

    processes.on_primary(write)


STAGE = Stage(
    name="human_latents",
    summary="Human demonstrations → the latents that the discriminator compares the policy's with.",
    validate=validate,
    run=run,
    check_architectures=check_architectures,
    options=(
        "human_latents",
        "reward.latent_indices",
        "sarm_model",
        "sarm_max_length",
        "dtype",
    ),
    inputs=(
        Input("human_latents.demos_jsonl", Kind.ROWS),
        Input("reward.latent_indices", Kind.LIST),
        Input("sarm_model", Kind.SCORER),
    ),
    output=lambda config: STATES_FILE if config.human_latents.states else LATENTS_FILE,
    makes=(LATENTS_FILE, STATES_FILE),
    after=("identify",),
    processes="all",
    wanted=lambda config: bool(config.human_latents.demos_jsonl),
)
