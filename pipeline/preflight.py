"""What `--stage=all` refuses before its first stage: hours later is too late for a typing error.

Files that an earlier stage writes are not there yet, and lists that are read from them wait too.
"""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from conversion.hub import is_repository
from conversion.load import read_policy_config, read_sarm_config
from pipeline import stages
from pipeline.experiments import runs_of
from pipeline.shared import check_remat, mesh_config, split_paths
from ppo.options import PARSERS
from sarm_jax.evaluation.benchmark_files import named_files
from sarm_jax.io.errors import InputError
from sarm_jax.io.workdir import named_workdirs
from sarm_jax.parallel.sharding import make_mesh

INPUTS = (
    "prompts_jsonl eval_prompts_jsonl prepare_data.demos_jsonl prepare_data.steering_dir "
    "prepare_data.rewardbench2 prepare_data.rm_bench prepare_data.safety_pairs "
    "prepare_data.complement_pairs train_sarm.pairs_jsonl identify.pairs_jsonl "
    "identify.verbosity_jsonl human_latents.demos_jsonl probe.data_jsonl evaluate.prompts_jsonl "
    "evaluate.human_jsonl "
    "evaluate.data_jsonl evaluate.steering_json evaluate.rm_bench evaluate.rewardbench2 "
    "reward.human_latents"
).split()
NAMED = ("evaluate.data_jsonl",)  # of INPUTS: FILE or NAME=FILE
RUNS = ("evaluate.runs", "report.runs")
MODELS = {
    "policy_model": read_policy_config,
    "sarm_model": read_sarm_config,
    "train_sarm.model": read_policy_config,
}


def check(config: ConfigDict, workdir: Path, wanted: Sequence[str]) -> None:
    """Raises InputError for an option of the stages `wanted` that is out of range, or a file or
    model that none of them will write."""
    for field in INPUTS:
        text = _value(config, field)
        paths = split_paths(text) if text else ()
        if field in NAMED:
            others = [path for path in paths if not _own(path, workdir)]
            paths = tuple(file.path for file in named_files(others, field))
        for path in paths:
            if not path.startswith("hf://"):
                _check_there(path, workdir, field)
    for field in RUNS:
        for folder in named_workdirs(_value(config, field), workdir, field).values():
            _check_there(str(folder), workdir, field)
    for field, read in MODELS.items():
        model = _value(config, field)
        if model and not (_own(model, workdir) or is_repository(model)):
            read(model)
    check_remat(config.remat)
    make_mesh(mesh_config(config))
    for name in wanted:
        for _, run_config, _ in runs_of(name, config, workdir):
            stages.load(name).options(without_lists_to_come(run_config, workdir))


def without_lists_to_come(config: ConfigDict, workdir: Path) -> ConfigDict:
    """A copy in which lists that wait for a file are set aside, after a look at all others."""
    config = config.copy_and_resolve_references()
    waiting = [name for name in PARSERS if _waits(config.reward[name], workdir)]
    if waiting:  # and with them the lists that must be as long
        for name, parse in PARSERS.items():
            if name not in waiting:
                parse(name, config.reward[name])
            config.reward[name] = ""
    if _waits(config.probe.feature, workdir):
        config.probe.feature = "0"
    return config


def _value(config: ConfigDict, field: str) -> str:
    section, _, name = field.rpartition(".")
    return (config[section] if section else config)[name]


def _check_there(path: str, workdir: Path, field: str) -> None:
    if not (_own(path, workdir) or Path(path).exists()):
        raise InputError(f"{field}={path}: no such file")


def _waits(text: str, workdir: Path) -> bool:
    """Whether a list is read from a file that a stage is still to write."""
    files = [part.strip()[1:].split(":")[0] for part in text.split(",") if "@" in part]
    return any(_own(path, workdir) and not Path(path).exists() for path in files)


def _own(path: str, workdir: Path) -> bool:
    return Path(path).absolute().is_relative_to(workdir.absolute())
