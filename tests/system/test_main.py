"""The command line: the pipeline end to end on a tiny model, (bad input: test_bad_inputs)."""

import json
import re
import shutil
from pathlib import Path

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
from pipeline.shared import policy_model, reward_model
from ppo.planning.chips import GIB, Chip, target
from ppo.planning.plan import Layout
from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import read_jsonl
from sarm_jax.io.workdir import nobody_else_in
from sarm_jax.models.chat import encode_prompt
from sarm_jax.models.lora import LoRAConfig, add_lora
from sarm_jax.parallel.sharding import MeshConfig
from tests.closeness import assert_close, assert_same_metrics
from tests.command import run_main
from tests.oracles import save_tiny_llama, save_tiny_sarm, tiny_llama_config, tiny_tokenizer

SMALL = (
    "--config.ppo.total_steps=2 --config.ppo.batch_size=4 --config.ppo.max_new_tokens=6 "
    "--config.ppo.calibration_batches=2 --config.ppo.max_prompt_tokens=120 --config.lora.rank=4"
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
    for name, rows in (("demos", demos), ("pairs", pairs)):
        lines = [json.dumps(row) for row in rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def run(world, tmp_path):
    """Runs `main` with the tiny world's models; returns its exit code."""

    def call(*options: str) -> int:
        given = {
            "--workdir": f"--workdir={tmp_path / 'run'}",
            "--policy_model": f"--policy_model={world / 'policy'}",
            "--sarm_model": f"--sarm_model={world / 'sarm'}",
            "--prompts_jsonl": f"--prompts_jsonl={world / 'demos.jsonl'}",
        }
        for option in options:
            given.pop(option.split("=")[0], None)
        return run_main("--config=configs/base.py", *given.values(), *SMALL, *options)

    return call


def test_the_pipeline_from_a_chat_model_to_an_adapter(world, run, tmp_path, capsys):
    workdir = tmp_path / "run"
    demos = world / "demos.jsonl"
    sarm = f"--sarm_model={workdir / 'sarm'}"
    assert run(
        "--stage=prepare_data",
        f"--config.prepare_data.demos_jsonl={demos}",
        "--config.prepare_data.samples_per_prompt=1",
        "--config.prepare_data.max_new_tokens=6",
    ) == 0  # fmt: skip
    assert run(
        "--stage=train_sarm",
        f"--config.train_sarm.pairs_jsonl={workdir}/data/pairs.jsonl",
        "--config.train_sarm.source_layer=2",
        "--config.train_sarm.latent_size=64",
        "--config.train_sarm.k=8",
        "--config.train_sarm.aux_k=8",
        "--config.train_sarm.sae_steps=50",
        "--config.train_sarm.sae_batch_tokens=32",
        "--config.train_sarm.epochs=2",
        "--config.train_sarm.batch_size=4",
    ) == 0  # fmt: skip
    assert run(
        "--stage=identify",
        sarm,
        f"--config.identify.pairs_jsonl={workdir}/data/pairs.jsonl",
        "--config.identify.top_k=4",
    ) == 0  # fmt: skip
    selected = f"@{workdir}/probes/selected_features.json"
    probe = [
        sarm,
        f"--config.probe.feature={selected}:safety_harming[:2],{selected}:safety_promoting[:1]",
        f"--config.probe.data_jsonl={workdir}/data/pairs.jsonl",
    ]
    assert run("--stage=probe", *probe) == 0
    lists = json.loads((workdir / "probes" / "selected_features.json").read_text())
    for feature in (*lists["safety_harming"][:2], lists["safety_promoting"][0]):
        assert (workdir / "probes" / f"probe_f{feature}.csv").exists()
    features = f"--latent_indices={selected}:safety_harming"
    assert run(
        "--stage=human_latents", sarm, features, f"--config.human_latents.demos_jsonl={demos}"
    ) == 0  # fmt: skip
    train = [
        sarm,
        features,
        f"--penalize_features={selected}:safety_harming[:2]",
        f"--tau_values={selected}:tau_harming[:2]",
        "--alpha_values=0.5,0.25",
        "--config.reward.unit=sd",
        "--beta=0.1",
        f"--human_latents={workdir}/human_latents.safetensors",
    ]
    assert run("--stage=train", *train) == 0
    for name in (
        "config.json metrics.csv summary.json samples.jsonl sarm human_latents.safetensors "
        "adapter/adapter_config.json adapter/adapter_model.safetensors "
        "adapter/value_head.safetensors adapter/tokenizer.json"
    ).split():
        assert (workdir / name).exists(), name
    check_adapter_against_peft(world / "policy", workdir)

    assert run("--stage=train", *train) == 0  # finished: nothing more to do
    capsys.readouterr()
    everything = [
        *train,
        f"--config.prepare_data.demos_jsonl={demos}",
        "--config.prepare_data.samples_per_prompt=1",
        "--config.prepare_data.max_new_tokens=6",
        f"--config.identify.pairs_jsonl={workdir}/data/pairs.jsonl",
        "--config.identify.top_k=4",
        *probe[1:],
        f"--config.human_latents.demos_jsonl={demos}",
        f"--config.evaluate.prompts_jsonl={demos}",
        f"--config.evaluate.data_jsonl={demos}",
        "--config.evaluate.steering_json={workdir}/probes/steering_config.json",
        "--config.evaluate.resamples=100",
    ]
    assert outcomes(run, everything, capsys) == {
        "prepare_data": "up to date",
        "identify": "up to date",
        "human_latents": "up to date",
        "probe": "up to date",
        "train": "up to date",
        "evaluate": "done",
        "report": "done",
    }
    assert set(outcomes(run, everything, capsys).values()) == {"up to date"}
    check_report(workdir)
    steered = json.loads((workdir / "eval" / "steering.json").read_text())["sets"]["demos"]
    assert set(steered["active"]) == {str(i) for i in lists["safety_harming"]}
    pairs = workdir / "data" / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("{", "{ ", 1))  # the same pairs in other bytes
    again = outcomes(run, [*everything, "--config.probe.set_value=0.5"], capsys)
    assert again.pop("identify") == f"done, because {pairs} has changed"
    assert again.pop("probe") == "done, because probe.set_value was None and is now 0.5"
    assert set(again.values()) == {"up to date"}  # identify selected the same features
    assert run("--stage=all", *everything, "--alpha_values=0.5,0.5") == 2
    assert "reward.alpha_values was '0.5,0.25' and is now '0.5,0.5'" in capsys.readouterr().err


def outcomes(run, options, capsys) -> dict[str, str]:
    """What --stage=all says that it did about each stage."""
    assert run("--stage=all", *options) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.strip().splitlines()]
    return {line[0]: line[-1] for line in lines}


