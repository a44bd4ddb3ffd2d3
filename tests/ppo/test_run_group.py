"""Runs of a group give the numbers of separate runs, and stop, end and resume on their own."""

import csv
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo.learner import Learner, RunPrompts
from ppo.run_group import RunGroup
from ppo.tracking.guards import GuardStopError
from sarm_jax.models import chat
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.parallel.sharding import MeshConfig, Placement, make_mesh
from tests.closeness import assert_close
from tests.further import further
from tests.meshes import divisible_llama_config, place_parameters
from tests.tiny_models import reward_options, scale_matrices

pytestmark = pytest.mark.slow

TIMES = {"timestamp", "time_rollout", "time_score", "time_update", "tokens_per_second"}
RUNS = {
    "penalised": {},
    "plain": {"reward": reward_options(), "learning_rate": 3e-4},
    "seed": {"seed": 5},
}


def rows_of(workdir):
    """Returns the rows of metrics.csv as numbers, without times."""
    with (workdir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v or "nan") for k, v in row.items() if k not in TIMES} for row in rows]


def assert_same_numbers(first, second):
    a, b = rows_of(first), rows_of(second)
    assert len(a) == len(b)
    for row_a, row_b in zip(a, b, strict=True):
        assert row_a.keys() == row_b.keys()
        for name in row_a:
            np.testing.assert_allclose(row_a[name], row_b[name], rtol=1e-4, atol=1e-4, err_msg=name)
    texts = [
        [json.loads(line)["response"] for line in (folder / "samples.jsonl").open()]
        for folder in (first, second)
    ]
    assert texts[0] == texts[1]


@pytest.fixture
def policy(architecture, tokenizer):
    stop_ids = chat.stop_ids(tokenizer)
    return scale_matrices(Llama(architecture, rngs=nnx.Rngs(0), stop_ids=stop_ids))


def over_the_same_weights(policy):
    return nnx.merge(*nnx.split(policy))


@pytest.fixture
def programs(monkeypatch):
    """Counts the runs of each rollout that a group has sampled."""
    counts = []
    together = Learner.rollout_of_runs

    def count(self, prompts_of_runs, *rest):
        counts.append(len(prompts_of_runs))
        return together(self, prompts_of_runs, *rest)

    monkeypatch.setattr(Learner, "rollout_of_runs", count)
    return counts


def test_a_group_gives_the_numbers_of_separate_runs(make_trainer, policy, programs, tmp_path):
    options = {"total_steps": 10, "evaluate": True, "eval_every": 4}
    for name, changes in RUNS.items():
        make_trainer(tmp_path / name, **options, **changes).run()

    def run(name):
        def call(member):
            own = over_the_same_weights(policy)
            workdir = tmp_path / f"group_{name}"
            make_trainer(workdir, policy=own, member=member, **options, **RUNS[name]).run()

        return call

    assert RunGroup().run([run(name) for name in RUNS]) == [None] * len(RUNS)
    for name in RUNS:
        assert_same_numbers(tmp_path / name, tmp_path / f"group_{name}")
    assert set(programs) == {3}


def test_what_runs_have_in_common_before_their_first_update_is_sampled_once(
    make_trainer, policy, programs, monkeypatch, tmp_path
):
    options = {"total_steps": 3, "evaluate": True, "eval_every": 3}
    names = ("penalised", "plain")
    for name in names:
        make_trainer(tmp_path / name, **options, **RUNS[name]).run()
    alone, rollout = [], Learner.rollout

    def count(self, *rest, **options):
        alone.append(1)
        return rollout(self, *rest, **options)

    monkeypatch.setattr(Learner, "rollout", count)
    config = {}

    def run(name):
        def call(member):
            own = over_the_same_weights(policy)
            workdir = tmp_path / f"group_{name}"
            trainer = make_trainer(workdir, policy=own, member=member, **options, **RUNS[name])
            config[name] = trainer.config.ppo
            trainer.run()

        return call

    assert RunGroup().run([run(name) for name in names]) == [None, None]
    for name in names:
        assert_same_numbers(tmp_path / name, tmp_path / f"group_{name}")
        first, second = (
            (tmp_path / folder / "evaluations.jsonl").read_text().splitlines()
            for folder in (name, f"group_{name}")
        )
        assert [json.loads(row)["response"] for row in first] == [
            json.loads(row)["response"] for row in second
        ]
    before = config["plain"].calibration_batches + config["plain"].eval_batches + 1  # and step 0
    assert len(alone) == before
    assert programs == [2] * (2 + config["plain"].eval_batches)


def test_a_run_that_stops_leaves_the_others(make_trainer, policy, programs, tmp_path):
    for name in ("stopped", "other"):
        make_trainer(tmp_path / name, seed=len(name)).run()

    def run(name, **guards):
        def call(member):
            own, workdir = over_the_same_weights(policy), tmp_path / f"group_{name}"
            options = {"seed": len(name), "guards": guards, "policy": own}
            trainer = make_trainer(workdir, member=member, **options)
            trainer.run()

        return call

    # Every response is too short to have this much entropy, from the first step on.
    stopping = run("stopped", stop=("entropy",), entropy=1e9, steps=2)
    stopped, other = RunGroup().run([stopping, run("other")])
    assert isinstance(stopped, GuardStopError) and other is None
    assert len(rows_of(tmp_path / "group_stopped")) == 2
    assert_same_numbers(tmp_path / "other", tmp_path / "group_other")
    assert 2 in programs
    make_trainer(tmp_path / "group_stopped", seed=len("stopped")).run()  # alone, from there
    assert_same_numbers(tmp_path / "stopped", tmp_path / "group_stopped")


