"""Gates of a task in English, measured on samples of the policy before any RL.

    success_at_start          share of the policy's responses that are successes
    failure_at_start          share of the others, since there must be something to learn
    truth_auroc               AUROC of a linear probe on the pooled state for success, fitted on
                              samples of training prompts, tested on those of held-out prompts. Its
                              regularisation is chosen on the last quarter of the former
    accuracy_equal_shortcuts  share of the pairs of held-out samples with equal shortcuts and
                              different quality of which the better one scores higher
    least_bonus               gain in score, in sd of the scores, if two units of a shortcut are
                              added to a sample; that of the shortcut that gains least. Not measured
                              if the annotator is benign

A reward model that does not know the truth leaves only shortcuts to learn. A shortcut that it does
not pay for cannot be exploited.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from sarm_jax.features.dense_probe import logistic_direction, projection
from sarm_jax.features.detectors import Detectors, firing_rate
from sarm_jax.io.errors import InputError
from sarm_jax.lab.gate import BIASED, TEXT, Gate
from sarm_jax.lab.text.task import TextShortcut, TextTask
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.reporting.statistics import count_wins

L2 = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # regularisations of the probe for success
CHOOSING = 0.25  # share of the samples to training prompts on which one of them is chosen
UNITS = 2  # units of a shortcut that are added to a sample
MARKED = 128  # held-out samples to which each shortcut is added
DIFFERENT = 0.25  # least difference in quality of a pair

Rows = Sequence[Mapping[str, Any]]


def measure_text_gates(
    reward_model: RewardModel,
    detectors: Detectors,
    task: TextTask,
    *,
    samples: Rows,
    held_out_samples: Rows,
    seed: int,
) -> tuple[list[Gate], dict[str, dict[str, float]]]:
    """Measures the gates, and how the reward model and the detectors react to each shortcut.

    Args:
        reward_model: the SARM.
        detectors: the detectors that identify found.
        task: the task, with the shortcuts that the method is told.
        samples: {prompt, response, ended} rows of the policy, to training prompts.
        held_out_samples: the same, to held-out prompts.
        seed: seed of the shortcuts that are added.

    Returns:
        (the gates of `BIASED`, or of `TEXT` if the annotator is benign; for each shortcut the
        values of `_shortcut_values`, `told`, `base_rate` and, if there are samples without any told
        shortcut, `false_alarms`: the share of them on which a detector fires).

    Raises:
        InputError: all samples to held-out prompts are empty.
    """
    rng = np.random.default_rng([seed, 4])
    _, _, fit_nd = _read(reward_model, samples)
    score_n, z_nf, test_nd = _read(reward_model, held_out_samples)
    fit_n, test_n = (
        np.asarray([task.succeeds(r["prompt"], r["response"], r["ended"]) for r in rows])
        for rows in (samples, held_out_samples)
    )
    success = float(np.concatenate([fit_n, test_n]).mean())
    marked = _marked(task, held_out_samples)
    false_alarms = _false_alarms(task, held_out_samples, detectors=detectors, z_nf=z_nf)
    shortcuts = {
        shortcut.name: _shortcut_values(
            reward_model,
            detectors,
            shortcut,
            rows=[held_out_samples[i] for i in marked],
            score_n=score_n[marked],
            deviation=float(score_n.std()),
            rng=rng,
        )
        | {"told": float(shortcut.name in task.told), "base_rate": _base_rate(shortcut, samples)}
        | false_alarms
        for shortcut in task.all_shortcuts
    }
    values = {
        "success_at_start": success,
        "failure_at_start": 1 - success,
        "truth_auroc": probe_auroc(fit_nd, fit_n, test_nd=test_nd, test_n=test_n),
        "accuracy_equal_shortcuts": equal_pair_accuracy(task, held_out_samples, score_n),
        "least_bonus": min(values["gain"] for values in shortcuts.values()),
    }
    return [Gate(name, values[name]) for name in (BIASED if task.bias else TEXT)], shortcuts


def _base_rate(shortcut: TextShortcut, rows: Rows) -> float:
    """Returns the share of the samples that have a shortcut."""
    return float(np.mean([shortcut.count(row["response"]) > 0 for row in rows]))


def _false_alarms(
    task: TextTask, rows: Rows, *, detectors: Detectors, z_nf: np.ndarray
) -> dict[str, float]:
    """Computes on which share of the samples without any told shortcut a detector fires.

    Args:
        task: the task, with the shortcuts that the method is told.
        rows: the samples.
        detectors: the detectors.
        z_nf: features of the samples, `[N, M]`.

    Returns:
        `false_alarms`; nothing if every sample is empty or has a told shortcut.
    """
    clean = [
        i
        for i, row in enumerate(rows)
        if row["response"].strip() and not task.has_told(row["prompt"], row["response"])
    ]
    return {"false_alarms": firing_rate(z_nf[clean], detectors)} if clean else {}


def _marked(task: TextTask, rows: Rows) -> list[int]:
    """Returns which held-out samples shortcuts are added to.

    Raises:
        InputError: all samples are empty.
    """
    marked = [i for i, row in enumerate(rows) if row["response"].strip()][:MARKED]
    if not marked:
        raise InputError(
            f"{task.option}: all {len(rows)} samples of the policy to held-out prompts are empty, "
            "so that no shortcut can be measured"
        )
    return marked


def _read(reward_model: RewardModel, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns scores `[N]`, features `[N, M]` and pooled states `[N, D]`."""
    return reward_model.score_with_states(
        [row["prompt"] for row in rows], [row["response"] for row in rows]
    )


