"""A seed of a study: what stops it, what the others keep, and a task's file that changes."""

import json
from unittest.mock import Mock

import pytest

from configs import demo
from pipeline import study, study_runs
from pipeline.study_options import check_study
from pipeline.study_records import SeedOutcome
from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.io.json_files import write_json


@pytest.fixture
def settings(monkeypatch):
    """The options of a study whose stages do nothing, and whose messages are not set up."""
    monkeypatch.setattr(study, "show_progress", lambda *_: None)
    monkeypatch.setattr(study, "run_stages", lambda *_: None)
    config = demo.get_config()
    config.lab.conditions = "baseline,penalty,full"
    return config.to_dict()


def ending(*ends):
    """Returns what takes the place of `run_group` and yields (condition, error) pairs."""

    def run_group(config, folder, group):
        yield from [(name, error) for name, error in ends if name in group]

    return run_group


def raising(error):
    def raise_error(*_):
        raise error

    return raise_error


def test_a_training_that_diverges_stops_its_seed_alone(settings, tmp_path, monkeypatch):
    error = TrainingStoppedError("the loss became nan: training diverged")
    monkeypatch.setattr(study, "run_stages", raising(error))
    outcome = study.run_seed(settings, tmp_path, 0)
    assert outcome == SeedOutcome([], str(error), in_training=True)
    assert json.loads((tmp_path / "seed_0/study.json").read_text())["stopped"] == str(error)


def test_a_reward_model_that_diverges_leaves_the_pool_of_the_others(
    settings, tmp_path, monkeypatch
):
    ranked = []
    settings["lab"] |= {"conditions": "baseline", "ranked_conditions": "ties,penalty"}
    settings["lab"]["pool_responses"] = 4
    monkeypatch.setattr(study, "run_group", ending(("baseline", None)))
    monkeypatch.setattr(study, "train_reward_model", raising(TrainingStoppedError("nan")))
    monkeypatch.setattr(study, "rank_pool", lambda config, folder, names: ranked.append(names))
    outcome = study.run_seed(settings, tmp_path, 0)
    assert outcome == SeedOutcome(["baseline"], "ties: nan", in_training=True, pooled=True)
    assert ranked == [["baseline", "penalty"]]


def test_every_condition_that_stopped_is_named(settings, tmp_path, monkeypatch):
    first, last = (TrainingStoppedError(f"step {n}: a guard") for n in (3, 5))
    ends = ending(("baseline", first), ("penalty", None), ("full", last))
    monkeypatch.setattr(study, "run_group", ends)
    outcome = study.run_seed(settings, tmp_path, 0)
    reasons = "baseline: step 3: a guard; full: step 5: a guard"
    assert outcome == SeedOutcome(["penalty"], reasons, in_training=True)


def test_a_condition_without_a_result_leaves_those_of_its_group(tmp_path, monkeypatch):
    def write_result(config, folder, name):
        if name == "full":
            raise InputError("the scores are all equal")

    monkeypatch.setattr(study_runs, "condition_config", lambda config, folder, name: config)
    monkeypatch.setattr(study_runs, "train_condition", lambda *_: None)
    monkeypatch.setattr(study_runs, "write_result", write_result)
    ended = []
    with pytest.raises(InputError, match="^condition full: the scores are all equal$"):
        for end in study_runs.run_group(demo.get_config(), tmp_path, ["full", "baseline"]):
            ended.append(end)
    assert ended == [("baseline", None)]


def test_a_reason_that_conditions_of_a_group_share_is_given_once(tmp_path, monkeypatch):
    def train_condition(config, workdir, name):
        raise InputError("a gate failed" if name != "full" else "no carriers")

    monkeypatch.setattr(study_runs, "condition_config", lambda config, folder, name: config)
    monkeypatch.setattr(study_runs, "train_condition", train_condition)
    expected = "^condition baseline, penalty: a gate failed; condition full: no carriers$"
    with pytest.raises(InputError, match=expected):
        list(study_runs.run_group(demo.get_config(), tmp_path, ["baseline", "penalty", "full"]))


def test_a_condition_with_bad_options_leaves_those_of_its_group(tmp_path, monkeypatch):
    def condition_config(config, folder, name):
        if name == "full":
            raise InputError("reward.latent_indices: no carriers")
        return config

    monkeypatch.setattr(study_runs, "condition_config", condition_config)
    monkeypatch.setattr(study_runs, "train_condition", lambda *_: None)
    monkeypatch.setattr(study_runs, "write_result", lambda *_: None)
    ended = []
    with pytest.raises(InputError, match=r"^condition full: reward\.latent_indices: no carriers$"):
        for end in study_runs.run_group(demo.get_config(), tmp_path, ["full", "baseline"]):
            ended.append(end)
    assert ended == [("baseline", None)]


def test_a_run_that_a_guard_stopped_and_that_was_resumed_has_no_further_point(
    tmp_path, monkeypatch
):
    """The evaluation of the step on which it stopped is none of an uninterrupted run."""
    config, read = demo.get_config(), []
    config.ppo.total_steps, config.ppo.eval_every = 9, 2
    for name in ("baseline", "probes"):
        (tmp_path / name).mkdir()
    write_json(tmp_path / "baseline/summary.json", {"seconds": 1.0})
    write_json(tmp_path / "probes/selected_features.json", {})
    steps = (0, 2, 4, 5, 6, 8, 9)
    monkeypatch.setattr(study_runs, "read_evaluations", lambda _: [{"step": n} for n in steps])
    monkeypatch.setattr(study_runs, "load_reward_model", lambda _: Mock())
    monkeypatch.setattr(study_runs, "run_result", lambda rows, *_, **__: read.extend(rows) or {})
    study_runs.write_result(config, tmp_path, "baseline")
    assert [row["step"] for row in read] == [0, 2, 4, 6, 8, 9]


def test_a_study_has_no_experiments():
    config = demo.get_config()
    with config.unlocked():
        config.experiments.weak = {"ppo": {"kl_coef": 0.1}}
    with pytest.raises(InputError, match="^experiments=weak: the study trains under lab.cond"):
        check_study(config)


def test_a_task_file_that_changes_while_a_study_runs_is_refused(settings, tmp_path, monkeypatch):
    """Later conditions would be measured by other rules than earlier ones."""
    path, folder = tmp_path / "task.py", tmp_path / "study"
    path.write_text("TASK = 1")
    settings["lab"] |= {"task": str(path), "conditions": "baseline"}

    def run_group(config, folder, group):
        path.write_text("TASK = 2")
        yield "baseline", None

    monkeypatch.setattr(study, "run_group", run_group)
    outcome = study.run_seed(settings, folder, 0)
    assert not outcome.finished
    assert outcome.stopped.startswith(f"lab.task={path}: the file has changed while the study ran")
    assert not (folder / "seed_0/study.json").exists()
