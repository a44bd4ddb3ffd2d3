"""Things that are given for a model by mistake: the message names them and says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from conversion import from_gguf, from_hf, load_policy, load_sarm, to_hf
from conversion.peft import save_adapter
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.io.jsonl import read_jsonl
from sarm_jax.io.row_files import read_placed_rows
from sarm_jax.models.lora import LoRAConfig, add_lora
from tests import oracles

MERGE = "python -m conversion.to_hf --src={path} --dst=DIR --merge"


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """The models of the world, an adapter, a classifier, and copies that lack or hold more."""
    root = tmp_path_factory.mktemp("models")
    for name in ("policy", "sarm"):
        shutil.copytree(world / name, root / name)
    policy, tokenizer = load_policy(root / "policy")
    add_lora(policy, LoRAConfig(rank=2), nnx.Rngs(0))
    save_adapter(root / "adapter", policy, LoRAConfig(rank=2), str(root / "policy"), tokenizer)
    classifier = LlamaForSequenceClassification(oracles.tiny_llama_config(num_labels=1))
    classifier.save_pretrained(root / "classifier")
    tokenizer.save_pretrained(root / "classifier")
    tokenizer.save_pretrained(root / "tokenizer")
    make_runs(root)
    make_others(root)
    return root


def make_runs(root: Path) -> None:
    """Makes working directories, finished and not, and parts of them."""
    for name in ("run", "unfinished", "lab"):
        (root / name / "checkpoints" / "20" / "manifest").mkdir(parents=True)
        options = {"sarm_jax_version": "1", "policy_model": str(root / "policy")}
        (root / name / "config.json").write_text(json.dumps(options))
    shutil.copytree(root / "adapter", root / "run" / "adapter")
    for name in ("policy", "sarm"):
        shutil.copytree(root / name, root / "lab" / name)
    (root / "stages").mkdir()
    (root / "stages" / "stages.json").write_text("{}")


def make_others(root: Path) -> None:
    """Makes directories and files of other kinds."""
    files = {
        "ggufs/m.gguf": b"GGUF\3\0\0\0",
        "renamed.bin": b"GGUF\3\0\0\0",
        "pickles/pytorch_model.bin": b"PK\3\4",
        "pickle.pt": b"PK\3\4",
        "data_set/data.parquet": b"PAR1",
        "arrow_set/dataset_info.json": b"{}",
        "notes.txt": b"hello",
        "cache/snapshots/abc/config.json": b"{}",
        "parent/a/config.json": b"{}",
        "parent/b/config.json": b"{}",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    shutil.copytree(root / "policy", root / "bare", ignore=lambda *_: ["config.json"])


def refused(call, *arguments) -> str:
    with pytest.raises(InputError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


BOTH = {  # what is given, relative to the models → parts of the message
    "adapter": ("is a PEFT adapter, not a model", MERGE),
    "run/adapter": ("is a PEFT adapter", MERGE),
    "run": ("is the working directory of a run", MERGE),
    "unfinished": ("is the working directory of a run",),
    "lab": ("is the working directory of a run", "{path}/policy or {path}/sarm"),
    "stages": ("is the working directory of a run",),
    "run/checkpoints": ("is a checkpoint of a run", "conversion.to_hf --src=WORKDIR"),
    "run/checkpoints/20": ("is a checkpoint of a run",),
    "tokenizer": ("holds only a tokenizer",),
    "ggufs": ("holds a GGUF file", "python -m conversion.from_gguf --src={path}/m.gguf --dst=DIR"),
    "ggufs/m.gguf": ("is a GGUF file", "python -m conversion.from_gguf --src={path} --dst=DIR"),
    "renamed.bin": ("is a GGUF file",),
    "pickles": ("holds pickled weights (pytorch_model.bin)", "unpickling runs code"),
    "pickles/pytorch_model.bin": ("is a file of pickled weights", "safe_serialization=True"),
    "pickle.pt": ("is a file of pickled weights",),
    "data_set": ("holds data, not a model",),
    "arrow_set": ("holds data, not a model",),
    "cache": ("is the hub's cache",),
    "policy/model.safetensors": ("is one file of a model: name its directory", "/policy"),
    "policy/config.json": ("is one file of a model: name its directory",),
    "bare": ("holds weights, but no config.json",),
    "notes.txt": ("is a file, expected a model directory",),
    "parent": ("is no model, but its folders may be: a, b",),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("load", [load_policy, load_sarm])
def test_what_is_no_model_is_called_by_its_name(models, name, load):
    path = models / name
    message = refused(load, path)
    for part in BOTH[name]:
        assert part.format(path=path) in message
    assert str(path) in message


SWAPPED = [
    (load_policy, "sarm", ("is a SARM", "the other option")),
    (
        load_sarm,
        "policy",
        ("not a SARM but a language model", "--stage=train_sarm", "other option"),
    ),
    (load_sarm, "classifier", ("not a SARM but a classifier without an SAE", "train_sarm")),
    (load_policy, "classifier", ("LlamaForSequenceClassification", "LlamaForCausalLM")),
]


@pytest.mark.parametrize(("load", "name", "parts"), SWAPPED)
def test_a_model_of_another_kind(models, load, name, parts):
    message = refused(load, models / name)
    assert all(part in message for part in parts), message


def test_conversion_commands_say_it_too(models, tmp_path):
    out = tmp_path / "out"
    assert "is a PEFT adapter" in refused(from_hf.convert, models / "adapter", out, "policy")
    assert "is a GGUF file" in refused(from_hf.convert, models / "ggufs/m.gguf", out, "policy")
    assert "working directory of a run" in refused(to_hf.export, models / "unfinished", out)
    assert "not a file but a directory" in refused(from_gguf.convert, models / "ggufs", out)
    assert "not a GGUF file" in refused(
        from_gguf.convert, models / "policy" / "model.safetensors", out
    )
    assert not list(tmp_path.iterdir())


def bitsandbytes(tensors: dict, name: str, size: int) -> None:
    tensors[name] = torch.zeros((size // 2, 1), dtype=torch.uint8)
    tensors[f"{name}.absmax"] = torch.zeros(4)
    tensors[f"{name}.quant_map"] = torch.zeros(16)
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)


def bitsandbytes8(tensors: dict, name: str, size: int) -> None:
    tensors[name] = tensors[name].to(torch.int8)
    tensors[name.removesuffix("weight") + "SCB"] = torch.zeros(4)


def gptq(tensors: dict, name: str, size: int) -> None:
    del tensors[name]
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        tensors[name.removesuffix("weight") + part] = torch.zeros(4, dtype=torch.int32)


def fp8(tensors: dict, name: str, size: int) -> None:
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[f"{name}_scale"] = torch.ones(1)


@pytest.mark.parametrize("quantise", [bitsandbytes, bitsandbytes8, gptq, fp8])
def test_quantised_tensors_are_called_so(models, tmp_path, quantise):
    shutil.copytree(models / "policy", tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    quantise(tensors, name, tensors[name].numel())
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    message = refused(load_policy, tmp_path / "q")
    assert "the weights are quantised" in message and "layers.1.mlp.up_proj" in message
    assert "missing" not in message


# ---- data

ROWS = [{"prompt": "p", "chosen": ["a"], "rejected": ["b"]}, {"prompt": "q", "n": 1}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p"}, {"prompt": "q"}]), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.json", "x.JSON", "x.txt", "x"])
@pytest.mark.parametrize("content", [LINES, json.dumps(ROWS), json.dumps(ROWS, indent=1)])
def test_rows_are_read_whatever_the_file_is_called(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert [row.content for row in read_placed_rows(tmp_path / name)] == ROWS


@pytest.mark.parametrize("name", ["x.parquet", "x.PARQUET", "x.jsonl", "x.json"])
def test_parquet_is_read_whatever_the_file_is_called(tmp_path, name):
    (tmp_path / name).write_bytes(parquet())
    assert [row.content for row in read_placed_rows(tmp_path / name)] == [
        {"prompt": "p"},
        {"prompt": "q"},
    ]


@pytest.mark.parametrize("name", ["x.JSONL", "x.json", "x"])
def test_json_lines_are_read_whatever_the_file_is_called(tmp_path, name):
    (tmp_path / name).write_text(LINES)
    assert read_jsonl(tmp_path / name, {"prompt": str}) == ROWS


OTHERS = {
    "Parquet": parquet(),
    "gzip": b"\x1f\x8b\x08\0",
    "zstd": b"\x28\xb5\x2f\xfd\0",
    "zip archive": b"PK\3\4",
    "GGUF": b"GGUF\3\0\0\0",
    "safetensors": (16).to_bytes(8, "little") + b'{"a": 1}       ',
    "pickle": b"\x80\x04\x95",
    "web page": b"<!DOCTYPE html><html>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\n",
    "NumPy": b"\x93NUMPY\1\0",
}


@pytest.mark.parametrize("format", OTHERS)
def test_other_formats_are_called_by_their_name(tmp_path, format):
    (tmp_path / "x.json").write_bytes(OTHERS[format])
    assert format in refused(read_jsonl, tmp_path / "x.json", {})
    assert format in refused(read_json, tmp_path / "x.json")
    if format != "Parquet":
        assert format in refused(read_placed_rows, tmp_path / "x.json")


def test_json_and_json_lines_exchanged(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(LINES)
    assert "is JSON Lines, expected a JSON object" in refused(read_json, path)
    path.write_text(json.dumps(ROWS))
    assert "is one JSON array, expected JSON Lines" in refused(read_jsonl, path, {})
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert "one JSON object over several lines" in refused(read_jsonl, path, {})
    path.write_text(json.dumps(ROWS[0]))
    assert read_jsonl(path, {}) == ROWS[:1] and read_json(path) == ROWS[0]
