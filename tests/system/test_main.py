"""The command line on tiny models: the pipeline end to end, single stages and plans."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from peft import PeftModel
from transformers import AutoModelForCausalLM

import conversion.load
from configs import base
from conversion import load_policy, load_sarm, to_hf
from conversion.peft import save_adapter
from pipeline.models import load_policy_model, load_reward_model
from ppo.planning.chips import GIB, Chip, target
from ppo.planning.plan import Layout
from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import read_jsonl
from sarm_jax.io.workdir import lock_workdir
from sarm_jax.models.chat import encode_prompt
from sarm_jax.models.lora import LoRAConfig, add_lora
from sarm_jax.parallel.sharding import MeshConfig
from tests.closeness import assert_close, assert_same_metrics
from tests.command import run_main
from tests.oracles import save_tiny_llama, save_tiny_sarm, tiny_llama_config, tiny_tokenizer

pytestmark = pytest.mark.slow

SMALL = (
    "--config.ppo.total_steps=2 --config.ppo.batch_size=4 --config.ppo.max_new_tokens=6 "
    "--config.ppo.calibration_batches=2 --config.ppo.max_prompt_tokens=120 --config.lora.rank=4"
).split()

PREPARE_DATA = (
    "--config.prepare_data.samples_per_prompt=1",
    "--config.prepare_data.max_new_tokens=6",
)
TRAINED_FILES = (
    "config.json metrics.csv summary.json samples.jsonl sarm human_latents.safetensors "
    "adapter/adapter_config.json adapter/adapter_model.safetensors "
    "adapter/value_head.safetensors adapter/tokenizer.json"
).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny policy, a tiny SARM, prompts, demonstrations and pairs."""
    root = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer()
    save_tiny_llama(root / "policy", tiny_llama_config(), tokenizer)
    save_tiny_sarm(root / "sarm", tokenizer)
    words = ["red", "green", "blue", "round", "tall", "old", "new", "warm"]
    demos = [
        {"prompt": f"name {n} {w}", "response": f"it is {w} and it was {n} all the time."}
        for n, w in enumerate(words)
    ]
    pairs = [
        {"prompt": d["prompt"], "chosen": d["response"], "rejected": "no " * (n % 3 + 2)}
        for n, d in enumerate(demos)
    ]
    talks: list[dict] = list(demos)
    for n, start in ((1, [("system", "Be brief")]), (4, [("user", "hi"), ("assistant", "yo")])):
        turns = [{"role": r, "content": c} for r, c in (*start, ("user", demos[n]["prompt"]))]
        talks[n] = {"prompt": turns, "response": demos[n]["response"]}
    for name, rows in (("demos", demos), ("talks", talks), ("pairs", pairs)):
        lines = [json.dumps(row) for row in rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def run(world, tmp_path):
    """Returns a function that runs `main` with the tiny models and returns its exit code."""

    def call(*options: str) -> int:
        arguments = {
            "--workdir": f"--workdir={tmp_path / 'run'}",
            "--policy_model": f"--policy_model={world / 'policy'}",
            "--sarm_model": f"--sarm_model={world / 'sarm'}",
            "--prompts_jsonl": f"--prompts_jsonl={world / 'demos.jsonl'}",
        }
        for option in options:
            arguments.pop(option.split("=")[0], None)
        return run_main("--config=configs/base.py", *arguments.values(), *SMALL, *options)

    return call


def test_the_pipeline_from_a_chat_model_to_an_adapter(world, run, tmp_path, capsys):
    workdir, demos = tmp_path / "run", world / "talks.jsonl"
    make_sarm(run, workdir, demos)
    check_conversations(workdir / "data" / "pairs.jsonl", 2)
    sarm = f"--sarm_model={workdir / 'sarm'}"
    selected = f"@{workdir}/probes/selected_features.json"
    identify = [
        f"--config.identify.pairs_jsonl={workdir}/data/pairs.jsonl",
        "--config.identify.top_k=4",
    ]
    assert run("--stage=identify", sarm, *identify) == 0
    probe = [
        f"--config.probe.feature={selected}:safety_harming[:2],{selected}:safety_promoting[:1]",
        f"--config.probe.data_jsonl={workdir}/data/pairs.jsonl",
    ]
    assert run("--stage=probe", sarm, *probe) == 0
    lists = json.loads((workdir / "probes" / "selected_features.json").read_text())
    for feature in (*lists["safety_harming"][:2], lists["safety_promoting"][0]):
        assert (workdir / "probes" / f"probe_f{feature}.csv").exists()
    features = f"--latent_indices={selected}:safety_harming"
    human = f"--config.human_latents.demos_jsonl={demos}"
    assert run("--stage=human_latents", sarm, features, human) == 0
    train = [
        sarm,
        f"--prompts_jsonl={demos}",
        features,
        f"--penalize_features={selected}:safety_harming[:2]",
        f"--tau_values={selected}:tau_harming[:2]",
        "--alpha_values=0.5,0.25",
        "--config.reward.unit=sd",
        "--beta=0.1",
        f"--human_latents={workdir}/human_latents.safetensors",
    ]
    assert run("--stage=train", *train) == 0
    for name in TRAINED_FILES:
        assert (workdir / name).exists(), name
    check_adapter_against_peft(world / "policy", workdir)

    assert run("--stage=train", *train) == 0  # the run is finished: nothing is done
    capsys.readouterr()
    everything = [
        *train,
        *PREPARE_DATA,
        f"--config.prepare_data.demos_jsonl={demos}",
        *identify,
        *probe,
        human,
        f"--config.evaluate.prompts_jsonl={demos}",
        f"--config.evaluate.data_jsonl={world / 'demos.jsonl'}",
        "--config.evaluate.steering_json={workdir}/probes/steering_config.json",
        "--config.evaluate.resamples=100",
    ]
    check_all_stages(run, workdir, everything, capsys)
    check_conversations(workdir / "eval" / "responses.jsonl", 2)
    steered = json.loads((workdir / "eval" / "steering.json").read_text())["sets"]["demos"]
    assert set(steered["active"]) == {str(i) for i in lists["safety_harming"]}


def check_conversations(path: Path, count: int) -> None:
    """Checks that the rows of a file have so many different conversations as prompts."""
    prompts = [row["prompt"] for row in read_jsonl(path, {})]
    assert len({json.dumps(p) for p in prompts if isinstance(p, list)}) == count


def make_sarm(run, workdir: Path, demos: Path) -> None:
    """Makes preference pairs and trains a SARM on them."""
    pairs = f"--config.prepare_data.demos_jsonl={demos}"
    assert run("--stage=prepare_data", pairs, *PREPARE_DATA) == 0
    options = (
        "source_layer=2 latent_size=64 k=8 aux_k=8 sae_steps=50 sae_batch_tokens=32 epochs=2 "
        "batch_size=4"
    ).split()
    options.append(f"pairs_jsonl={workdir}/data/pairs.jsonl")
    assert run("--stage=train_sarm", *(f"--config.train_sarm.{o}" for o in options)) == 0


def check_all_stages(run, workdir: Path, options: list[str], capsys) -> None:
    """Checks what --stage=all repeats after the single stages, and after changes."""
    assert outcomes(run, options, capsys) == {
        "prepare_data": "up to date",
        "identify": "up to date",
        "human_latents": "up to date",
        "probe": "up to date",
        "train": "up to date",
        "evaluate": "done",
        "report": "done",
    }
    assert set(outcomes(run, options, capsys).values()) == {"up to date"}
    check_report(workdir)
    pairs = workdir / "data" / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("{", "{ ", 1))  # the same pairs in other bytes
    again = outcomes(run, [*options, "--config.probe.set_value=0.5"], capsys)
    assert again.pop("identify") == f"done, because {pairs} has changed"
    assert again.pop("probe") == "done, because probe.set_value was None and is now 0.5"
    certificates = workdir / "probes" / "certificates.json"  # which the report shows
    assert again.pop("report") == f"done, because {certificates} has changed"
    assert set(again.values()) == {"up to date"}  # identify selected the same features
    assert run("--stage=all", *options, "--alpha_values=0.5,0.5") == 2
    assert "reward.alpha_values was '0.5,0.25' and is now '0.5,0.5'" in capsys.readouterr().err


