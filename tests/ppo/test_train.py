"""Whole runs on a tiny policy and SARM: files, resuming, learning, stopping."""

import csv
import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo.learner import Learner
from ppo.prompts import PromptDeck
from ppo.rollout import Sampler
from ppo.tracking import metrics as metrics_module
from ppo.tracking.guards import GuardStopError, NonFiniteError
from ppo.tracking.metrics import COLUMNS, check_log, read_evaluations
from ppo.update import Updater
from sarm_jax.io.errors import InputError
from sarm_jax.models import chat
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.rewards.scoring import Scored
from tests.closeness import assert_close
from tests.further import further
from tests.tiny_models import ALGORITHMS, HELD_OUT, PROMPTS, REWARD, reward_options

pytestmark = pytest.mark.slow


def metrics(workdir):
    with (workdir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def same_state(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def without_times(rows):
    timed = {"timestamp", "time_rollout", "time_score", "time_update", "tokens_per_second"}
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def test_a_run_writes_all_its_files(make_trainer, tmp_path):
    workdir = tmp_path / "run"
    summary = make_trainer(workdir).run()
    rows = metrics(workdir)
    assert list(rows[0])[: len(COLUMNS)] == COLUMNS
    assert list(rows[0])[len(COLUMNS) :] == [
        "feat_3_activation", "feat_3_above_tau", "feat_5_activation", "feat_5_above_tau",
        "skipped_updates", "distinct_responses", "latent_kl", "latent_kl_se",
    ]  # fmt: skip
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert all(np.isfinite(float(cell)) for row in rows for cell in row.values())
    for row in rows:
        assert float(row["ratio_0_max_dev"]) <= 1e-5
        assert float(row["approx_kl"]) > 0
        assert float(row["sampler_drift"]) < 1e-4
        terms = [float(row[x]) for x in ("rm_score", "indicator_penalty", "kl_penalty")]
        assert_close(float(row["total_reward"]), terms[0] - terms[1] - terms[2], 1e-6, terms)
    assert float(rows[0]["ref_kl"]) < 1e-6 < float(rows[-1]["ref_kl"])
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").open()]
    assert len(samples) == 8
    for sample in samples:
        total = sample["rm_score"] - sum(sample["penalties"].values()) - sample["kl_penalty"]
        assert_close(sample["total_reward"], total, 1e-6, terms=sample["rm_score"])
        assert set(sample["penalties"]) == {"3", "5"}
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert list(workdir.glob("events.out.tfevents.*"))
    assert list((workdir / "checkpoints").iterdir())


def test_a_run_without_a_critic(make_trainer, tmp_path):
    workdir = tmp_path / "run"
    trainer = make_trainer(workdir, evaluate=True, total_steps=3, **ALGORITHMS["grpo"])
    trainer.run()
    rows = metrics(workdir)
    assert list(rows[0])[-3] == "zero_spread_groups" and rows[0]["value_loss"] == ""
    others = [row[name] for row in rows for name in row if name != "value_loss"]
    assert np.isfinite(np.asarray(others, float)).all()
    assert "value_head" not in trainer.state.train.params
    samples = [json.loads(line) for line in (workdir / "samples.jsonl").open()]
    assert samples[0]["prompt"] == samples[1]["prompt"]  # neighbours in a batch
    assert samples[0]["response"] != samples[1]["response"]
    evaluated = [json.loads(line) for line in (workdir / "evaluations.jsonl").open()]
    assert len({row["prompt"] for row in evaluated if row["step"] == 0}) == 2
    with pytest.raises(InputError, match=r"metrics.csv:1: does not have the columns"):
        check_log(workdir, REWARD.penalize_features, done=3, checkpoint_every=2)


def test_the_state_is_there_from_the_start(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", total_steps=1)
    fresh = jax.tree.map(np.asarray, trainer.state)
    assert not np.any(fresh.train.params["value_head"]["kernel"])
    assert fresh.density_ratio is not None
    trainer.run()
    assert np.any(trainer.state.train.params["value_head"]["kernel"])
    without = make_trainer(tmp_path / "without", reward=reward_options())
    assert without.state.density_ratio is None


def test_same_seed_same_numbers(make_trainer, tmp_path):
    runs = [make_trainer(tmp_path / name) for name in "ab"]
    for trainer in runs:
        trainer.run()
    same_state(runs[0].state, runs[1].state)
    a, b = (without_times(metrics(tmp_path / name)) for name in "ab")
    assert a == b


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", further("grpo")])
def test_a_resumed_run_gives_the_same_results(make_trainer, tmp_path, algorithm):
    options = {"total_steps": 5, **ALGORITHMS[algorithm]}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.run()
    first = make_trainer(tmp_path / "parts", **options)
    step = first._step

    def interrupted(number, state):
        if number == 3:  # the row of step 2, after the checkpoint at 2, must not be logged twice
            raise KeyboardInterrupt
        return step(number, state)

    first._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert len(metrics(tmp_path / "parts")) == 3
    second = make_trainer(tmp_path / "parts", **options)
    second.run()
    same_state(whole.state, second.state)
    a, b = (without_times(metrics(tmp_path / name)) for name in ("whole", "parts"))
    assert a == b
    lines = [(tmp_path / n / "samples.jsonl").read_text() for n in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_a_finished_run_is_not_repeated(make_trainer, tmp_path):
    one = make_trainer(tmp_path / "run", total_steps=2)
    one.run()
    before = (tmp_path / "run" / "metrics.csv").read_text()
    again = make_trainer(tmp_path / "run", total_steps=2)
    again.run()
    same_state(one.state, again.state)
    assert (tmp_path / "run" / "metrics.csv").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_and_exits(make_trainer, tmp_path, number):
    trainer = make_trainer(tmp_path / "run", checkpoint_every=100)
    step = trainer._step

    def signalled(at, state):
        if at == 1:
            os.kill(os.getpid(), number)
        return step(at, state)

    trainer._step = signalled
    with pytest.raises(SystemExit) as stop:
        trainer.run()
    assert stop.value.code == 128 + number
    assert len(metrics(tmp_path / "run")) == 2
    resumed = make_trainer(tmp_path / "run", checkpoint_every=100)
    resumed.run()
    assert [row["step"] for row in metrics(tmp_path / "run")] == ["0", "1", "2", "3"]


UNWHITENED = {"total_steps": 7, "whiten_advantages": False, "missing_eos_penalty": 0.0}


def poison(trainer):
    """Makes logits, a score, latents, the discriminator and gradients non-finite, at steps 1–5."""
    score, updater, step = trainer.scorer.score, trainer.updater, trainer._step
    current = -1
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), trainer.base)  # same shapes and types

    def poisoned_score(*texts):
        scored = score(*texts)
        score_b, z_bn, z_bs = map(np.array, (scored.score_b, scored.z_bn, scored.z_bs))
        if current == 2:
            score_b[0] = np.inf
        if current == 3:
            z_bn[1, 0] = np.nan
        if current == 4:
            z_bs[:] = np.nan
        return Scored(score_b, z_bn=z_bn, z_bs=z_bs)

    def poisoned_update(state, base, batch, **options):
        if current == 5:  # its square exceeds float32 in the norm of the gradient
            huge_b = np.resize(np.float32([1e30, -1e30]), len(batch.reward_b))
            batch = batch.replace(reward_b=jax.device_put(huge_b))
        return updater.update(state, nan if current == 1 else base, batch, **options)

    def checked_step(number, state):
        nonlocal current
        current, before = number, jax.tree.map(np.asarray, state)
        new, row, samples = step(number, state)
        if 1 <= number <= 5:
            same_state(before.train, new.train)
        if number == 4:
            same_state(before, new)
        return new, row, samples

    assert trainer.density_ratio is not None
    trainer.scorer.score = poisoned_score
    trainer.updater = SimpleNamespace(update=poisoned_update, lower=updater.lower)
    trainer._step = checked_step
    return trainer


def test_steps_that_are_not_finite_are_skipped_counted_and_dumped(
    make_trainer, tmp_path, compilations
):
    trainer = poison(
        make_trainer(tmp_path / "run", guards={"max_nonfinite_steps": 5}, **UNWHITENED)
    )
    compiled = compilations(trainer)
    summary = trainer.run()
    rows = metrics(tmp_path / "run")
    # Both epochs of the update, and at step 4 the discriminator's two minibatches as well.
    assert [float(row["skipped_updates"]) for row in rows] == [0, 2, 2, 2, 4, 2, 0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trainer.state))
    assert max(compiled) < 1  # the check compiles nothing
    (warning,) = [w for w in summary["warnings"] if w["guard"] == "nonfinite"]
    assert (warning["first_step"], warning["steps"]) == (1, 5)
    assert np.isfinite(summary["last_steps"]["total_reward"])
    for number in range(1, 6):
        path = tmp_path / "run" / f"nonfinite_step_{number}.npz"
        with np.load(path) as dumped:
            assert len(dumped["prompts"]) == len(dumped["batch.reward_b"]) == 4
            assert np.isfinite(dumped["state.train.params.value_head.kernel"]).all()
            assert np.isnan(dumped["scored.penalised_bn"]).any() == (number == 3)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    assert all(np.isfinite(sample["total_reward"]) for sample in samples)


def test_too_many_steps_that_are_not_finite_stop_the_run(make_trainer, tmp_path):
    trainer = poison(
        make_trainer(tmp_path / "run", guards={"max_nonfinite_steps": 1}, **UNWHITENED)
    )
    with pytest.raises(NonFiniteError, match=r"step 2: 2 of 3 steps .*nonfinite_step_2\.npz"):
        trainer.run()
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stopped"] == "2 steps that were not finite"
    assert "nonfinite" in [warning["guard"] for warning in summary["warnings"]]
    healed = make_trainer(tmp_path / "run", **UNWHITENED)
    healed.run()
    assert [float(row["skipped_updates"]) for row in metrics(tmp_path / "run")] == [0, 2, *[0] * 5]


def test_a_run_without_a_finite_step_fails(make_trainer, tmp_path):
    trainer = poison(make_trainer(tmp_path / "run", **{**UNWHITENED, "total_steps": 1}))
    step = trainer._step
    trainer._step = lambda number, state: step(
        number + 1, state
    )  # the first step is poisoned as well
    with pytest.raises(NonFiniteError, match="1 of 1 steps were not finite"):
        trainer.run()


def test_a_guard_stops_the_run_if_guards_stop_names_it(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", guards={"stop": ("no_eos",), "steps": 2})
    with pytest.raises(GuardStopError, match=r"no_eos.*--config\.guards\.stop= resumes"):
        trainer.run()
    assert len(metrics(tmp_path / "run")) == 2
    assert trainer.state.train.params["lora"]  # the adapter is saved from it
    again = make_trainer(tmp_path / "run", guards={"stop": ("no_eos",), "steps": 2})
    with pytest.raises(GuardStopError, match="step 1: .*checkpoint 2 saved"):
        again.run()  # takes no further step
    assert len(metrics(tmp_path / "run")) == 2
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"2"}
    stopped = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (stopped["steps"], stopped["total_steps"]) == (2, 4)
    assert stopped["stopped"] == "guards.stop (no_eos)"
    assert "no_eos" in [warning["guard"] for warning in stopped["warnings"]]
    summary = make_trainer(tmp_path / "run", guards={"steps": 2}).run()
    assert summary["steps"] == 4 and summary["stopped"] is None
    named = {warning["guard"]: warning for warning in summary["warnings"]}
    assert named["no_eos"]["first_step"] == 1 and named["no_eos"]["steps"] == 3
    assert "reward_scale" in named  # α of 0.1 and 0.2 for a score with an sd of about 2


def test_a_guard_on_the_last_step_stops_nothing(make_trainer, tmp_path):
    guards = {"stop": ("no_eos",), "steps": 2}
    summary = make_trainer(tmp_path / "run", total_steps=2, guards=guards).run()
    assert summary["stopped"] is None
    assert "no_eos" in [warning["guard"] for warning in summary["warnings"]]


@pytest.fixture
def compilations():
    """Lists the step of every compilation of a trainer; -1 before the first step."""

    def listen_to(trainer):
        compiled: list[int] = []
        current, step = {"step": -1}, trainer._step

        def counted(at, state):
            current["step"] = at
            return step(at, state)

        def listen(event, _seconds, **_):
            if event == "/jax/core/compile/backend_compile_duration":
                compiled.append(current["step"])

        trainer._step = counted
        jax.monitoring.register_event_duration_secs_listener(listen)
        return compiled

    yield listen_to
    jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize("pieces", [2, further(1)])
def test_no_compilation_after_the_second_step(make_trainer, tmp_path, pieces, compilations):
    many = tuple(range(3, 70))  # stop tokens, so that lengths differ between the steps
    options = {"total_steps": 8, "eval_every": 3, "pack_levels": 3, "num_minibatches": pieces}
    trainer = make_trainer(tmp_path / "run", evaluate=True, stop_ids=many, **options)
    taken = set()
    (slot_plan,) = trainer._slot_plans.values()
    slots_for = slot_plan.slots_for

    def noted_slots(*lengths):
        taken.add(slots_for(*lengths))
        return slots_for(*lengths)

    slot_plan.slots_for = noted_slots
    compiled = compilations(trainer)
    trainer.run()
    assert compiled, "the listener heard nothing"
    assert max(compiled) < 2
    assert len(taken) > 1 and taken <= set(slot_plan.all_slots())


def test_a_resumed_run_compiles_before_its_second_step(make_trainer, tmp_path, compilations):
    many = tuple(range(3, 70))
    options = {"pack_levels": 2, "stop_ids": many}
    make_trainer(tmp_path / "run", total_steps=3, **options).run()
    trainer = make_trainer(tmp_path / "run", total_steps=9, **options)
    for program in (Learner._reference_logp, Updater._targets, Updater._step):
        program.clear_cache()  # compiled again, as in a new process
    compiled = compilations(trainer)
    trainer.run()
    assert compiled and max(compiled) < 4


def test_ppo_learns_to_please_the_reward_model(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(
        tmp_path / "run",
        reward=reward_options(),
        total_steps=30,
        batch_size=16,
        learning_rate=1e-2,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        samples_per_step=0,
        checkpoint_every=100,
    )

    # Tokens of one half of the vocabulary are rewarded, which one direction of the output embedding
    # separates. The decoder is replaced, so that the scorer gets token ids.
    policy = nnx.merge(trainer.learner.reference_graph, trainer.base)
    rewarded = set(np.flatnonzero(policy.vocabulary[:, 0] > 0).tolist())

    def token_ids(_, generation):
        pairs = zip(np.asarray(generation.tokens_br), np.asarray(generation.mask_br), strict=True)
        return [" ".join(map(str, row[mask])) for row, mask in pairs]

    def share_of_rewarded(model, prompts, responses, clamp, latent_indices):
        share = [np.mean([int(i) in rewarded for i in text.split()]) for text in responses]
        return np.asarray(share, np.float32), np.zeros((len(share), 0), np.float32)

    monkeypatch.setattr(Sampler, "_decode", token_ids)
    monkeypatch.setattr(RewardModel, "score", share_of_rewarded)
    summary = trainer.run()
    assert summary["total_reward_change_in_sd"] > 1.0
    assert summary["last_steps"]["ref_kl"] > 0.1


def test_scores_are_not_mixed_up_between_rows(make_trainer, tmp_path, reward_model):
    trainer = make_trainer(tmp_path / "run", total_steps=1, samples_per_step=4)
    trainer.run()
    weight_f = np.asarray(reward_model.model.score[...])
    for line in (tmp_path / "run" / "samples.jsonl").open():
        sample = json.loads(line)
        score, z = reward_model.score([sample["prompt"]], [sample["response"]])
        assert_close(sample["rm_score"], score[0], terms=z[0] * weight_f)
        for feature, tau, alpha in zip((3, 5), (0.1, 0.2), (0.2, 0.1), strict=True):
            fired = alpha if z[0, feature] > tau else 0.0
            np.testing.assert_allclose(sample["penalties"][str(feature)], fired, rtol=1e-6)


def test_clamping_changes_the_reward_that_is_learned_from(make_trainer, tmp_path, reward_model):
    reward = reward_options(clamp_features=(3,), clamp_set_values=(0.0,))
    trainer = make_trainer(tmp_path / "run", reward=reward, total_steps=1, samples_per_step=4)
    trainer.run()
    weight_f = np.asarray(reward_model.model.score[...])
    for line in (tmp_path / "run" / "samples.jsonl").open():
        sample = json.loads(line)
        score, z = reward_model.score([sample["prompt"]], [sample["response"]])
        expected = score[0] - weight_f[3] * z[0, 3]
        assert_close(sample["rm_score"], expected, terms=z[0] * weight_f)


def test_a_clamp_does_not_magnify_what_it_leaves(make_trainer, tmp_path):
    half = tuple(range(32))  # of the latents
    reward = reward_options(clamp_features=half, clamp_set_values=(0.0,) * 32)
    clamped = make_trainer(tmp_path / "clamped", reward=reward, total_steps=1)
    plain = make_trainer(tmp_path / "plain", reward=reward_options(), total_steps=1)
    clamped.run()
    plain.run()
    assert clamped.scale.std == pytest.approx(plain.scale.std, rel=1e-6)
    assert clamped.scale.mean != pytest.approx(plain.scale.mean, abs=1e-3)


def test_held_out_prompts_are_evaluated_and_not_learned_from(make_trainer, tmp_path, reward_model):
    plain = make_trainer(tmp_path / "plain")
    plain.run()
    options = {"evaluate": True, "eval_every": 3, "eval_batches": 2}
    trainer = make_trainer(tmp_path / "run", **options)
    summary = trainer.run()
    same_state(plain.state, trainer.state)
    assert without_times(metrics(tmp_path / "plain")) == without_times(metrics(tmp_path / "run"))
    assert not (tmp_path / "plain" / "evaluations.jsonl").exists()

    rows = read_evaluations(tmp_path / "run")
    assert [row["step"] for row in rows] == [0] * 8 + [3] * 8 + [4] * 8
    prompts = [row["prompt"] for row in rows]
    assert prompts[:8] == prompts[8:16] == prompts[16:] and set(prompts) == set(HELD_OUT)
    assert max(row["ref_kl"] for row in rows[:8]) < 1e-6 < min(row["ref_kl"] for row in rows[16:])
    assert summary["held_out"]["steps"] == [0, 4] and summary["held_out"]["responses"] == 8
    weight_f = np.asarray(reward_model.model.score[...])
    for row in rows:
        score, z = reward_model.score([row["prompt"]], [row["response"]])
        assert_close(row["rm_score"], score[0], terms=z[0] * weight_f)
        assert (row["penalties"]["3"] > 0) == (z[0, 3] > REWARD.tau_values[0])
        total = row["rm_score"] - sum(row["penalties"].values()) - row["kl_penalty"]
        assert_close(row["total_reward"], total, 1e-6, terms=row["rm_score"])
    last = [row["rm_score"] for row in rows[16:]]
    np.testing.assert_allclose(summary["held_out"]["last"]["rm_score"], np.mean(last), rtol=1e-6)


def test_a_line_separator_within_a_response_is_kept(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"step": 0, "response": "a\u2028b"}\n{"step": 2, "response": "c"}\n{"st')
    metrics_module._keep_lines(path, 1)
    assert path.read_text() == '{"step": 0, "response": "a\u2028b"}\n'


def test_an_incomplete_character_at_the_end_is_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    whole = '{"step": 0, "response": "é"}\n'.encode()
    path.write_bytes(whole + '{"step": 1, "response": "é'.encode()[:-1])
    metrics_module._keep_lines(path, 1)
    assert path.read_bytes() == whole


def test_evaluations_of_a_resumed_run_are_logged_once(make_trainer, tmp_path):
    options = {"evaluate": True, "eval_every": 1, "total_steps": 5}
    make_trainer(tmp_path / "whole", **options).run()
    first = make_trainer(tmp_path / "parts", **options)
    step = first._step

    def interrupted(number, state):
        if number == 3:
            raise KeyboardInterrupt
        return step(number, state)

    first._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        first.run()
    make_trainer(tmp_path / "parts", **options).run()
    whole, parts = ((tmp_path / n / "evaluations.jsonl").read_text() for n in ("whole", "parts"))
    assert whole == parts


def test_batches_of_prompts(tokenizer, ppo_config):
    deck = PromptDeck(PROMPTS, tokenizer, ppo_config(seed=1))
    dealt = [deck.texts(step) for step in range(5)]
    flat = [text for batch in dealt for text in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == sorted(PROMPTS)
    assert flat[:10] != flat[10:]
    assert deck.texts(3) == dealt[3]
    texts, (tokens, mask) = deck.texts(0), deck.deal(0)
    for text, row, real in zip(texts, tokens, mask, strict=True):
        assert row[real].tolist() == chat.encode_prompt(tokenizer, text)
        assert not real[0] or real.all()
    assert jnp.asarray(mask)[:, -1].all()


def test_what_ends_a_run_early_is_in_its_summary(make_trainer, tmp_path):
    """Errors of the device and of the disk; the summary of the call before is there until then."""

    def failing(at, error):
        trainer = make_trainer(tmp_path / "run", total_steps=6, evaluate=True)
        step = trainer._step

        def failing_step(number, state):
            if number == at:
                raise error
            return step(number, state)

        trainer._step = failing_step
        with pytest.raises(type(error)):
            trainer.run()
        return json.loads((tmp_path / "run" / "summary.json").read_text())

    first = failing(3, RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 3 bytes"))
    assert first["stopped"] == "out of memory" and first["steps"] == 3 and first["held_out"]
    last = failing(2, OSError(5, "Input/output error", "/data/x"))  # it repeats step 2
    assert last["stopped"] == "/data/x: Input/output error" and last["steps"] == 2
    started = []
    trainer = make_trainer(tmp_path / "run", total_steps=6, evaluate=True)
    trainer._on_start = lambda: started.append((tmp_path / "run" / "summary.json").read_text())
    assert trainer.run()["stopped"] is None
    assert json.loads(started[0]) == last


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", ["metrics.csv", "samples.jsonl", "evaluations.jsonl", "."])
def test_files_that_are_removed_under_a_run_are_named(make_trainer, tmp_path, name):
    trainer, run = make_trainer(tmp_path / "run", total_steps=6, evaluate=True), tmp_path / "run"
    step = trainer._step

    def removing(number, state):
        if number == 3:
            remove(run / name)
        return step(number, state)

    trainer._step = removing
    with pytest.raises((InputError, OSError)) as error:
        trainer.run()
    text = str(error.value)
    assert str(run / ("metrics.csv" if name == "." else name)) in text, text
    assert not re.search(r"[0-9a-f]{8}|tmp-|partial", text.replace(str(tmp_path), "")), text
    if name == ".":
        assert not run.exists()
        return
    summary = json.loads((run / "summary.json").read_text())
    assert str(run / name) in summary["stopped"] and summary["steps"] >= 3


def test_a_refused_run_writes_nothing(make_trainer, tmp_path):
    """Whatever fails before the first step: compilation, calibration, what is called then."""
    for name in ("_calibrate", "_programs", "_on_start"):
        trainer = make_trainer(tmp_path / "run")

        def fail(*_):
            raise InputError("no")

        setattr(trainer, name, fail)
        with pytest.raises(InputError):
            trainer.run()
        assert not list((tmp_path / "run").iterdir())


def test_more_steps_after_the_end_are_the_steps_of_a_longer_run(make_trainer, tmp_path):
    options = {"checkpoint_every": 3, "warmup_steps": 2}
    make_trainer(tmp_path / "parts", total_steps=2, **options).run()
    parts = make_trainer(tmp_path / "parts", total_steps=5, **options)
    assert parts.run()["steps"] == 5
    whole = make_trainer(tmp_path / "whole", total_steps=5, **options)
    whole.run()
    same_state(whole.state, parts.state)
    a, b = (without_times(metrics(tmp_path / name)) for name in ("whole", "parts"))
    assert a == b
