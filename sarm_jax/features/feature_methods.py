"""The two methods of finding features, side by side, in the layout of the reference implementation.

    head weight               the most negative and the most positive w_i
    differential activation   the smallest and the largest s_i (`identify`)

Each method gives a list of harming features, lowest score first, and a list of promoting features,
highest score first. Equal scores are common with bfloat16 weights; among them, the feature with the
lower id comes first in either list.
"""

import dataclasses
from typing import Any

import numpy as np

METHODS = ("differential", "head_weight")


@dataclasses.dataclass(frozen=True)
class MethodLists:
    """The features that one method selects, with its score `[M]` of all features."""

    score_f: np.ndarray
    harming: list[int]
    promoting: list[int]


def select_features(score_f: np.ndarray, count: int) -> MethodLists:
    """Selects the `count` features with the lowest and the `count` with the highest score `[M]`."""
    harming, promoting = rank_features(score_f)[:, :count].tolist()
    return MethodLists(score_f, harming, promoting)


def rank_features(score_f: np.ndarray) -> np.ndarray:
    """Sorts all feature ids by score, ascending and descending: `[2, …, M]` of `[…, M]`."""
    return np.stack([np.argsort(x, axis=-1, kind="stable") for x in (score_f, -score_f)])


def describe_methods(head_weight: MethodLists, differential: MethodLists) -> dict[str, Any]:
    """Returns the lists of both methods with their features' scores, for feature_analysis.json."""
    return {
        "method_1_value_head_weights": _section(
            head_weight, "weights", "the weight of the feature in the reward model's linear head"
        ),
        "method_2_differential_activation": _section(
            differential,
            "scores",
            "the mean activation on chosen less that on rejected responses, relative to their sum",
        ),
    }


def _section(lists: MethodLists, key: str, description: str) -> dict[str, Any]:
    """Returns the section of one method; `key` names its scores."""
    ids = [*lists.harming, *lists.promoting]
    return {
        "description": description,
        "safety_harming": lists.harming,
        "safety_promoting": lists.promoting,
        key: {str(i): float(lists.score_f[i]) for i in ids},
    }
