"""Every file of a model, an adapter, a run or an option, replaced by something that is no file.

Whoever opens a named pipe waits for its writer. A thread watches every pipe of these tests, and
gives a reader that waits there an empty file, so that no test can hang.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from flax import nnx

from conversion import from_gguf, from_hf, load_policy, load_sarm, to_hf
from conversion.peft import load_adapter, save_adapter
from conversion.torch_zip import read_object
from pipeline.provenance import Records
from pipeline.report.runs import read_run
from ppo.tracking.manifest import DamagedCheckpointError, check_manifest
from ppo.tracking.metrics import check_log, read_evaluations
from ppo.tracking.metrics_csv import read_metrics
from ppo.tracking.trackers.record import read_runs
from sarm_jax.features.dense_probe import load_probe
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import open_file, read_bytes
from sarm_jax.io.json_files import read_json
from sarm_jax.io.jsonl import read_jsonl
from sarm_jax.io.row_files import read_placed_rows
from sarm_jax.io.workdir import read_settings
from sarm_jax.models.lora import LoRAConfig, add_lora
from sarm_jax.rewards.human_latents import load_human_latents
from sarm_jax.rewards.human_states import load_human_states
from tests.command import run_main
from tests.report_runs import write_run


@contextlib.contextmanager
def watched_pipe(path: Path):
    """Makes a named pipe; fails afterwards if anybody opened it for reading."""
    os.mkfifo(path)
    done, readers = threading.Event(), []

    def watch() -> None:
        while not done.wait(0.02):
            with contextlib.suppress(OSError):  # ENXIO: nobody reads, which is right
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                readers.append(path)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        path.unlink()
    assert not readers, f"{path} was opened"


@contextlib.contextmanager
def unix_socket(path: Path):
    """Makes a socket; the name may be too long for `bind`, so it is bound in its directory."""
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    yield
    path.unlink()


@contextlib.contextmanager
def directory(path: Path):
    """Makes a directory."""
    path.mkdir()
    yield
    path.rmdir()


ODD = {"a named pipe": watched_pipe, "a socket": unix_socket, "a directory": directory}


@contextlib.contextmanager
def replaced_by(kind: str, path: Path):
    """Puts something odd in the place of a file, and the file back afterwards."""
    kept = path.with_name(path.name + ".kept")
    existed = path.exists()
    if existed:
        path.rename(kept)
    path.parent.mkdir(exist_ok=True)
    with ODD[kind](path):
        yield
    if existed:
        kept.rename(path)


def refused(call, *arguments) -> str:
    start = time.monotonic()
    with pytest.raises((InputError, DamagedCheckpointError)) as error:
        call(*arguments)
    assert time.monotonic() - start < 10
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """Copies of the models of the world, the policy also converted and with an adapter."""
    root = tmp_path_factory.mktemp("models")
    for name in ("policy", "sarm"):
        shutil.copytree(world / name, root / name)
    from_hf.convert(root / "policy", root / "ours", "policy")
    policy, tokenizer = load_policy(root / "policy")
    add_lora(policy, LoRAConfig(rank=2), nnx.Rngs(0))
    save_adapter(root / "adapter", policy, LoRAConfig(rank=2), str(root / "policy"), tokenizer)
    return root


MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "tokenizer.model", "merges.txt", "vocab.json", "processor_config.json", "sarm_jax.json",
    "model.safetensors", "model.safetensors.index.json", "additional_chat_templates/tool.jinja",
)  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_files_of_models(models, kind, tmp_path):
    calls = {
        "policy": lambda: load_policy(models / "policy"),
        "sarm": lambda: load_sarm(models / "sarm"),
        "ours": lambda: load_policy(models / "ours"),
    }
    for model, call in calls.items():
        for name in MODEL_FILES:
            with replaced_by(kind, models / model / name):
                message = refused(call)
                assert name in message and f"is not a file but {kind}" in message
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with replaced_by(kind, models / "policy" / name):
            source = models / "policy"
            assert kind in refused(from_hf.convert, source, tmp_path / "out", "policy")
            assert kind in refused(to_hf.export, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ODD)
def test_files_of_adapters(models, kind, tmp_path):
    policy, _ = load_policy(models / "policy")
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
        with replaced_by(kind, models / "adapter" / name):
            message = refused(load_adapter, models / "adapter", policy)
            assert name in message and f"is not a file but {kind}" in message
    with replaced_by(kind, models / "adapter" / "adapter_model.safetensors"):
        assert kind in refused(to_hf.export, models / "adapter", tmp_path / "out")
    assert not list(tmp_path.iterdir())


READERS = {
    "x.json": (read_json, read_bytes, open_file, read_placed_rows),
    "x.jsonl": (lambda path: read_jsonl(path, {}), read_placed_rows),
    "x.parquet": (read_placed_rows,),
    "x.pt": (read_object,),
    "x.gguf": (lambda path: from_gguf.convert(path, f"{path}.out"),),
    "x.safetensors": (load_human_latents, load_probe, load_human_states),
    "metrics.csv": (read_metrics, lambda path: check_log(path.parent, (), 0, 1)),
    "config.json": (lambda path: read_settings(path.parent),),
    "stages.json": (lambda path: Records(path.parent),),
    "trackers.json": (lambda path: read_runs(path.parent),),
    "evaluations.jsonl": (lambda path: read_evaluations(path.parent),),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", READERS)
def test_readers(name, kind, tmp_path):
    for read in READERS[name]:
        with replaced_by(kind, tmp_path / name):
            assert f"{name}: is not a file but {kind}" in refused(read, tmp_path / name)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [n for n in READERS if n.startswith("x.")])
def test_readers_of_a_device_and_of_a_zero_byte(name):
    for read in READERS[name]:
        if name == "x.json":
            assert "is not a file but a device" in refused(read, Path("/dev/zero"))
        refused(read, Path(f"a\0{name}"))


@pytest.mark.parametrize("kind", ODD)
def test_files_of_a_run(kind, tmp_path):
    write_run(tmp_path / "run")
    names = ("metrics.csv", "samples.jsonl", "config.json", "summary.json")
    for name in names:
        with replaced_by(kind, tmp_path / "run" / name):
            message = refused(read_run, name, tmp_path / "run", 0)
            assert f"{name}: is not a file but {kind}" in message


@pytest.mark.parametrize("kind", ODD)
def test_files_of_a_checkpoint(kind, tmp_path):
    path = tmp_path / "manifest" / "sha256.json"
    with replaced_by(kind, path):
        assert kind in refused(check_manifest, tmp_path)
    path.write_text(json.dumps({"train/x": "0"}))
    with replaced_by(kind, tmp_path / "train" / "x"):
        assert kind in refused(check_manifest, tmp_path)


PROBE = "--stage=probe --config.probe.feature=1"
OPTIONS = (
    "--prompts_jsonl={odd}",
    "--config.eval_prompts_jsonl={odd}",
    "--beta=0.5 --human_latents={odd}.safetensors",
    "--penalize_features=@{odd}.json:harming --tau_values=1 --alpha_values=1",
    "--stage=human_latents --config.human_latents.demos_jsonl={odd}",
    "--stage=prepare_data --config.prepare_data.demos_jsonl={odd}",
    "--stage=prepare_data --config.prepare_data.source=benchmarks "
    "--config.prepare_data.rm_bench={odd}.json",
    "--stage=prepare_data --config.prepare_data.source=benchmarks "
    "--config.prepare_data.rewardbench2={odd}.parquet",
    "--config.reward.probe_penalty=1 --config.reward.probe={odd}.safetensors",
    "--config.reward.distance_penalty=1 --config.reward.human_states={odd}.safetensors",
    "--stage=train_probe --config.identify.pairs_jsonl={odd}",
    "--stage=train_sarm --config.train_sarm.pairs_jsonl={odd}",
    "--stage=train_sarm --config.train_sarm.pairs_jsonl={world}/pairs.jsonl "
    "--config.train_sarm.tie_pairs_jsonl={odd}",
    "--stage=identify --config.identify.pairs_jsonl={odd}",
    "--stage=identify --config.identify.pairs_jsonl={world}/pairs.jsonl "
    "--config.identify.verbosity_jsonl={odd}",
    "--stage=identify --config.identify.pairs_jsonl={world}/pairs.jsonl "
    "--config.identify.feature_names={odd}",
    f"{PROBE} --config.probe.data_jsonl={{odd}}",
    "--stage=probe --config.probe.feature=@{odd}.json:harming "
    "--config.probe.data_jsonl={world}/demos.jsonl",
    "--stage=evaluate --config.evaluate.data_jsonl={odd} "
    "--config.evaluate.steering_json={world}/steering.json",
    "--stage=evaluate --config.evaluate.data_jsonl={world}/answers.jsonl "
    "--config.evaluate.steering_json={odd}.json",
    "--stage=evaluate --config.evaluate.rm_bench={odd}.jsonl",
    "--stage=evaluate --config.evaluate.rewardbench2={odd}.parquet",
    "--stage=plan --config.plan.policy_config={odd}.json",
    "--stage=plan --config.plan.sarm_config={odd}.json",
    "--stage=plan --config.plan.prompt_lengths={odd}.json",
    "--policy_model={odd}",
    "--sarm_model={odd}",
    "--workdir={odd}",
    "--config={odd}",
    "--flagfile={odd}",
)


@pytest.mark.parametrize("options", OPTIONS)
def test_files_of_options(options, world, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copy(world / "demos.jsonl", tmp_path)
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    Path("answers.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    Path("steering.json").write_text("{}")
    suffixes = (".safetensors", ".jsonl", ".json", ".parquet", "")
    suffix = next(s for s in suffixes if "{odd}" + s in options)
    filled = options.replace("{odd}", str(tmp_path / "odd")).replace("{world}", str(tmp_path))
    defaults = {
        "--config": str(Path(__file__).parents[2] / "configs" / "base.py"),
        "--workdir": str(tmp_path / "out"),
        "--policy_model": str(world / "policy"),
        "--sarm_model": str(world / "sarm"),
        "--prompts_jsonl": str(tmp_path / "demos.jsonl"),
    }
    given = {option.split("=")[0] for option in filled.split()}
    others = [f"{name}={value}" for name, value in defaults.items() if name not in given]
    if "plan" in options:  # --policy_model would take the place of plan.policy_config
        models = ("--policy_model", "--sarm_model")
        others = [o.replace("--", "--config.", 1) if o.startswith(models) else o for o in others]
    with watched_pipe(tmp_path / f"odd{suffix}"):
        assert run_main(*others, *filled.split()) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert "odd" in error
    assert not (tmp_path / "out").exists()
