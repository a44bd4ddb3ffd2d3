"""Says what a path is that was given for a model directory and is none, and what to do with it."""

from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import open_file
from sarm_jax.io.formats import binary_format
from sarm_jax.io.json_files import read_json
from sarm_jax.io.workdir import VERSION_KEY

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
UNPICKLING = (
    "which are refused because unpickling runs code; re-save the model with safetensors "
    "(save_pretrained(..., safe_serialization=True))"
)
_ADAPTER = "adapter_config.json"
_DATA = (".jsonl", ".parquet", ".arrow", ".csv", ".tsv")
_DATA_SETS = ("dataset_info.json", "dataset_dict.json", "state.json")
_CHECKPOINTS = ("_CHECKPOINT_METADATA", "_METADATA", "manifest")  # of Orbax


def describe_file(path: Path) -> str:
    """Describes a file that was given for a model directory, and what to do with it."""
    try:
        with open_file(path) as file:
            magic = binary_format(file.read(64))
    except InputError:
        magic = None
    if path.suffix == ".gguf" or "GGUF" in (magic or ""):
        return f"is a GGUF file: convert it with {_from_gguf(path)}, and name DIR"
    if path.suffix in PICKLED:
        return f"is a file of pickled weights, {UNPICKLING}"
    if path.suffix == ".safetensors":
        return f"is one file of a model: name its directory, {path.parent}"
    if path.name in ("config.json", "sarm_jax.json", "tokenizer.json", _ADAPTER):
        return f"is one file of a model: name its directory, {path.parent}"
    return "is a file, expected a model directory or a repository id"


def describe_directory(path: Path) -> str | None:
    """Describes a directory without a model's config.json; None if there is nothing to say."""
    names = sorted(entry.name for entry in path.iterdir())
    suffixes = {Path(name).suffix for name in names}
    if _ADAPTER in names:
        return (
            "is a PEFT adapter, not a model: add it to its base model with "
            f"python -m conversion.to_hf --src={path} --dst=DIR --merge, and name DIR"
        )
    if run := _describe_run(path, names):
        return run
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf is not None:
        return f"holds a GGUF file: convert it with {_from_gguf(path / gguf)}, and name DIR"
    pickled = [name for name in names if Path(name).suffix in PICKLED]
    if pickled:
        return f"holds pickled weights ({', '.join(pickled[:3])}), {UNPICKLING}"
    if ".safetensors" in suffixes:
        return "holds weights, but no config.json: copy it from where the weights come from"
    if {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"} & set(names):
        return "holds only a tokenizer: neither config.json nor weights are there"
    if suffixes & set(_DATA) or set(_DATA_SETS) & set(names):
        return "holds data, not a model"
    models = [name for name in names if (path / name / "config.json").is_file()]
    if models:
        return f"is no model, but its folders may be: {', '.join(models[:3])}"
    if (path / "snapshots").is_dir():
        return "is the hub's cache of a repository: name the repository, or a folder of snapshots/"
    return None


def is_run(config: dict[str, Any]) -> bool:
    """Returns True if a config.json holds the options of a run instead of an architecture."""
    return "model_type" not in config and (VERSION_KEY in config or "policy_model" in config)


def describe_workdir(path: Path) -> str:
    """Describes the working directory of a run, and what in it is a model."""
    parts = "is the working directory of a run, not a model"
    folders = [path / part for part in ("policy", "sarm", "reward_model")]
    models = [str(folder) for folder in folders if folder.is_dir()]
    if (path / "adapter").is_dir():
        return (
            f"{parts}: add its adapter to the base model with "
            f"python -m conversion.to_hf --src={path} --dst=DIR --merge, and name DIR"
        )
    return f"{parts}: name {' or '.join(models)}" if models else parts


def _describe_run(path: Path, names: list[str]) -> str | None:
    if {"stages.json", "metrics.csv"} & set(names):
        return describe_workdir(path)
    if "config.json" in names:
        try:
            return describe_workdir(path) if is_run(read_json(path / "config.json")) else None
        except InputError:
            return None
    steps = [name for name in names if name.isdecimal()]
    if set(_CHECKPOINTS) & set(names) or (steps and set(steps) == set(names)):
        return (
            "is a checkpoint of a run, which only the run itself reads; "
            "python -m conversion.to_hf --src=WORKDIR --dst=DIR --merge writes its policy"
        )
    return None


def _from_gguf(path: Path) -> str:
    return f"python -m conversion.from_gguf --src={path} --dst=DIR"
