"""A SARM from preference pairs."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from configs.shared import read_pairs, required, split_paths, write_json
from conversion import load_policy
from conversion.checkpoint import open_checkpoint
from conversion.load import read_policy_config
from conversion.to_hf import save_sarm
from sarm_jax.errors import InputError
from sarm_jax.jsonl import write_jsonl
from sarm_jax.training import TrainSARMConfig, train_sarm

LOG = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Preference pairs → a SARM on the first layers of the policy model, in the HF layout."""
    required(config, "train_sarm.pairs_jsonl")
    paths = split_paths(config.train_sarm.pairs_jsonl)
    section = config.train_sarm.to_dict() | {"pairs_jsonl": paths}
    model = section.pop("model") or config.policy_model
    if not model:
        required(config, "policy_model")
    options = TrainSARMConfig(**section)
    pairs = read_pairs(paths, unequal=True)
    options.held_out(pairs)
    options.check_layers(read_policy_config(model).num_hidden_layers)
    if (workdir / "sarm").exists():
        raise InputError(f"{workdir / 'sarm'} exists already: delete it to train again")
    LOG.info("training a SARM on %d pairs, for %s", len(pairs), workdir / "sarm")
    policy, tokenizer = load_policy(model, config.dtype)
    rows: list[dict] = []
    sarm, summary = train_sarm(options, policy, tokenizer, pairs, rows.append)
    hf_config = open_checkpoint(model, "policy").hf_config
    write_json(workdir / "sarm_summary.json", summary)
    write_jsonl(workdir / "sarm_metrics.jsonl", rows)
    # Last, because --stage=all takes it for the end of the stage.
    save_sarm(workdir / "sarm", sarm, tokenizer, hf_config)
    accuracy, interval = summary["accuracy_held_out"], summary["accuracy_held_out_95"]
    LOG.info("held-out accuracy %.3f (95 %% %.3f to %.3f)", accuracy, *interval)
    LOG.info("SARM in %s, numbers in %s", workdir / "sarm", workdir / "sarm_summary.json")
