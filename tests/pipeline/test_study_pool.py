"""The pool of a seed: its sampling, its scale under a clamp, what its ranking depends on."""

import numpy as np
import pytest

from configs import smollm2_task
from pipeline import study_pool
from sarm_jax.lab.pool import Pool
from sarm_jax.lab.sampling import Sampled
from sarm_jax.rewards.compound import ScoreScale
from sarm_jax.rewards.scoring import Scored

SCORE_B = np.float32([3.0, -1.0, 4.0, 2.0, 0.5, 1.5])
CLAMPED_B = np.float32([0.1, 0.2, 0.15, 0.3, 0.12, 0.25])
ENDED_B = np.array([1, 1, 0, 1, 1, 0], bool)
# An option that the samples, the scores or the rewards of a pool depend on, with another value.
OPTIONS = {
    "ppo.seed": 5,
    "ppo.max_new_tokens": 9,
    "ppo.temperature": 0.7,
    "ppo.missing_eos_penalty": 0.25,
    "sarm_max_length": 77,
    "reward.unit": "score",
    "reward.penalty_cap": 3.0,
    "lab.task": "words",
    "lab.told_shortcuts": "praise",
    "lab.alpha": 1.25,
    "lab.distance_penalty": 0.75,
    "lab.length_penalty": 0.3,
    "lab.untold_alpha": 0.4,
    "lab.untold_cap": 5.0,
    "lab.pool_prompts": 3,
    "lab.pool_responses": 6,
    "lab.sampling_slots": 0,
}


def read_by_a_clamp(monkeypatch, clamped_b) -> np.ndarray:
    """Returns the rewards of a pool under the condition clamp, from scores that are made up."""

    class ClampedScorer:
        def __init__(self, model, reward):
            assert reward.clamp_features == (1,)

        def score(self, prompts, responses):
            return Scored(clamped_b, np.zeros((6, 0)), np.zeros((6, 0)))

    monkeypatch.setattr(study_pool, "Scorer", ClampedScorer)
    monkeypatch.setattr(study_pool, "load_reward_model", lambda config: None)
    config = smollm2_task.get_config()
    config.reward.clamp_features, config.reward.clamp_set_values = "1", "0.0"
    config.ppo.missing_eos_penalty = 1.0
    zeros_b = np.zeros(6)
    pool = Pool(["p"] * 6, ["r"] * 6, ENDED_B, zeros_b, zeros_b, zeros_b, zeros_b, (1, 6))
    read = study_pool.Readings(SCORE_B, np.zeros((6, 2)), np.zeros((6, 3)))
    scale = ScoreScale.estimate(SCORE_B, SCORE_B)
    ((variant, reward_b),) = study_pool._rewards(config, "clamp", pool, read, scale)
    assert variant == {"weight": 1.0, "tau": 1.0, "at_cap": 0.0}
    return reward_b


def test_rewards_under_a_clamp_are_in_deviations_of_the_scores_without_it(monkeypatch):
    """As in PPO. In deviations of the clamped scores, an end of turn would be worth too little."""
    normal_b = (CLAMPED_B - CLAMPED_B.mean()) / SCORE_B.std()
    expected_b = np.where(ENDED_B, normal_b, np.minimum(normal_b, 0) - 1.0)
    np.testing.assert_allclose(read_by_a_clamp(monkeypatch, CLAMPED_B), expected_b, rtol=1e-5)


def test_a_clamp_may_leave_nothing_of_the_score(monkeypatch):
    reward_b = read_by_a_clamp(monkeypatch, np.full(6, 0.5, np.float32))
    np.testing.assert_allclose(reward_b, np.where(ENDED_B, 0.0, -1.0), atol=1e-6)


def test_a_pool_is_sampled_as_ppo_samples(monkeypatch):
    asked = {}

    def sample(policy, tokenizer, prompts, *, samples, shown, **options):
        asked.update(options, prompts=prompts, samples=samples)
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        size = len(repeated)
        return Sampled(repeated, ["no"] * size, np.ones(size, bool), np.ones(size, int))

    prompts = ["Write one short sentence about one kind of animal and the barn."] * 5
    monkeypatch.setattr(study_pool, "load_policy", lambda *arguments: (None, None))
    monkeypatch.setattr(study_pool, "read_prompts", lambda path: prompts)
    monkeypatch.setattr(study_pool, "sample_responses", sample)
    config = smollm2_task.get_config()
    config.lab.pool_prompts, config.lab.pool_responses = 2, 4
    config.ppo.update(temperature=0.7, max_new_tokens=11, seed=3)
    assert study_pool._sample(config).shape == (2, 4)
    assert asked == {
        "prompts": prompts[:2], "samples": 4, "temperature": 0.7, "max_new_tokens": 11, "seed": 3,
        "slots": 64,
    }  # fmt: skip


@pytest.mark.parametrize("field", OPTIONS)
def test_a_pool_is_ranked_again_if_an_option_of_it_changes(field, tmp_path):
    """Weights and other files are in the record by their digests."""
    config = smollm2_task.get_config()
    config.policy_model = config.sarm_model = str(tmp_path / "model")
    before = study_pool._made_from(config, tmp_path, ["baseline"])
    assert study_pool._made_from(config, tmp_path, ["baseline", "penalty"]) != before
    config.update_from_flattened_dict({field: OPTIONS[field]})
    assert study_pool._made_from(config, tmp_path, ["baseline"]) != before
