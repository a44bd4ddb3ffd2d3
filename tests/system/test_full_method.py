"""The whole method, from training a SARM to the report: on meshes and on two processes as on one.

The stages are those of `--stage=all`: train_sarm in mode 3, identify, human_latents, probe, train,
evaluate and report.
"""

import json
import math
import os
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


def start_two(world, workdir, *options, killed=(), primary=("main.py",), stage="all", others=()):
    """Starts all stages on two processes, each of which has half of every weight.

    Args:
        options: options of both processes.
        killed: what ends process 1, arguments of `benchmarks.killed`.
        primary: the program of process 0, as arguments of Python.
        stage: the stage.
        others: further options of process 1.
    """
    address = f"--coordinator_address=localhost:{unused_port()}"
    environment = os.environ | {
        "TQDM_DISABLE": "1",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
    }
    started = []
    for number in range(2):
        own = others if number else ()
        program = ["-m", "benchmarks.killed", *killed, "--"] if killed else ["main.py"]
        program = program if number else primary
        line = command(world, workdir, "mesh.fsdp=2", *options, *own, stage=stage)
        line += [address, "--num_processes=2", f"--process_id={number}"]
        text = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(
            subprocess.Popen([sys.executable, *program, *line], cwd=ROOT, env=environment, **text)
        )
    return started


def last_lines(finished):
    """Returns (exit code, last line of stderr) of each process; "" if it has written none."""
    return [(code, text.strip().rpartition("\n")[2]) for code, text in finished]


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
    term = ["--place=sarm", "--call=5", "--signal=SIGTERM"]
    stopped = finish(*start_two(world, workdir, killed=term))
    assert [code for code, _ in stopped] == [143, 143], stopped
    assert list((workdir / "sarm_checkpoints").iterdir()) and not (workdir / "sarm").exists()
    # Then the disk of the other one is full when it writes the SARM.
    full = finish(*start_two(world, workdir, primary=["-c", FULL_DISK], stage="train_sarm"))
    assert [code for code, _ in full] == [2, 2], full
    first, second = (line for _, line in last_lines(full))
    message = "sarm: No space left on device"
    assert first == f"error: {message}; free space and run the same command again"
    assert second == f"error: process 0: {message}"
    assert "resuming after step" in full[0][1]
    assert list((workdir / "sarm_checkpoints").iterdir()) and not (workdir / "sarm").exists()
    # Then the second process dies in the first step of PPO.
    dead = finish(*start_two(world, workdir, killed=["--place=update", "--call=1"]))
    assert [code for code, _ in dead] == [2, -9], dead
    assert "another process of the run has ended" in last_lines(dead)[0][1]
    assert (workdir / "sarm").exists() and (workdir / "human_latents.safetensors").exists()
    finished = finish(*start_two(world, workdir))
    assert [code for code, _ in finished] == [0, 0], finished
    assert "train_sarm" not in finished[0][1]  # is up to date
    assert_same_run(workdir, one)
