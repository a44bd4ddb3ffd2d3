"""Preference pairs, the benchmarks' files, or the lab's world: what the later stages read."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from conversion.hub import locate_file
from conversion.to_hf import save_policy
from pipeline.shared import DEMO, given, policy_model, required, write_json
from sarm_jax.evaluation.benchmark_data import (
    OUTPUTS,
    BenchmarkDataConfig,
    collect,
    counts_table,
)
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import read_jsonl, write_jsonl
from sarm_jax.lab.build import LabConfig, make_data, make_models
from sarm_jax.training.preference_pairs import PairsConfig, make_pairs

LOG = logging.getLogger(__name__)
Options = TypeVar("Options", PairsConfig, LabConfig)
FILES = ("rewardbench2", "rm_bench", "safety_pairs", "complement_pairs")
SHOWN_REFUSALS = 5  # per file, of all that are in data_summary.json


def options(config: ConfigDict) -> PairsConfig | BenchmarkDataConfig | LabConfig:
    """The section prepare_data, or lab; benchmark files under the names they were given."""
    section, source = config.prepare_data, config.prepare_data.source
    if source == "lab":
        return from_section(LabConfig, config.lab)
    if source == "demonstrations":
        found = from_section(PairsConfig, section)
        required(config, "prepare_data.demos_jsonl", "policy_model")
        return found
    if source == "benchmarks":
        fields: dict[str, Any] = {
            name: tuple((f, Path(f)) for f in given(section[name])) for name in FILES
        }
        fields |= {name: section[name] for name in ("steering_dir", "held_out_fraction", "seed")}
        return BenchmarkDataConfig(**fields)
    raise InputError(f"prepare_data.source={source!r}: expected demonstrations, lab or benchmarks")


def run(config: ConfigDict, workdir: Path) -> None:
    """What the later stages read: preference pairs, or the whole of the lab's world."""
    asked = options(config)
    if isinstance(asked, LabConfig):
        prepare_lab(asked, workdir)
    elif isinstance(asked, PairsConfig):
        prepare_pairs(asked, config, workdir)
    else:
        prepare_benchmarks(asked, workdir)


def from_section(kind: type[Options], section: ConfigDict) -> Options:
    """A dataclass of options from the fields of its names."""
    return kind(**{field.name: section[field.name] for field in dataclasses.fields(kind)})


def prepare_pairs(options: PairsConfig, config: ConfigDict, workdir: Path) -> None:
    """Demonstrations → preference pairs, rejected answers being made from good ones."""
    demos = read_jsonl(options.demos_jsonl, DEMO)
    options.check(demos)
    LOG.info("pairs from %d demonstrations, for %s", len(demos), workdir / "data" / "pairs.jsonl")
    policy, tokenizer = policy_model(config)
    pairs = make_pairs(options, policy, tokenizer, demos)
    write_jsonl(workdir / "data" / "pairs.jsonl", pairs)
    LOG.info("%d pairs in %s", len(pairs), workdir / "data" / "pairs.jsonl")


def prepare_lab(options: LabConfig, workdir: Path) -> None:
    """A seed → the lab's data, its pretrained model and its policy, in the HF layout."""
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


def prepare_benchmarks(options: BenchmarkDataConfig, workdir: Path) -> None:
    """data/*.jsonl and, last, data/data_summary.json; files of an earlier call are replaced."""
    found: dict[str, Any] = {
        name: tuple((called, locate_file(called)) for called, _ in getattr(options, name))
        for name in FILES
    }
    data = collect(dataclasses.replace(options, **found))
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
