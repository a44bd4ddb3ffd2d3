"""Working directories and files whose names contain what separates something in an option."""

import json

import pytest

from configs import base
from pipeline.changes import change
from pipeline.cli import fill_in
from pipeline.experiments import with_runs
from pipeline.inputs import LISTS, MODELS, Input, Kind
from pipeline.preflight import _is_future
from pipeline.provenance import provenance
from pipeline.stage import Stage, is_list, load_all
from sarm_jax.io.path_lists import escaped

NAMES = [
    "plain", "lr=0.1", "a,b", "a:b", "@a", "[a]", "x[:0]", "a b", " a ", "a\\", "a\\,b", "%s %(x)d",
    "{workdir}", "\udc80", "日本", "a=b,c:d@e[:1]", "=", ",", ":",
]  # fmt: skip
INPUTS = [(stage, item) for stage in load_all() if stage.output for item in stage.inputs]
MOVED = [(stage, item) for stage, item in INPUTS if stage.name != "report"]  # it names its folder
SHORT = NAMES[::4]


def identifier(value) -> str:
    return value.name if isinstance(value, Stage) else value.field


def value_of(item: Input, folder: str = "{workdir}") -> str:
    """Returns a value of the field that names a file, or a run or model, in a folder."""
    values = {
        Kind.FILE: f"{folder}/f.json",
        Kind.ROWS: f"{folder}/f.json",
        Kind.FILES: f"{folder}/f.json,{folder}/g.json",
        Kind.NAMED_FILES: f"n={folder}/f.json,{folder}/g.json",
        Kind.RUNS: f"n={folder}/run,{folder}/run2",
        Kind.LIST: f"1,@{folder}/f.json:tau[:1],2,@{folder}/g.json:tau",
    }
    return values.get(item.kind, f"{folder}/model")


def make(workdir):
    """Writes what `value_of` names, and returns the files."""
    names = ["f.json", "g.json", "model/config.json", "run/adapter/a", "run2/adapter/a"]
    for path in (paths := [workdir / name for name in names]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"tau": [1.0], "path": path.name}))
    return paths


def with_value(item: Input, value: str, workdir):
    config = base.get_config()
    config.update_from_flattened_dict({item.field: value})
    return fill_in(config, workdir)


def recorded(stage: Stage, config, workdir):
    made_from = provenance(stage, config, workdir / "out")
    return {"options": json.loads(json.dumps(made_from.options)), "inputs": made_from.inputs}


@pytest.mark.parametrize("stage, item", INPUTS, ids=identifier)
def test_every_file_that_is_read_has_its_digest_recorded(stage, item, tmp_path):
    for name in NAMES if item.kind in LISTS else SHORT:
        workdir = tmp_path / name
        files = make(workdir)
        config = with_value(item, value_of(item), workdir)
        paths = item.paths(config, workdir)
        assert paths and all(path.exists() for path in paths), (name, paths)
        read = [f for f in files if any(f.is_relative_to(path) for path in paths)]
        assert len(read) == (1 if item.kind in (Kind.FILE, Kind.ROWS, *MODELS) else 2)
        before = recorded(stage, config, workdir)
        assert {str(file) for file in read} <= before["inputs"].keys()
        assert change(stage, before, provenance(stage, config, workdir / "out")) is None
        for file in read:
            content = file.read_text()
            file.write_text(content + " ")
            changed = change(stage, before, provenance(stage, config, workdir / "out"))
            assert changed == f"{file} has changed"
            file.write_text(content)


@pytest.mark.parametrize("stage, item", MOVED, ids=identifier)
def test_what_was_moved_is_the_same(stage, item, tmp_path, monkeypatch):
    for number, name in enumerate(SHORT):
        place = tmp_path / str(number)
        workdir, moved = place / "old", place / name
        make(workdir)
        config = with_value(item, value_of(item), workdir)
        before = recorded(stage, config, workdir)
        workdir.rename(moved)
        config = with_value(item, value_of(item), moved)
        assert change(stage, before, provenance(stage, config, moved / "out")) is None
        monkeypatch.chdir(moved)
        for folder in (".", "./", f"../{name}", f"..//{name}/."):
            if "{workdir}" in folder:
                continue  # it would be filled in
            text = value_of(item, escaped(folder) if item.kind in LISTS else folder)
            if item.kind is Kind.RUNS and not folder.strip("./"):
                continue  # an unnamed run is called like its folder
            config = with_value(item, text, moved)
            assert change(stage, before, provenance(stage, config, moved / "out")) is None


@pytest.mark.parametrize("name", NAMES)
def test_experiments_may_be_anywhere(name, tmp_path):
    config = base.get_config()
    with config.unlocked():
        config.experiments.one = {"reward": {"tau_values": "@{workdir}/f.json:tau"}}
    workdir = tmp_path / name
    make(workdir)
    filled = fill_in(config, workdir)
    assert filled.experiments.one.reward.tau_values == f"@{escaped(str(workdir))}/f.json:tau"
    runs = Input("report.runs", Kind.RUNS).paths(with_runs(filled, workdir), workdir)
    assert runs == [workdir / "experiments" / "one"]
    assert not _is_future(filled.experiments.one.reward.tau_values, workdir)
    assert _is_future(f"@{escaped(str(workdir))}/gone.json:tau", workdir)


def test_fields_that_are_lists():
    assert is_list("reward.tau_values") and is_list("experiments.a.reward.tau_values")
    assert is_list("evaluate.runs") and is_list("identify.pairs_jsonl")
    assert not is_list("prompts_jsonl") and not is_list("policy_model")
