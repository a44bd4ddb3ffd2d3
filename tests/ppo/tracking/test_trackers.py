"""Trackers: what they are given, over interruptions, failures and missing packages."""

import inspect
import json
import logging
import math
import sqlite3
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from tensorboardX.event_file_writer import EventsWriter

from configs import base
from ppo.options import train_config
from ppo.tracking.metrics import RunLog, columns_of
from ppo.tracking.metrics_csv import read_metrics
from ppo.tracking.trackers.record import FILE, read_runs
from ppo.tracking.trackers.start import SERVICES, TrackConfig, check_available
from ppo.tracking.trackers.tracker import flat_samples
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.io import secrets
from sarm_jax.io.errors import InputError
from sarm_jax.parallel import processes

OPTIONS = {"ppo": {"seed": 0, "top_p": 1.0}, "reward": {"penalty_cap": math.inf}, "track": "x"}
ALL = TrackConfig(("tensorboard", *SERVICES), "sarm_jax", OPTIONS)
MEANS = "total_reward rm_score kl_penalty ref_kl indicator_penalty eos_fraction".split()


def sample(step: int) -> dict:
    return {
        "step": step, "prompt": "p", "response": "r", "rm_score": 1.5, "penalties": {"3": 0.5},
        "kl_penalty": 0.0, "total_reward": 1.0,
    }  # fmt: skip


def evaluation(step: int) -> dict:
    return sample(step) | {"ref_kl": 0.0, "ended": True}


def write(log: RunLog, *steps: int, evaluated: bool = True) -> None:
    """Logs steps, each after the evaluation of the steps before it."""
    for step in steps:
        if evaluated:
            log.write_evaluation([evaluation(step)])
        row = {name: 100.0 * step + i for i, name in enumerate(columns_of((3,)))} | {"step": step}
        row["grad_norm"] = math.nan if step == 1 else 2.0
        del row["disc_loss"]
        log.write(row, [sample(step)] * 2)


def run_log(workdir: Path, first_step: int, tracking: TrackConfig | None = ALL) -> RunLog:
    return RunLog(workdir, (3,), first_step, 9, tracking=tracking)


class FakeTable:
    def __init__(self, columns=None, data=None, rows=None, dataframe=None, dtype=None):
        self.columns, self.data = columns, data
        for column in zip(*(data or ()), strict=True):  # W&B refuses a column of several types
            assert len({isinstance(value, str) for value in column}) == 1


class Services:
    """Stand-ins for both packages with the signatures that are used; they note what they get."""

    def __init__(self) -> None:
        self.wandb, self.trackio = ModuleType("wandb"), ModuleType("trackio")
        self.runs: dict[str, list[SimpleNamespace]] = {"wandb": [], "trackio": []}
        self.failing: set[str] = set()  # names of calls such as "wandb.log"
        self.wandb.Settings = SimpleNamespace
        self.wandb.login = lambda: self._call("wandb.login")
        self.wandb.init = self.wandb_init
        self.trackio.init = self.trackio_init
        self.wandb.Table = self.trackio.Table = FakeTable

    def _call(self, name: str) -> bool:
        if name in self.failing:
            raise RuntimeError(f"{name} failed\nhere")
        return True

    def _run(self, service: str, **options) -> SimpleNamespace:
        self._call(f"{service}.init")
        run = SimpleNamespace(entries=[], options=options, finished=None, metrics=[])
        self.runs[service].append(run)
        return run

    def wandb_init(
        self, entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None,
        config=None, group=None, mode=None, resume=None, settings=None,
    ):  # fmt: skip
        run = self._run(
            "wandb", project=project, dir=dir, id=id, name=name, config=config, resume=resume
        )

        def log(data, step=None, commit=None):
            self._call("wandb.log")
            assert commit and (not run.entries or step > run.entries[-1]["position"])
            run.entries.append({"position": step, **data})

        def finish(exit_code=None, quiet=None):
            self._call("wandb.finish")
            run.finished = exit_code

        run.define_metric = lambda name, step_metric=None: run.metrics.append((name, step_metric))
        run.log, run.finish = log, finish
        return run

    def trackio_init(
        self, project, name=None, group=None, space_id=None, config=None, resume="never",
        embed=True,
    ):  # fmt: skip
        print("* Trackio project initialized")
        run = self._run("trackio", project=project, name=name, config=config, resume=resume)

        def log(metrics, step=None):
            self._call("trackio.log")
            assert "step" not in metrics
            run.entries.append({"step": step, **metrics})

        def finish():
            self._call("trackio.finish")
            run.finished = True

        run.log, self.trackio.finish = log, finish
        return run


