"""A run of two processes on loopback, with collectives over gloo, equals that of one process."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import read_jsonl
from sarm_jax.parallel import processes
from sarm_jax.parallel.processes import Hosts
from tests.closeness import assert_same_metrics
from tests.command import run_main
from tests.meshes import COMPARED_COLUMNS
from tests.paths import ROOT
from tests.tiny_models import ALGORITHMS

pytestmark = pytest.mark.slow

OPTIONS = (
    "ppo.total_steps=10 ppo.batch_size=4 ppo.max_new_tokens=4 ppo.calibration_batches=2 "
    "ppo.max_prompt_tokens=120 ppo.checkpoint_every=10 ppo.pack_levels=1 ppo.eval_every=5 "
    "ppo.eval_batches=1 ppo.learning_rate=1e-3 lora.rank=4 sarm_batch_size=2"
).split()
TRAIN = (
    "--config=configs/base.py --policy_model={0}/policy --sarm_model={0}/sarm "
    "--prompts_jsonl={0}/demos.jsonl --config.eval_prompts_jsonl={0}/demos.jsonl "
    "--penalize_features=3,5 --tau_values=0.1,0.1 --alpha_values=0.5,0.25 "
    "--beta=0.1 --human_latents={0}/human.safetensors"
)
BIT = ["-m", "benchmarks.killed", "--place=update", "--call=4", "--signal=SIGTERM", "--"]


def unused_port() -> int:
    """Returns a port that no process listens at."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def options(world, workdir):
    """Returns the command line of the train stage."""
    flags = [*TRAIN.format(world).split(), *(f"--config.{option}" for option in OPTIONS)]
    return [*flags, f"--workdir={workdir}"]


def algorithm_options(algorithm):
    """Returns the command line of an algorithm."""
    return [f"--config.ppo.{name}={value}" for name, value in ALGORITHMS[algorithm].items()]


def start(world, workdir, *further, program=("main.py",)):
    """Starts the train stage in a separate process with one device."""
    line = [sys.executable, *program, *options(world, workdir), *further]
    environment = os.environ | {
        "TQDM_DISABLE": "1",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1",
        "TMPDIR": str(world.parent),
    }
    text = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=environment, **text)


def finish(*started):
    """Waits for processes; returns (exit code, stderr) of each."""
    errors = [process.communicate(timeout=600)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, errors, strict=True)]


def start_two(world, workdir, others=((), ()), programs=(("main.py",),) * 2):
    """Starts both processes of a run on a mesh over them."""
    address = f"--coordinator_address=localhost:{unused_port()}"
    return [
        start(
            world,
            *(workdir, "--config.mesh.data=2", address, "--num_processes=2"),
            *(f"--process_id={number}", *others[number]),
            program=programs[number],
        )
        for number in range(2)
    ]


def assert_nothing_is_left_to_do(world, workdir, others):
    summary = (workdir / "summary.json").read_text()
    again = finish(*start_two(world, workdir, others))
    assert [code for code, _ in again] == [0, 0], again
    assert (workdir / "summary.json").read_text() == summary


def assert_same_run(folder, algorithm):
    """Compares the run of one process in `folder`/one with that of two in `folder`/two."""
    one, two = (read_metrics(folder / name / "metrics.csv") for name in ("one", "two"))
    columns = [name for name in COMPARED_COLUMNS if algorithm == "ppo" or name != "value_loss"]
    assert_same_metrics(two, one, columns)
    assert all(row["ratio_0_max_dev"] <= 1e-5 for row in two)
    responses = [
        [row["response"] for row in read_jsonl(folder / name / "evaluations.jsonl", {})]
        for name in ("one", "two")
    ]
    assert responses[0] == responses[1] and len(responses[0]) >= 2 * 4
    files = [
        {str(p.relative_to(folder / name)) for p in (folder / name).rglob("*.safetensors")}
        for name in ("one", "two")
    ]
    assert files[0] == files[1] != set()


