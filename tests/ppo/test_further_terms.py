"""Runs whose reward reads the pooled state, screens, is bounded, and has a price per token."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest

from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.features.dense_probe import DenseProbe, load_probe, save_probe
from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import stop_ids
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel.sharding import ONE_DEVICE, MeshConfig, Placement, make_mesh
from sarm_jax.rewards import ControlledReward
from sarm_jax.rewards.human_states import fit_human_states, save_human_states
from sarm_jax.rewards.reward_config import FURTHER_TERMS
from tests.closeness import assert_close, assert_same_metrics
from tests.meshes import COMPARED_COLUMNS, train_on_mesh
from tests.tiny_models import PROMPTS, reward_options

pytestmark = pytest.mark.slow
STATE_SIZE = 32
TRAINED = 3e-4  # as in tests/sarm_jax/parallel/test_sharding.py
TERMS = ("rm_score", "indicator_penalty", "kl_penalty", *FURTHER_TERMS)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A probe that fires on about half of the responses, and states of "human" responses."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    direction = rng.normal(size=STATE_SIZE)
    probe = DenseProbe((direction / np.linalg.norm(direction)).astype(np.float32), 0.0)
    save_probe(folder / "probe.safetensors", probe)
    states = fit_human_states(rng.normal(size=(20, STATE_SIZE)).astype(np.float32), "x")
    save_human_states(folder / "states.safetensors", states)
    return {
        "probe": str(folder / "probe.safetensors"),
        "human_states": str(folder / "states.safetensors"),
    }


@pytest.fixture
def reward(files):
    """All further terms and a penalised feature."""
    return reward_options(
        **files,
        penalize_features=(3,),
        tau_values=(0.1,),
        alpha_values=(0.2,),
        probe_penalty=0.3,
        distance_penalty=0.02,
        length_penalty=0.01,
        bound="sigmoid",
        unit="sd",
    )


@pytest.fixture
def screen(reward):
    """The same terms, with feature and probe as a screen."""
    return dataclasses.replace(reward, alpha_values=(), probe_penalty=0.0, screen=True)


def without_times(workdir):
    timed = {"timestamp", "time_rollout", "time_score", "time_update", "tokens_per_second"}
    with (workdir / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def lines(workdir, name):
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_terms_of_a_run_and_of_the_reward_function(
    make_trainer, reward, reward_model, tokenizer, tmp_path
):
    """Every record has every term, they add up, and other trainers get the same numbers."""
    workdir = tmp_path / "run"
    trainer = make_trainer(workdir, reward=reward, evaluate=True, total_steps=2)
    rollouts, rewards = [], []
    make_batch = trainer._batch

    def remember(rollout, reward_b, slots):
        rollouts.append(rollout)
        rewards.append(reward_b.tolist())
        return make_batch(rollout, reward_b, slots)

    trainer._batch = remember
    trainer.run()
    for row in read_metrics(workdir / "metrics.csv"):
        assert list(row)[-len(reward.further_columns) :] == list(reward.further_columns)
        terms = [row[name] for name in TERMS]
        assert_close(row["total_reward"], terms[0] - sum(terms[1:]), 1e-5, terms)
        assert row["probe_above_tau"] > 0 and row["state_distance"] > 0
    for name in ("samples.jsonl", "evaluations.jsonl"):
        for row in lines(workdir, name):
            further = sum(row[term] for term in FURTHER_TERMS)
            expected = row["rm_score"] - sum(row["penalties"].values()) - further
            assert_close(row["total_reward"], expected, 1e-5, terms=row["rm_score"])
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(FURTHER_TERMS) <= summary["held_out"]["last"].keys()

    function = ControlledReward(
        reward_model,
        reward,
        scale=trainer.scale,
        normalise=True,
        missing_eos_penalty=1.0,
        stop_ids=stop_ids(tokenizer),
    )
    for rollout, expected in zip(rollouts, rewards, strict=True):
        pairs = zip(rollout.generation.tokens_br, rollout.generation.mask_br, strict=True)
        ids = [np.asarray(tokens)[np.asarray(mask)].tolist() for tokens, mask in pairs]
        assert function(rollout.prompts, rollout.responses, completion_ids=ids) == expected
    with pytest.raises(InputError, match="reward.length_penalty=0.01: needs completion_ids"):
        ControlledReward(reward_model, reward, scale=trainer.scale)(PROMPTS, PROMPTS)


def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, screen, tmp_path):
    groups = {"algorithm": "rloo", "samples_per_prompt": 2}
    options = {"reward": screen, "evaluate": True, "eval_every": 2, **groups}
    whole = make_trainer(tmp_path / "whole", total_steps=4, **options)
    whole.run()
    make_trainer(tmp_path / "cut", total_steps=2, **options).run()
    cut = make_trainer(tmp_path / "cut", total_steps=4, **options)
    cut.run()
    for a, b in zip(*map(jax.tree.leaves, (whole.state, cut.state)), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [without_times(tmp_path / name) for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    shares = [float(row["screened_fraction"]) for row in rows[0]]
    assert any(0 < share < 1 for share in shares)
    for name in ("samples.jsonl", "evaluations.jsonl"):
        own, other = (lines(tmp_path / folder, name) for folder in ("whole", "cut"))
        assert own == other and {row["screened"] for row in own} <= {True, False}


def test_a_run_whose_responses_are_all_screened_learns_nothing(make_trainer, screen, tmp_path):
    always = dataclasses.replace(load_probe(screen.probe), tau=-1e6)
    save_probe(tmp_path / "always.safetensors", always)
    everything = dataclasses.replace(screen, probe=str(tmp_path / "always.safetensors"))
    trainer = make_trainer(tmp_path / "run", reward=everything, total_steps=2)
    before = jax.tree.map(np.asarray, trainer.state.train)
    trainer.run()
    for a, b in zip(*map(jax.tree.leaves, (before, trainer.state.train)), strict=True):
        np.testing.assert_array_equal(a, b)
    for row in read_metrics(tmp_path / "run/metrics.csv"):
        assert row["screened_fraction"] == 1 and row["screened_updates"] == 2
        assert row["skipped_updates"] == 0
        assert row["entropy"] > 1  # of all responses: nothing has collapsed
        own = {name: value for name, value in row.items() if not name.startswith("disc_")}
        assert np.isfinite(list(own.values())).all()


@pytest.mark.evidence
def test_two_devices_compute_what_one_does(screen, tokenizer, ppo_config, tmp_path):
    runs = {
        name: train_on_mesh(
            tokenizer, ppo_config, placement, tmp_path / name, reward=screen, total_steps=2
        )
        for name, placement in (
            ("one", ONE_DEVICE),
            ("two", Placement(make_mesh(MeshConfig(1, 2, 1)))),
        )
    }
    one, two = (read_metrics(tmp_path / name / "metrics.csv") for name in runs)
    names = [n for n in COMPARED_COLUMNS if not n.startswith("disc")]
    assert_same_metrics(two, one, [*names, *screen.further_columns])
    assert any(0 < row["screened_fraction"] < 1 for row in one)
    params = [run.state.train.params for run in runs.values()]
    for a, b in zip(*map(jax.tree.leaves, params), strict=True):
        assert_close(a, b, TRAINED)


def test_states_are_read_only_if_a_term_needs_them(make_trainer, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the states are not needed")

    monkeypatch.setattr(RewardModel, "score_with_states", refuse)
    reward = reward_options(length_penalty=0.01, bound="sigmoid")
    make_trainer(tmp_path / "run", reward=reward, total_steps=1).run()


def test_a_reward_function_cannot_screen(reward_model, screen):
    with pytest.raises(InputError, match="reward.screen=True: the trainer takes a number"):
        ControlledReward(reward_model, screen)