def check_report(workdir: Path) -> None:
    """The page has the run's numbers and its evaluation."""
    page = (workdir / "report.html").read_text()
    assert "Held-out prompts" in page and "Reward against distance" in page
    assert (workdir / "figures" / "goodhart.png").exists()


def check_adapter_against_peft(base: Path, workdir: Path) -> None:
    """The adapter in peft, and the merged export in transformers, agree and differ from base."""
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
    "train_sarm --config.train_sarm.pairs_jsonl={pairs} --config.train_sarm.source_layer=2": "sarm",
    "identify --config.identify.pairs_jsonl={pairs}": "probes",
    "probe --config.probe.feature=3 --config.probe.data_jsonl={pairs}": "probes",
    "human_latents --config.human_latents.demos_jsonl={demos}": "human_latents.safetensors",
    "train": "",
    "evaluate --config.evaluate.prompts_jsonl={demos} --config.evaluate.runs={adapter}": "eval",
}


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_stage_says_what_it_does_and_where_before_it_takes_long(
    world, run, tmp_path, monkeypatch, capsys, stage
):
    names = {name: world / f"{name}.jsonl" for name in ("demos", "pairs")} | {"adapter": "none"}
    if "{adapter}" in stage:
        policy, tokenizer = load_policy(world / "policy")
        lora = LoRAConfig(rank=2)
        add_lora(policy, lora, nnx.Rngs(0))
        names["adapter"] = tmp_path / "adapter"
        save_adapter(names["adapter"], policy, lora, str(world / "policy"), tokenizer)

    def stopped(*_):
        raise InputError("the weights would be read now")

    monkeypatch.setattr(conversion.load, "_fill", stopped)
    capsys.readouterr()
    assert run(*f"--stage={stage.format(**names)}".split()) == 2
    said, error = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "run" / OUTPUTS[stage]) in said
    assert error == "error: the weights would be read now"
    assert run(*f"--stage={stage.format(**names)}".split(), "--log_level=warning") == 2
    assert capsys.readouterr().err.splitlines() == [error]


def test_what_a_stage_does_not_read_is_said(run, world, capsys):
    pairs = f"--config.identify.pairs_jsonl={world / 'none.jsonl'}"
    assert run("--stage=identify", "--learning_rate=1", "--alpha_values=1", pairs) == 2
    *said, error = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2] for line in said] == [
        f"--{flag}: {field} is not read by --stage=identify"
        for flag, field in (
            ("alpha_values", "reward.alpha_values"),
            ("learning_rate", "ppo.learning_rate"),
        )
    ]
    assert error.startswith(f"error: {world / 'none.jsonl'}: cannot be read")


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


