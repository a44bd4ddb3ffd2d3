"""Ranks one pool of samples of a seed under every condition, for the best of n without training.

A pool of responses to held-out prompts is sampled once from the reference policy. Each condition
ranks it by the reward that PPO learns from under that condition. So conditions, weights and
thresholds can be compared without training a policy for each of them. Conditions that no ranking
can tell apart are left out: other weights of the KL to the reference, a bound on the score, and the
latent KL, whose discriminator is trained along with the policy.
"""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from conversion import load_policy
from pipeline.models import load_reward_model
from pipeline.provenance import digests
from pipeline.study_runs import condition_config
from pipeline.tasks import task_of, task_records
from sarm_jax.evaluation.best_of_n import kl_of_best_of
from sarm_jax.features.dense_probe import probe_file
from sarm_jax.features.penalties import cap_in_score
from sarm_jax.io.json_files import read_json, write_json
from sarm_jax.io.jsonl import write_jsonl
from sarm_jax.lab.conditions import DRAWS, PROBES, RETRAINED, UNTOLD_FILE, is_ranked
from sarm_jax.lab.oracle import OracleRewardModel
from sarm_jax.lab.pool import Pool, evading_gain, make_pool
from sarm_jax.lab.sampling import sample_responses
from sarm_jax.models.conversation_rows import read_prompts
from sarm_jax.rewards.compound import ScoreScale, learned_reward
from sarm_jax.rewards.human_states import STATES_FILE
from sarm_jax.rewards.options import reward_config
from sarm_jax.rewards.reward_config import RewardConfig
from sarm_jax.rewards.scoring import Scored, Scorer, reward_terms
from sarm_jax.rewards.state_controls import state_controls

LOG = logging.getLogger(__name__)
FILE = "best_of_n.json"
WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors of the weights of a condition's penalties
ROUNDING = 1e-5  # relative rounding error of a penalty that is at its cap
MOSTLY = 0.5  # a warning is logged if more than this share of a pool is at the cap
TAU_FACTORS = (0.0, 0.5, 2.0)  # of the detectors' thresholds, beside 1


@dataclasses.dataclass(frozen=True)
class Readings:
    """Scores `[B]`, all features `[B, M]` and pooled states `[B, D]` of the pool's responses."""

    score_b: np.ndarray
    z_bf: np.ndarray
    x_bd: np.ndarray


def rank_pool(config: ConfigDict, folder: Path, conditions: Sequence[str]) -> None:
    """Samples the pool of a seed, ranks it under the conditions and writes best_of_n.json.

    A condition with a reward model of its own needs it to be trained before, see
    `study_runs.train_reward_model`. If best_of_n.json is up to date, nothing is done.

    Args:
        config: the config of the seed.
        folder: the folder of the seed.
        conditions: names of the conditions; those that cannot rank a pool are left out.
    """
    for condition in {*DRAWS, "untold"} & set(conditions):
        condition_config(config, folder, condition)  # writes its features if they are not there
    path, made_from = folder / FILE, _made_from(config, folder, conditions)
    if path.exists() and read_json(path).get("made_from") == made_from:
        return
    pool = _sample(config)
    write_jsonl(folder / "pool.jsonl", _rows(pool))
    model = OracleRewardModel(load_reward_model(config), task_of(config))
    read = Readings(*model.score_with_states(pool.prompts, pool.responses))
    scale = ScoreScale.estimate(read.score_b, read.score_b)
    score_b = scale.normalise(read.score_b)
    sizes = [2**i for i in range(20) if 2**i <= largest_n(pool)]
    rankings = []
    for condition in filter(is_ranked, conditions):
        ranked = condition_config(config, folder, condition)
        for variant, reward_b in _rewards(ranked, condition, pool, read, scale):
            means = pool.best_of(reward_b, score_b, sizes)
            rankings.append({"condition": condition, **variant, **means})
            _warn_of_cap(condition, variant)
    selected = read_json(folder / "probes" / "selected_features.json")
    silent_b = ~_fires(read, selected["detectors"], selected["tau_detectors"])
    content = {
        "made_from": made_from,
        "prompts": pool.shape[0],
        "n": sizes,
        "kl": [float(kl_of_best_of(n)) for n in sizes],
        "rankings": rankings,
        "evading_gain": evading_gain(score_b, silent_b, pool.told_b, pool.shape),
        "random_draws": _random_draws(folder, conditions, pool, read),
    }
    write_json(path, content)


