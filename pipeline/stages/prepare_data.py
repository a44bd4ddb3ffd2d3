"""Prepare what the later stages read: pairs, the benchmarks' files, or the lab's world."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from conversion.load import load_hf_tokenizer, load_policy, read_policy_config
from conversion.to_hf import save_policy
from pipeline.inputs import Input, Kind
from pipeline.models import check_conversations, load_policy_model
from pipeline.option_bounds import OPTIONS
from pipeline.options import optional_paths, required
from pipeline.stage import Stage
from pipeline.tasks import is_text, task_records, text_task_of
from sarm_jax.evaluation.benchmark_data import (
    OUTPUTS,
    BenchmarkDataConfig,
    collect,
    counts_table,
)
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import write_json
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.lab.build import LabConfig, LabData, make_data, make_models
from sarm_jax.lab.text.data import (
    PREPARE_DATA_FIELDS,
    TextData,
    TextDataConfig,
    make_text_data,
    split_prompts,
)
from sarm_jax.models.chat import encode_prompt
from sarm_jax.models.checks import check_positions
from sarm_jax.models.conversation import Prompt, to_json
from sarm_jax.models.conversation_rows import read_demonstrations
from sarm_jax.training.preference_pairs import PairsConfig, make_pairs

LOG = logging.getLogger(__name__)
Options = TypeVar("Options", PairsConfig, LabConfig)
FILES = ("rewardbench2", "rm_bench", "safety_pairs", "complement_pairs")
SHOWN_REFUSALS = 5  # per file; data_summary.json has all
# Options of the lab that only tasks in English read, and that only the world of capitals reads.
TEXT_OPTIONS = ("base_model", "prompts", "held_out_prompts", "label_noise", "annotator_bias")
WORLD_OPTIONS = (
    "held_out_fraction corpus_rows demonstrations tap_layer pretraining_steps "
    "pretraining_learning_rate"
).split()
DEMONSTRATIONS = "demonstrations"  # the source by default, read if demos_jsonl is named
LAST_FILE = {"lab": "policy", "benchmarks": "data/data_summary.json"}


def validate(
    config: ConfigDict,
) -> PairsConfig | BenchmarkDataConfig | LabConfig | TextDataConfig:
    """Validates the section prepare_data, or lab; benchmark files keep the names given to them."""
    section, source = config.prepare_data, config.prepare_data.source
    if source == "lab" and is_text(config):
        task = text_task_of(config)  # raises for an unknown task or shortcut
        check_task_options(config)
        required(config, "lab.base_model")
        text = text_options(config)
        split_prompts(text, task, np.random.default_rng(0))  # raises if there are too few
        return text
    if source == "lab":
        check_task_options(config)
        return from_section(LabConfig, config.lab)
    if source == DEMONSTRATIONS:
        options = from_section(PairsConfig, section)
        required(config, "prepare_data.demos_jsonl", "policy_model")
        return options
    if source == "benchmarks":
        fields: dict[str, Any] = {name: optional_paths(section[name]) for name in FILES}
        fields |= {name: section[name] for name in ("steering_dir", "held_out_fraction", "seed")}
        return BenchmarkDataConfig(**fields)
    raise InputError(f"prepare_data.source={source!r}: expected demonstrations, lab or benchmarks")


def check_task_options(config: ConfigDict) -> None:
    """Raises InputError for an option that the lab's task does not read."""
    for name in WORLD_OPTIONS if is_text(config) else TEXT_OPTIONS:
        value = config.lab[name]
        if value != OPTIONS.lab[name]:
            raise InputError(f"lab.{name}={value}: lab.task={config.lab.task} does not read it")


def run(config: ConfigDict, workdir: Path) -> None:
    """Write preference pairs, the sets made from benchmarks, or the whole of the lab's world."""
    options = validate(config)
    if isinstance(options, LabConfig):
        prepare_lab(options, workdir)
    elif isinstance(options, TextDataConfig):
        prepare_text_lab(options, config, workdir)
    elif isinstance(options, PairsConfig):
        prepare_pairs(options, config, workdir)
    else:
        prepare_benchmarks(options, workdir)


def from_section(kind: type[Options], section: ConfigDict) -> Options:
    """Builds a dataclass of options from the section's fields of the same names."""
    return kind(**{field.name: section[field.name] for field in dataclasses.fields(kind)})


def prepare_pairs(options: PairsConfig, config: ConfigDict, workdir: Path) -> None:
    """Makes preference pairs from demonstrations; rejected answers are spoilt good ones."""
    demonstrations = read_demonstrations(options.demos_jsonl)
    options.check(demonstrations)
    if options.samples_per_prompt:
        prompts = [row["prompt"] for row in demonstrations]
        check_conversations(config.policy_model, {options.demos_jsonl: prompts})
        check_context(options, config.policy_model, prompts)
    path = workdir / "data" / "pairs.jsonl"
    LOG.info("pairs from %d demonstrations, for %s", len(demonstrations), path)
    policy, tokenizer = load_policy_model(config)
    pairs = make_pairs(options, policy, tokenizer, demonstrations)
    write_jsonl(path, [pair | {"prompt": to_json(pair["prompt"])} for pair in pairs])
    LOG.info("%d pairs in %s", len(pairs), path)


def check_context(options: PairsConfig, policy_model: str, prompts: Sequence[Prompt]) -> None:
    """Raises InputError if a sampled answer can exceed the positions that the policy has."""
    policy = read_policy_config(policy_model)
    tokenizer = load_hf_tokenizer(policy_model, policy.vocab_size)
    check_positions(
        max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts),
        options.max_new_tokens,
        policy.positions,
        option="prepare_data.max_new_tokens",
        model=policy_model,
    )