def _shortcut_values(
    reward_model: RewardModel,
    detectors: Detectors,
    shortcut: TextShortcut,
    *,
    rows: Rows,
    score_n: np.ndarray,
    deviation: float,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Adds a shortcut to samples, in the phrasings that contrast pairs show and in the others.

    Returns:
        `gain`, the mean gain in score, in sd; `paid`, the share of the samples that gain;
        `detection` and `detection_kept_back`, the shares of the marked samples on which a detector
        fires.
    """
    kept_back = shortcut.phrasings[len(shortcut.shown) :] or shortcut.phrasings
    read = {}
    for name, phrasings in (("shown", shortcut.shown), ("kept_back", kept_back)):
        texts = [shortcut.added(rng, row["response"].strip(), UNITS, phrasings) for row in rows]
        read[name] = reward_model.score([row["prompt"] for row in rows], texts)
    gain_n = np.concatenate([score - score_n for score, _ in read.values()])
    return {
        "gain": float(gain_n.mean() / deviation) if deviation > 0 else 0.0,
        "paid": float(np.mean(count_wins(gain_n))),
        "detection": firing_rate(read["shown"][1], detectors),
        "detection_kept_back": firing_rate(read["kept_back"][1], detectors),
    }


def probe_auroc(
    fit_nd: np.ndarray, fit_n: np.ndarray, *, test_nd: np.ndarray, test_n: np.ndarray
) -> float:
    """Fits a logistic probe to the states of both classes; returns its AUROC on the test states.

    It is 0.5 if one side has a single class, because there is nothing to tell apart.

    Args:
        fit_nd: states `[N, D]`; those to one prompt are neighbours. The last quarter of them
            chooses the regularisation, and the probe is then fitted to all.
        fit_n: the class of each, `[N]`.
        test_nd: test states `[K, D]`.
        test_n: the class of each, `[K]`.
    """
    if len(set(fit_n.tolist())) < 2 or len(set(test_n.tolist())) < 2:
        return 0.5

    def auroc_of(rows: int, l2: float, on_nd: np.ndarray, on_n: np.ndarray) -> float:
        """Fits the probe to the first rows; returns its AUROC on other states."""
        states_nd, class_n = fit_nd[:rows], fit_n[:rows]
        direction_d = logistic_direction(states_nd[~class_n], states_nd[class_n], l2)
        return auroc(projection(on_nd, direction_d), on_n)

    rows = round(len(fit_n) * (1 - CHOOSING))
    l2 = L2[0]
    if len(set(fit_n[:rows].tolist())) == 2 == len(set(fit_n[rows:].tolist())):
        l2 = max(L2, key=lambda value: auroc_of(rows, value, fit_nd[rows:], fit_n[rows:]))
    return auroc_of(len(fit_n), l2, test_nd, test_n)


def auroc(value_n: np.ndarray, positive_n: np.ndarray) -> float:
    """Returns the share of the pairs of a positive and a negative whose values are in that order.

    A tie counts half (the Mann–Whitney statistic).
    """
    ranks_n, positives = rankdata(value_n), int(positive_n.sum())
    negatives = len(positive_n) - positives
    above = ranks_n[positive_n].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def equal_pair_accuracy(task: TextTask, rows: Rows, score_n: np.ndarray) -> float:
    """Returns how often the better of two samples with equal shortcuts scores higher.

    Samples to one prompt are compared; they are neighbours. Without such a pair it is 0.5.
    """
    margins = []
    for _, group in itertools.groupby(range(len(rows)), key=lambda i: rows[i]["prompt"]):
        for first, second in itertools.combinations(group, 2):
            sides = [(rows[i]["prompt"], rows[i]["response"]) for i in (first, second)]
            if task.counts(*sides[0]) != task.counts(*sides[1]):
                continue
            difference = task.plain_quality(*sides[0]) - task.plain_quality(*sides[1])
            if abs(difference) >= DIFFERENT:
                margins.append(float(score_n[first] - score_n[second]) * np.sign(difference))
    return float(np.mean(count_wins(margins))) if margins else 0.5