def largest_n(pool: Pool) -> int:
    """Returns the largest n: half the responses to a prompt, for a mean over many sets."""
    return max(1, pool.shape[1] // 2)


def _made_from(config: ConfigDict, folder: Path, conditions: Sequence[str]) -> dict[str, Any]:
    """Returns all that the result depends on: options, and digests of models, features, prompts."""
    lab_options = (
        "alpha distance_penalty length_penalty untold_alpha untold_cap pool_responses pool_prompts"
    ).split()
    ppo_options = ("max_new_tokens", "missing_eos_penalty", "temperature")
    files = [Path(config.eval_prompts_jsonl), *_files(Path(config.policy_model))]
    files += [*_files(Path(config.sarm_model)), folder / STATES_FILE]
    for condition in set(RETRAINED) & set(conditions):
        files += _files(folder / condition / "sarm")
    draws = [f"{name}.json" for name in DRAWS if name in conditions]
    probes = [probe_file(kind) for kind in PROBES.values()]
    files += [
        folder / "probes" / name
        for name in ("selected_features.json", UNTOLD_FILE, *draws, *probes)
    ]
    read = digests(sorted(file for file in files if file.is_file()))
    return {
        "conditions": list(conditions),
        "task": [config.lab[name] for name in ("task", "shortcuts", "told_shortcuts")],
        "seed": config.ppo.seed,
        "slots": config.lab.sampling_slots,
        "sarm_max_length": config.sarm_max_length,
        **{name: config.ppo[name] for name in ppo_options},
        **{name: config.lab[name] for name in lab_options},
        **task_records(config),
        **{name: config.reward[name] for name in ("unit", "penalty_cap")},
        "files": {os.path.relpath(file, folder): digest for file, digest in read.items()},
    }


def _files(model: Path) -> list[Path]:
    """Returns the files of a model's directory."""
    return [file for file in model.rglob("*") if file.is_file()]


def _sample(config: ConfigDict) -> Pool:
    """Samples the pool from the policy of the seed, on the first held-out prompts."""
    policy, tokenizer = load_policy(config.policy_model, config.dtype)
    prompts = read_prompts(config.eval_prompts_jsonl)[: config.lab.pool_prompts]
    samples = config.lab.pool_responses
    LOG.info(
        "best of n on a pool of %d responses to each of %d held-out prompts%s", samples,
        len(prompts),
        ", all that there are" if len(prompts) < config.lab.pool_prompts else "",
    )  # fmt: skip
    sampled = sample_responses(
        policy,
        tokenizer,
        [str(prompt) for prompt in prompts],
        samples=samples,
        max_new_tokens=config.ppo.max_new_tokens,
        temperature=config.ppo.temperature,
        seed=config.ppo.seed,
        slots=config.lab.sampling_slots,
        shown="pool",
    )
    return make_pool(sampled, task_of(config), (len(prompts), samples))


def _rows(pool: Pool) -> Iterator[dict[str, Any]]:
    """Yields the rows of pool.jsonl."""
    columns = (pool.prompts, pool.responses, pool.ended_b.tolist(), pool.gold_b.tolist())
    for row in zip(*columns, strict=True):
        yield dict(zip(("prompt", "response", "ended", "gold"), row, strict=True))


def _rewards(
    config: ConfigDict, condition: str, pool: Pool, read: Readings, scale: ScoreScale
) -> Iterator[tuple[dict[str, float], np.ndarray]]:
    """Computes the rewards of the pool under a condition, for several weights and thresholds.

    Yields:
        (variant, rewards `[B]`). A variant has `weight` and `tau`, the factors of the condition's
        weights and thresholds, and `at_cap`, the share of the responses whose penalties reach
        `reward.penalty_cap`.
    """
    reward = reward_config(config.reward)
    own = None
    if condition in RETRAINED or reward.clamp_features:
        own = Scorer(load_reward_model(config), reward).score(pool.prompts, pool.responses)
        # The shared reward model, which is only clamped here, has been read without a clamp.
        unclamped_b = own.score_b if condition in RETRAINED else read.score_b
        scale = ScoreScale.estimate(own.score_b, unclamped_b)
    states = state_controls(reward, read.x_bd.shape[1]).read(read.x_bd)
    for variant, changed in _variants(reward):
        scored = own or Scored(
            read.score_b,
            z_bn=read.z_bf[:, list(changed.penalize_features)],
            z_bs=np.zeros((len(read.score_b), 0), np.float32),
            states=states,
        )
        terms = reward_terms(
            changed, scored, d_b=np.zeros_like(read.score_b), scale=scale, lengths_b=pool.tokens_b
        )
        reward_b = learned_reward(
            terms,
            scale=scale,
            ended_b=pool.ended_b,
            missing_eos_penalty=config.ppo.missing_eos_penalty,
        )
        if terms.screened_b is not None:
            reward_b = np.where(terms.screened_b, -np.inf, reward_b)
        taken_b = terms.controls_b - terms.further.get("length_penalty", np.float32(0))
        at_cap_b = taken_b >= (1 - ROUNDING) * cap_in_score(changed.penalty_cap, scale.std)
        yield variant | {"at_cap": float(at_cap_b.mean())}, reward_b


def _warn_of_cap(condition: str, variant: Mapping[str, float]) -> None:
    """Warns if most responses are at the cap of a condition's penalties, at its own weight."""
    if variant["weight"] == variant["tau"] == 1 and variant["at_cap"] > MOSTLY:
        LOG.warning(
            "condition %s: its penalties reach the cap on a share of %.2f of the pool, and do not "
            "change the order of these responses: lower its weight",
            condition,
            variant["at_cap"],
        )


def _variants(reward: RewardConfig) -> Iterator[tuple[dict[str, float], RewardConfig]]:
    """Yields the reward with its weights multiplied by `WEIGHTS`, thresholds by `TAU_FACTORS`."""
    weights = ("probe_penalty", "distance_penalty", "length_penalty")
    weighted = bool(reward.alpha_values) or any(getattr(reward, name) for name in weights)
    for factor in WEIGHTS if weighted else (1.0,):
        changes = {name: factor * getattr(reward, name) for name in weights}
        alphas = tuple(factor * alpha for alpha in reward.alpha_values)
        yield (
            {"weight": factor, "tau": 1.0},
            dataclasses.replace(reward, alpha_values=alphas, **changes),
        )
    for factor in TAU_FACTORS if any(reward.tau_values) else ():
        taus = tuple(factor * tau for tau in reward.tau_values)
        yield {"weight": 1.0, "tau": factor}, dataclasses.replace(reward, tau_values=taus)


def _fires(read: Readings, features: Sequence[int], taus: Sequence[float]) -> np.ndarray:
    """Returns on which responses any of the features is above its threshold, `[B]`."""
    return np.any(read.z_bf[:, list(features)] > np.asarray(taus, np.float32), axis=1)


def _random_draws(
    folder: Path, conditions: Sequence[str], pool: Pool, read: Readings
) -> dict[str, dict[str, float | None]]:
    """Returns how often each draw of random features fires with and without a told shortcut.

    Returns:
        For each draw the shares of the responses with and without a told shortcut on which it
        fires; None if the pool has no such responses.
    """
    draws = {}
    for condition in conditions:
        if condition == "random" or condition in DRAWS:
            name = condition if condition in DRAWS else "selected_features"
            lists = read_json(folder / "probes" / f"{name}.json")
            fires_b = _fires(read, lists["random_control"], lists["tau_random_control"])
            sides = {"with_shortcut": pool.told_b, "without": ~pool.told_b}
            draws[condition] = {
                name: float(fires_b[side_b].mean()) if side_b.any() else None
                for name, side_b in sides.items()
            }
    return draws
