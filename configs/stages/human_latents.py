"""The human side of the latent KL."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from configs.shared import DEMO, required, reward_model
from conversion.load import read_sarm_config
from ppo.human_latents import collect_human_latents, save_human_latents
from ppo.options import reward_config
from sarm_jax.jsonl import read_jsonl

LOG = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Human demonstrations → the buffer of latents that the discriminator compares with."""
    required(config, "human_latents.demos_jsonl", "sarm_model")
    demos = read_jsonl(config.human_latents.demos_jsonl, DEMO)
    reward = reward_config(config.reward)
    reward.check_features(read_sarm_config(config.sarm_model).sae.latent_size)
    path = workdir / "human_latents.safetensors"
    LOG.info("latents of %d demonstrations, for %s", len(demos), path)
    human = collect_human_latents(reward_model(config), demos, reward.latent_indices)
    save_human_latents(path, human)
    LOG.info("latents %s in %s", human.z_ns.shape, path)
