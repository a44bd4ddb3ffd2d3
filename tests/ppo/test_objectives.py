"""Advantages and losses of RLOO and GRPO: against TRL, by hand, and against their textbook forms.

TRL's own methods compute the expected losses, on the same random tensors.
"""

import types
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

from ppo.group_advantages import group_normalised, has_no_spread, leave_one_out
from ppo.learner import Evaluation
from ppo.objectives import Batch, objective
from sarm_jax.io.errors import InputError

ROWS, TOKENS, K = 8, 7, 4


class Tensors(NamedTuple):
    """Log-probabilities `[B, R]`, the mask of the responses, and a reward for each response."""

    logp: np.ndarray
    old_logp: np.ndarray
    ref_logp: np.ndarray
    mask: np.ndarray
    reward: np.ndarray


@pytest.fixture(params=range(3))
def tensors(request):
    rng = np.random.default_rng(request.param)
    logp = rng.normal(-2, 1, (ROWS, TOKENS))
    old_logp, ref_logp = (logp + rng.normal(0, s, logp.shape) for s in (0.15, 0.5))
    lengths = rng.integers(1, TOKENS + 1, ROWS)
    mask = np.arange(TOKENS)[None] < lengths[:, None]
    reward = rng.normal(size=ROWS)
    return Tensors(*(x.astype(np.float32) for x in (logp, old_logp, ref_logp)), mask, reward)


@pytest.fixture
def make_config(ppo_config):
    def make(algorithm, **changes):
        sizes = {"batch_size": ROWS, "samples_per_prompt": K, "max_new_tokens": TOKENS}
        return ppo_config(algorithm=algorithm, **sizes, **changes)

    return make


def run_ours(config, tensors):
    """Returns (loss, its gradient in log π, metrics, targets) of a whole batch."""
    logp, old_logp, ref_logp, mask, reward = map(jnp.asarray, tensors)
    nothing = jnp.zeros((ROWS, 0), jnp.int32)
    batch = Batch(nothing, nothing, mask, ref_logp, reward.astype(jnp.float32))
    algorithm = objective(config)
    targets = algorithm.targets(batch, Evaluation(old_logp, jnp.zeros_like(logp), None))

    def loss(logp):
        now = Evaluation(logp, jnp.zeros_like(logp), None)
        return algorithm.loss(now, targets, batch, mask.sum())

    (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(logp)
    return value, gradient, parts | algorithm.metrics(batch, targets), targets


def run_trl(trainer, tensors, advantages, **options):
    """Returns (loss, gradient in log π) of TRL's `_compute_loss` on the same tensors."""
    logp = torch.tensor(tensors.logp, requires_grad=True)
    mask = torch.tensor(tensors.mask).float()

    def log_probabilities(*_, **__):
        return logp, torch.zeros_like(logp), None

    def gather(x):
        return x

    accelerator = types.SimpleNamespace(
        gather=gather, gather_for_metrics=gather, reduce=lambda x, **_: x, num_processes=1
    )
    fake = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=log_probabilities,
        accelerator=accelerator,
        model=types.SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        _entropy_bonus_enabled=False,
        max_completion_length=TOKENS,
        args=types.SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1
        ),
        **options,
    )
    empty = torch.zeros((ROWS, 0), dtype=torch.long)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.tensor(np.asarray(advantages)),
        "old_per_token_logps": torch.tensor(tensors.old_logp),
        "old_logps": (torch.tensor(tensors.old_logp) * mask).sum(1),
        "ref_per_token_logps": torch.tensor(tensors.ref_logp),
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(fake, fake.model, inputs)
    loss.backward()
    return loss.item(), logp.grad.numpy()


