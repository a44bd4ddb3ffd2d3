"""Several runs of PPO from one config: what each changes, where it goes, what is done again."""

import json
import re
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base, reference
from pipeline import together
from pipeline.all_stages import run_all
from pipeline.experiments import runs_of, with_changes, with_runs
from pipeline.provenance import provenance
from pipeline.runner import run_stage, run_stages
from pipeline.stage import load
from ppo.learner import Learner
from ppo.tracking.guards import GuardStopError
from sarm_jax.io.errors import InputError
from tests.command import run_main
from tests.stages import replace_run

pytestmark = pytest.mark.slow


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
    with pytest.raises(InputError, match=r"experiment penalised: .*alpha_values was '0.1,0.1'"):
        run_all(config, tmp_path)


def test_experiments_at_once_give_the_numbers_of_one_at_a_time(world, tmp_path, monkeypatch):
    config = two_experiments(world)
    with config.unlocked():  # with one seed, what is the same for both would be sampled once
        config.experiments.penalised.ppo = ConfigDict({"seed": 1})
    loads = []
    load_weights = together.load_policy_model
    monkeypatch.setattr(
        together, "load_policy_model", lambda config: loads.append(1) or load_weights(config)
    )
    scorers, rollouts = [], []
    load_scorer, sample = together.load_reward_model, Learner.rollout_of_runs
    monkeypatch.setattr(
        together,
        "load_reward_model",
        lambda *args, **options: scorers.append(1) or load_scorer(*args, **options),
    )
    monkeypatch.setattr(
        Learner, "rollout_of_runs", lambda *args: rollouts.append(len(args[1])) or sample(*args)
    )
    run_stages(config, tmp_path / "one", [load("train")])
    assert len(loads) == len(scorers) == 2 and not rollouts
    config.experiments_at_once = 3  # more than there are
    outcomes = run_stages(config, tmp_path / "two", [load("train")])
    assert [outcome.stage for outcome in outcomes] == ["train baseline", "train penalised"]
    assert len(loads) == len(scorers) == 3  # one of the runs reads no features
    assert rollouts and set(rollouts) == {2}
    for name in ("baseline", "penalised"):
        one, two = (tmp_path / folder / "experiments" / name for folder in ("one", "two"))
        names = [{path.name.split(".tfevents")[0] for path in run.iterdir()} for run in (one, two)]
        assert names[0] == names[1]
        first, second = (json.loads((run / "summary.json").read_text()) for run in (one, two))
        for part in ("first_steps", "last_steps"):
            for key, value in first[part].items():
                assert second[part][key] == pytest.approx(value, rel=1e-4, abs=1e-4), key
    again = run_stages(config, tmp_path / "two", [load("train")])
    assert [outcome.action for outcome in again] == ["up to date"] * 2


def test_every_error_of_a_group_is_shown_at_once(caplog):
    def fail(error):
        def work():
            raise error

        return work

    works = [("a", fail(InputError("no file"))), ("b", fail(RuntimeError("odd")))]
    with pytest.raises(InputError, match="no file"):
        together.run_together([*works, ("c", fail(AssertionError("not run")))], at_once=2)
    assert "no file" in caplog.text and "odd" in caplog.text and "not run" not in caplog.text
    works[0] = ("a", fail(SystemExit(143)))
    with pytest.raises(SystemExit, match="143"):  # of a signal
        together.run_together([works[1], works[0]], at_once=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiments_at_once": 0}, r"experiments_at_once=0: must be at least 1"),
        ({"profile.start_step": 0}, r"profile.start_step=0: JAX traces one run at a time"),
        ({"track": "wandb"}, r"track=wandb: W&B has one run in a process"),
    ],
)
def test_what_allows_one_experiment_at_a_time(world, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("pipeline.stages.train.check_available", lambda tracking: None)
    config = two_experiments(world)
    config.ppo.total_steps = 4
    config.update_from_flattened_dict({"experiments_at_once": 2, **changes})
    with pytest.raises(InputError, match=message):
        run_all(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_a_guard_stops_leaves_the_others(world, tmp_path, monkeypatch):
    trained = []

    def run(config, workdir):
        trained.append(workdir.name)
        if workdir.name == "baseline":
            raise GuardStopError("step 1: stopped")

    replace_run(monkeypatch, "train", run)
    with pytest.raises(GuardStopError, match="experiment baseline: step 1: stopped"):
        run_stages(two_experiments(world), tmp_path, [load("train")])
    assert trained == ["baseline", "penalised"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"reward": {"tau": "1.0"}}, "experiments.penalised.reward.tau: no such option"),
        ({"ppo": {"total_steps": "2"}}, "penalised.ppo.total_steps='2': expected int"),
        ({"lora": 5}, "experiments.penalised.lora=5: expected options"),
        ({"evaluate": {"seed": 1}}, "experiments.penalised.evaluate: an experiment changes ppo,"),
        ({"dtype": "bfloat16"}, "experiments.penalised.dtype: an experiment changes ppo,"),
    ],
)
def test_an_experiment_changes_what_training_reads(world, changes, message):
    config = two_experiments(world)
    with config.unlocked():
        config.experiments.penalised = ConfigDict(changes)
    with pytest.raises(InputError, match=re.escape(message)):
        with_changes(config, "penalised")