def test_a_mesh_changes_nothing_but_where_it_runs(run, tmp_path):
    rows = []
    for name, mesh in (("one", []), ("four", ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"])):
        assert run(f"--workdir={tmp_path / name}", *mesh) == 0
        rows.append(read_metrics(tmp_path / name / "metrics.csv"))
    one, four = rows
    names = "total_reward ref_kl ppo_loss response_length_mean grad_norm".split()
    assert_same_metrics(four, one, names)


def test_both_models_know_the_mesh_of_the_config(world):
    config = base.get_config()
    config.policy_model, config.sarm_model = str(world / "policy"), str(world / "sarm")
    config.mesh.fsdp = 2
    policy, _ = policy_model(config)
    for model in (policy, reward_model(config).model.trunk):
        assert model.placement.mesh.shape["fsdp"] == 2
        assert model.embed_tokens.sharding.mesh == model.placement.mesh


def test_load_sarm_scores_text(world):
    sarm = load_sarm(world / "sarm")
    score, z = sarm.score(["a"], ["b"])
    assert score.shape == (1,) and z.shape == (1, 64)


def test_help_is_shown(capsys):
    assert run_main("--help") == 0
    shown = capsys.readouterr().out
    assert "--penalize_features" in shown and "Exit codes" in shown


def test_a_missing_config_is_said(capsys):
    assert run_main() == 2
    assert "--config is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    "baseline full_method ablation_alpha_02 ablation_alpha_005 ablation_tau_4 ablation_tau_2 "
    "verbosity_control".split(),
)
def test_every_config_is_a_valid_experiment(name, tmp_path):
    import importlib

    from ppo.options import train_config

    config = importlib.import_module(f"configs.{name}").get_config()
    options = train_config(config)
    assert config.policy_model == "meta-llama/Llama-3.1-8B-Instruct"
    assert options.ppo.batch_size == 8 and options.ppo.total_steps == 100
    options.reward.check_features(65536)
    expected = {
        "baseline": ((), ()),
        "ablation_alpha_02": ((0.2,) * 3, (3.0,) * 3),
        "ablation_alpha_005": ((0.05,) * 3, (3.0,) * 3),
        "ablation_tau_4": ((0.1,) * 3, (4.0,) * 3),
        "ablation_tau_2": ((0.1,) * 3, (2.0,) * 3),
    }.get(name, ((0.1,) * 3, (3.0,) * 3))
    assert (options.reward.alpha_values, options.reward.tau_values) == expected


def test_prompts_are_encoded_through_the_chat_template(world):
    _, tokenizer = load_policy(world / "policy")
    assert tokenizer.decode(encode_prompt(tokenizer, "hi")).rstrip().endswith("<|end_header_id|>")


def test_a_run_that_a_guard_stops_leaves_its_adapter(run, world, tmp_path, capsys):
    never = ["--config.guards.stop=no_eos", "--config.guards.steps=1"]
    never += ["--config.guards.eos_fraction=2.0", "--total_steps=4"]
    sarm = f"--sarm_model={world}/sarm"
    assert run("--stage=train", sarm, *never) == 3
    said = capsys.readouterr().err
    assert "error: step 0: stopped by guards.stop (no_eos), checkpoint 1 saved" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["total_steps"]) == (1, 4)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    with nobody_else_in(tmp_path / "run"):
        assert run("--stage=train", sarm, "--total_steps=4") == 2
    assert "another process is training there" in capsys.readouterr().err
    assert run("--stage=train", sarm, "--total_steps=4") == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [f",{line}" for line in lines], "has not the columns of this run"),
        (lambda lines: lines[:2], "has not a row for each of the 2 steps"),
        (None, "metrics.csv has 2 steps, but there is no checkpoint"),
    ],
)
def test_a_run_whose_records_are_gone_is_not_written_over(run, tmp_path, capsys, spoil, message):
    workdir = tmp_path / "run"
    assert run("--stage=train", "--config.ppo.checkpoint_every=1") == 0
    if spoil is None:
        shutil.rmtree(workdir / "checkpoints")
    else:
        path = workdir / "metrics.csv"
        path.write_text("\n".join(spoil(path.read_text().splitlines())) + "\n")
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
    # Data-parallel gradients are summed over the devices; nothing else of the weights moves.
    step = next(row for row in plan["programs"] if row["name"] == "step")
    assert step["collectives"]["all-reduce"]["count"] > 0
    assert "| decode | 120 | – |" in capsys.readouterr().out


