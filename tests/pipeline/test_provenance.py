"""When a stage counts as up to date, and what is never overwritten."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from configs import base, demo, smollm2_task, verbosity_smollm2_baseline
from configs.ablations import VARIANTS
from pipeline import preflight
from pipeline.all_stages import run_all
from pipeline.changes import Provenance, change
from pipeline.cli import fill_in
from pipeline.inputs import Kind
from pipeline.preflight import check, check_input, check_inputs
from pipeline.provenance import Records, check_same_everywhere, digests, provenance
from pipeline.runner import run_stage
from pipeline.stage import load, load_all
from pipeline.study import run_study
from sarm_jax.io.errors import InputError
from sarm_jax.parallel import processes
from tests.stages import replace_run


def test_inputs_are_the_existing_files_that_the_stage_declares(tmp_path):
    model, run, pairs = tmp_path / "model", tmp_path / "run", tmp_path / "pairs.jsonl"
    (model / "deep").mkdir(parents=True)
    (run / "adapter").mkdir(parents=True)
    own = tmp_path / "work" / "eval" / "policy.json"
    own.parent.mkdir(parents=True)
    files = [model / "config.json", pairs, run / "adapter/a"]
    for path in (*files, model / "deep/x", run / "big", own):
        path.write_text(path.name)
    config = base.get_config()
    config.sarm_model = str(model)
    config.policy_model = "owner/policy"  # on the hub: it counts by its name
    config.evaluate.prompts_jsonl = f"{pairs}, {tmp_path}/none.jsonl"
    config.evaluate.rm_bench = "hf://datasets/owner/name/file.json"
    config.reward.tau_values = f"0.5,@{pairs}:key[:2]"
    config.evaluate.runs = f"mine={run}"
    stage = load("evaluate")
    before = provenance(stage, config, tmp_path / "work")
    assert sorted(before.inputs) == sorted(map(str, files))  # eval/ is its own output
    pairs.write_text("changed")
    after = provenance(stage, config, tmp_path / "work").inputs
    assert {p for p in after if after[p] != before.inputs[p]} == {str(pairs)}


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"ppo.seed": 1}, "ppo.seed was 0 and is now 1"),
        ({"lora.rank": 4}, "lora.rank was 16 and is now 4"),
        ("another row", "{0} has changed"),
        ({"mesh.data": 2}, ""),
    ],
)
def test_a_process_that_has_not_what_process_0_has_is_refused(
    tmp_path, monkeypatch, changed, difference
):
    """Every option and file that results depend on; not the devices that compute them."""
    prompts, config, stage = tmp_path / "prompts.jsonl", base.get_config(), load("train")
    prompts.write_text('{"prompt": "a row"}\n')
    config.prompts_jsonl, said = str(prompts), []
    first = dataclasses.asdict(provenance(stage, config, tmp_path))
    monkeypatch.setattr(processes, "connected", lambda: True)
    monkeypatch.setattr(processes, "raising_on_all", contextlib.nullcontext)
    monkeypatch.setattr(processes, "broadcast", lambda own: first)
    monkeypatch.setattr(processes, "raise_on_all", said.append)
    if isinstance(changed, dict):
        config.update_from_flattened_dict(changed)
    else:
        prompts.write_text(f'{{"prompt": "{changed}"}}\n')
    check_same_everywhere(stage, config, tmp_path)
    told = f"not what process 0 has: {difference.format(prompts)}" if difference else ""
    assert said == [told]


OF_ROWS = (Kind.ROWS, Kind.FILES, Kind.NAMED_FILES)
FILE_INPUTS = [item for item in preflight.inputs() if item.kind in (*OF_ROWS, Kind.FILE)]


@pytest.mark.parametrize("item", FILE_INPUTS, ids=lambda item: item.field)
def test_data_on_the_hub_count_by_their_name(item, tmp_path):
    config, address = base.get_config(), "hf://datasets/owner/name@main"
    config.update_from_flattened_dict({item.field: address})
    if item.kind not in OF_ROWS:
        with pytest.raises(InputError, match=f"^{item.field}=hf:.*: no such file"):
            check_input(item, config, tmp_path)
        return
    check_input(item, config, tmp_path)
    assert item.files(config, tmp_path) == []
    for stage in load_all():
        if item in stage.inputs:
            before = provenance(stage, config, tmp_path)
            config.update_from_flattened_dict({item.field: "hf://datasets/owner/name@v2"})
            changed = provenance(stage, config, tmp_path)
            assert item.field in change(stage, dataclasses.asdict(before), changed)
            config.update_from_flattened_dict({item.field: address})


def test_an_option_with_the_name_of_a_folder_is_no_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dots", "mine"):
        Path(name).mkdir()
        Path(name, "w.safetensors").write_text(name)
    config = base.get_config()
    config.remat, config.policy_model = "dots", "mine"
    assert list(provenance(load("train"), config, tmp_path / "run").inputs) == [
        "mine/w.safetensors"
    ]


def test_large_files_count_by_content_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.provenance.LARGE", 1 << 10)
    monkeypatch.setattr("pipeline.provenance.PIECE", 64)
    first, again = tmp_path / "a.bin", tmp_path / "b.bin"
    first.write_bytes(bytes(range(256)) * 16)
    again.write_bytes(first.read_bytes())  # another place, another time: the same weights

    def digest(path):
        return digests([path])[str(path)]

    assert digest(first) == digest(again)
    for place in (0, 4095):
        content = bytearray(first.read_bytes())
        content[place] ^= 1
        again.write_bytes(content)
        assert digest(first) != digest(again)
    again.write_bytes(first.read_bytes() + b"0")
    assert digest(first) != digest(again)


def test_a_stage_that_did_not_finish_is_not_up_to_date(tmp_path):
    made_from = Provenance({"a": 1}, {})
    with pytest.raises(KeyboardInterrupt), Records(tmp_path).recording("identify", made_from):
        assert not Records(tmp_path).finished("identify")
        raise KeyboardInterrupt
    assert not Records(tmp_path).finished("identify")
    with Records(tmp_path).recording("identify", made_from):
        pass
    records = Records(tmp_path)
    assert records.finished("identify") and records.difference(load("identify"), made_from) is None
    assert records.difference(load("identify"), Provenance({"a": 2}, {})) == "a was 1 and is now 2"
    with pytest.raises(InputError), records.recording("identify", Provenance({"a": 3}, {})):
        raise InputError("refused")
    assert Records(tmp_path).difference(load("identify"), made_from) is None
    with (
        pytest.raises(InputError),
        records.recording("probe", Provenance({"a": float("nan"), "b": "\udc80"}, {})),
    ):
        raise InputError("not finite")
    assert list(Records(tmp_path).stages) == ["identify"]
    (tmp_path / "stages.json").write_text("[]")
    with pytest.raises(InputError, match=r"stages\.json: not a record of stages"):
        Records(tmp_path)


def test_stages_side_by_side_keep_each_others_records(tmp_path):
    made_from = Provenance({"a": 1}, {})
    first, second = Records(tmp_path), Records(tmp_path)
    with first.recording("identify", made_from):
        with pytest.raises(InputError), second.recording("human_latents", made_from):
            raise InputError("refused")
        assert list(Records(tmp_path).stages) == ["identify"]
        with Records(tmp_path).recording("probe", made_from):
            pass
    assert all(map(Records(tmp_path).finished, ("identify", "probe")))


def test_a_refused_first_stage_leaves_no_record(tmp_path):
    config = base.get_config()
    config.policy_model = "a/policy"
    config.train_sarm.pairs_jsonl = str(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"none\.jsonl"):
        run_stage("train_sarm", config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_took_long_is_never_made_again(tmp_path, monkeypatch):
    calls = []

    def train_sarm(config, workdir):
        calls.append(config.train_sarm.epochs)
        (workdir / "sarm").mkdir()

    replace_run(monkeypatch, "train_sarm", train_sarm)
    config, pairs = base.get_config(), tmp_path / "pairs.jsonl"
    pairs.write_text("one")
    config.policy_model, config.train_sarm.pairs_jsonl = "a/policy", str(pairs)
    run_all(config, tmp_path)
    run_all(config, tmp_path)
    assert calls == [3]
    pairs.write_text("two")
    with pytest.raises(InputError, match=r"train_sarm: .*pairs\.jsonl has changed"):
        run_all(config, tmp_path)
    pairs.write_text("one")
    config.train_sarm.epochs = 4
    with pytest.raises(InputError, match=r"train_sarm\.epochs was 3 and is now 4"):
        run_stage("train_sarm", config, tmp_path)
    (tmp_path / "stages.json").unlink()  # as left by a call that kept no record
    run_all(config, tmp_path)
    assert calls == [3]
    (tmp_path / "sarm").rmdir()
    run_all(config, tmp_path)
    assert calls == [3, 4]
    assert json.loads((tmp_path / "stages.json").read_text())["train_sarm"]["seconds"] >= 0


def test_features_of_another_reward_model_are_said(tmp_path, monkeypatch, caplog):
    config, pairs, sarm = base.get_config(), tmp_path / "pairs.jsonl", tmp_path / "sarm"
    sarm.mkdir()
    for path in (pairs, sarm / "model.safetensors"):
        path.write_text("one")
    config.sarm_model = str(sarm)
    for name in ("identify", "train"):
        replace_run(monkeypatch, name, lambda *_: None)

    def run(stage, **changes):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        run_stage(stage, changed, tmp_path)

    def warnings(**changes):
        caplog.clear()
        run("train", **changes)
        (tmp_path / "stages.json").write_text(kept)
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    run("identify", **{"identify.pairs_jsonl": str(pairs)})
    kept = (tmp_path / "stages.json").read_text()
    assert not warnings()  # that pairs were named for identify alone is no change
    where = f"{tmp_path}/probes/selected_features.json is out of date: "
    again = "; --stage=identify makes it again"
    other = str(tmp_path / "other")
    assert warnings(sarm_model=other) == [
        f"{where}sarm_model was {str(sarm)!r} and is {other!r}{again}"
    ]
    (sarm / "model.safetensors").write_text("two")
    assert warnings() == [f"{where}{sarm}/model.safetensors has changed{again}"]


ALL = [stage for stage in load_all() if stage.output]


@pytest.fixture
def everything(tmp_path):
    """A config that asks for every stage; each reads what one before it writes."""
    config = base.get_config()
    config.policy_model, config.sarm_model = f"{tmp_path}/policy", f"{tmp_path}/sarm"
    config.prompts_jsonl = config.prepare_data.demos_jsonl = f"{tmp_path}/data/prompts.jsonl"
    for section in ("train_sarm", "identify"):
        config[section].pairs_jsonl = f"{tmp_path}/data/pairs.jsonl"
    config.train_sae.model = f"{tmp_path}/classifier"
    config.train_sae.responses_jsonl = f"{tmp_path}/data/pairs.jsonl"
    config.human_latents.demos_jsonl = config.probe.data_jsonl = f"{tmp_path}/data/demos.jsonl"
    selected = f"@{tmp_path}/probes/selected_features.json"
    config.probe.feature = f"{selected}:detectors,3"
    config.probe.max_value = 1.0
    config.reward.penalize_features = f"{selected}:detectors"
    config.reward.tau_values = f"{selected}:tau_detectors"
    config.reward.alpha_values = "1,1"
    config.reward.probe = f"{tmp_path}/probes/dense_probe_logistic.safetensors"
    config.reward.human_states = f"{tmp_path}/human_states.safetensors"
    config.reward.probe_penalty = config.reward.distance_penalty = 0.1
    config.evaluate.data_jsonl = f"{tmp_path}/data/demos.jsonl"
    config.evaluate.steering_json = f"{tmp_path}/probes/steering_config.json"
    return config


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("ppo.clip_range", -1.0, "ppo.clip_range=-1.0"),
        ("checkpoint.keep_every", -1, "checkpoint.keep_every=-1"),
        ("guards.steps", 0, "guards.steps=0"),
        ("remat", "some", "remat='some'"),
        ("mesh.tensor", 64, "mesh data=1 fsdp=1 tensor=64"),
        ("policy_model", "", "policy_model is empty"),
        ("reward.unit", "points", "reward.unit='points'"),
        ("reward.beta", -1.0, "reward.beta=-1.0"),
        ("reward.penalty_cap", -1.0, "reward.penalty_cap=-1.0"),
        ("reward.probe", "gone.safetensors", "reward.probe=gone.safetensors: no"),
        ("reward.human_states", "gone.safetensors", "reward.human_states=gone.safetensors: no"),
        ("train_probe.l2", 0.0, "train_probe.l2=0.0"),
        ("reward.alpha_values", "1,x", "reward.alpha_values: found 'x'"),
        ("reward.penalize_features", "@gone.json:a", "gone.json"),
        ("reward.human_latents", "gone.safetensors", "reward.human_latents=gone.safetensors: no"),
        ("prepare_data.source", "somewhere", "prepare_data.source='somewhere'"),
        ("prepare_data.temperature", -1.0, "prepare_data.temperature=-1.0"),
        ("train_sarm.k", 0, "train_sarm.k=0"),
        ("train_sae.k", 0, "train_sae.k=0"),
        ("train_sae.model", "", "train_sae.model is empty"),
        ("identify.top_k", 0, "identify.top_k=0"),
        ("identify.naming_examples", -1, "identify.naming_examples=-1"),
        ("probe.mode", "dance", "probe.mode='dance'"),
        ("probe.level", 2.0, "probe.level=2.0"),
        ("probe.min_value", 2, "probe.min_value=2.0 exceeds probe.max_value=1.0"),
        ("probe.set_value", 0.0, "probe.set_value=0.0 and probe.max_value=1.0"),
        ("probe.rank", 2, "probe.rank=2 with probe.mode=pairs"),
        ("probe.feature", "x", "probe.feature: found 'x'"),
        ("evaluate.samples", 0, "evaluate.samples=0"),
        ("evaluate.num_example", -1, "evaluate.num_example=-1"),
        ("evaluate.resamples", 5, "evaluate.resamples=5"),
        ("evaluate.seed", 2**31, f"evaluate.seed={2**31}"),
        ("evaluate.rm_bench", "a.json", "evaluate.rm_bench=a.json: no such file"),
        ("evaluate.runs", "a=gone", "evaluate.runs=gone: no such file"),
        ("report.runs", "gone", "report.runs=gone: no such file"),
        ("report.samples", -1, "report.samples=-1"),
        ("eval_prompts_jsonl", "a.jsonl", "eval_prompts_jsonl=a.jsonl: no such file"),
    ],
)
def test_all_refuses_before_the_first_stage(tmp_path, everything, field, value, message):
    check(everything, tmp_path, ALL)
    everything.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as error:
        check(everything, tmp_path, ALL)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("ppo.batch_size", -1, "ppo.batch_size=-1"),
        ("ppo.lr_schedule", "bogus", "bogus"),
        ("identify.tau_quantile", 7.0, "identify.tau_quantile=7.0"),
        ("lab.alpha", -1.0, "lab.alpha=-1.0"),
        ("lab.held_out_fraction", 1e-6, "lab.held_out_fraction=1e-06"),
        ("lab.held_out_fraction", 1 - 1e-6, "lab.held_out_fraction=0.999999"),
    ],
)
def test_the_study_refuses_before_the_first_world(tmp_path, field, value, message):
    config = demo.get_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as error:
        run_study(config, tmp_path)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_seeds_side_by_side_share_a_gpu(tmp_path, monkeypatch):
    """JAX would give nearly all of its memory to whoever asks for devices first: the preflight."""
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)

    def checked(*_):
        raise InputError(f"{name}={os.environ.get(name)}")

    monkeypatch.setattr("pipeline.study.check", checked)
    config = demo.get_config()
    config.lab.processes = 2
    with pytest.raises(InputError, match=f"{name}=false"):
        run_study(config, tmp_path)


def test_all_needs_something_to_do(tmp_path):
    with pytest.raises(InputError, match="nothing to do"):
        run_all(base.get_config(), tmp_path)


CONFIGS = Path(base.__file__).parent.glob("*.py")
NAMES = [path.stem for path in CONFIGS if "def get_config" in path.read_text()]
EXPERIMENTS = [(name, ()) for name in NAMES if name != "ablations"]
EXPERIMENTS += [("ablations", (variant,)) for variant in VARIANTS]


@pytest.mark.parametrize("name, arguments", EXPERIMENTS)
def test_every_experiment_passes_the_preflight(name, arguments, tmp_path, monkeypatch):
    # Models and files of another machine.
    monkeypatch.setattr(preflight, "is_within", lambda path, workdir: True)
    template = importlib.import_module(f"configs.{name}").get_config(*arguments)
    config = fill_in(template, tmp_path)
    if config.prepare_data.source == "benchmarks":
        config.prepare_data.rm_bench = "rm_bench.json"
    wanted = [stage for stage in load_all() if stage.wanted(config)]
    assert wanted or name == "base"
    check(config, tmp_path, wanted)


@pytest.mark.parametrize(
    "stage, field, value",
    [
        ("identify", "sarm_max_length", 100),
        ("human_latents", "sarm_max_length", 100),
        ("human_latents", "human_latents.states", True),
        ("train_probe", "identify.false_alarm_budget", 0.1),
        ("train_probe", "train_probe.l2", 0.1),
        ("train", "reward.screen", True),
        ("probe", "sarm_max_length", 100),
        ("evaluate", "sarm_max_length", 100),
        ("evaluate", "reward.alpha_values", "1"),
        ("evaluate", "ppo.max_new_tokens", 3),
        ("train", "discriminator.steps", 9),
        ("train", "sarm_max_length", 100),
        ("train", "lora.rank", 3),
        ("train", "remat", "full"),
        ("train", "dtype", "bfloat16"),
    ],
)
def test_stages_depend_on_the_options_that_they_read(tmp_path, stage, field, value):
    config = base.get_config()
    before = load(stage).recorded_options(config, tmp_path)
    config.update_from_flattened_dict({field: value})
    assert load(stage).recorded_options(config, tmp_path) != before


FILE_FIELDS = [item.field for item in preflight.inputs() if item.kind is not Kind.LIST]


@pytest.mark.parametrize("field", FILE_FIELDS)
def test_a_file_that_is_not_there_is_refused_first(tmp_path, everything, field):
    everything.update_from_flattened_dict({field: "gone.x"})
    with pytest.raises(Exception, match="gone.x"):
        preflight.check(everything, tmp_path, ALL)


def test_a_list_that_will_be_made_again_is_not_compared_with_a_new_reward_model(tmp_path, world):
    """`identify` would find other features in it; those of the old file need not exist."""
    config, path = base.get_config(), tmp_path / "probes" / "selected_features.json"
    config.policy_model, config.sarm_model = f"{world}/policy", f"{world}/sarm"
    config.prompts_jsonl = f"{world}/demos.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"detectors": [400], "tau_detectors": [0.1]}))
    config.identify.pairs_jsonl = f"{world}/demos.jsonl"
    config.reward.penalize_features = f"@{path}:detectors"
    config.reward.tau_values = f"@{path}:tau_detectors"
    config.reward.alpha_values = "1"
    identify, train = load("identify"), load("train")
    preflight.check(config, tmp_path, [identify, train])
    with pytest.raises(InputError, match="feature 400 of a SARM with 64 latents"):
        preflight.check(config, tmp_path, [train])  # nothing makes the file again


def test_the_preflight_names_the_experiment(tmp_path, world):
    config = base.get_config()
    config.policy_model, config.sarm_model = f"{world}/policy", f"{world}/sarm"
    config.prompts_jsonl = f"{world}/demos.jsonl"
    controls = {"penalize_features": "64", "tau_values": "1", "alpha_values": "1"}
    with config.unlocked():
        config.experiments = {"a": {}, "b": {"reward": controls}}
    message = "^experiment b: reward.penalize_features: feature 64 of a SARM with 64 latents"
    with pytest.raises(InputError, match=message):
        preflight.check(config, tmp_path, [load("train")])


@pytest.mark.parametrize("source", [demo, smollm2_task, verbosity_smollm2_baseline])
def test_prepare_data_alone_needs_no_policy_that_it_makes_or_does_not_read(tmp_path, source):
    config = source.get_config()
    config.policy_model = "{workdir}/policy"
    config.lab.base_model = ""  # on this machine it need not be there
    config = fill_in(config, tmp_path)
    stage = load("prepare_data")
    check_inputs(stage, config, tmp_path)
    config.prepare_data.source = "demonstrations"
    with pytest.raises(InputError, match="^policy_model="):
        check_inputs(stage, config, tmp_path)


ONE_STAGE = [
    (stage.name, item)
    for stage in load_all()
    if stage.output
    for item in stage.inputs
    if item.kind not in (Kind.LIST, Kind.RUNS)
]


@pytest.mark.parametrize(("name", "item"), ONE_STAGE, ids=lambda case: getattr(case, "field", case))
def test_a_stage_that_is_called_alone_names_the_option_of_a_missing_file(tmp_path, name, item):
    """The file may be in the working directory, if no stage makes it, or elsewhere."""
    stage, config = load(name), base.get_config()
    stage = dataclasses.replace(
        stage, inputs=(dataclasses.replace(item, read_if=lambda config: True),)
    )
    for gone in (tmp_path / "gone.x", tmp_path.parent / "gone.x"):
        config.update_from_flattened_dict({item.field: str(gone)})
        with pytest.raises(InputError, match=rf"^{re.escape(f'{item.field}={gone}')}: no such "):
            check_inputs(stage, config, tmp_path)


REWARD_FILES = ("human_latents", "probe", "human_states")


def test_every_file_option_is_looked_for():
    flat = base.get_config().to_dict()
    names = [
        f"{s}.{n}" if s else n
        for s, part in [("", flat), *((k, v) for k, v in flat.items() if isinstance(v, dict))]
        for n in part
        if n.endswith("_jsonl")
        or (n in ("steering_json", *REWARD_FILES) and not isinstance(part[n], dict))
    ]
    assert set(names) <= set(FILE_FIELDS), set(names) - set(FILE_FIELDS)


def test_lists_that_are_there_are_read_before_the_first_stage(tmp_path, everything):
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "selected_features.json").write_text(
        json.dumps({"detectors": [1, 2], "tau_detectors": [0.1]})
    )
    with pytest.raises(Exception, match="reward.tau_values has 1 values for 2"):
        preflight.check(everything, tmp_path, ALL)


def test_of_a_model_only_what_is_read_of_it_counts(tmp_path):
    """A README, a cache or the run itself may lie in the model's directory."""
    config, model = base.get_config(), tmp_path / "model"
    (model / "additional_chat_templates").mkdir(parents=True)
    counted = ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
    counted += ["tokenizer.model", "additional_chat_templates/tools.jinja"]
    for name in counted:
        (model / name).write_text("a")
    config.policy_model = config.sarm_model = str(model)
    for name in ("train", "identify", "human_latents"):
        stage = load(name)
        before = provenance(stage, config, model / "run")
        for other in ("README.md", ".cache/x", "run/adapter/adapter_model.safetensors", "a.bin"):
            path = model / other
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("b")
        now = provenance(stage, config, model / "run")
        assert set(now.inputs) == {str(model / file) for file in counted}
        older = {"options": now.options, "inputs": now.inputs | {str(model / "README.md"): "c"}}
        for record in (dataclasses.asdict(before), older):
            assert change(stage, record, now) is None
        for file in counted:
            (model / file).write_text("changed")
            assert f"{file} has changed" in change(
                stage, dataclasses.asdict(before), provenance(stage, config, model / "run")
            )
            (model / file).write_text("a")
        shutil.rmtree(model / "run")


def test_a_study_that_was_moved_is_the_same(tmp_path):
    """The lab's policy is made by the stage whose options name the place that it is made in."""
    stage, folders = load("prepare_data"), [tmp_path / name for name in ("here", "there")]
    config = demo.get_config()
    before, after = (provenance(stage, fill_in(config, folder), folder) for folder in folders)
    assert before.options["policy_model"] != after.options["policy_model"]
    record = {"options": before.options, "inputs": before.inputs}
    assert change(stage, record, after) is None
    config.prepare_data.source = "demonstrations"  # which samples with the policy
    before, after = (provenance(stage, fill_in(config, folder), folder) for folder in folders)
    record = {"options": before.options, "inputs": before.inputs}
    assert change(stage, record, after).startswith("policy_model was ")
