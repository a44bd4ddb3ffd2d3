"""The two ways to find features, side by side, in the layout of the reference implementation.

    head weight               the most negative and the most positive w_i
    differential activation   the smallest and the largest s_i (`features`)

Each gives a list of harming features, lowest score first, and one of promoting features, highest
score first. Of features with the same score, which are common with weights in bfloat16, the one
with the lower id comes first in either list.
"""

import dataclasses
from typing import Any

import numpy as np

METHODS = ("differential", "head_weight")


@dataclasses.dataclass(frozen=True)
class MethodLists:
    """Feature ids by one method's score `[M]`."""

    score_f: np.ndarray
    harming: list[int]
    promoting: list[int]


def lists_of(score_f: np.ndarray, count: int) -> MethodLists:
    """The `count` features with the lowest, and those with the highest, score `[M]`."""
    harming, promoting = ranks_of(score_f)[:, :count].tolist()
    return MethodLists(score_f, harming, promoting)


def ranks_of(score_f: np.ndarray) -> np.ndarray:
    """All feature ids, the lowest score first and the highest first, `[2, …, M]` for `[…, M]`."""
    return np.stack([np.argsort(x, axis=-1, kind="stable") for x in (score_f, -score_f)])


def both_methods(head_weight: MethodLists, differential: MethodLists) -> dict[str, Any]:
    """The lists of both methods with their features' scores, for feature_analysis.json."""
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
    ids = [*lists.harming, *lists.promoting]
    return {
        "description": description,
        "safety_harming": lists.harming,
        "safety_promoting": lists.promoting,
        key: {str(i): float(lists.score_f[i]) for i in ids},
    }
