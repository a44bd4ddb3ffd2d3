"""The whole method, from training a SARM to the report: on meshes and on two processes as on one.

The stages are those of `--stage=all`: train_sarm in mode 3, identify, human_latents, probe, train,
evaluate and report.
"""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ppo.tracking.metrics_csv import read_metrics
from tests.closeness import assert_close
from tests.command import run_main
from tests.full_method_runs import command, make_world
from tests.meshes import COMPARED_COLUMNS
from tests.paths import ROOT
from tests.sarm_jax.parallel.test_processes import finish, unused_port

pytestmark = pytest.mark.evidence

TOLERANCE = 1e-4
# Keys of JSON files that differ between equal runs.
OF_TIME = {"seconds", "seconds_per_step_median"}
WRITTEN = (
    "sarm_summary.json sarm_metrics.jsonl probes/selected_features.json summary.json "
    "probes/feature_analysis.json probes/feature_pages.json probes/probe_summary.json "
    "probes/certificates.json eval/steering.json eval/policy.json eval/latent_map.json"
).split()
# Runs main.py on a disk that is full when a model is written.
FULL_DISK = """
import errno
from conversion.to_hf import TensorWriter
from pipeline.command import run
def add(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "sarm")
TensorWriter.add = add
run()
"""
TENSORS = (
    "sarm/model.safetensors human_latents.safetensors probes/feature_scores.safetensors "
    "adapter/adapter_model.safetensors adapter/value_head.safetensors"
).split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("full_method"))


@pytest.fixture(scope="module")
def one(world):
    """The working directory of all stages on one device."""
    workdir = world / "one" / "run"  # the report shows the name of the directory
    assert run_main(*command(world, workdir)) == 0
    return workdir


def files_of(workdir: Path) -> set[str]:
    """Returns the names of all files of a working directory whose names are always the same."""
    names = {str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(("events.", "checkpoints/"))}


