"""Records of the seeds of a study, by which several commands in one directory share a page."""

import copy
import dataclasses
import json
import logging

import pytest

from configs import demo
from pipeline import study
from pipeline.study_records import (
    FILE,
    WITHOUT_EFFECT,
    SeedOutcome,
    locked_seed,
    read_records,
    remove_record,
    seed_folder,
    study_options,
    write_record,
)
from sarm_jax.features.feature_names import NO_NAMES
from sarm_jax.io import secrets
from sarm_jax.io.errors import InputError

DONE = SeedOutcome(["baseline", "full"], pooled=True)


@pytest.fixture
def settings():
    return demo.get_config().to_dict()


def record(workdir, seed, settings, outcome=DONE):
    """Writes the record of a seed and returns its path."""
    folder = seed_folder(workdir, seed)
    folder.mkdir(exist_ok=True)
    write_record(folder, study_options(settings), outcome)
    return folder / FILE


def changed(settings, field, value):
    """Returns a copy of the options with one changed."""
    settings, (*sections, name) = copy.deepcopy(settings), field.split(".")
    holder = settings
    for section in sections:
        holder = holder[section]
    holder[name] = value
    return settings


def test_seeds_of_the_same_options_are_read_in_order(tmp_path, settings):
    stopped = SeedOutcome([], "no memory", in_training=True)
    for seed, outcome in ((10, DONE), (9, stopped), (0, DONE)):
        record(tmp_path, seed, settings, outcome)
    (tmp_path / "seed_x").mkdir()
    (tmp_path / "seed_3").mkdir()  # in training
    records = read_records(tmp_path, study_options(settings))
    assert list(records) == [0, 9, 10]
    assert records == {0: DONE, 9: stopped, 10: DONE}
    remove_record(tmp_path / "seed_9")
    remove_record(tmp_path / "seed_9")
    assert list(read_records(tmp_path, study_options(settings))) == [0, 10]


@pytest.mark.parametrize("field", ["ppo.learning_rate", "lab.conditions", "dtype", "reward.unit"])
def test_a_seed_of_other_options_is_left_out_and_named(tmp_path, settings, caplog, field):
    record(tmp_path, 0, settings)
    record(tmp_path, 1, changed(settings, field, "another"))
    with caplog.at_level(logging.WARNING):
        assert list(read_records(tmp_path, study_options(settings))) == [0]
    (message,) = caplog.messages
    assert message.startswith(f"the page leaves out seed 1 of other options: {field} was 'another'")


def test_a_seed_from_before_an_option_existed_is_not_left_out(tmp_path, settings):
    path = record(tmp_path, 0, settings)
    content = json.loads(path.read_text())
    del content["options"]["train_sarm"]["sae_model"]
    path.write_text(json.dumps(content))
    assert list(read_records(tmp_path, study_options(settings))) == [0]


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_options_without_an_effect_on_results_may_differ(tmp_path, settings, field):
    record(tmp_path, 0, changed(settings, field, "another"))
    assert list(read_records(tmp_path, study_options(settings))) == [0]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"options": {}}',
        '{"options": [], "finished": [], "stopped": "", "in_training": false, "pooled": false}',
        '{"options": {}, "finished": 3, "stopped": "", "in_training": false, "pooled": false}',
        '{"options": {}, "finished": [3], "stopped": "", "in_training": false, "pooled": false}',
        '{"options": {}, "finished": [], "stopped": 3, "in_training": false, "pooled": false}',
        '{"options": {}, "finished": [], "stopped": "", "in_training": 0, "pooled": false}',
        '{"options": {}, "finished": [], "stopped": "", "in_training": false, "pooled": "no"}',
        '{"options": {}, "finished": [], "stopped": "", "in_training": false, "more": 1}',
    ],
)
def test_a_damaged_record_is_left_out_and_named(tmp_path, settings, caplog, content):
    path = record(tmp_path, 0, settings)
    record(tmp_path, 1, settings)
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert list(read_records(tmp_path, study_options(settings))) == [1]
    (message,) = caplog.messages
    assert message.startswith(f"the page leaves out seed 0: {path}: ")


def test_the_last_of_several_commands_draws_the_page_of_all_seeds(tmp_path, monkeypatch):
    config, pages = demo.get_config(), []

    def run_seed(settings, workdir, seed, level, task_file):
        outcome = SeedOutcome(["baseline"], "stopped" if seed == 11 else "", pooled=seed == 3)
        record(workdir, seed, settings, outcome)
        return outcome

    def write_study(workdir, finished, conditions, stopped, names, pooled, task):
        assert (workdir / ".lab.json.lock").exists()
        pages.append((list(finished), dict(stopped), pooled))
        return workdir / "lab.html", "the result"

    monkeypatch.setattr(study, "check", lambda *_: None)
    monkeypatch.setattr(study, "run_seed", run_seed)
    monkeypatch.setattr(study, "write_study", write_study)
    for seeds, learning_rate in (("20-21", 2e-3), ("3", 2e-3), ("4", 1e-3), ("21,20", 2e-3)):
        config.lab.seeds, config.ppo.learning_rate = seeds, learning_rate
        study.run_study(config, tmp_path)
    config.lab.seeds = "11"
    with pytest.raises(InputError, match="^1 of 1 seeds stopped; seed 11: stopped$"):
        study.run_study(config, tmp_path)
    assert pages == [
        ([20, 21], {}, []),
        ([3, 20, 21], {}, [3]),
        ([4], {}, []),  # of another learning rate
        ([3, 20, 21], {}, [3]),
        ([3, 11, 20, 21], {11: "stopped"}, [3]),
    ]
    assert not list(tmp_path.glob(".*"))  # no lock is left


