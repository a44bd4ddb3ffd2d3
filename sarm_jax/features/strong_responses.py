"""The responses on which features are strongest: what a person, or a language model, looks at."""

import dataclasses
from typing import Any

import numpy as np

from sarm_jax.models.latent_store import Contrast

OFF = 3  # responses to compare with
Text = tuple[str, str]  # prompt and response


@dataclasses.dataclass(frozen=True)
class StrongResponses:
    """Where a feature is strongest, as rows with "z", "sides", "prompt" and "response".

    The strongest comes first. The feature is on, z > 0, for `active` of all `responses`; one that
    is never on has no examples. `off` are some of the others, drawn at random, to compare with.
    """

    feature: int
    examples: list[dict[str, Any]]
    off: list[Text]
    active: int
    responses: int


def strong_responses(
    contrast: Contrast, ids: list[int], texts: list[Text], count: int, seed: int
) -> list[StrongResponses]:
    """At most `count` responses with the largest z > 0 for each of the features `ids`.

    `seed` is of the responses drawn to compare with.
    """
    chosen, rejected = set(contrast.chosen_p.tolist()), set(contrast.rejected_p.tolist())
    listed = []
    for i, z_n in zip(ids, contrast.latents.columns(ids).T, strict=True):
        top = [int(n) for n in np.argsort(-z_n, kind="stable")[:count] if z_n[n] > 0]
        examples = [
            {
                "z": float(z_n[n]),
                "sides": [s for s, m in (("chosen", chosen), ("rejected", rejected)) if n in m],
                "prompt": texts[n][0],
                "response": texts[n][1],
            }
            for n in top
        ]
        silent = np.random.default_rng([seed, i]).permutation(np.flatnonzero(z_n <= 0))[:OFF]
        off = [texts[n] for n in silent]
        listed.append(StrongResponses(i, examples, off, int((z_n > 0).sum()), len(z_n)))
    return listed
