"""Traces: own times by hand, and the summary of a real run."""

import json

import numpy as np

from ppo.profiling import PHASES, SHOWN, ProfileConfig, own_times


def test_own_times_by_hand():
    events = [
        (0, 100, "outer"),
        (10, 30, "inner"),
        (15, 5, "innermost"),
        (50, 20, "inner"),
        (100, 7, "after"),
    ]
    found = sorted(own_times(events))
    assert found == [("after", 7), ("inner", 20), ("inner", 25), ("innermost", 5), ("outer", 50)]


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
