"""Draws the held-out prompts of a training set."""

from collections.abc import Iterable

import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.models.conversation import Prompt


def draw_held_out(
    prompts: Iterable[Prompt], *, fraction: float, seed: int, stage: str
) -> set[Prompt]:
    """Draws a fraction of the distinct prompts at random.

    Args:
        prompts: the prompts of all rows, in their order.
        fraction: the share of the distinct prompts that is drawn.
        seed: the seed of the draw.
        stage: the section of the config that has the fraction, for messages.

    Raises:
        InputError: no prompt would be left for training or for evaluation.
    """
    distinct = list(dict.fromkeys(prompts))
    order = np.random.default_rng(seed).permutation(len(distinct))
    drawn = order[: round(fraction * len(distinct))]
    if not 0 < len(drawn) < len(distinct):
        raise InputError(
            f"{stage}.held_out_fraction={fraction}: holds out {len(drawn)} of {len(distinct)} "
            "prompts; training and evaluation each need at least one"
        )
    return {distinct[i] for i in drawn}
