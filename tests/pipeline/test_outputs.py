"""Obstacles to a stage's files, stages at the same time, and the remains of a refused run."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from configs import base
from pipeline import preflight
from pipeline.changes import Provenance
from pipeline.inputs import Kind
from pipeline.provenance import Records, check_claim, claim_workdir
from pipeline.runner import run_stage
from pipeline.stage import load, load_all
from pipeline.stages.train import is_taken
from sarm_jax.io.errors import InputError
from tests.stages import replace_run

CONFIGS = {"prepare_data": ["demonstrations", "benchmarks", "lab"]}


def config_of(stage: str, variant: str):
    config = base.get_config()
    config.policy_model, config.sarm_model = "owner/policy", "owner/sarm"
    config.probe.feature, config.probe.data_jsonl = "3,7", "owner.jsonl"
    if stage == "prepare_data":
        config.prepare_data.source = variant
    return config


def targets(stage, config):
    names = stage.makes if stage.writes is None else stage.writes(config)
    return [name for name in names if "*" not in name]


CASES = [
    (stage.name, variant, name)
    for stage in load_all()
    for variant in CONFIGS.get(stage.name, [""])
    for name in targets(stage, config_of(stage.name, variant))
]


@pytest.mark.parametrize("name, variant, target", CASES)
def test_what_is_in_the_way_is_found_before_the_work(name, variant, target, tmp_path, monkeypatch):
    worked = []
    replace_run(monkeypatch, name, lambda *_: worked.append(1))
    monkeypatch.setattr("pipeline.runner.check_call", lambda *_: None)
    config = config_of(name, variant)
    path = tmp_path / target
    obstacles = [path.touch if target.endswith("/") else partial(path.mkdir, parents=True)]
    if path.parent != tmp_path:
        obstacles.append(path.parent.touch)
    for make in obstacles:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        make()
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="expected a f|is not a folder") as error:
            run_stage(name, config, tmp_path)
        assert str(path if make is obstacles[0] else path.parent) in str(error.value)
        stage = load(name)
        with pytest.raises(InputError):
            stage.check_outputs(config, tmp_path)
        assert not worked and sorted(tmp_path.rglob("*")) == before
        for left in reversed(before):
            left.rmdir() if left.is_dir() else left.unlink()
    if target.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    load(name).check_outputs(config, tmp_path)  # what an earlier call has written is not in the way


def test_a_file_in_the_place_of_all_experiments(tmp_path, monkeypatch):
    replace_run(monkeypatch, "train", lambda *_: pytest.fail("it runs"))
    monkeypatch.setattr("pipeline.runner.check_call", lambda *_: None)
    config = config_of("train", "")
    config.prompts_jsonl = "a.jsonl"
    with config.unlocked():
        config.experiments.one = {"ppo": {"seed": 1}}
    (tmp_path / "experiments").touch()
    with pytest.raises(InputError, match="experiments is not a folder"):
        run_stage("train", config, tmp_path)


def test_all_finds_what_is_in_the_way_before_the_first_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "check_input", lambda *_: None)
    config = config_of("probe", "")
    config.evaluate.data_jsonl = "a.jsonl"
    (tmp_path / "report.html").mkdir()
    stages = [load("probe"), load("report")]
    with pytest.raises(InputError, match=r"report\.html: is a folder"):
        preflight.check(config, tmp_path, stages)


def test_a_stage_runs_once_at_a_time(tmp_path, monkeypatch):
    inside, go_on = threading.Event(), threading.Event()

    def wait(config, workdir):
        inside.set()
        assert go_on.wait(30)
        (workdir / "human_latents.safetensors").touch()

    replace_run(monkeypatch, "human_latents", wait)
    replace_run(monkeypatch, "probe", lambda *_: None)
    config = config_of("probe", "")
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_stage, "human_latents", config, tmp_path)
        assert inside.wait(30)
        record = (tmp_path / "stages.json").read_text()
        for _ in range(20):
            with pytest.raises(InputError, match="another process runs --stage=human_latents"):
                run_stage("human_latents", config, tmp_path)
        assert (tmp_path / "stages.json").read_text() == record
        run_stage("probe", config, tmp_path)  # another output
        go_on.set()
        first.result()
    assert all(map(Records(tmp_path).finished, ("human_latents", "probe")))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"human_latents.safetensors", "stages.json"}


def test_records_of_many_stages_at_once_are_all_kept(tmp_path):
    def record(number: int) -> None:
        for n in range(30):
            with Records(tmp_path).recording(f"{number}", Provenance({"n": n}, {})):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(record, range(8)))
    stages = Records(tmp_path).stages
    assert {name: entry["options"] for name, entry in stages.items()} == {
        str(number): {"n": 29} for number in range(8)
    }
    assert all(entry["finished"] for entry in stages.values())


@pytest.mark.parametrize(
    "error",
    [InputError("the scores are all the same"), MemoryError(), RuntimeError("RESOURCE_EXHAUSTED"),
     FileNotFoundError(2, "No such file", "x"), KeyboardInterrupt(), SystemExit(143)],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("claimed", [False, True], ids=["before the claim", "in the first step"])
@pytest.mark.parametrize("name", ["train", "train_sarm", "prepare_data"])
def test_a_run_without_a_finished_step_does_not_bar_another(
    tmp_path, monkeypatch, error, claimed, name
):
    ran = []

    def run(config, workdir):
        if name == "train" and claimed:
            claim_workdir(load("train"), config, workdir)
            (workdir / "metrics.csv").write_text("step\n")
        ran.append(1)
        if len(ran) == 1:
            raise error

    replace_run(monkeypatch, name, run)
    config = config_of(name, "lab" if name == "prepare_data" else "")
    with pytest.raises(type(error)):
        run_stage(name, config, tmp_path)
    for field, value in (("dtype", "bfloat16"), ("policy_model", "owner/other")):
        config.update_from_flattened_dict({field: value})
    run_stage(name, config, tmp_path)
    assert len(ran) == 2
    if name == "train" and claimed:
        assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_config_of_something_else_is_never_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"my": "own"}')
    with pytest.raises(InputError, match="another configuration"):
        check_claim(load("train"), config_of("train", ""), tmp_path)


@pytest.mark.parametrize("kept", ["metrics.csv", "checkpoints/2/x", "adapter/adapter_config.json"])
def test_what_a_run_has_done_bars_another(tmp_path, monkeypatch, kept):
    replace_run(monkeypatch, "train", lambda *_: pytest.fail("it runs"))
    train, config = load("train"), config_of("train", "")
    claim_workdir(train, config, tmp_path)
    check_claim(train, config, tmp_path)
    config.dtype = "bfloat16"
    check_claim(train, config, tmp_path)
    path = tmp_path / kept
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("step\n0\n")
    with pytest.raises(InputError, match="dtype was 'float32' and is now 'bfloat16'"):
        check_claim(train, config, tmp_path)


@pytest.mark.parametrize(
    "schedule, steps, allowed",
    [("constant", 101, True), ("constant", 10**6, True), ("constant", 99, False),
     ("linear", 101, False), ("cosine", 101, False), ("linear", 100, True)],
)  # fmt: skip
def test_more_steps_are_another_run_only_if_the_schedule_decays(tmp_path, schedule, steps, allowed):
    train, config = load("train"), config_of("train", "")
    config.ppo.lr_schedule = schedule
    claim_workdir(train, config, tmp_path)
    (tmp_path / "metrics.csv").write_text("step\n0\n")
    made_from = Provenance(train.recorded_options(config, tmp_path), {})
    with Records(tmp_path).recording("train", made_from):
        pass
    config.ppo.total_steps = steps
    now = Provenance(train.recorded_options(config, tmp_path), {})
    changed = Records(tmp_path).difference(train, now, continuing=True)
    assert (changed is None) == allowed
    assert (Records(tmp_path).difference(train, now) is None) == (steps == 100)  # up to date
    if allowed:
        check_claim(train, config, tmp_path)
        claim_workdir(train, config, tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert stored["ppo"]["total_steps"] == steps
        return
    with pytest.raises(InputError, match=f"ppo.total_steps was 100 and is now {steps}"):
        check_claim(train, config, tmp_path)


FILE_INPUTS = [
    (stage, variant, item)
    for stage in load_all()
    for variant in CONFIGS.get(stage.name, [""])
    for item in stage.inputs
    if item.kind in (Kind.FILE, Kind.ROWS, Kind.FILES, Kind.NAMED_FILES)
]


@pytest.mark.parametrize(
    "stage, variant, item", FILE_INPUTS, ids=[f"{s.name}-{v}-{i.field}" for s, v, i in FILE_INPUTS]
)
def test_a_stage_does_not_replace_what_it_reads(stage, variant, item, tmp_path):
    """Neither under the name of its output nor under another name of the same file."""
    config = config_of(stage.name, variant)
    for name in targets(stage, config):
        if name.endswith("/"):
            continue
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        link = tmp_path / f"link{path.suffix}"
        link.symlink_to(path)
        for given in (path, link):
            config.update_from_flattened_dict({item.field: str(given)})
            config.reward.beta = 1.0
            with pytest.raises(InputError, match="writes this file itself") as error:
                stage.check_outputs(config, tmp_path / "run")
            assert f"{item.field}={given}" in str(error.value)
        config.update_from_flattened_dict({item.field: str(tmp_path / "other.jsonl")})
        stage.check_outputs(config, tmp_path / "run")
        link.unlink()


def test_an_adapter_that_no_run_made_is_kept(tmp_path):
    for place in (tmp_path / "folder", tmp_path / "link"):
        place.mkdir()
    assert not is_taken(tmp_path / "folder" / "adapter")
    (tmp_path / "folder" / "adapter").mkdir()
    assert not is_taken(tmp_path / "folder" / "adapter")  # nothing is lost
    (tmp_path / "folder" / "adapter" / "notes.txt").touch()
    assert is_taken(tmp_path / "folder" / "adapter")
    (tmp_path / "link" / "adapter").symlink_to(tmp_path / "folder")
    assert is_taken(tmp_path / "link" / "adapter")