@pytest.fixture
def services(monkeypatch):
    fakes = Services()
    for name in SERVICES:
        monkeypatch.setitem(sys.modules, name, getattr(fakes, name))
    return fakes


def board_of(workdir: Path) -> list[tuple[int, dict[str, float]]]:
    """Returns the scalars of the events files, (step, values) of each event."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(workdir.glob("events*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            values = {value.tag: value.simple_value for value in event.summary.value}
            events += [(event.step, values)] if values else []
            data = data[16 + length :]
    return events


def rows_of(entries: list[dict]) -> list[dict]:
    """Returns the entries of steps, without those of evaluations."""
    return [entry for entry in entries if "total_reward" in entry]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_the_metrics_of_the_csv_and_of_tensorboard(services, tmp_path, name):
    with run_log(tmp_path, 0) as log:
        write(log, 0, 1, 2)
        log.write_evaluation([evaluation(3)])
    (run,) = services.runs[name]
    columns = [c for c in columns_of((3,)) if c not in ("timestamp", "disc_loss")]
    rows = rows_of(run.entries)
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row, logged in zip(rows, read_metrics(tmp_path / "metrics.csv"), strict=True):
        assert {*row} - {"position", "samples"} == {*columns}
        assert all(row[c] == pytest.approx(logged[c], nan_ok=True) for c in columns)
        table = row["samples"]
        columns_of_table = list(table.data[0]) if table.columns is None else table.columns
        assert "penalty_3" in columns_of_table and "penalties" not in columns_of_table
        assert len(table.data) == 2 and len(table.data[0]) == len(columns_of_table)
    evaluations = [entry for entry in run.entries if "held_out/rm_score" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 1, 2, 3]
    assert {*evaluations[0]} - {"position", "step"} == {f"held_out/{mean}" for mean in MEANS}
    # The same steps and names, in the same order, as TensorBoard.
    mine = [
        (e["step"], {k for k in e if k not in ("step", "position", "samples")}) for e in run.entries
    ]
    assert mine == [(step, {*values}) for step, values in board_of(tmp_path)]
    assert run.finished == (name == "trackio")  # exit code 0


def test_named_features_are_described_and_columns_keep_their_names(services, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    names = FeatureNames({3: "flattery", 4: "unused"})
    with RunLog(tmp_path, (3, 5), 0, 9, tracking=ALL, names=names) as log:
        assert log.columns == columns_of((3, 5))
        for step in (0, 1):
            log.write(dict.fromkeys(columns_of((3, 5)), 1.0) | {"step": step}, [sample(step)])
    expected = {
        "feat_3_activation": 'mean z of feature 3 "flattery"',
        "feat_3_above_tau": 'share of responses above τ of feature 3 "flattery"',
    }
    for name in SERVICES:
        (run,) = services.runs[name]
        assert run.options["config"]["columns"] == expected
    described = []
    (path,) = tmp_path.glob("events*")
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        for value in Event.FromString(data[12 : 12 + length]).summary.value:
            if value.metadata.summary_description:
                described.append((value.tag, value.metadata.summary_description))
        data = data[16 + length :]
    assert dict(described) == expected and len(described) == 2  # with the first event of each


@pytest.mark.parametrize("name", SERVICES)
def test_the_config_has_all_options_without_secrets(services, tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_API_KEY", "5ecret" * 7)
    secrets.collect()
    config = base.get_config()
    config.track, config.prompts_jsonl = ",".join(SERVICES), f"data/{'5ecret' * 7}.jsonl"
    config.guards.stop = "no_eos"
    try:
        with run_log(tmp_path, 0, train_config(config).tracking):
            pass
    finally:
        monkeypatch.undo()
        secrets.collect()
    (run,) = services.runs[name]
    expected = config.to_dict() | {"prompts_jsonl": "data/[WANDB_API_KEY].jsonl"}
    assert run.options["config"] == expected
    assert "5ecret" not in str(run.options) + (tmp_path / FILE).read_text()


@pytest.mark.parametrize("name", SERVICES)
@pytest.mark.parametrize("first_step", [0, 2, 3])
def test_a_resumed_run_goes_on_in_the_same_run(services, tmp_path, name, first_step):
    with run_log(tmp_path, 0) as log:
        write(log, 0, 1, 2)
    with run_log(tmp_path, first_step) as log:
        write(log, *range(first_step, 6))
    first, second = services.runs[name]
    same = ("id", "name", "project", "resume", "dir")
    for key in same:
        assert first.options.get(key) == second.options.get(key)
    steps = [row["step"] for run in (first, second) for row in rows_of(run.entries)]
    assert steps == list(range(6))
    assert len(first.entries) + len(second.entries) == 2 * 6
    assert len(read_metrics(tmp_path / "metrics.csv")) == 6


@pytest.mark.parametrize("name", SERVICES)
def test_a_kill_between_the_record_and_the_log(services, tmp_path, name):
    log = run_log(tmp_path, 0)
    write(log, 0, 1, evaluated=False)
    recorded = json.loads((tmp_path / FILE).read_text())
    recorded[name]["position"] += 2
    (tmp_path / FILE).write_text(json.dumps(recorded))
    with run_log(tmp_path, 1) as log:
        write(log, 1, 2, 3, evaluated=False)
    steps = [row["step"] for run in services.runs[name] for row in rows_of(run.entries)]
    assert steps == [0, 1, 3]


@pytest.mark.parametrize("name", SERVICES)
def test_what_starts_another_run_of_a_tracker(services, tmp_path, name):
    def identity(workdir: Path, tracking: TrackConfig = ALL) -> tuple:
        with run_log(workdir, 0, tracking) as log:
            write(log, 0)
        options = services.runs[name][-1].options
        return options.get("id"), options["name"], options["project"]

    first = identity(tmp_path / "a") if (tmp_path / "a").mkdir() is None else None
    assert identity(tmp_path / "a") == first
    (tmp_path / "b").mkdir()
    assert identity(tmp_path / "b") != first  # another experiment of the same config
    elsewhere = identity(tmp_path / "a", TrackConfig(SERVICES, "other", OPTIONS))
    assert elsewhere != first and elsewhere[2] == "other"
    (tmp_path / "a" / "metrics.csv").unlink()  # the run was deleted
    assert identity(tmp_path / "a", TrackConfig(SERVICES, "other", OPTIONS)) != elsewhere


def json_of(workdir: Path) -> dict:
    return json.loads((workdir / FILE).read_text())


def test_names_and_places(services, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for workdir, name in (
        (Path("outputs/run/experiments/low_kl"), "outputs/run/experiments/low_kl"),
        (tmp_path, tmp_path.name),
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        with run_log(workdir, 0):
            pass
        options = services.runs["wandb"][-1].options
        assert options["name"] == name and Path(options["dir"]) == workdir
        ids = {service: run["id"] for service, run in json_of(workdir).items()}
        assert options["id"] == ids["wandb"]
        assert services.runs["trackio"][-1].options["name"] == f"{name}-{ids['trackio']}"
    monkeypatch.chdir("/")  # from elsewhere, the run keeps its name
    with run_log(tmp_path / "outputs/run/experiments/low_kl", 0) as log:
        write(log, 0)
    with run_log(tmp_path / "outputs/run/experiments/low_kl", 1):
        pass
    assert len({run.options["name"] for run in services.runs["wandb"][-2:]}) == 1


@pytest.mark.parametrize("call", [f"{name}.{call}" for name in SERVICES for call in ("log",)])
def test_a_failure_is_one_warning(services, tmp_path, caplog, call):
    services.failing = {call, call.replace("log", "finish")}
    other = "trackio" if call.startswith("wandb") else "wandb"
    with caplog.at_level(logging.WARNING), run_log(tmp_path, 0) as log:
        write(log, 0, 1, 2)
    name = call.partition(".")[0]
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert warning == f"track={name}: RuntimeError: {call} failed; the run goes on"
    assert (
        len(read_metrics(tmp_path / "metrics.csv")) == 3 == len(rows_of(entries(services, other)))
    )


def entries(services: Services, name: str) -> list[dict]:
    return services.runs[name][-1].entries


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_that_cannot_start_is_an_error(services, tmp_path, name):
    services.failing = {f"{name}.init"}
    with pytest.raises(InputError, match=rf"^track={name}: RuntimeError: {name}.init failed$"):
        run_log(tmp_path, 0)
    assert all(run.finished is not None for runs in services.runs.values() for run in runs)


def test_the_exit_code_of_a_run_that_fails(services, tmp_path):
    with pytest.raises(OSError, match="full"), run_log(tmp_path, 0):
        raise OSError("full")
    assert services.runs["wandb"][0].finished == 1


@pytest.mark.parametrize("name", SERVICES)
def test_a_missing_package_is_named(services, monkeypatch, name):
    check_available(ALL)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"^track={name}: .*; pip install {name}$"):
        check_available(ALL)
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # such as an empty folder
    with pytest.raises(InputError, match=rf"^track={name}: .*; pip install {name}$"):
        check_available(ALL)
    check_available(TrackConfig(("tensorboard",)))


def test_a_login_that_fails(services, monkeypatch):
    services.failing = {"wandb.login"}
    with pytest.raises(InputError, match=r"^track=wandb: RuntimeError: wandb.login failed$"):
        check_available(ALL)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_available(ALL)


def test_other_processes_use_no_service(services, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_primary", lambda: False)
    services.failing = {"wandb.login"}
    check_available(ALL)
    with run_log(tmp_path, 0) as log:
        write(log, 0)
    assert services.runs == {"wandb": [], "trackio": []} and not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    ("tracking", "files"),
    [
        (None, {"metrics.csv", "samples.jsonl", "evaluations.jsonl", "events"}),
        (TrackConfig(), {"metrics.csv", "samples.jsonl", "evaluations.jsonl", "events"}),
        (TrackConfig(()), {"metrics.csv", "samples.jsonl", "evaluations.jsonl"}),
        (TrackConfig(SERVICES), {"metrics.csv", "samples.jsonl", "evaluations.jsonl", FILE}),
    ],
)
def test_files_of_a_run(services, tmp_path, tracking, files):
    with run_log(tmp_path, 0, tracking) as log:
        write(log, 0)
    assert {p.name if not p.name.startswith("events.") else "events"
            for p in tmp_path.iterdir()} == files  # fmt: skip


def test_tensorboard_on_a_full_disk_ends_the_run(services, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="No space"), run_log(tmp_path, 0) as log:

        def fails(self, event):
            raise OSError("No space")

        monkeypatch.setattr(EventsWriter, "write_event", fails)
        write(log, 0)


@pytest.mark.parametrize(
    ("track", "project", "message"),
    [
        ("wandb,mlflow", "p", "track=wandb,mlflow: no tracker is called 'mlflow'; expected some"),
        ("WandB", "p", "track=WandB: no tracker is called 'WandB'"),
        ("wandb;trackio", "p", "track=wandb;trackio: no tracker is called 'wandb;trackio'"),
        ("wandb,wandb", "p", "track=wandb,wandb: 'wandb' is given twice"),
        ("tensorboard,trackio, tensorboard", "p", "track=tensorboard,trackio,tensorboard: 'tensor"),
        ("wandb", "", "track_project='': expected"),
        ("wandb", "a/b", "track_project='a/b': expected"),
        ("", "..", r"track_project='..': expected"),
        ("", "x" * 101, "track_project='xxx"),
        ("", "a\n", r"track_project='a\n': expected"),
    ],
)
def test_bad_options(track, project, message):
    config = base.get_config()
    config.track, config.track_project = track, project
    with pytest.raises(InputError) as error:
        train_config(config)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("track", "names"),
    [
        ("", ()),
        ("tensorboard", ("tensorboard",)),
        ("wandb", ("wandb",)),
        (" trackio , wandb,", ("trackio", "wandb")),
        ("wandb,trackio,tensorboard", ("wandb", "trackio", "tensorboard")),
    ],
)
def test_good_options(track, names):
    config = base.get_config()
    config.track, config.track_project = track, "My-project_1.0"
    assert train_config(config).tracking.names == names


GOOD = {"id": "0123abcd", "name": "n", "project": "p", "position": 3}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "must have the fields"),
        ({k: v for k, v in GOOD.items() if k != "id"}, "must have the fields"),
        (GOOD | {"more": 1}, "must have the fields"),
        (GOOD | {"position": "3"}, "field 'position' of 'wandb' must be int, found '3'"),
        (GOOD | {"position": True}, "field 'position' of 'wandb' must be int, found True"),
        (GOOD | {"name": None}, "field 'name' of 'wandb' must be str, found None"),
        (GOOD | {"id": "../../x"}, "id '../../x' of 'wandb'"),
    ],
)
def test_a_damaged_record_is_refused(services, tmp_path, row, message):
    (tmp_path / FILE).write_text(json.dumps({"wandb": GOOD}))
    assert read_runs(tmp_path)["wandb"].position == 3
    (tmp_path / FILE).write_text(json.dumps({"wandb": row}))
    with pytest.raises(InputError) as error:
        read_runs(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / FILE}: ") and message in str(error.value)
    assert "delete it to start a new run" in str(error.value)


# ---- The packages themselves, if they are installed


def test_signatures_of_wandb():
    wandb = pytest.importorskip("wandb")
    _check_parameters(Services().wandb_init, wandb.init)
    _check_parameters(lambda data, step, commit: 0, wandb.Run.log)
    _check_parameters(lambda name, step_metric: 0, wandb.Run.define_metric)
    _check_parameters(lambda exit_code: 0, wandb.Run.finish)
    _check_parameters(lambda columns, data: 0, wandb.Table.__init__)


def test_signatures_of_trackio():
    trackio = pytest.importorskip("trackio")
    _check_parameters(Services().trackio_init, trackio.init)
    _check_parameters(lambda metrics, step: 0, trackio.Run.log)
    _check_parameters(lambda columns, data: 0, trackio.Table.__init__)


def _check_parameters(used, real) -> None:
    assert {*inspect.signature(used).parameters} <= {*inspect.signature(real).parameters}


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "5ecret" * 7)
    tracking = TrackConfig(("wandb",), "sarm_jax", OPTIONS)
    check_available(tracking)
    with run_log(tmp_path, 0, tracking) as log:
        write(log, 0, 1)
    with run_log(tmp_path, 1, tracking) as log:
        write(log, 1, 2)
    wandb.teardown()
    first, second = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    rows = [_rows_of_wandb(path) for path in (first, second)]
    assert [row["step"] for row in rows[0] + rows[1]] == [0, 0, 1, 1, 2, 2]
    assert [row["_step"] for row in rows[0] + rows[1]] == [0, 1, 2, 3, 4, 5]
    assert rows[1][-1]["total_reward"] == 202.0 and rows[1][0]["held_out/rm_score"] == 1.5
    assert first.name == second.name  # the id of the run
    tables = sorted(tmp_path.rglob("*.table.json"))
    assert len(tables) == 3 and json.loads(tables[0].read_text())["data"][0][1] == "p"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"5ecret" not in path.read_bytes(), path


def _rows_of_wandb(path: Path) -> list[dict]:
    """Reads the history of a .wandb file: LevelDB's log format after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, rows = path.read_bytes(), 7, b"", []
    while place < len(data):
        left = 32768 - place % 32768  # a record that does not fit in a block is split
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            items = Record.FromString(record).history.item
            if items:
                names = ("/".join(item.nested_key) or item.key for item in items)
                rows.append(
                    dict(zip(names, (json.loads(i.value_json) for i in items), strict=True))
                )
            record = b""
    return rows