def test_a_plan_of_prompts_of_two_lengths(run, tmp_path, capsys):
    """Three prompts of 10 tokens and one of 100: it is in half of all batches of two."""

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
    shown = capsys.readouterr().out
    assert [(one["padded"], one["share"]) for one in both["prompt_lengths"]] == [
        (16, pytest.approx(0.5)), (104, pytest.approx(0.5)),
    ]  # fmt: skip
    seconds = [short["step_seconds"], long["step_seconds"]]
    assert [one["step_seconds"] for one in both["prompt_lengths"]] == seconds
    assert both["step_seconds"] == pytest.approx(sum(seconds) / 2) and seconds[0] < seconds[1]
    assert both["peak_bytes"] == long["peak_bytes"] > short["peak_bytes"]
    assert both["programs"] == short["programs"] + long["programs"]
    assert {row["prompt_tokens"] for row in both["programs"]} == {16, 104}
    assert "s a step in expectation" in shown and "| 16 | 50.0 % |" in shown
    assert "| decode | 104 | – |" in shown
    # One length: the plan is what it is without a file.
    assert with_lengths("one", {98: 3, 104: 9}) == long
    dropped = "--config.ppo.long_prompts=drop", "--config.ppo.max_prompt_tokens=16"
    assert with_lengths("dropped", {10: 3, 100: 1}, *dropped) == short


def test_decoding_does_not_hide_behind_the_prefill(run, tmp_path, monkeypatch):
    _, devices, backend = target("host", 1, "float32")
    balanced = Chip("balanced", 1e9, 1e9, GIB, 1e9)  # the prefill computes, decoding reads
    asked = []

    def stand_in(*given):
        asked.append(given)
        return balanced, devices, backend

    monkeypatch.setattr("ppo.planning.plan.target", stand_in)
    assert run("--stage=plan") == 0
    assert asked == [("host", 1, "float32")]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    rows = {row["name"]: row for row in plan["programs"]}
    rollout, prefill, decode = (rows[name] for name in ("rollout", "prefill", "decode"))
    assert prefill["flops"] > prefill["bytes"] and decode["flops"] < decode["bytes"]
    in_turn = prefill["roofline_seconds"] + 5 * decode["roofline_seconds"]
    assert rollout["roofline_seconds"] == pytest.approx(in_turn, rel=0.015)
    assert max(rollout["flops"], rollout["bytes"]) / 1e9 < 0.98 * in_turn


def test_a_search_takes_the_fastest_that_fits(run, tmp_path, monkeypatch):
    few = [Layout(MeshConfig(tensor=2), "dots", 1), Layout(MeshConfig(), "full", 1)]
    monkeypatch.setattr("pipeline.stages.plan.layouts_for", lambda devices, rows: few)
    small = ["--config.ppo.ppo_epochs=1", "--config.ppo.batch_size=2", "--config.plan.search=True"]
    assert run("--stage=plan", *small) == 0
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    others = plan["candidates"]
    assert len(others) == 1
    assert all(not o["fits"] or o["step_seconds"] >= plan["step_seconds"] for o in others)


def test_pairs_are_sampled_on_the_mesh_and_a_sarm_trained_beside_it(world, tmp_path, capsys):
    given = ["--config=configs/base.py", f"--policy_model={world}/policy", "--stage=prepare_data"]
    given += [f"--config.prepare_data.demos_jsonl={world}/demos.jsonl"]
    given += ["--config.prepare_data.max_new_tokens=6"]
    meshes = {"one": (), "two": ("--config.mesh.tensor=2", "--config.mesh.data=2")}
    for name, mesh in meshes.items():
        assert run_main(*given, *mesh, f"--workdir={tmp_path / name}") == 0
    pairs = [read_jsonl(tmp_path / name / "data" / "pairs.jsonl", {}) for name in meshes]
    assert len(pairs[0]) == len(pairs[1]) > 8
    same = sum(one == two for one, two in zip(*pairs, strict=True))
    assert same > 0.9 * len(pairs[0])  # a rounding may turn a draw
    options = "source_layer=1 latent_size=16 k=4 mode=0 sae_steps=2 sae_batch_tokens=8 aux_k=4"
    train = [f"--config.train_sarm.{option}" for option in options.split()]
    train += ["--stage=train_sarm", "--config.mesh.tensor=2", "--config.remat=full"]
    train += [f"--config.train_sarm.pairs_jsonl={tmp_path}/one/data/pairs.jsonl"]
    assert run_main(*given[:2], *train, f"--workdir={tmp_path}/sarm") == 0
    said = capsys.readouterr().err
    assert "train_sarm runs on one device: mesh data=1 fsdp=1 tensor=2 is for" in said