def test_a_flag_that_experiments_set_is_refused(tmp_path, capsys):
    given = ["--config=configs/reference.py", f"--workdir={tmp_path / 'run'}"]
    assert run_main(*given, "--alpha_values=1,1,1") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--alpha_values=1,1,1: experiments of the config set it" in said
    assert "--config.experiments." in said and ".reward.alpha_values" in said


def test_a_name_is_no_path(world):
    config = two_experiments(world)
    with config.unlocked():
        config.experiments["a/b"] = ConfigDict()
    with pytest.raises(InputError, match=r"experiments\.a/b: expected a name"):
        runs_of(load("train"), config, Path("run"))


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
    """Each run has the options that the reference's run_experiments.sh passes."""
    config = reference.get_config()
    three = "@{workdir}/probes/selected_features.json:safety_harming[:3]"
    expected = {
        "baseline": ("", "", ""),
        "full_method": (three, "3,3,3", "0.1,0.1,0.1"),
        "ablation_alpha_02": (three, "3,3,3", "0.2,0.2,0.2"),
        "ablation_alpha_005": (three, "3,3,3", "0.05,0.05,0.05"),
        "ablation_tau_4": (three, "4,4,4", "0.1,0.1,0.1"),
        "ablation_tau_2": (three, "2,2,2", "0.1,0.1,0.1"),
        "verbosity_control": ("29733,53553,3402", "3,3,3", "0.1,0.1,0.1"),
    }
    assert list(config.experiments) == sorted(expected) or set(config.experiments) == set(expected)
    for name, lists in expected.items():
        reward = with_changes(config, name).reward
        assert (reward.penalize_features, reward.tau_values, reward.alpha_values) == lists
        assert reward.beta == 0
    assert config.ppo.total_steps == 100 and config.lora.rank == 16 and config.lora.alpha == 32


def test_a_stopped_run_leaves_the_others_to_a_single_stage_too(world, tmp_path, monkeypatch):
    trained = []

    def run(config, workdir):
        trained.append(workdir.name)
        raise GuardStopError("step 1: stopped")

    replace_run(monkeypatch, "train", run)
    with pytest.raises(GuardStopError, match="experiment baseline: step 1: stopped"):
        run_stage("train", two_experiments(world), tmp_path)
    assert trained == ["baseline", "penalised"]


@pytest.mark.parametrize("alone", [True, False])
def test_a_bad_option_of_the_last_experiment_is_found_before_the_first(
    world, tmp_path, monkeypatch, alone
):
    config = two_experiments(world)
    config.experiments.penalised.reward.tau_values = "1.0"
    replace_run(monkeypatch, "train", lambda *_: pytest.fail("trained"))
    with pytest.raises(
        InputError, match="experiment penalised: reward.tau_values has 1 values for 2"
    ):
        if alone:
            run_stage("train", config, tmp_path)
        else:
            run_stages(config, tmp_path, [load("train")])


def test_without_prompts_no_policies_are_compared(world):
    config = two_experiments(world)
    config.evaluate.prompts_jsonl = ""
    found = with_runs(config, Path("run"))
    assert not found.evaluate.runs and found.report.runs


@pytest.mark.parametrize("name", ["base", "human"])
def test_a_name_of_the_evaluation_is_refused(world, name):
    config = two_experiments(world)
    with config.unlocked():
        config.experiments[name] = ConfigDict()
    with pytest.raises(InputError, match=rf"experiments\.{name}: "):
        runs_of(load("train"), config, Path("run"))


def test_a_page_is_made_again_after_an_evaluation(world, tmp_path):
    """The report of several experiments also shows the evaluation beside them."""
    config = with_runs(two_experiments(world), tmp_path)
    (tmp_path / "eval").mkdir()
    before = provenance(load("report"), config, tmp_path)
    (tmp_path / "eval/policy.json").write_text("{}")
    after = provenance(load("report"), config, tmp_path)
    assert before.inputs != after.inputs


def test_the_folder_of_the_steering_files(tmp_path):
    """`--config=configs/reference.py:FOLDER`, from the command line to the options."""
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "pipeline.runner.run_stage", lambda stage, config, *_: sys.exit(config_of(config))
        )
        run_main(
            f"--config=configs/reference.py:{tmp_path}",
            "--stage=identify",
            f"--workdir={tmp_path / 'run'}",
        )
    assert [f"{tmp_path}/train/rewardbenchv2/safety.jsonl"] == SEEN


SEEN: list[str] = []


def config_of(config) -> int:
    SEEN.append(config.identify.pairs_jsonl.split(",")[0])
    return 0