def test_rloo_loss_is_that_of_trl(make_config, tensors):
    config = make_config("rloo", kl_coef=0.3, clip_range=0.2, clip_range_high=0.3)
    loss, gradient, _, targets = run_ours(config, tensors)
    expected, expected_gradient = run_trl(
        RLOOTrainer, tensors, targets.advantages_br[:, 0], epsilon_low=0.2, epsilon_high=0.3
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize(
    ("average", "trl_name"), [("responses", "grpo"), ("tokens", "dapo"), ("constant", "dr_grpo")]
)
def test_grpo_loss_is_that_of_trl(make_config, tensors, average, trl_name, kl_coef):
    config = make_config(
        "grpo", kl_coef=kl_coef, clip_range=0.1, clip_range_high=0.25, loss_average=average
    )
    loss, gradient, _, targets = run_ours(config, tensors)
    expected, expected_gradient = run_trl(
        GRPOTrainer,
        tensors,
        targets.advantages_br[:, 0],
        epsilon_low=0.1,
        epsilon_high=0.25,
        beta=kl_coef,
        loss_type=trl_name,
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_advantages_against_loops(make_config, tensors):
    reward, mask = tensors.reward.astype(np.float32).astype(np.float64), tensors.mask
    kl = np.where(mask, tensors.old_logp - tensors.ref_logp, 0).sum(axis=1)
    penalised = reward - 0.3 * kl
    expected = {"rloo": [], "grpo": [], "dr_grpo": []}
    for i in range(ROWS):
        group = list(range(i // K * K, i // K * K + K))
        others = [penalised[j] for j in group if j != i]
        expected["rloo"].append(penalised[i] - sum(others) / (K - 1))
        mean = sum(reward[j] for j in group) / K
        std = (sum((reward[j] - mean) ** 2 for j in group) / (K - 1)) ** 0.5
        expected["grpo"].append((reward[i] - mean) / (std + 1e-4))
        expected["dr_grpo"].append(reward[i] - mean)
    for name, values in expected.items():
        algorithm = "rloo" if name == "rloo" else "grpo"
        config = make_config(algorithm, kl_coef=0.3, scale_advantages=name != "dr_grpo")
        *_, targets = run_ours(config, tensors)
        np.testing.assert_allclose(targets.advantages_br[:, 0], values, rtol=1e-4, atol=1e-5)


def test_two_by_two_by_hand():
    reward = jnp.asarray([1.0, 3.0, 5.0, 5.0])
    np.testing.assert_array_equal(leave_one_out(reward, 2), [-2, 2, 0, 0])
    np.testing.assert_array_equal(group_normalised(reward, 2, scale=False), [-1, 1, 0, 0])
    scaled = 1 / (np.sqrt(2) + 1e-4)
    np.testing.assert_allclose(
        group_normalised(reward, 2, scale=True), [-scaled, scaled, 0, 0], rtol=1e-6
    )


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1 / 3, 1e-3, 1e4, -7.7])
@pytest.mark.parametrize("k", [2, 3, 5, 7, 8])
def test_groups_without_spread_have_no_advantage(value, k):
    reward = jnp.asarray([value] * k + list(range(k)), jnp.float32)
    for advantages in (leave_one_out(reward, k), group_normalised(reward, k, scale=True)):
        assert (advantages[:k] == 0).all() and not (advantages[k:] == 0).all()
    assert has_no_spread(reward.reshape(2, k)).tolist() == [True, False]


def test_groups_without_spread_are_counted_and_have_no_policy_gradient(make_config, tensors):
    reward = np.concatenate([np.full(K, 0.3), tensors.reward[K:]])
    config = make_config("grpo", kl_coef=0.0)
    _, gradient, metrics, _ = run_ours(config, tensors._replace(reward=reward))
    assert metrics["zero_spread_groups"] == 1
    assert (gradient[:K] == 0).all() and (gradient[K:] != 0).any()


def test_a_reward_that_is_nan_makes_the_loss_nan(make_config, tensors):
    reward = tensors.reward.copy()
    reward[0] = np.nan
    for algorithm in ("rloo", "grpo"):
        loss, *_ = run_ours(make_config(algorithm), tensors._replace(reward=reward))
        assert np.isnan(loss)


def test_one_epoch_of_rloo_is_reinforce(make_config, tensors):
    """The gradient at the old parameters is −A ∇ log π(response), averaged over the responses."""
    fresh = tensors._replace(logp=tensors.old_logp)
    _, gradient, _, targets = run_ours(make_config("rloo"), fresh)
    expected = -np.asarray(targets.advantages_br) * tensors.mask / ROWS
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_options_reduce_to_the_textbook_form(make_config, tensors):
    """ε_high = ε is the symmetric clip; equal lengths make the averages equal."""
    for algorithm in ("rloo", "grpo"):
        losses = [
            run_ours(make_config(algorithm, clip_range=0.1, clip_range_high=high), tensors)[0]
            for high in (0.0, 0.1)
        ]
        assert losses[0] == losses[1]
    full = tensors._replace(mask=np.ones_like(tensors.mask))
    averages = [
        run_ours(make_config("grpo", loss_average=average), full)[0]
        for average in ("tokens", "responses", "constant")
    ]
    np.testing.assert_allclose(averages, averages[0], rtol=1e-5)


def test_a_penalty_that_a_whole_group_pays_moves_nothing(make_config, tensors):
    """Controls act within the group: only differences between its responses matter."""
    reward = tensors.reward.astype(np.float32)
    paid_by_all = reward - np.repeat([0.5, 0.0], K).astype(np.float32)
    paid_by_one = reward - np.eye(ROWS, dtype=np.float32)[0]
    for algorithm in ("rloo", "grpo"):
        config = make_config(algorithm)
        before, same, changed = (
            run_ours(config, tensors._replace(reward=r))[1]
            for r in (reward, paid_by_all, paid_by_one)
        )
        np.testing.assert_allclose(same, before, rtol=1e-3, atol=1e-6)
        assert np.abs(np.asarray(changed - before)[:K]).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "reinforce"}, "ppo.algorithm='reinforce': expected one of ppo, rloo, grpo"),
        ({"algorithm": "rloo", "samples_per_prompt": 1}, "ppo.samples_per_prompt=1"),
        ({"algorithm": "grpo", "samples_per_prompt": 3}, "ppo.batch_size=8 is not divisible by"),
        ({"samples_per_prompt": 0}, "ppo.samples_per_prompt=0: must be at least 1"),
        ({"loss_average": "rows"}, "ppo.loss_average='rows'"),
        ({"algorithm": "rloo", "loss_average": "responses"}, "ppo.loss_average=responses"),
        ({"algorithm": "ppo", "scale_advantages": False}, "ppo.scale_advantages=False"),
        ({"rollout_slots": 8}, "ppo.rollout_slots=8: must be less than ppo.batch_size=8"),
        ({"rollout_slots": 6}, "a multiple of ppo.samples_per_prompt=4"),
        ({"rollout_slots": -4}, "ppo.rollout_slots=-4"),
        ({"clip_range_high": -0.1}, "ppo.clip_range_high=-0.1"),
    ],
)
def test_bad_options_are_named(ppo_config, changes, message):
    options = {"batch_size": 8, "samples_per_prompt": 4, **changes}
    with pytest.raises(InputError) as error:
        ppo_config(**options)
    assert message in str(error.value)


def test_good_options(ppo_config):
    config = ppo_config(batch_size=8, samples_per_prompt=4)  # PPO may sample groups as well
    assert config.prompts_per_batch == 2 and config.has_critic and not config.unused
    config = ppo_config(
        batch_size=8, samples_per_prompt=4, algorithm="grpo", loss_average="constant"
    )
    assert not config.has_critic and "vf_coef" in config.unused
