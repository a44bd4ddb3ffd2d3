"""A SARM from preference pairs."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from conversion import load_policy
from conversion.checkpoint import open_checkpoint
from conversion.load import read_policy_config
from conversion.to_hf import save_sarm
from pipeline.shared import (
    check_remat,
    mesh_config,
    read_pairs,
    required,
    split_paths,
    write_json,
)
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.parallel.sharding import MeshConfig
from sarm_jax.training.train_sarm import TrainSARMConfig, train_sarm

LOG = logging.getLogger(__name__)


def options(config: ConfigDict) -> TrainSARMConfig:
    """The section train_sarm, but for the model."""
    required(config, "train_sarm.pairs_jsonl")
    section = config.train_sarm.to_dict()
    section["pairs_jsonl"] = split_paths(section["pairs_jsonl"])
    if not section.pop("model"):
        required(config, "policy_model")
    check_remat(config.remat)
    mesh_config(config)
    return TrainSARMConfig(**section)


def run(config: ConfigDict, workdir: Path) -> None:
    """Preference pairs → a SARM on the first layers of the policy model, in the HF layout."""
    asked, model = options(config), config.train_sarm.model or config.policy_model
    pairs = read_pairs(asked.pairs_jsonl, unequal=True)
    asked.held_out(pairs)
    asked.check_layers(read_policy_config(model).num_hidden_layers)
    if (workdir / "sarm").exists():
        raise InputError(f"{workdir / 'sarm'} exists already: delete it to train again")
    LOG.info("training a SARM on %d pairs, for %s", len(pairs), workdir / "sarm")
    if (mesh := mesh_config(config)) != MeshConfig():
        LOG.info("train_sarm runs on one device: %s is for the other stages", mesh)
    if asked.dead_after_steps >= asked.sae_steps:
        LOG.warning(
            "train_sarm.dead_after_steps=%d: no latent counts as dead in sae_steps=%d, and aux_k=%d"
            " brings none back",
            asked.dead_after_steps, asked.sae_steps, asked.aux_k,
        )  # fmt: skip
    policy, tokenizer = load_policy(model, config.dtype)
    policy.remat = config.remat
    rows: list[dict] = []
    sarm, summary = train_sarm(asked, policy, tokenizer, pairs, rows.append)
    hf_config = open_checkpoint(model, "policy").hf_config
    write_json(workdir / "sarm_summary.json", summary)
    write_jsonl(workdir / "sarm_metrics.jsonl", rows)
    # Last, because --stage=all takes it for the end of the stage.
    save_sarm(workdir / "sarm", sarm, tokenizer, hf_config)
    accuracy, interval = summary["accuracy_held_out"], summary["accuracy_held_out_95"]
    LOG.info("held-out accuracy %.3f (95 %% %.3f to %.3f)", accuracy, *interval)
    LOG.info("SARM in %s, numbers in %s", workdir / "sarm", workdir / "sarm_summary.json")
