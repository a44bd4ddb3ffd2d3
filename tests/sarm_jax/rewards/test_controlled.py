"""Tests of the compound reward as a function for other trainers."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from sarm_jax.io.errors import InputError, TrainingStoppedError
from sarm_jax.models.chat import stop_ids
from sarm_jax.rewards import RewardConfig, ScoreScale, controlled_reward, reward_config
from sarm_jax.rewards.human_latents import collect_human_latents, save_human_latents
from sarm_jax.rewards.scoring import Scored
from tests.further import further
from tests.tiny_models import ACTIVE, ALGORITHMS, DISCRIMINATOR, PROMPTS, REWARD

PENALTIES = RewardConfig(penalize_features=(3, 5), tau_values=(0.1, 0.2), alpha_values=(0.2, 0.1))
SCALE = ScoreScale(0.5, 2.0)
RESPONSES = [f"well, it is {n}" for n in range(len(PROMPTS))]
GUIDE = Path(__file__).parents[3] / "docs/guides/other_trainers.md"


@pytest.fixture
def human(reward_model):
    rows = [{"prompt": p, "response": f"well, {p}"} for p in PROMPTS]
    return collect_human_latents(reward_model, rows, ACTIVE)


@pytest.mark.parametrize("algorithm", ["ppo", further("rloo"), further("grpo")])
def test_the_reward_that_the_trainer_here_learns_from(
    make_trainer, reward_model, tokenizer, human, tmp_path, algorithm
):
    """A run's rollouts, given to the function, get the run's rewards, bit for bit."""
    trainer = make_trainer(tmp_path / "run", total_steps=3, **ALGORITHMS[algorithm])
    rollouts, rewards = [], []
    roll_out, make_batch = trainer._roll_out, trainer._batch

    def remember(rollout, reward_b, slots):
        rollouts.append(rollout)
        rewards.append(reward_b.tolist())
        return make_batch(rollout, reward_b, slots)

    trainer._roll_out, trainer._batch = roll_out, remember
    trainer.run()
    function = controlled_reward(
        reward_model,
        REWARD,
        human_latents=human,
        discriminator=DISCRIMINATOR,
        scale=trainer.scale,
        normalise=True,
        missing_eos_penalty=1.0,
        stop_ids=stop_ids(tokenizer),
    )
    for rollout, expected in zip(rollouts, rewards, strict=True):
        pairs = zip(rollout.generation.tokens_br, rollout.generation.mask_br, strict=True)
        ids = [np.asarray(tokens)[np.asarray(mask)].tolist() for tokens, mask in pairs]
        assert function(rollout.prompts, rollout.responses, completion_ids=ids) == expected
    assert function.calls == 3
    assert any(not all(rollout.ended_b) for rollout in rollouts)  # the rule for no end was used


def test_terms_by_hand(reward_model):
    """R_total is score − Σ α · 1[z > τ], within the cap, on latents before the clamp."""
    controls = RewardConfig(
        penalize_features=(5, 8),
        tau_values=(0.2, 0.1),
        alpha_values=(0.1, 0.15),
        clamp_features=(8,),
        clamp_max_values=(0.0,),
        penalty_cap=0.1,
    )
    function = controlled_reward(reward_model, controls, scale=SCALE)
    rewards = function(PROMPTS, RESPONSES)
    score_b, _ = reward_model.score(PROMPTS, RESPONSES, clamp={8: 0.0})
    _, z_bf = reward_model.score(PROMPTS, RESPONSES)
    clamped = np.where(z_bf[:, 8] > 0, score_b, reward_model.score(PROMPTS, RESPONSES)[0])
    penalty_b = 0.1 * (z_bf[:, 5] > 0.2) + 0.15 * (z_bf[:, 8] > 0.1)
    assert penalty_b.max() > 0.2 > penalty_b.min()  # the cap is 0.1 · σ
    np.testing.assert_allclose(rewards, clamped - np.minimum(penalty_b, 0.1 * 2.0), rtol=1e-5)


def test_scale_of_the_first_call(reward_model):
    """Without `scale` μ and σ are those of the first call, and stay."""
    controls = dataclasses.replace(PENALTIES, unit="sd")
    function = controlled_reward(reward_model, controls)
    first = function(PROMPTS, RESPONSES)
    score_b, z_bf = reward_model.score(PROMPTS, RESPONSES)
    penalty_b = 0.2 * (z_bf[:, 3] > 0.1) + 0.1 * (z_bf[:, 5] > 0.2)
    np.testing.assert_allclose(first, score_b - score_b.std() * penalty_b, rtol=1e-5)
    function(PROMPTS[:2], RESPONSES[:2])
    assert function.scale.std == pytest.approx(score_b.std(), rel=1e-6)
    assert controlled_reward(reward_model, controls).calibrate(PROMPTS, RESPONSES).std == (
        function.scale.std
    )


def test_no_controls(reward_model):
    """Without controls the reward is the score, also of a single response."""
    function = controlled_reward(reward_model, RewardConfig())
    score_b, _ = reward_model.score(PROMPTS, RESPONSES)
    assert function(PROMPTS, RESPONSES) == score_b.tolist()
    single = function(PROMPTS[:1], RESPONSES[:1])
    assert type(single[0]) is float and function.scale is None


def test_completions_as_messages(reward_model):
    """A completion may be a list of one assistant message."""
    function = controlled_reward(reward_model, PENALTIES, scale=SCALE)
    messages = [[{"role": "assistant", "content": response}] for response in RESPONSES]
    assert function(PROMPTS, messages) == function(PROMPTS, RESPONSES)


def test_logged_terms(reward_model):
    """The terms reach `log`, `log_metric` and `log_extra` under the names of metrics.csv."""
    means, metrics, columns = [], {}, {}
    function = controlled_reward(reward_model, PENALTIES, scale=SCALE, log=means.append)
    rewards = function(
        PROMPTS, RESPONSES, log_metric=metrics.__setitem__, log_extra=columns.__setitem__
    )
    assert means == [metrics]
    assert columns["total_reward"] == rewards
    names = ["total_reward", "rm_score", "indicator_penalty", "kl_penalty"]
    assert list(columns) == list(metrics) == names
    assert metrics["indicator_penalty"] == pytest.approx(np.mean(columns["indicator_penalty"]))


def test_saved_and_restored(reward_model, human, tmp_path):
    """A restored function continues like one that was never stopped."""

    def make():
        return controlled_reward(
            reward_model, REWARD, human_latents=human, discriminator=DISCRIMINATOR
        )

    whole = make()
    whole(PROMPTS, RESPONSES)
    whole.save(tmp_path / "reward.safetensors")
    expected = whole(PROMPTS, RESPONSES)
    resumed = make()
    resumed.restore(tmp_path / "reward.safetensors")
    assert resumed(PROMPTS, RESPONSES) == expected != make()(PROMPTS, RESPONSES)


def test_file_of_human_latents(reward_model, human, tmp_path):
    """The buffer may be given as the file that the stage human_latents writes."""
    save_human_latents(tmp_path / "human.safetensors", human)
    options = {"discriminator": DISCRIMINATOR, "scale": SCALE}
    from_file = controlled_reward(
        reward_model, REWARD, human_latents=tmp_path / "human.safetensors", **options
    )
    in_memory = controlled_reward(reward_model, REWARD, human_latents=human, **options)
    assert from_file(PROMPTS, RESPONSES) == in_memory(PROMPTS, RESPONSES)


def test_options_as_in_a_config():
    """The section `reward` of a config gives the same controls; missing fields have defaults."""
    section = {"penalize_features": "3,5", "tau_values": "0.1,0.2", "alpha_values": "0.2,0.1"}
    assert reward_config(section) == PENALTIES


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        (
            [[{"role": "user", "content": "a"}]],
            r"completions\[0\]: .* found \[.*user",
        ),
        ([[{"role": "assistant", "content": None}]], r"completions\[0\]"),
        ([[{"role": "assistant", "content": "a", "tool_calls": [{}]}]], r"completions\[0\]"),
        (["a", []], r"completions\[1\]"),
        (["a", 3], r"completions\[1\]: .* found 3"),
    ],
)
def test_wrong_completions(reward_model, completions, message):
    """A completion that is neither a text nor one assistant message is refused."""
    function = controlled_reward(reward_model, RewardConfig())
    with pytest.raises(InputError, match=message):
        function(PROMPTS[: len(completions)], completions)


def test_wrong_options(reward_model, human, tmp_path):
    """Options that cannot work are refused when the function is made, and named."""
    make = controlled_reward
    with pytest.raises(InputError, match=r"reward\.beta=0\.05 needs human latents"):
        make(reward_model, REWARD)
    with pytest.raises(InputError, match=r"reward\.penalize_features: feature 64 of a SARM"):
        make(reward_model, dataclasses.replace(PENALTIES, penalize_features=(3, 64)))
    with pytest.raises(InputError, match=r"missing_eos_penalty=-1: must not be negative"):
        make(reward_model, PENALTIES, missing_eos_penalty=-1)
    with pytest.raises(InputError, match=r"missing_eos_penalty=1: needs stop_ids"):
        make(reward_model, PENALTIES, missing_eos_penalty=1)
    ends = make(reward_model, PENALTIES, scale=SCALE, missing_eos_penalty=1, stop_ids=[260])
    with pytest.raises(InputError, match=r"needs completion_ids of 10 completions, found none"):
        ends(PROMPTS, RESPONSES)
    with pytest.raises(InputError, match="nothing to learn from"):
        make(reward_model, PENALTIES)(PROMPTS[:1] * 2, RESPONSES[:1] * 2)
    other = make(reward_model, PENALTIES)
    other.save(tmp_path / "other")
    with pytest.raises(InputError, match=r"other: its discriminator reads the features \[\]"):
        make(reward_model, REWARD, human_latents=human).restore(tmp_path / "other")
    (tmp_path / "text").write_text("no tensors")
    for name in ("text", "missing"):
        with pytest.raises(InputError, match=name):
            other.restore(tmp_path / name)


def test_reward_that_is_not_finite(reward_model, monkeypatch):
    """A score that is not finite stops the training, since trainers would read it as a number."""
    function = controlled_reward(reward_model, PENALTIES, scale=SCALE)
    zeros = np.zeros((2, 2), np.float32)
    scores = Scored(np.asarray([1.0, np.nan], np.float32), z_bn=zeros, z_bs=zeros)
    monkeypatch.setattr(function._scorer, "score", lambda *texts: scores)
    with pytest.raises(TrainingStoppedError, match="the reward of response 1 is nan"):
        function(PROMPTS[:2], RESPONSES[:2])
    assert function.calls == 0


@pytest.mark.parametrize("conversational", [False, True])
def test_three_steps_of_trl(world, reward_model, tokenizer, human, tmp_path, conversational):
    """TRL's GRPOTrainer trains with the function and logs its terms."""
    calls = []

    function = controlled_reward(
        reward_model, REWARD, human_latents=human, discriminator=DISCRIMINATOR
    )
    original = type(function).__call__

    class Recorded(type(function)):
        def __call__(self, prompts, completions, **kwargs):
            rewards = original(self, prompts, completions, **kwargs)
            calls.append((prompts, completions, rewards, self.terms))
            return rewards

    function.__class__ = Recorded
    prompts = PROMPTS
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(world / "policy"),
        reward_funcs=function,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert function.calls == len(calls) == 3
    logs = [row for row in trainer.state.log_history if "reward" in row]
    for row, (texts, completions, rewards, terms) in zip(logs, calls, strict=True):
        if conversational:
            assert completions[0][0]["role"] == "assistant"
            texts = [messages[0]["content"] for messages in texts]
            completions = [messages[0]["content"] for messages in completions]
        score_b, _ = reward_model.score(texts, completions)
        np.testing.assert_allclose(terms.score_b, score_b, rtol=1e-6)
        assert row["rewards/controlled_reward/mean"] == pytest.approx(np.mean(rewards), rel=1e-4)
        assert row["kl_penalty"] == pytest.approx(terms.kl_penalty_b.mean(), rel=1e-4, abs=1e-6)


def test_example_for_verl(reward_model, monkeypatch):
    """The example in the guide is called as verl's batch reward manager calls it."""
    example = re.search(r"```python\n(# verl_reward\.py.*?)```", GUIDE.read_text(), re.S)[1]
    monkeypatch.setattr("conversion.load_sarm", lambda *arguments, **options: reward_model)
    names: dict = {}
    exec(example, names)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    scores = names["compute_score"](
        data_sources=["x"] * len(PROMPTS),
        solution_strs=RESPONSES,
        ground_truths=[None] * len(PROMPTS),
        extra_infos=np.asarray(rows, object),
    )
    assert scores == names["reward"](PROMPTS, RESPONSES)
    assert all(type(score) is float for score in scores)
