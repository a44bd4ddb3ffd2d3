"""Several runs of PPO from one config: what each changes, where it goes, what is done again."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base, reference
from configs.experiment_runs import runs_of, with_changes, with_runs
from configs.pipeline import run_stages
from configs.stages.all import run_all
from ppo.guards import GuardStopError
from sarm_jax.errors import InputError


def two_experiments(world: Path) -> ConfigDict:
    """Two steps of two runs on the tiny models, one of them penalised, and what compares them."""
    config = base.get_config()
    config.policy_model, config.sarm_model = str(world / "policy"), str(world / "sarm")
    config.prompts_jsonl = config.evaluate.prompts_jsonl = str(world / "demos.jsonl")
    config.sarm_max_length = 256
    config.ppo.update(
        {"total_steps": 2, "batch_size": 4, "max_new_tokens": 6, "calibration_batches": 1}
    )
    with config.unlocked():
        config.experiments = ConfigDict(
            {
                "baseline": {},
                "penalised": {
                    "reward": {
                        "penalize_features": "1,2",
                        "tau_values": "0.0,0.0",
                        "alpha_values": "0.1,0.1",
                    }
                },
            }
        )
    return config


def test_from_one_config_to_a_page_on_all_runs(world, tmp_path, capsys):
    config = two_experiments(world)
    run_all(config, tmp_path)
    shown = capsys.readouterr().out
    assert "train baseline" in shown and "train penalised" in shown
    for name, features in (("baseline", ""), ("penalised", "1,2")):
        folder = tmp_path / "experiments" / name
        assert (folder / "adapter/adapter_config.json").is_file()
        settings = json.loads((folder / "config.json").read_text())
        assert settings["reward"]["penalize_features"] == features
        assert json.loads((folder / "summary.json").read_text())["experiment_name"] == name
    policy = json.loads((tmp_path / "eval/policy.json").read_text())
    assert set(policy["runs"]) >= {"base", "baseline", "penalised"}
    page = (tmp_path / "report.html").read_text()
    assert "baseline" in page and "penalised" in page
    run_all(config, tmp_path)
    again = capsys.readouterr().out
    assert again.count("up to date") == 4
    config.experiments.penalised.reward.alpha_values = "0.2,0.2"
    with pytest.raises(InputError, match=r"stage train penalised: .*alpha_values was '0.1,0.1'"):
        run_all(config, tmp_path)


def test_a_run_that_a_guard_stops_leaves_the_others(world, tmp_path, monkeypatch):
    trained = []

    def run(config, workdir):
        trained.append(workdir.name)
        if workdir.name == "baseline":
            raise GuardStopError("step 1: stopped")

    monkeypatch.setattr("configs.stages.train.run", run)
    with pytest.raises(GuardStopError, match="experiment baseline: step 1: stopped"):
        run_stages(two_experiments(world), tmp_path, ["train"])
    assert trained == ["baseline", "penalised"]


def test_an_experiment_changes_options_that_exist(world):
    config = two_experiments(world)
    config.experiments.penalised.unlock()
    config.experiments.penalised.reward.tau = "1.0"
    with pytest.raises(InputError, match=r"experiments\.penalised: .*tau"):
        with_changes(config, "penalised")


def test_a_name_is_no_path(world):
    config = two_experiments(world)
    with config.unlocked():
        config.experiments["a/b"] = ConfigDict()
    with pytest.raises(InputError, match=r"experiments\.a/b: expected a name"):
        runs_of("train", config, Path("run"))


def test_runs_that_are_named_stay(world):
    config = two_experiments(world)
    config.report.runs = "mine=elsewhere"
    found = with_runs(config, Path("run"))
    assert found.report.runs == "mine=elsewhere"
    assert found.evaluate.runs == (
        "baseline=run/experiments/baseline,penalised=run/experiments/penalised"
    )
    assert not config.evaluate.runs


def test_the_references_experiments():
    """What its run_experiments.sh passes for each run."""
    config = reference.get_config()
    three = "@{workdir}/probes/selected_features.json:safety_harming[:3]"
    expected = {
        "baseline": ("", "", ""),
        "full_method": (three, "3.0,3.0,3.0", "0.1,0.1,0.1"),
        "ablation_alpha_02": (three, "3.0,3.0,3.0", "0.2,0.2,0.2"),
        "ablation_alpha_005": (three, "3.0,3.0,3.0", "0.05,0.05,0.05"),
        "ablation_tau_4": (three, "4.0,4.0,4.0", "0.1,0.1,0.1"),
        "ablation_tau_2": (three, "2.0,2.0,2.0", "0.1,0.1,0.1"),
        "verbosity_control": ("29733,53553,3402", "3.0,3.0,3.0", "0.1,0.1,0.1"),
    }
    assert list(config.experiments) == sorted(expected) or set(config.experiments) == set(expected)
    for name, lists in expected.items():
        reward = with_changes(config, name).reward
        assert (reward.penalize_features, reward.tau_values, reward.alpha_values) == lists
        assert reward.beta == 0
    assert config.ppo.total_steps == 100 and config.lora.rank == 16 and config.lora.alpha == 32
