"""The responses on which a feature is strongest, for people and language models that name it."""

import dataclasses
from typing import Any

import numpy as np

from sarm_jax.models.conversation import Prompt, plain_text
from sarm_jax.models.latent_store import Contrast

OFF = 3  # responses on which the feature is off, for comparison
Text = tuple[Prompt, str]  # prompt and response


@dataclasses.dataclass(frozen=True)
class StrongResponses:
    """The responses on which one feature is strongest.

    Attributes:
        feature: id of the feature.
        examples: rows with "z", "sides", "prompt" and "response", both as plain text, strongest
            first; empty if the feature is never on (z > 0).
        off: responses on which the feature is off, drawn at random for comparison.
        active: number of responses on which the feature is on.
        responses: number of all responses.
    """

    feature: int
    examples: list[dict[str, Any]]
    off: list[tuple[str, str]]
    active: int
    responses: int


def strong_responses(
    contrast: Contrast, ids: list[int], texts: list[Text], count: int, seed: int
) -> list[StrongResponses]:
    """Finds at most `count` responses with the largest z > 0 for each of the features `ids`.

    Args:
        contrast: the latents, and which rows are chosen or rejected.
        ids: features to look up.
        texts: prompt and response of each row of the latents.
        count: largest number of responses of each feature.
        seed: seed of the responses that are drawn for comparison.
    """
    chosen, rejected = set(contrast.chosen_p.tolist()), set(contrast.rejected_p.tolist())
    results = []
    for i, z_n in zip(ids, contrast.latents.columns(ids).T, strict=True):
        top = [int(n) for n in np.argsort(-z_n, kind="stable")[:count] if z_n[n] > 0]
        examples = [
            {
                "z": float(z_n[n]),
                "sides": [s for s, m in (("chosen", chosen), ("rejected", rejected)) if n in m],
                "prompt": plain_text(texts[n][0]),
                "response": texts[n][1],
            }
            for n in top
        ]
        silent = np.random.default_rng([seed, i]).permutation(np.flatnonzero(z_n <= 0))[:OFF]
        results.append(
            StrongResponses(
                feature=i,
                examples=examples,
                off=[(plain_text(texts[n][0]), texts[n][1]) for n in silent],
                active=int((z_n > 0).sum()),
                responses=len(z_n),
            )
        )
    return results