def test_a_run_of_two_processes_equals_that_of_one(world, tmp_path):
    short = ("--config.ppo.total_steps=3", "--config.ppo.eval_every=3")
    assert run_main(*options(world, tmp_path / "one"), *short) == 0
    finished = finish(*start_two(world, tmp_path / "two", (short, short)))
    assert [code for code, _ in finished] == [0, 0], finished
    # The primary process alone tells the outcome.
    assert ["3 steps: total reward" in errors for _, errors in finished] == [True, False]
    assert_same_run(tmp_path, "ppo")
    assert not list(world.parent.glob("sarm_jax_*"))  # the second process has removed its files


@pytest.mark.evidence
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_a_resumed_run_of_two_processes_equals_that_of_one(world, tmp_path, algorithm):
    """GRPO runs with refilled slots, PPO without."""
    others = (algorithm_options(algorithm),) * 2
    assert run_main(*options(world, tmp_path / "one"), *others[0]) == 0
    # The signal is sent to the process that does not keep the run.
    killed = start_two(world, tmp_path / "two", others, programs=(("main.py",), BIT))
    stopped = finish(*killed)
    assert [code for code, _ in stopped] == [143, 143], stopped
    assert "stopped by signal 15 after step 4" in stopped[0][1]
    assert [path.name for path in (tmp_path / "two" / "checkpoints").iterdir()] == ["4"]
    finished = finish(*start_two(world, tmp_path / "two", others))
    assert [code for code, _ in finished] == [0, 0], finished
    assert "resuming after step 4 of 10" in finished[0][1]
    if algorithm == "grpo":
        assert_nothing_is_left_to_do(world, tmp_path / "two", others)
    assert_same_run(tmp_path, algorithm)


def test_if_one_process_refuses_its_input_both_do(world, tmp_path):
    missing = ("--prompts_jsonl=nowhere.jsonl",)
    (first, first_error), (second, second_error) = finish(
        *start_two(world, tmp_path / "files", others=((), missing))
    )
    assert (first, second) == (2, 2)
    assert "error: prompts_jsonl=nowhere.jsonl" in second_error
    assert "error: process 1: prompts_jsonl=nowhere.jsonl" in first_error
    assert not list((tmp_path / "files").glob("checkpoints"))


@pytest.mark.evidence  # `tests/pipeline/test_provenance.py` compares without processes
def test_if_one_process_has_another_option_both_refuse(world, tmp_path):
    (first, _), (second, second_error) = finish(
        *start_two(world, tmp_path / "seeds", others=((), ("--seed=1",)))
    )
    assert (first, second) == (2, 2)
    assert "error: process 1: not what process 0 has: ppo.seed was 0 and is now 1" in second_error


def test_a_coordinator_that_does_not_answer_is_named():
    hosts = Hosts(f"localhost:{unused_port()}", count=2, number=1, timeout=0)
    with pytest.raises(InputError, match=r"--coordinator_address=localhost:\d+: no answer in 0 s"):
        processes.connect(hosts)


def test_a_single_process_communicates_with_nobody():
    tree = {"a": jax.numpy.arange(3), "b": 2.0}
    assert processes.fetch(tree)["a"].tolist() == [0, 1, 2]
    assert processes.broadcast(None) is None and processes.all_max(15) == 15
    processes.raise_on_others("a problem")
    assert processes.on_primary(lambda: (1, None)) == (1, None)
    with pytest.raises(OSError, match="full"), processes.raising_on_all():
        raise OSError("full")
    with processes.primary_only(contextlib.nullcontext("entered")) as entered:
        assert entered == "entered"
    assert not processes.lost_peer(jax.errors.JaxRuntimeError("Gloo: connection closed by peer"))
    with processes.writable_workdir(Path("run")) as place, processes.exit_without_barrier():
        assert place == Path("run")