def test_trackio_local(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")
    from trackio import sqlite_storage, utils

    for module in (utils, sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    tracking = TrackConfig(("trackio",), "sarm_jax", OPTIONS)
    check_available(tracking)
    workdir = tmp_path / "run"
    workdir.mkdir()
    with run_log(workdir, 0, tracking) as log:
        write(log, 0, 1)
    with run_log(workdir, 1, tracking) as log:
        write(log, 1, 2)
    assert capsys.readouterr().out == ""
    (name,) = {f"{run.name}-{run.id}" for run in read_runs(workdir).values()}
    rows = sqlite_storage.SQLiteStorage.get_logs("sarm_jax", name)
    assert sorted(row["step"] for row in rows) == [0, 0, 1, 1, 2, 2]
    steps = {row["step"]: row for row in rows_of(rows)}
    assert steps[2]["total_reward"] == 202.0 and len(steps[2]["samples"]["_value"]) == 2
    assert math.isnan(steps[1]["grad_norm"])
    config = sqlite_storage.SQLiteStorage.get_run_config("sarm_jax", name)
    assert config["ppo"] == OPTIONS["ppo"]
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        runs = database.execute("SELECT DISTINCT run_id, run_name FROM metrics").fetchall()
    assert [run_name for _, run_name in runs] == [name]


def test_samples_with_texts_and_conversations_make_one_table():
    """W&B's table refuses a column of texts and lists, and would lose the metrics of the step."""
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p"}]
    rows = flat_samples([sample(0), sample(1) | {"prompt": talk}])
    assert [row["prompt"] for row in rows] == ["p", "System: Be brief.\n\nUser: p"]
    assert rows[0]["penalty_3"] == 0.5