def prepare_lab(options: LabConfig, workdir: Path) -> None:
    """Makes the lab's data, its pretrained model and its policy, in the HF layout."""
    if (workdir / "policy").exists():
        raise InputError(f"{workdir / 'policy'} exists already: delete it to train again")
    LOG.info("a world and its models, for %s", workdir)
    shutil.rmtree(workdir / "pretrained", ignore_errors=True)  # left by a call that did not finish
    data = make_data(options)
    # First, because training may diverge, and then nothing is written.
    pretrained, policy, tokenizer, _ = make_models(options, data)
    for field in dataclasses.fields(data):
        write_jsonl(workdir / "data" / f"{field.name}.jsonl", getattr(data, field.name))
    save_policy(workdir / "pretrained", pretrained, tokenizer)
    save_policy(workdir / "policy", policy, tokenizer)
    LOG.info("the lab's data and models are in %s", workdir)


def text_options(config: ConfigDict) -> TextDataConfig:
    """Collects the options of a task in English from the sections lab and prepare_data."""
    names = [field.name for field in dataclasses.fields(TextDataConfig)]
    sections = {
        name: config.prepare_data if name in PREPARE_DATA_FIELDS else config.lab for name in names
    }
    return TextDataConfig(**{name: section[name] for name, section in sections.items()})


def prepare_text_lab(options: TextDataConfig, config: ConfigDict, workdir: Path) -> None:
    """Makes the data of a task in English, and its policy, in the HF layout."""
    if (workdir / "policy").exists():
        raise InputError(f"{workdir / 'policy'} exists already: delete it to make it again")
    task = text_task_of(config)
    LOG.info("data and policy of the task %s, told of %s", task.name, ", ".join(task.told))
    model, tokenizer = load_policy(config.lab.base_model, config.dtype)
    data, policy = make_text_data(options, task, model, tokenizer)
    for field in dataclasses.fields(data):
        write_jsonl(workdir / "data" / f"{field.name}.jsonl", getattr(data, field.name))
    save_policy(workdir / "policy", policy, tokenizer)
    LOG.info("the task's data and policy are in %s", workdir)


def prepare_benchmarks(options: BenchmarkDataConfig, workdir: Path) -> None:
    """Writes data/*.jsonl and, last, data/data_summary.json; replaces those of an earlier call."""
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
    for source in data.summary["sources"].values():
        for refusal in source["refusals"][:SHOWN_REFUSALS]:
            LOG.warning("refused: %s: %s", refusal["place"], refusal["reason"])
    print(counts_table(data.summary))
    LOG.info("data in %s, counts in %s", folder, folder / "data_summary.json")


def wanted(config: ConfigDict) -> bool:
    """Returns whether the config names a source of data, which `validate` may refuse."""
    return config.prepare_data.source != DEMONSTRATIONS or bool(config.prepare_data.demos_jsonl)


def writes(config: ConfigDict) -> list[str]:
    """Returns the names of all files and folders that the source of the data makes."""
    source = config.prepare_data.source
    if source == "lab":
        kind = TextData if is_text(config) else LabData
        tables = [f"data/{field.name}.jsonl" for field in dataclasses.fields(kind)]
        if is_text(config):
            return [*tables, "policy/"]
        return [*tables, "policy/", "pretrained/"]
    if source == "benchmarks":
        return [*(f"data/{name}.jsonl" for name in OUTPUTS), "data/data_summary.json"]
    return ["data/pairs.jsonl"]


def records(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Adds the options of the lab's world, if that is the source."""
    if config.prepare_data.source != "lab":
        return {"lab": {}}
    kind = TextDataConfig if is_text(config) else LabConfig
    names = [f.name for f in dataclasses.fields(kind) if f.name not in PREPARE_DATA_FIELDS]
    if is_text(config):
        names += ["task", "told_shortcuts", "annotator_bias"]
    return {"lab": {name: config.lab[name] for name in names}, **task_records(config)}


def reads_source(source: str) -> Callable[[ConfigDict], bool]:
    """Returns a function that tells whether a config takes its data from the source."""
    return lambda config: config.prepare_data.source == source


def unread(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the policy's field if the lab makes the policy itself, wherever it puts it."""
    return ("policy_model",) if options["prepare_data"]["source"] == "lab" else ()


STAGE = Stage(
    name="prepare_data",
    summary="Demonstrations, benchmark files or a seed → pairs and prompts that later stages read.",
    validate=validate,
    run=run,
    options=("prepare_data", "policy_model", "lab.base_model", "dtype"),
    inputs=(
        Input("prepare_data.demos_jsonl", Kind.ROWS, read_if=reads_source(DEMONSTRATIONS)),
        Input("prepare_data.steering_dir", read_if=reads_source("benchmarks")),
        Input("prepare_data.rewardbench2", Kind.FILES, read_if=reads_source("benchmarks")),
        Input("prepare_data.rm_bench", Kind.FILES, read_if=reads_source("benchmarks")),
        Input("prepare_data.safety_pairs", Kind.FILES, read_if=reads_source("benchmarks")),
        Input("prepare_data.complement_pairs", Kind.FILES, read_if=reads_source("benchmarks")),
        Input("policy_model", Kind.POLICY, read_if=reads_source(DEMONSTRATIONS)),
        Input("lab.base_model", Kind.POLICY, read_if=reads_source("lab")),
    ),
    output=lambda config: LAST_FILE.get(config.prepare_data.source, "data/pairs.jsonl"),
    makes=("data/*", "policy/", "pretrained/"),
    writes=writes,
    wanted=wanted,
    costly=lambda config: config.prepare_data.source == "lab",
    unread=unread,
    records=records,
)
