"""Scripts that read finished runs refuse bad input with exit code 2 and one clear last line."""

import importlib
import logging
import sys

import pytest

from configs import demo
from pipeline.study_records import SeedOutcome, study_options, write_record
from sarm_jax.io.json_files import write_json

NO_STUDY = "it is no study, or no seed has"
REFUSALS = [  # script, its arguments, the last line
    ("evasion", "", "required: study"),
    ("evasion", "{root}/gone", f"gone: has no seed_*/; {NO_STUDY} begun"),
    ("evasion", "{root}/empty", NO_STUDY),
    ("evasion", "{root}/file", NO_STUDY),
    ("evasion", "{root}/other", NO_STUDY),
    ("evasion", "{root}/half", "--conditions=baseline,penalty: {root}/half has no finished run of"),
    ("evasion", "{root}/half --conditions=x", "--conditions=x: found 'x', expected one of"),
    ("evasion", "{root}/half --conditions=", "--conditions=: found ''"),
    ("masking", "", "required: studies"),
    ("masking", "{root}/gone", f"gone: has no seed_*/study.json; {NO_STUDY} ended"),
    ("masking", "{root}/other", NO_STUDY),
    ("masking", "{root}/broken", "seed_0/study.json: not the record of a seed"),
    ("masking", "{root}/half", "selected_features.json: cannot be read"),
    ("shortcut_matrix", "", "required: studies"),
    ("shortcut_matrix", "{root}/gone", NO_STUDY),
    ("shortcut_matrix", "{root}/broken", "seed_0/study.json: not the record of a seed"),
    ("shortcut_matrix", "{root}/half", "lab.json: cannot be read"),
    ("early_stopping", "", "required: study"),
    ("early_stopping", "{root}/gone", NO_STUDY),
    ("early_stopping", "{root}/other", NO_STUDY),
    ("early_stopping", "{root}/half", "baseline/result.json: cannot be read"),
    ("guards_on_runs", "", "required: runs"),
    ("guards_on_runs", "{root}/gone", "gone: no such directory"),
    ("guards_on_runs", "{root}/empty", "empty: no run (no summary.json)"),
    ("guards_on_runs", "{root}/empty {root}/file", "empty and 1 more: no run"),
    ("guards_on_runs", "{root}/run", "run/config.json: cannot be read"),
    ("after_the_fact", "", "give --list, or --pairs and models"),
    ("after_the_fact", "--list={root}/gone", "feature_scores.safetensors: cannot be read"),
    ("after_the_fact", "--pairs={root}/gone x=y:z", "gone: cannot be read"),
    ("after_the_fact", "--pairs={root}/gone x=y", "x=y: expected NAME=REWARD_MODEL:WORKDIR"),
]


@pytest.fixture
def root(tmp_path):
    """A directory with places that are no study, or not a whole one."""
    for name in ("empty", "other/seed_x", "broken/seed_0", "half/seed_0", "run"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("{}")
    write_json(tmp_path / "broken/seed_0/study.json", {})
    write_json(tmp_path / "run/summary.json", {})
    options = study_options(demo.get_config().to_dict())
    write_record(tmp_path / "half/seed_0", options, SeedOutcome([]))
    return tmp_path


@pytest.mark.parametrize(("script", "arguments", "message"), REFUSALS)
def test_bad_input_is_refused(script, arguments, message, root, monkeypatch, capsys):
    words = arguments.format(root=root).split()
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{script}").main()
    shown = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert shown[-1].startswith(f"{script}: error: ")
    assert message.format(root=root) in shown[-1]
    assert logging.root.manager.disable == logging.NOTSET  # also for what runs after it
