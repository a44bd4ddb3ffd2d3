"""Traces: own times by hand, and the summary of a real run."""

import json
from types import SimpleNamespace

import numpy as np

from ppo.tracking.profiling import PHASES, SHOWN, ProfileConfig, own_times, summarise_trace


def test_own_times_by_hand():
    events = [
        (0, 100, "outer"),
        (10, 30, "inner"),
        (15, 5, "innermost"),
        (50, 20, "inner"),
        (100, 7, "after"),
    ]
    times = sorted(own_times(events))
    assert times == [("after", 7), ("inner", 20), ("inner", 25), ("innermost", 5), ("outer", 50)]


def test_events_that_overlap_are_not_inside_each_other():
    events = [(0, 100, "step"), (10, 30, "first"), (39, 40, "second"), (79, 21, "third")]
    assert sorted(own_times(events)) == [("first", 30), ("second", 40), ("step", 9), ("third", 21)]


def event(name, start, duration, **stats):
    return SimpleNamespace(name=name, start_ns=start, duration_ns=duration, stats=stats.items())


def test_operations_of_a_gpu_are_its_kernels():
    graph = {"hlo_module": "jit_rollout", "hlo_op": "command_buffer_7"}
    kernels = [event("gemm", 0, 60, **graph), event("add", 59, 40, **graph)]
    kernels += [event("gemm", 100, 50, **graph)]
    host = [event("ppo_step", 0, 1000), event("rollout", 0, 300)]
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=[SimpleNamespace(events=kernels)]),
        SimpleNamespace(name="/host:CPU", lines=[SimpleNamespace(events=host)]),
    ]
    summary = summarise_trace(SimpleNamespace(planes=planes))
    top = [(row["operation"], row["calls"]) for row in summary["top_operations"]]
    assert top == [("gemm", 2), ("add", 1)]
    np.testing.assert_allclose(summary["top_operations"][0]["seconds"], 110e-9)
    np.testing.assert_allclose(summary["operation_seconds"], 150e-9)


def test_two_steps_of_a_run_are_traced(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, total_steps=5, profile=ProfileConfig(3, 2))
    trainer.run()
    summary = json.loads((tmp_path / "profile_summary.json").read_text())
    assert summary["steps"] == 2 and set(summary["phases"]) == set(PHASES)
    assert min(summary["phases"].values()) > 0
    assert sum(summary["phases"].values()) <= summary["step_seconds"]
    seconds = [row["seconds"] for row in summary["top_operations"]]
    assert len(seconds) == SHOWN and seconds == sorted(seconds, reverse=True)
    shares = [row["share"] for row in summary["top_operations"]]
    np.testing.assert_allclose(shares, np.divide(seconds, summary["operation_seconds"]))
    assert 0 < sum(shares) <= 1
    assert {row["program"] for row in summary["top_operations"]} & {"jit__step", "jit_rollout"}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
