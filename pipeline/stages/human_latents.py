"""The human side of the latent KL."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from conversion.load import read_sarm_config
from pipeline.shared import DEMO, required, reward_model
from ppo.human_latents import collect_human_latents, save_human_latents
from ppo.options import reward_config
from ppo.reward import RewardConfig
from sarm_jax.io.jsonl import read_jsonl

LOG = logging.getLogger(__name__)


def options(config: ConfigDict) -> RewardConfig:
    """The section reward, which says whose latents are wanted."""
    required(config, "human_latents.demos_jsonl", "sarm_model")
    return reward_config(config.reward)


def run(config: ConfigDict, workdir: Path) -> None:
    """Human demonstrations → the buffer of latents that the discriminator compares with."""
    reward = options(config)
    demos = read_jsonl(config.human_latents.demos_jsonl, DEMO)
    reward.check_features(read_sarm_config(config.sarm_model).sae.latent_size)
    path = workdir / "human_latents.safetensors"
    LOG.info("latents of %d demonstrations, for %s", len(demos), path)
    human = collect_human_latents(reward_model(config), demos, reward.latent_indices)
    save_human_latents(path, human)
    LOG.info("latents %s in %s", human.z_ns.shape, path)