REFUSED = SeedOutcome(["baseline"], "stage train: ppo.learning_rate=0.1 differs")


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({0: REFUSED}, True),
        ({0: SeedOutcome([], REFUSED.stopped)}, True),
        ({0: SeedOutcome(["baseline", "penalty"], "pool: no file")}, True),  # without the pool
        ({0: dataclasses.replace(REFUSED, in_training=True)}, False),
        ({0: SeedOutcome(["baseline"])}, False),  # asked for fewer conditions
        ({0: REFUSED, 1: SeedOutcome(["baseline"])}, True),  # has a result that the page lacks
        ({0: SeedOutcome(["baseline", "penalty"], "", pooled=True)}, False),
    ],
)
def test_a_refused_call_does_not_replace_a_page_with_more_results(tmp_path, monkeypatch, own, kept):
    runs = {"baseline": [{"seed": 0}], "penalty": [{"seed": 0}]}
    content = json.dumps({"conditions": runs, "best_of_n": {"seeds": [0]}})
    (tmp_path / "lab.json").write_text(content)
    (tmp_path / "lab.html").write_text("the page")
    drawn = (tmp_path / "lab.html", "the result")
    monkeypatch.setattr(study, "write_study", lambda *_, **__: drawn)
    arguments = (demo.get_config(), tmp_path, own, ["baseline", "penalty"], NO_NAMES)
    page, result = study.draw_page(*arguments)
    assert page == drawn[0]
    assert result == (
        "The page is left as it was: it has results that this call does not have."
        if kept
        else "the result"
    )
    for damaged in ("", "[]", "{}", '{"conditions": 3}', '{"conditions": {"full": [4]}}'):
        (tmp_path / "lab.json").write_text(damaged)
        assert study.draw_page(*arguments) == drawn
    (tmp_path / "lab.json").write_text(content)
    (tmp_path / "lab.html").unlink()
    assert study.draw_page(*arguments) == drawn


@pytest.mark.parametrize("other", [True, False])
@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize(
    "outcome",
    [
        REFUSED,
        dataclasses.replace(REFUSED, finished=["kl_0.1"]),
        dataclasses.replace(REFUSED, in_training=True),
        DONE,
    ],
)
def test_a_call_with_other_options_that_is_refused_keeps_the_record(
    tmp_path, settings, monkeypatch, outcome, other, made
):
    """Otherwise the next call with the earlier options would leave its results out of the page."""
    monkeypatch.setattr(study, "show_progress", lambda *_: None)
    own = changed(settings, "ppo.learning_rate", 0.1) if other else settings
    folder = record(tmp_path, 0, settings).parent
    world = folder / "stages.json"
    world.write_text("{}")

    def run(config, folder):
        if made:
            world.write_text('{"identify": {"options": {}, "inputs": {}, "finished": "now"}}')
        return outcome

    monkeypatch.setattr(study, "_run_conditions", run)
    assert study.run_seed(own, tmp_path, 0) == outcome
    kept = other and not made and outcome.refused
    assert read_records(tmp_path, study_options(settings)) == (
        {0: DONE} if kept else {} if other else {0: outcome}
    )
    if other and not kept:
        ran = study_options(own)
        assert list(read_records(tmp_path, ran)) == [0]


def test_a_seed_that_another_process_runs_is_refused(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(study, "show_progress", lambda *_: None)
    path = record(tmp_path, 0, settings)
    with locked_seed(tmp_path, 0):
        outcome = study.run_seed(settings, tmp_path, 0)
    assert outcome == SeedOutcome([], f"--workdir={tmp_path}: another process runs seed 0")
    assert path.exists()


def test_one_process_at_a_time_runs_a_seed(tmp_path):
    with locked_seed(tmp_path, 0), locked_seed(tmp_path, 1):
        refused = pytest.raises(InputError, match=r"^--workdir=.*: another process runs seed 0$")
        with refused, locked_seed(tmp_path, 0):
            pass
    assert not list(tmp_path.iterdir())


def test_a_record_has_no_secrets(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(secrets, "_secrets", [("hidden-value", "MY_TOKEN")])
    path = record(tmp_path, 0, settings, SeedOutcome([], "row 1: found hidden-value"))
    assert json.loads(path.read_text())["stopped"] == "row 1: found [MY_TOKEN]"
