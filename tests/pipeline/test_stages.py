"""Stages are found by name, declare what they read, and are added by adding a file."""

import logging
import subprocess
import sys

import pytest

from configs import base
from pipeline import stage, stages
from pipeline.options import field_value
from pipeline.runner import refuse_missing_inputs, run_stage, run_stages
from sarm_jax.io.errors import InputError
from tests import oracles
from tests.paths import ROOT


@pytest.mark.parametrize("name", stage.names())
def test_every_module_of_stages_is_a_stage(name):
    loaded = stage.load(name)
    assert loaded.name == name and loaded.summary.endswith(".")
    assert loaded.run.__module__ == f"pipeline.stages.{name}" and loaded.run.__doc__


def test_stages_come_after_those_that_make_what_they_read():
    order = [loaded.name for loaded in stage.load_all() if loaded.output]
    names = "prepare_data train_sae train_sarm identify train_probe human_latents probe train"
    assert order == [*names.split(), "evaluate", "report"]


def test_a_probe_is_trained_for_the_runs_that_read_one():
    config, wanted = base.get_config(), stage.load("train_probe").wanted
    assert not wanted(config)
    config.identify.pairs_jsonl = "pairs.jsonl"
    with config.unlocked():
        config.experiments.a = {"reward": {"beta": 1.0}}
        assert not wanted(config)
        config.experiments.b = {"reward": {"probe": "probes/dense_probe_logistic.safetensors"}}
    assert wanted(config)
    config.experiments = {}
    config.reward.probe = "a/dense_probe_mean_difference.safetensors"
    assert wanted(config)
    config.reward.probe = "another.safetensors"  # which somebody else has made
    assert not wanted(config)


def test_held_out_prompts_alone_ask_for_no_evaluation_of_a_reward_model_without_features(
    tmp_path, caplog
):
    """Training reads them as well, and takes a reward model without an SAE."""
    oracles.save_tiny_classifier(tmp_path, oracles.tiny_llama_config(), oracles.tiny_tokenizer())
    config, wanted = base.get_config(), stage.load("evaluate").wanted
    config.prompts_jsonl = config.eval_prompts_jsonl = "prompts.jsonl"
    for model in ("", str(tmp_path / "written_later")):
        config.sarm_model = model
        assert wanted(config)
    config.sarm_model = str(tmp_path)
    with caplog.at_level(logging.INFO):
        assert not wanted(config) and not wanted(config)
    (message,) = caplog.messages
    assert message.startswith(f"evaluate is skipped: sarm_model={tmp_path} has no SAE")
    for field in ("data_jsonl", "rm_bench", "rewardbench2", "prompts_jsonl", "runs"):
        named = config.copy_and_resolve_references()
        named.evaluate[field] = "a.jsonl"
        assert wanted(named)  # what is named is refused, and not skipped


def test_options_and_inputs_are_fields_of_the_config():
    for loaded in stage.load_all():
        for field in (*loaded.options, *(item.field for item in loaded.inputs)):
            field_value(base.get_config(), field)
        for item in loaded.inputs if loaded.output else ():
            # A file counts by its content, and its name is an option that counts as well.
            assert loaded.reads_option(item.field), (loaded.name, item.field)