def outcomes(run, options, capsys) -> dict[str, str]:
    """Runs --stage=all and returns what it reports about each stage."""
    assert run("--stage=all", *options) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.strip().splitlines()]
    return {line[0]: line[-1] for line in lines}


def check_report(workdir: Path) -> None:
    """Checks that the page has the run's numbers and its evaluation."""
    page = (workdir / "report.html").read_text()
    assert "Held-out prompts" in page and "Reward against distance" in page
    assert page.count('class="feature"') > 3
    assert (workdir / "figures" / "goodhart.png").exists()


def check_adapter_against_peft(base: Path, workdir: Path) -> None:
    """Compares the merged export with the adapter in peft, which must differ from the base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.tensor([[5, 9, 60, 33, 70]])
    with torch.no_grad():
        plain = model(tokens).logits
        adapted = PeftModel.from_pretrained(model, workdir / "adapter")(tokens).logits
    to_hf.export(workdir, workdir / "merged", merge=True)
    ours, _ = load_policy(workdir / "merged")
    logits = np.asarray(ours(tokens.numpy(), np.ones((1, 5), bool)))
    assert_close(logits, adapted)
    assert (adapted - plain).abs().max() > 1e-5


OUTPUTS = {
    "prepare_data --config.prepare_data.demos_jsonl={demos}": "data/pairs.jsonl",
    "train_sarm --config.train_sarm.pairs_jsonl={pairs} --config.train_sarm.source_layer=2 "
    "--config.train_sarm.max_length=512": "sarm",
    "identify --config.identify.pairs_jsonl={pairs}": "probes",
    "probe --config.probe.feature=3 --config.probe.data_jsonl={pairs}": "probes",
    "human_latents --config.human_latents.demos_jsonl={demos}": "human_latents.safetensors",
    "train": "",
    "evaluate --config.evaluate.prompts_jsonl={demos} --config.evaluate.runs={adapter}": "eval",
}


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_stage_logs_its_output_before_it_loads_weights(
    world, run, tmp_path, monkeypatch, capsys, stage
):
    names = {name: world / f"{name}.jsonl" for name in ("demos", "pairs")} | {"adapter": "none"}
    if "{adapter}" in stage:
        policy, tokenizer = load_policy(world / "policy")
        lora = LoRAConfig(rank=2)
        add_lora(policy, lora, nnx.Rngs(0))
        names["adapter"] = tmp_path / "adapter"
        save_adapter(names["adapter"], policy, lora, str(world / "policy"), tokenizer)

    def stop(*_, **__):
        raise InputError("the weights would be read now")

    monkeypatch.setattr(conversion.load, "_fill", stop)
    capsys.readouterr()
    assert run(*f"--stage={stage.format(**names)}".split()) == 2
    line, error = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "run" / OUTPUTS[stage]) in line
    assert error == "error: the weights would be read now"
    assert run(*f"--stage={stage.format(**names)}".split(), "--log_level=warning") == 2
    assert capsys.readouterr().err.splitlines() == [error]


def test_flags_that_a_stage_does_not_read_are_logged(run, world, capsys):
    pairs = f"--config.identify.pairs_jsonl={world / 'none.jsonl'}"
    assert run("--stage=identify", "--learning_rate=1", "--alpha_values=1", pairs) == 2
    *lines, error = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in lines] == [
        f"--{flag}: {field} is not read by --stage=identify"
        for flag, field in (
            ("alpha_values", "reward.alpha_values"),
            ("learning_rate", "ppo.learning_rate"),
        )
    ]
    assert error == f"error: identify.{pairs.removeprefix('--config.identify.')}: no such file"


@pytest.mark.parametrize(
    ("option", "stage"),
    [
        ("--stage=identify --config.identify.pairs_jsonl={run}/data/pairs.jsonl", "prepare_data"),
        ("--stage=train --sarm_model={run}/sarm", "train_sarm"),
        ("--penalize_features=@{run}/probes/selected_features.json:detectors", "identify"),
        ("--beta=1 --human_latents={run}/human_latents.safetensors", "human_latents"),
        (
            "--stage=evaluate --config.evaluate.data_jsonl={world}/demos.jsonl "
            "--config.evaluate.steering_json={{workdir}}/probes/steering_config.json",
            "identify",
        ),
    ],
)
def test_the_stage_that_makes_a_missing_file_is_named(run, world, tmp_path, capsys, option, stage):
    assert run(*option.format(run=tmp_path / "run", world=world).split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"(; --stage={stage} makes it|; make it with --stage={stage})$", error)


@pytest.mark.evidence
def test_a_mesh_does_not_change_the_metrics(run, tmp_path):
    rows = []
    for name, mesh in (("one", []), ("four", ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"])):
        assert run(f"--workdir={tmp_path / name}", *mesh) == 0
        rows.append(read_metrics(tmp_path / name / "metrics.csv"))
    one, four = rows
    names = "total_reward ref_kl ppo_loss response_length_mean grad_norm".split()
    assert_same_metrics(four, one, names)


def test_both_models_are_on_the_mesh_of_the_config(world):
    config = base.get_config()
    config.policy_model, config.sarm_model = str(world / "policy"), str(world / "sarm")
    config.mesh.fsdp = 2
    policy, _ = load_policy_model(config)
    for model in (policy, load_reward_model(config).model.trunk):
        assert model.placement.mesh.shape["fsdp"] == 2
        assert model.embed_tokens.sharding.mesh == model.placement.mesh


def test_load_sarm_scores_text(world):
    sarm = load_sarm(world / "sarm")
    score, z = sarm.score(["a"], ["b"])
    assert score.shape == (1,) and z.shape == (1, 64)


def test_help_is_shown(capsys):
    assert run_main("--help") == 0
    output = capsys.readouterr().out
    assert "--penalize_features" in output and "Exit codes" in output


def test_a_missing_config_is_refused(capsys):
    assert run_main() == 2
    assert "--config is missing" in capsys.readouterr().err


def test_prompts_are_encoded_through_the_chat_template(world):
    _, tokenizer = load_policy(world / "policy")
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")).rstrip().endswith("<|end_header_id|>")


def test_a_run_that_a_guard_stops_leaves_its_adapter(run, world, tmp_path, capsys):
    never = ["--config.guards.stop=no_eos", "--config.guards.steps=1"]
    never += ["--config.guards.eos_fraction=2.0", "--total_steps=4"]
    sarm = f"--sarm_model={world}/sarm"
    assert run("--stage=train", sarm, *never) == 3
    log = capsys.readouterr().err
    assert "error: step 0: stopped by guards.stop (no_eos), checkpoint 1 saved" in log
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["total_steps"]) == (1, 4)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    with lock_workdir(tmp_path / "run"):
        assert run("--stage=train", sarm, "--total_steps=4") == 2
    assert "another process is training there" in capsys.readouterr().err
    assert run("--stage=train", sarm, "--total_steps=4") == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [f",{line}" for line in lines], "does not have the columns of this run"),
        (lambda lines: lines[:2], "does not have a row for each of the 2 steps"),
        (None, "metrics.csv has 2 steps, but there is no checkpoint"),
    ],
)
def test_a_run_with_damaged_records_is_not_overwritten(run, tmp_path, capsys, damage, message):
    workdir = tmp_path / "run"
    assert run("--stage=train", "--config.ppo.checkpoint_every=1") == 0
    if damage is None:
        shutil.rmtree(workdir / "checkpoints")
    else:
        path = workdir / "metrics.csv"
        path.write_text("\n".join(damage(path.read_text().splitlines())) + "\n")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert run("--stage=train", "--config.ppo.checkpoint_every=1") == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_a_plan_of_this_machine(run, tmp_path, capsys):
    assert run("--stage=plan", "--config.mesh.data=2", "--config.ppo.num_minibatches=2") == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["target"] == "host" and plan["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert plan["fits"] and plan["batch"] == 4
    runs = {row["name"]: row["runs"] for row in plan["programs"]}
    assert runs == {
        "rollout": 1, "prefill": 0, "decode": 0, "score": 1,
        "reference": 1, "targets": 1, "step": 4,
    }  # fmt: skip
    for row in plan["programs"]:
        assert row["bytes"] > 0 and row["flops"] > 0 and row["inherent_bytes"] > 0
        assert row["peak_bytes"] >= row["argument_bytes"] > 0
    total = sum(row["runs"] * row["seconds"] for row in plan["programs"])
    assert plan["step_seconds"] == pytest.approx(total)
    # Data-parallel gradients are summed over the devices.
    step = next(row for row in plan["programs"] if row["name"] == "step")
    assert step["collectives"]["all-reduce"]["count"] > 0
    assert "| decode | 120 | – |" in capsys.readouterr().out


def test_a_plan_of_prompts_of_two_lengths(run, tmp_path, capsys):
    """Three prompts have 10 tokens and one has 100, which is in half of all batches of two."""

    def plan(name: str, *options: str) -> dict:
        workdir = tmp_path / name
        assert (
            run("--stage=plan", "--config.ppo.batch_size=2", f"--workdir={workdir}", *options) == 0
        )
        return json.loads((workdir / "plan.json").read_text())

    def with_lengths(name: str, counts: dict[int, int], *options: str) -> dict:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(counts))
        return plan(name, f"--config.plan.prompt_lengths={path}", *options)

    short, long = (plan(f"p{n}", f"--config.ppo.max_prompt_tokens={n}") for n in (16, 104))
    assert len(short["prompt_lengths"]) == 1 and "in expectation" not in capsys.readouterr().out
    both = with_lengths("both", {10: 3, 100: 1})
    output = capsys.readouterr().out
    assert [(one["padded"], one["share"]) for one in both["prompt_lengths"]] == [
        (16, pytest.approx(0.5)), (104, pytest.approx(0.5)),
    ]  # fmt: skip
    seconds = [short["step_seconds"], long["step_seconds"]]
    assert [one["step_seconds"] for one in both["prompt_lengths"]] == seconds
    assert both["step_seconds"] == pytest.approx(sum(seconds) / 2) and seconds[0] < seconds[1]
    assert both["peak_bytes"] == long["peak_bytes"] > short["peak_bytes"]
    assert both["programs"] == short["programs"] + long["programs"]
    assert {row["prompt_tokens"] for row in both["programs"]} == {16, 104}
    assert "s a step in expectation" in output and "| 16 | 50.0 % |" in output
    assert "| decode | 104 | – |" in output
    # With one length, the plan is the same as without a file.
    assert with_lengths("one", {98: 3, 104: 9}) == long
    dropped = "--config.ppo.long_prompts=drop", "--config.ppo.max_prompt_tokens=16"
    assert with_lengths("dropped", {10: 3, 100: 1}, *dropped) == short


def test_the_plan_adds_prefill_and_decoding(run, tmp_path, monkeypatch):
    _, devices, backend = target("host", 1, "float32")
    # On this chip the prefill is bound by arithmetic and decoding by memory.
    balanced = Chip("balanced", flops=1e9, bandwidth=1e9, memory=GIB, link=1e9)
    calls = []

    def stand_in(*arguments):
        calls.append(arguments)
        return balanced, devices, backend

    monkeypatch.setattr("ppo.planning.plan.target", stand_in)
    assert run("--stage=plan") == 0
    assert calls == [("host", 1, "float32")]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    rows = {row["name"]: row for row in plan["programs"]}
    rollout, prefill, decode = (rows[name] for name in ("rollout", "prefill", "decode"))
    assert prefill["flops"] > prefill["bytes"] and decode["flops"] < decode["bytes"]
    in_turn = prefill["roofline_seconds"] + 5 * decode["roofline_seconds"]
    assert rollout["roofline_seconds"] == pytest.approx(in_turn, rel=0.015)
    assert max(rollout["flops"], rollout["bytes"]) / 1e9 < 0.98 * in_turn


def test_a_plan_of_train_sarm(run, tmp_path, capsys):
    options = "source_layer=1 latent_size=32 k=4 aux_k=4 max_length=16 batch_size=2"
    line = ["--stage=plan", "--config.plan.stage=train_sarm"]
    line += [f"--config.train_sarm.{option}" for option in options.split()]
    one = "--config.mesh.data=2", "--config.train_sarm.gradient_accumulation_steps=2"
    assert run(*line, *one) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["mode"] == 3 and plan["batch"] == 2 and plan["mesh"]["data"] == 2
    assert plan["fits"] and plan["peak_bytes"] > plan["held_bytes"] > 0
    assert (
        "train_sarm.mode=3, mesh data=2 fsdp=1 tensor=1, remat dots, accumulation 2, 2 pairs"
        in (capsys.readouterr().out)
    )
    head = "--config.train_sarm.mode=0", "--config.plan.pairs=1000"
    assert run(*line, *head) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["mode"] == 0 and plan["collect"]["steps"] == -(-2000 // plan["collect"]["batch"])
    assert plan["programs"][0]["argument_bytes"] >= 2000 * 4 * 8  # values and ids of all latents


def test_a_plan_of_identify(run, tmp_path, capsys):
    line = ["--stage=plan", "--config.plan.stage=identify", "--config.plan.pairs=1000"]
    line += ["--config.sarm_batch_size=4", "--config.sarm_max_length=48"]
    assert run(*line, "--config.mesh.data=2") == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["steps"] == 500 and plan["batch"] == 4 and plan["tokens"] == 48
    assert plan["run_seconds"] == 500 * plan["step_seconds"] > 0
    assert plan["host_bytes"] == 2 * 1000 * 8 * 8  # 8 values with their features
    assert plan["fits"] and plan["peak_bytes"] > plan["programs"][0]["argument_bytes"] > 0
    text = "identify, mesh data=2 fsdp=1 tensor=1, 4 conversations of 48 tokens: peak"
    assert text in capsys.readouterr().out


@pytest.mark.evidence  # tests/ppo/planning has the choice by hand
def test_a_search_selects_the_fastest_layout_that_fits(run, tmp_path, monkeypatch):
    few = [Layout(MeshConfig(tensor=2), "dots", 1), Layout(MeshConfig(), "full", 1)]
    monkeypatch.setattr("pipeline.stages.plan.layouts_for", lambda devices, rows: few)
    small = ["--config.ppo.ppo_epochs=1", "--config.ppo.batch_size=2", "--config.plan.search=True"]
    assert run("--stage=plan", *small) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    others = plan["candidates"]
    assert len(others) == 1
    assert all(not o["fits"] or o["step_seconds"] >= plan["step_seconds"] for o in others)


@pytest.mark.evidence
def test_pairs_are_sampled_and_a_sarm_is_trained_on_a_mesh(world, tmp_path):
    models = ["--config=configs/base.py", f"--policy_model={world}/policy"]
    sample = ["--stage=prepare_data", "--config.prepare_data.max_new_tokens=6"]
    sample += [f"--config.prepare_data.demos_jsonl={world}/demos.jsonl"]
    meshes = {"one": (), "two": ("--config.mesh.tensor=2", "--config.mesh.data=2")}
    for name, mesh in meshes.items():
        assert run_main(*models, *sample, *mesh, f"--workdir={tmp_path / name}") == 0
    pairs = [read_jsonl(tmp_path / name / "data" / "pairs.jsonl", {}) for name in meshes]
    assert len(pairs[0]) == len(pairs[1]) > 8
    same = sum(one == two for one, two in zip(*pairs, strict=True))
    assert same > 0.9 * len(pairs[0])  # rounding may change a draw
    options = "source_layer=1 latent_size=16 k=4 mode=0 sae_steps=2 sae_batch_tokens=8 aux_k=4"
    train = [f"--config.train_sarm.{option}" for option in options.split()]
    train += ["--stage=train_sarm", "--config.remat=full"]
    train += [f"--config.train_sarm.pairs_jsonl={tmp_path}/one/data/pairs.jsonl"]
    for name, mesh in meshes.items():
        assert run_main(*models, *train, *mesh, f"--workdir={tmp_path / name}") == 0
    summaries = [json.loads((tmp_path / name / "sarm_summary.json").read_text()) for name in meshes]
    assert_close(*(s["sae"]["explained_variance"] for s in summaries), 1e-4)
    one, two = (load_sarm(tmp_path / name / "sarm") for name in meshes)
    for ours, theirs in zip(
        *(jax.tree.leaves(nnx.state(m.model)) for m in (two, one)), strict=True
    ):
        assert_close(ours, theirs, 1e-4)
