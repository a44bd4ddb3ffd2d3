"""Pages on single features, feature_pages.json: which words each of them reads.

For each feature: how often and how strongly it is on in each group of responses (chosen and
rejected ones, or those of people and policies), what it adds to the reward, the features with the
most similar decoder rows, and the responses that excite it most, token by token.

The tokens are those of the response up to the one that the reward reads. Of a long response the
last `TOKENS` are kept and those around the strongest one; {"left_out": n} stands for the others.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sarm_jax.features.naming_prompts import shortened
from sarm_jax.features.neighbours import decoder_directions, nearest_features
from sarm_jax.features.token_latents import TokenLatents, token_latents, token_texts
from sarm_jax.models.conversation import Prompt, plain_text
from sarm_jax.models.latent_store import Latents
from sarm_jax.models.reward_model import RewardModel

PAGES = "feature_pages.json"
MAX_PAGES = 64  # features of a file
EXAMPLES = 5  # responses of each feature
BINS = 24  # of a histogram
TOKENS, AROUND = 128, 24  # tokens at the end of a response, and on either side of the strongest one
PROMPT_CHARACTERS, PIECE_CHARACTERS = 400, 200
DIGITS = 5  # significant digits of activations
Text = tuple[Prompt, str]  # prompt and response


@dataclasses.dataclass(frozen=True)
class ResponseGroups:
    """The responses that pages are about.

    Attributes:
        texts: prompt and response of each row of `latents`.
        latents: their latents.
        groups: rows of each group of responses by its name, such as "chosen"; a row may be in
            several groups, and several times in one.
    """

    texts: Sequence[Text]
    latents: Latents
    groups: Mapping[str, np.ndarray]


def feature_pages(
    model: RewardModel,
    responses: ResponseGroups,
    roles: Mapping[int, Sequence[str]],
    *,
    tau: Mapping[int, float],
    examples: int = EXAMPLES,
    direction_fd: np.ndarray | None = None,
) -> dict[str, Any]:
    """Describes features for their pages.

    Args:
        model: the reward model.
        responses: the responses that are looked at.
        roles: what each feature is to the run, such as "detector"; the most important feature
            first. Only the first `MAX_PAGES` are described.
        tau: thresholds of features; a feature may have none.
        examples: responses that are shown of each feature.
        direction_fd: the decoder rows of length 1, if they are known.

    Returns:
        The content of feature_pages.json.
    """
    ids = list(roles)[:MAX_PAGES]
    z_nf, weight_f = responses.latents.columns(ids), model.feature_weights()
    rank_f = np.empty(len(weight_f), int)
    rank_f[np.argsort(-np.abs(weight_f), kind="stable")] = np.arange(1, len(weight_f) + 1)
    strongest = [_strongest(responses.texts, z_n, examples) for z_n in z_nf.T]
    by_row = _token_latents(model, responses.texts, ids, strongest)
    direction_fd = decoder_directions(model.sae) if direction_fd is None else direction_fd
    features = []
    for column, (i, nearest) in enumerate(
        zip(ids, nearest_features(direction_fd, ids), strict=True)
    ):
        z_n = z_nf[:, column]
        features.append(
            {
                "feature": i,
                "roles": list(roles[i]),
                "weight": float(weight_f[i]),
                "weight_rank": int(rank_f[i]),
                "tau": tau.get(i),
                "groups": _groups(responses.groups, z_n, tau.get(i)),
                "neighbours": [{"feature": n, "cosine": _short(cosine)} for n, cosine in nearest],
                "examples": [
                    {
                        "z": float(z_n[n]),
                        "groups": [name for name, own in responses.groups.items() if n in own],
                        "prompt": shortened(plain_text(responses.texts[n][0]), PROMPT_CHARACTERS),
                        "tokens": _tokens(model.tokenizer, by_row[n], column),
                    }
                    for n in strongest[column]
                ],
            }
        )
    return {"latents": len(weight_f), "features": features}


def _strongest(texts: Sequence[Text], z_n: np.ndarray, count: int) -> list[int]:
    """Returns the rows with the largest z > 0, each text once, the largest first."""
    rows: dict[Text, int] = {}
    for n in np.argsort(-z_n, kind="stable").tolist():
        if len(rows) == count or z_n[n] <= 0:
            break
        rows.setdefault(texts[n], n)
    return list(rows.values())


def _token_latents(
    model: RewardModel, texts: Sequence[Text], ids: Sequence[int], strongest: Sequence[list[int]]
) -> dict[int, TokenLatents]:
    """Computes latents at the tokens of all responses that are shown, by row."""
    rows = sorted({n for own in strongest for n in own})
    if not rows:
        return {}
    return dict(zip(rows, token_latents(model, [texts[n] for n in rows], ids), strict=True))


def _groups(
    groups: Mapping[str, np.ndarray], z_n: np.ndarray, tau: float | None
) -> dict[str, dict[str, Any]]:
    """Describes the activations of a feature in every group; all histograms have the same bins."""
    low, high = min(0.0, float(z_n.min())), max(0.0, float(z_n.max()))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    described = {}
    for name, rows in groups.items():
        own_n = z_n[rows]
        described[name] = {
            "responses": len(own_n),
            "fires": float((own_n > 0).mean()),
            "above_tau": None if tau is None else float((own_n > np.float32(tau)).mean()),
            "mean": float(own_n.mean()),
            "range": [float(edges[0]), float(edges[-1])],
            "counts": np.histogram(own_n[own_n != 0], edges)[0].tolist(),
        }
    return described


def _tokens(tokenizer: Any, latents: TokenLatents, column: int) -> list[Any]:
    """Returns the response as [text, z] of each piece, and what the end and gaps are."""
    start, pooled = min(latents.response, latents.pooled), latents.pooled
    z_t = latents.z_ts[start : pooled + 1, column]
    # Apart, since a character that the response leaves incomplete would take the token with it.
    ids = latents.ids
    pieces = token_texts(tokenizer, ids[start:pooled]) + token_texts(tokenizer, [ids[pooled]])
    ends = np.cumsum([count for _, count in pieces])
    z_n = np.maximum.reduceat(z_t, [0, *ends[:-1]])
    strongest = int(np.argmax(z_n))
    shown: list[Any] = []
    for n, ((text, _), z) in enumerate(zip(pieces, z_n, strict=True)):
        if n >= len(pieces) - TOKENS or abs(n - strongest) <= AROUND:
            shown.append([text[:PIECE_CHARACTERS], _short(z)])
        elif shown and isinstance(shown[-1], dict):
            shown[-1]["left_out"] += 1
        else:
            shown.append({"left_out": 1})
    return shown


def _short(value: float) -> float:
    return float(f"{float(value):.{DIGITS}g}")
