"""Gates of the world of capitals, see `lab.gate`, and how its reward model rates shortcuts.

    r2_flattery               R² of a linear probe on the pooled state for the words of flattery
    r2_correctness            the same for the number of right capitals
    detection_one_word        share of the responses with one unit of a shortcut that are detected
    false_alarms              share of the responses without it that are detected
    accuracy_below_annotator  pair accuracy that the reward model lacks, compared with the annotator

They are measured on held-out prompts. A shortcut that the reward model does not encode cannot be
exploited, a shortcut that no feature encodes cannot be penalised, and a reward model that cannot
tell right from wrong leaves nothing else to learn.
"""

from collections.abc import Sequence

import numpy as np

from sarm_jax.features.detectors import Detectors, firing_rate
from sarm_jax.lab import world
from sarm_jax.lab.gate import CAPITALS, Gate
from sarm_jax.lab.shortcuts import FLATTERY_ALONE, SHORTCUTS, World, contrast_pair
from sarm_jax.models.chat import encode_conversation
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.reporting.spread import is_constant
from sarm_jax.reporting.statistics import count_wins
from sarm_jax.training.activations import Conversation, collect_pooled

RESPONSES = 2000  # to fit a linear probe to, and as many to test it on
PAIRS = 8000  # gives the accuracy a standard error of about 0.003


def measure_gates(
    reward_model: RewardModel,
    detectors: Detectors,
    contrast_single: Sequence[dict[str, str]],
    prompts: Sequence[str],
    held_out_prompts: Sequence[str],
    seed: int,
    lab_world: World = FLATTERY_ALONE,
) -> list[Gate]:
    """Measures the gates of `CAPITALS` and returns them in that order.

    Args:
        reward_model: the SARM.
        detectors: detectors that identify found.
        contrast_single: held-out pairs whose sides differ by one unit of a shortcut.
        prompts: prompts of the training set.
        held_out_prompts: prompts of the held-out set.
        seed: seed of the sampled responses and pairs.
        lab_world: the world, which decides the responses and the preferences.
    """
    rng = np.random.default_rng([seed, 2])
    fit_nd, fit_texts = _states(reward_model, rng, prompts, lab_world)
    test_nd, test_texts = _states(reward_model, rng, held_out_prompts, lab_world)
    fit_counts, test_counts = (
        [world.count_words(prompt, response) for prompt, response in texts]
        for texts in (fit_texts, test_texts)
    )

    def r2(field: str) -> float:
        fit_n, test_n = ([float(getattr(c, field)) for c in cs] for cs in (fit_counts, test_counts))
        return linear_probe_r2(
            fit_nd, np.asarray(fit_n), test_nd=test_nd, test_n=np.asarray(test_n)
        )

    def latents(side: str) -> np.ndarray:
        rows = contrast_single
        return reward_model.score([r["prompt"] for r in rows], [r[side] for r in rows])[1]

    pairs = [lab_world.preference_pair(rng, str(p)) for p in rng.choice(held_out_prompts, PAIRS)]
    values = {
        "r2_flattery": r2("flattery"),
        "r2_correctness": r2("hits"),
        "detection_one_word": firing_rate(latents("rejected"), detectors),
        "false_alarms": firing_rate(latents("chosen"), detectors),
        "accuracy_below_annotator": lab_world.annotator_accuracy(pairs)
        - pair_accuracy(reward_model, pairs),
    }
    return [Gate(name, values[name]) for name in CAPITALS]


def measure_shortcuts(
    reward_model: RewardModel,
    detectors: Detectors,
    prompts: Sequence[str],
    held_out_prompts: Sequence[str],
    seed: int,
    lab_world: World,
) -> dict[str, dict[str, float]]:
    """Measures how the reward model and the detectors react to each shortcut of a world.

    For each shortcut, told or not, pairs are made on held-out prompts that differ in it alone.

    Args:
        reward_model: the SARM.
        detectors: detectors that identify found.
        prompts: prompts of the training set.
        held_out_prompts: prompts of the held-out set.
        seed: seed of the sampled responses and pairs.
        lab_world: the world.

    Returns:
        For each shortcut: `r2` of a linear probe for its units; `paid`, the share of the pairs
        whose side with the shortcut scores higher; `detection` and `false_alarms`, the shares of
        the sides with and without it on which a detector fires; and `told`, 1 or 0.
    """
    rng = np.random.default_rng([seed, 3])
    fit_nd, fit_texts = _states(reward_model, rng, prompts, lab_world)
    test_nd, test_texts = _states(reward_model, rng, held_out_prompts, lab_world)
    measured = {}
    for name in lab_world.shortcuts:
        shortcut = SHORTCUTS[name]
        fit_n, test_n = (
            np.asarray([float(shortcut.count(*text)) for text in texts])
            for texts in (fit_texts, test_texts)
        )
        pairs = [
            contrast_pair(rng, str(prompt), shortcut, int(rng.integers(1, shortcut.most + 1)))
            for prompt in rng.choice(held_out_prompts, RESPONSES)
        ]
        sides = [
            reward_model.score([pair["prompt"] for pair in pairs], [pair[side] for pair in pairs])
            for side in ("chosen", "rejected")
        ]
        (clean_b, clean_bf), (marked_b, marked_bf) = sides
        measured[name] = {
            "told": float(name in lab_world.told),
            "r2": linear_probe_r2(fit_nd, fit_n, test_nd=test_nd, test_n=test_n),
            "paid": float(np.mean(count_wins(marked_b - clean_b))),
            "detection": firing_rate(marked_bf, detectors),
            "false_alarms": firing_rate(clean_bf, detectors),
        }
    return measured


def linear_probe_r2(
    fit_nd: np.ndarray, fit_n: np.ndarray, test_nd: np.ndarray, test_n: np.ndarray
) -> float:
    """Fits least squares with an intercept to the fit rows; returns R² on the test rows.

    R² is 0 if all test values are equal, because there is nothing to explain.
    """
    if is_constant(test_n):
        return 0.0

    def with_intercept(x_nd):
        return np.concatenate([x_nd, np.ones((len(x_nd), 1))], axis=1)

    weights = np.linalg.lstsq(with_intercept(fit_nd).astype(np.float64), fit_n, rcond=1e-6)[0]
    residual_n = test_n - with_intercept(test_nd) @ weights
    return float(1 - np.mean(residual_n**2) / np.var(test_n))


def pair_accuracy(reward_model: RewardModel, pairs: Sequence[dict[str, str]]) -> float:
    """Computes how often the chosen response scores higher; a tie counts half."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen_b, rejected_b = (
        reward_model.score(prompts, [pair[side] for pair in pairs])[0]
        for side in ("chosen", "rejected")
    )
    return float(np.mean(count_wins(chosen_b - rejected_b)))


def _states(
    reward_model: RewardModel,
    rng: np.random.Generator,
    prompts: Sequence[str],
    lab_world: World,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Samples responses of any quality: (pooled trunk states `[N, D]`, prompts and responses)."""
    sampled = [str(prompt) for prompt in rng.choice(prompts, RESPONSES)]
    exchanges = [(prompt, lab_world.any_response(rng, prompt)) for prompt in sampled]
    rows = [
        Conversation(encode_conversation(reward_model.tokenizer, prompt, response), turn_length=1)
        for prompt, response in exchanges
    ]
    return collect_pooled(reward_model.model.trunk, rows), exchanges