def test_a_signal_stops_all_runs_with_a_checkpoint(make_trainer, policy, tmp_path):
    def run(name):
        def call(member):
            own = over_the_same_weights(policy)
            trainer = make_trainer(tmp_path / name, policy=own, member=member)
            step = trainer._step

            def stop_after_one(number, state):
                if number == 1 and name == "a":
                    os.kill(os.getpid(), signal.SIGTERM)
                return step(number, state)

            trainer._step = stop_after_one
            trainer.run()

        return call

    errors = RunGroup().run([run("a"), run("b")])
    assert [error.code for error in errors] == [128 + signal.SIGTERM] * 2
    for name in "ab":
        steps = [int(path.name) for path in (tmp_path / name / "checkpoints").iterdir()]
        assert len(rows_of(tmp_path / name)) == max(steps) < 4


def test_a_signal_before_any_run_has_begun_ends_the_process(monkeypatch):
    passed = []

    def outer(number, _frame):
        passed.append(number)
        raise KeyboardInterrupt  # in place of the end of the process

    previous = signal.signal(signal.SIGTERM, outer)
    try:
        with pytest.raises(KeyboardInterrupt):
            RunGroup().run([lambda _: os.kill(os.getpid(), signal.SIGTERM)])
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert passed == [signal.SIGTERM]


def test_an_error_of_the_shared_program_reaches_every_run(
    make_trainer, policy, monkeypatch, tmp_path
):
    def fail(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Learner, "rollout_of_runs", fail)

    def run(name):
        own, seed = over_the_same_weights(policy), ord(name)
        return lambda member: make_trainer(
            tmp_path / name, policy=own, member=member, seed=seed
        ).run()

    errors = RunGroup().run([run("a"), run("b")])
    assert ["RESOURCE_EXHAUSTED" in str(error) for error in errors] == [True, True]


@pytest.mark.parametrize(
    ("shape", "changes", "slots"),
    [
        further((1, 1, 1), {}, None),
        ((1, 1, 1), {}, 16),
        ((1, 1, 1), {"algorithm": "rloo", "samples_per_prompt": 2}, None),
        further((2, 1, 1), {}, 8),
        further((1, 2, 1), {}, None),
        further((1, 1, 2), {}, None),
        ((1, 2, 2), {}, None),
    ],
)
def test_rollouts_of_several_adapters(tokenizer, ppo_config, shape, changes, slots):
    config = divisible_llama_config(tokenizer)
    policy = Llama(config, rngs=nnx.Rngs(0), stop_ids=chat.stop_ids(tokenizer))
    policy.placement = Placement(make_mesh(MeshConfig(*shape)))
    policy = place_parameters(scale_matrices(policy), policy.placement)
    learner, fresh, base = Learner.attach(
        ppo_config(**changes), LoRAConfig(rank=4), policy=policy, pad=0
    )
    rng = np.random.default_rng(0)
    rows = learner.config.prompts_per_batch
    runs, expected = [], []
    for number in range(3):
        noise = iter(jax.random.split(jax.random.key(number), 100))
        lora = jax.tree.map(
            lambda x, noise=noise: x + 0.1 * jax.random.normal(next(noise), x.shape), fresh.params
        )
        lora = policy.placement.replicated(lora)["lora"]
        mask_bp = np.arange(4)[::-1] < rng.integers(1, 5, size=(rows, 1))
        tokens_bp = np.where(mask_bp, rng.integers(5, 60, size=(rows, 4)), 0).astype(np.int32)
        key = jax.random.key(10 + number)
        runs.append(RunPrompts(lora, tokens_bp, mask_bp, key))
        expected.append(learner.rollout({"lora": lora}, base, tokens_bp, mask_bp, key, slots=slots))
    for result, alone in zip(learner.rollout_of_runs(runs, base, slots), expected, strict=True):
        np.testing.assert_array_equal(result.tokens_br, alone.tokens_br)
        np.testing.assert_array_equal(result.mask_br, alone.mask_br)
        np.testing.assert_array_equal(result.ended_b, alone.ended_b)
        assert_close(result.logp_br, np.asarray(alone.logp_br), 1e-5)


def test_the_program_of_several_runs_holds_the_weights_once(tokenizer, ppo_config):
    """No array of the program has an axis of runs and the size of a kernel."""
    policy = Llama(divisible_llama_config(tokenizer), rngs=nnx.Rngs(0), stop_ids=(1,))
    learner, fresh, base = Learner.attach(ppo_config(), LoRAConfig(rank=4), policy=policy, pad=0)
    rows = learner.config.prompts_per_batch
    tokens_bp, mask_bp = jnp.ones((rows, 1), jnp.int32), jnp.ones((rows, 1), bool)
    run = RunPrompts(fresh.params["lora"], tokens_bp, mask_bp, jax.random.key(0))
    text = str(jax.make_jaxpr(learner._rollout_of_runs, static_argnums=2)((run,) * 3, base, None))
    # W_gate and W_up of one layer, fused: [1, 2 · 64, 32].
    assert "f32[1,128,32]" in text
    assert "f32[3,1,128,32]" not in text and "f32[3,128,32]" not in text