def read(path: Path) -> object:
    """Reads a JSON file, or the rows of a JSON Lines file."""
    text = path.read_text()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def assert_same_json(actual: object, expected: object, place: str) -> None:
    """Asserts that texts, features and counts are equal, and other numbers up to rounding."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict) and actual.keys() == expected.keys(), place
        for key in expected.keys() - OF_TIME:
            assert_same_json(actual[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert isinstance(actual, list) and len(actual) == len(expected), place
        for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same_json(a, b, f"{place}[{n}]")
    elif isinstance(expected, float):
        assert math.isclose(actual, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE), (
            f"{place}: {actual} is not {expected}"
        )
    else:
        assert actual == expected, place


def added_weights(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, with the product of the two factors of an adapter for both."""
    products = {
        name: tensor @ tensors[name.replace("lora_B", "lora_A")]
        for name, tensor in tensors.items()
        if "lora_B" in name
    }
    return products or tensors


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Asserts that all stages have written the same into two working directories."""
    assert files_of(workdir) == files_of(expected)
    for name in WRITTEN:
        assert_same_json(read(workdir / name), read(expected / name), name)
    for name in TENSORS:
        actual, tensors = load_file(workdir / name), load_file(expected / name)
        assert actual.keys() == tensors.keys(), name
        for key, tensor in added_weights(tensors).items():
            assert_close(added_weights(actual)[key], tensor, TOLERANCE, name=f"{name}: {key}")
    rows, expected_rows = (read_metrics(folder / "metrics.csv") for folder in (workdir, expected))
    for column in COMPARED_COLUMNS:
        values, others = ([row[column] for row in table] for table in (rows, expected_rows))
        np.testing.assert_allclose(values, others, TOLERANCE, TOLERANCE, err_msg=column)
    texts = ([row["response"] for row in read(w / "samples.jsonl")] for w in (workdir, expected))
    assert len({json.dumps(text) for text in texts}) == 1


@pytest.mark.parametrize("mesh", ["data=2 tensor=2", "fsdp=4"])
def test_four_devices_give_the_numbers_of_one(world, one, mesh):
    workdir = world / mesh.replace(" ", "_") / "run"
    options = [f"mesh.{axis}" for axis in mesh.split()]
    assert run_main(*command(world, workdir, *options)) == 0
    assert_same_run(workdir, one)


def start_two(world, workdir, *options, programs=(("main.py",),) * 2, stage="all", others=()):
    """Starts all stages on two processes, each of which has half of every weight.

    Args:
        options: options of both processes.
        programs: the program of each process, as arguments of Python.
        stage: the stage.
        others: further options of process 1.
    """
    address = f"--coordinator_address=localhost:{unused_port()}"
    environment = os.environ | {
        "TQDM_DISABLE": "1",
        "TMPDIR": str(temporary(world)),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    started = []
    for number, program in enumerate(programs):
        own = others if number else ()
        line = command(world, workdir, "mesh.fsdp=2", *options, *own, stage=stage)
        line += [address, "--num_processes=2", f"--process_id={number}"]
        text = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(
            subprocess.Popen([sys.executable, *program, *line], cwd=ROOT, env=environment, **text)
        )
    return started


def temporary(world):
    """Returns the temporary directory of both processes."""
    folder = world / "temporary"
    folder.mkdir(exist_ok=True)
    return folder


def killing(number, place, call=1, name="SIGKILL"):
    """Returns the programs of both processes; process `number` ends at a call of a place."""
    programs = [["main.py"], ["main.py"]]
    arguments = [f"--place={place}", f"--call={call}", f"--signal={name}"]
    programs[number] = ["-m", "benchmarks.killed", *arguments, "--"]
    return programs


def last_lines(finished):
    """Returns (exit code, last line of stderr) of each process; "" if it has written none."""
    return [(code, text.strip().rpartition("\n")[2]) for code, text in finished]


def stages_of(log):
    """Returns the stages that a run of `--stage=all` has begun, in order, by its log."""
    return re.findall(r"process 0: stage (\w+): .* In ", log)


def assert_killed(finished, number):
    """Asserts that one process was killed, and that the other ended with 2 and one line of it."""
    lines = last_lines(finished)
    assert lines[number][0] == -signal.SIGKILL, finished
    code, line = lines[1 - number]
    assert code == 2 and line.startswith("error: another process of the run has ended"), finished


@dataclasses.dataclass(frozen=True)
class Kill:
    """A SIGKILL of one process in a stage: what there is then, and what must not be there.

    Attributes:
        stage: the stage.
        number: the process.
        place: the place of `benchmarks.killed`.
        call: the call of the place, from 1.
        half: a file or folder that the stage has written by then.
        last: the one that the stage ends with.
    """

    stage: str
    number: int
    place: str
    call: int
    half: str
    last: str


KILLS = (
    Kill("train_sarm", 0, "sarm", 2, "sarm_activations/pretrained/matrix.json", "sarm"),
    Kill(
        "identify", 0, "selection", 1, "probes/feature_pages.json", "probes/selected_features.json"
    ),
    Kill("human_latents", 1, "demonstrations", 1, "stages.json", "human_latents.safetensors"),
    Kill("probe", 0, "certificates", 2, "probes/certificates.json", "probes/probe_summary.json"),
    Kill("train", 1, "update", 3, "checkpoints/2/state", "adapter/adapter_config.json"),
    Kill("evaluate", 0, "policies", 1, "eval/responses.jsonl", "eval/policy.json"),
    Kill("report", 0, "page", 2, "figures", "report.html"),
)


def test_two_processes_give_the_numbers_of_one(world, one):
    workdir = world / "two" / "run"
    other = world / "other_pairs.jsonl"
    other.write_text((world / "pairs.jsonl").read_text().replace("red", "rot"))
    refused = finish(
        *start_two(world, workdir, others=(f"train_sarm.pairs_jsonl={other}",), stage="train_sarm")
    )
    assert [code for code, _ in refused] == [2, 2], refused
    for _, line in last_lines(refused):
        assert line.startswith("error: process 1: not what process 0 has: "), line
        assert "pairs.jsonl" in line
    assert not workdir.exists() or not files_of(workdir)

    # The signal is sent to the process that does not write, in the training on preferences.
    stopped = finish(*start_two(world, workdir, programs=killing(1, "sarm", 5, "SIGTERM")))
    assert [code for code, _ in stopped] == [143, 143], stopped
    assert list((workdir / "sarm_checkpoints").iterdir()) and not (workdir / "sarm").exists()
    # Then the disk of the other one is full when it writes the SARM.
    full = finish(
        *start_two(world, workdir, programs=[["-c", FULL_DISK], ["main.py"]], stage="train_sarm")
    )
    assert [code for code, _ in full] == [2, 2], full
    first, second = (line for _, line in last_lines(full))
    message = "sarm: No space left on device"
    assert first == f"error: {message}; free space and run the same command again"
    assert second == f"error: process 0: {message}"
    assert "resuming after step" in full[0][1]
    assert list((workdir / "sarm_checkpoints").iterdir()) and not (workdir / "sarm").exists()
    finished = finish(*start_two(world, workdir))
    assert [code for code, _ in finished] == [0, 0], finished
    assert_same_run(workdir, one)


def test_two_processes_killed_in_every_stage_give_the_numbers_of_one(world, one):
    """The primary process is killed in some stages, the other one in others."""
    workdir, resumed_in, logs = world / "killed" / "run", "train_sarm", {}
    for kill in KILLS:
        programs = killing(kill.number, kill.place, kill.call)
        killed = finish(*start_two(world, workdir, programs=programs))
        assert_killed(killed, kill.number)
        stages = list(dict.fromkeys([resumed_in, kill.stage]))
        assert stages_of(killed[0][1]) == stages, kill  # those before are up to date
        assert (workdir / kill.half).exists() and not (workdir / kill.last).exists(), kill
        records = json.loads((workdir / "stages.json").read_text())
        assert [name for name, record in records.items() if not record["finished"]] == [kill.stage]
        logs[resumed_in], resumed_in = killed[0][1], kill.stage
    finished = finish(*start_two(world, workdir))
    assert [code for code, _ in finished] == [0, 0], finished
    assert stages_of(finished[0][1]) == ["report"]
    assert_same_run(workdir, one)
    # Both processes have used their activations again, and the training of the policy went on.
    assert "activations in" in logs["train_sarm"] and "resuming after step 2 of 3" in logs["train"]
    assert not (temporary(world) / f"sarm_jax_{os.getuid()}").exists()
