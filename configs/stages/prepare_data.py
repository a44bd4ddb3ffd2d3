"""Preference pairs, the benchmarks' files, or the lab's world: what the later stages read."""

import dataclasses
import logging
import shutil
from pathlib import Path

from ml_collections import ConfigDict

from configs.shared import DEMO, required, split_paths, write_json
from conversion import load_policy
from conversion.hub import locate_file
from conversion.to_hf import save_policy
from sarm_jax.errors import InputError
from sarm_jax.evaluation.benchmark_data import (
    OUTPUTS,
    BenchmarkDataConfig,
    collect,
    counts_table,
)
from sarm_jax.jsonl import read_jsonl, write_jsonl
from sarm_jax.lab.build import LabConfig, make_data, make_models
from sarm_jax.preference_pairs import PairsConfig, make_pairs

LOG = logging.getLogger(__name__)
SHOWN_REFUSALS = 5  # per file, of all that are in data_summary.json


def run(config: ConfigDict, workdir: Path) -> None:
    """What the later stages read: preference pairs, or the whole of the lab's world."""
    section = config.prepare_data.to_dict()
    source = section["source"]
    if source == "lab":
        prepare_lab(config, workdir)
    elif source == "demonstrations":
        names = [field.name for field in dataclasses.fields(PairsConfig)]
        prepare_pairs(PairsConfig(**{name: section[name] for name in names}), config, workdir)
    elif source == "benchmarks":
        prepare_benchmarks(config, workdir)
    else:
        raise InputError(
            f"prepare_data.source={source!r}: expected demonstrations, lab or benchmarks"
        )


def prepare_pairs(options: PairsConfig, config: ConfigDict, workdir: Path) -> None:
    """Demonstrations → preference pairs, rejected answers being made from good ones."""
    required(config, "prepare_data.demos_jsonl", "policy_model")
    demos = read_jsonl(options.demos_jsonl, DEMO)
    options.check(demos)
    LOG.info("pairs from %d demonstrations, for %s", len(demos), workdir / "data" / "pairs.jsonl")
    policy, tokenizer = load_policy(config.policy_model, config.dtype)
    pairs = make_pairs(options, policy, tokenizer, demos)
    write_jsonl(workdir / "data" / "pairs.jsonl", pairs)
    LOG.info("%d pairs in %s", len(pairs), workdir / "data" / "pairs.jsonl")


def prepare_lab(config: ConfigDict, workdir: Path) -> None:
    """A seed → the lab's data, its pretrained model and its policy, in the HF layout."""
    options = lab_config(config)
    if (workdir / "policy").exists():
        raise InputError(f"{workdir / 'policy'} exists already: delete it to train again")
    LOG.info("a world and its models, for %s", workdir)
    shutil.rmtree(workdir / "pretrained", ignore_errors=True)  # of a call that did not finish
    data = make_data(options)
    for field in dataclasses.fields(data):
        write_jsonl(workdir / "data" / f"{field.name}.jsonl", getattr(data, field.name))
    pretrained, policy, tokenizer, _ = make_models(options, data)
    save_policy(workdir / "pretrained", pretrained, tokenizer)
    save_policy(workdir / "policy", policy, tokenizer)
    LOG.info("the lab's data and models are in %s", workdir)


def prepare_benchmarks(config: ConfigDict, workdir: Path) -> None:
    """data/*.jsonl and, last, data/data_summary.json; files of an earlier call are replaced."""
    section = config.prepare_data
    options = BenchmarkDataConfig(
        steering_dir=section.steering_dir,
        rewardbench2=located(section.rewardbench2),
        rm_bench=located(section.rm_bench),
        safety_pairs=located(section.safety_pairs),
        complement_pairs=located(section.complement_pairs),
        held_out_fraction=section.held_out_fraction,
        seed=section.seed,
    )
    data = collect(options)
    folder = workdir / "data"
    (folder / "data_summary.json").unlink(missing_ok=True)
    for name in OUTPUTS:
        path = folder / f"{name}.jsonl"
        if data.outputs[name]:
            write_jsonl(path, data.outputs[name])
        else:
            path.unlink(missing_ok=True)
    write_json(folder / "data_summary.json", data.summary)
    for found in data.summary["sources"].values():
        for refusal in found["refusals"][:SHOWN_REFUSALS]:
            LOG.warning("refused: %s: %s", refusal["place"], refusal["reason"])
    print(counts_table(data.summary))
    LOG.info("data in %s, counts in %s", folder, folder / "data_summary.json")


def located(text: str) -> tuple[tuple[str, Path], ...]:
    """Comma-separated files as (name, local path)."""
    names = split_paths(text) if text else ()
    return tuple((name, locate_file(name)) for name in names)


def lab_config(config: ConfigDict) -> LabConfig:
    """The lab section's part that makes the world."""
    section = config.lab.to_dict()
    return LabConfig(**{field.name: section[field.name] for field in dataclasses.fields(LabConfig)})