def test_a_stage_is_one_file(tmp_path, monkeypatch):
    """A new module is found, ordered, run by its name and recorded, without any other change."""
    (tmp_path / "count.py").write_text(
        "from pipeline.inputs import Input\n"
        "from pipeline.stage import Stage\n"
        "def run(config, workdir):\n"
        "    text = open(config.prompts_jsonl).read()\n"
        "    (workdir / 'count.txt').write_text(str(len(text)))\n"
        "STAGE = Stage(name='count', summary='Prompts → their characters.',\n"
        "    validate=lambda config: None, run=run, options=('prompts_jsonl',),\n"
        "    inputs=(Input('prompts_jsonl'),), output='count.txt', makes=('count.txt',),\n"
        "    after=('prepare_data',), wanted=lambda config: bool(config.prompts_jsonl))\n"
    )
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(tmp_path)])
    config, prompts = base.get_config(), tmp_path / "prompts.jsonl"
    prompts.write_text("12345")
    config.prompts_jsonl = str(prompts)
    names = [loaded.name for loaded in stage.load_all()]
    assert names.index("count") > names.index("prepare_data")
    selected = [stage.load("count")]
    for text, action in (("12345", "done"), ("12345", "up to date"), ("123456", "has changed")):
        prompts.write_text(text)
        (outcome,) = run_stages(config, tmp_path, selected)
        assert action in outcome.action and (tmp_path / "count.txt").read_text() == str(len(text))
    sys.modules.pop("pipeline.stages.count")


def test_a_missing_input_names_the_stage_that_makes_it(tmp_path):
    config = base.get_config()
    config.sarm_model = f"{tmp_path}/sarm"
    config.human_latents.demos_jsonl = f"{tmp_path}/data/demos.jsonl"
    for field, path, maker in (
        ("human_latents.demos_jsonl", "data/demos.jsonl", "prepare_data"),
        ("sarm_model", "sarm", "train_sarm"),
    ):
        with pytest.raises(InputError) as error:
            run_stage("human_latents", config, tmp_path)
        message = f"{field}={tmp_path}/{path}: no such file; --stage={maker} makes it"
        assert str(error.value) == message
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
    assert not (tmp_path / "stages.json").exists()


def test_an_evaluation_without_policies_needs_none_of_their_files(tmp_path):
    config = base.get_config()
    config.policy_model = f"{tmp_path}/policy"
    config.eval_prompts_jsonl = f"{tmp_path}/data/prompts.jsonl"
    config.evaluate.human_jsonl = f"{tmp_path}/data/demos.jsonl"
    refuse_missing_inputs(stage.load("evaluate"), config, tmp_path)
    config.evaluate.runs = str(tmp_path)
    for field, path in (
        ("evaluate.human_jsonl", "data/demos.jsonl"),
        ("eval_prompts_jsonl", "data/prompts.jsonl"),
        ("policy_model", "policy"),
    ):
        with pytest.raises(InputError, match=f"^{field}={tmp_path}/{path}: no such file; "):
            refuse_missing_inputs(stage.load("evaluate"), config, tmp_path)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / path).write_text("")
    refuse_missing_inputs(stage.load("evaluate"), config, tmp_path)


def test_a_result_without_a_record_is_kept_without_its_inputs(tmp_path):
    config = base.get_config()
    config.policy_model = "owner/policy"
    config.train_sarm.pairs_jsonl = f"{tmp_path}/data/pairs.jsonl"
    (tmp_path / "sarm").mkdir()
    (outcome,) = run_stages(config, tmp_path, [stage.load("train_sarm")])
    assert outcome.action.startswith("kept")
    (tmp_path / "sarm").rmdir()
    with pytest.raises(InputError, match=r"^stage train_sarm: .* --stage=prepare_data makes it$"):
        run_stages(config, tmp_path, [stage.load("train_sarm")])


def test_help_waits_for_no_plots_tests_or_dashboards():
    heavy = "matplotlib scipy.stats tensorboardX torch ppo.train".split()
    program = f"import sys, main; print(*({set(heavy)} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stdout.split()) == (0, [])


@pytest.mark.parametrize(
    "content, says",
    [
        ("def get_config():\n    return 1 / 0\n", "bad.py:2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    pass\n", "bad.py: its get_config() must return a ConfigDict"),
        ("x = 1\n", "has no attribute 'get_config'"),
    ],
)
def test_a_config_that_is_none_is_named(tmp_path, content, says):
    (tmp_path / "bad.py").write_text(content)
    command = [sys.executable, "main.py", f"--config={tmp_path}/bad.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and says in done.stderr
