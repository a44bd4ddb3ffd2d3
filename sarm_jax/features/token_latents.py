"""Latents at every token of a conversation, not only where the reward model pools.

The reward reads a latent once, at the end of the response. The SAE is the same function at every
token, so the latent there tells which words it responds to:

    z_t = SAE(x_t),   x_t the standardised trunk state (SARM) or the state itself (linear reward)

At the pooled token this is the latent that the reward reads. (Suffix s: the requested features.)
"""

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sarm_jax.models.chat import bucket_length, decode, encode_conversation, pad_batch, pad_id
from sarm_jax.models.conversation import Prompt
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import standardise
from sarm_jax.models.sarm import SARM
from sarm_jax.parallel.finite import require_finite
from sarm_jax.parallel.processes import fetch

INCOMPLETE = "\ufffd"  # the end of the text of a token that holds only a part of a character
MOST_PARTS = 4  # tokens that a character is split over, with byte-level tokenizers


@dataclasses.dataclass(frozen=True)
class TokenLatents:
    """The tokens of a conversation as the reward model reads it, with latents at each of them.

    Attributes:
        ids: the tokens.
        z_ts: latents `[T, S]`.
        response: the position of the first token of the response.
        pooled: the position that the reward reads.
    """

    ids: list[int]
    z_ts: np.ndarray
    response: int
    pooled: int


def token_latents(
    model: RewardModel, texts: Sequence[tuple[Prompt, str]], features: Sequence[int]
) -> list[TokenLatents]:
    """Computes latents of some features at every token of some conversations.

    Args:
        model: the reward model.
        texts: prompt and response of each conversation.
        features: the features; each of them is computed for every conversation.
    """
    rows = [model.encode(prompt, response) for prompt, response in texts]
    split, feature_s = nnx.split(model.model), jnp.asarray(features, jnp.int32)
    pad, place = pad_id(model.tokenizer), model.model.trunk.placement.rows
    order = np.argsort([len(row) for row in rows], kind="stable")
    latents: dict[int, np.ndarray] = {}
    for start in range(0, len(rows), model.batch_size):
        batch = order[start : start + model.batch_size]
        filled = [rows[i] for i in batch]
        filled += [filled[0]] * (model.batch_size - len(batch))  # few shapes, so few compilations
        length = min(bucket_length(max(map(len, filled)), parts=1), model.max_length)
        tokens_bt, mask_bt = place(pad_batch(filled, length, pad))
        z_bts = np.asarray(fetch(_latents(*split, tokens_bt, mask_bt, feature_s)))
        require_finite({"latents": z_bts}, "the reward model, at the tokens of responses")
        latents |= {int(i): z_bts[n, : len(rows[i])] for n, i in enumerate(batch)}
    return [
        TokenLatents(
            ids=row,
            z_ts=np.asarray(latents[i]),
            response=_response_start(model, *texts[i], row),
            pooled=_pooled(model.model, row),
        )
        for i, row in enumerate(rows)
    ]


@partial(jax.jit, static_argnums=0)
def _latents(graphdef, state, tokens_bt, mask_bt, feature_s):
    """Computes z `[B, T, S]`; one position at a time, since `[B, T, M]` would not fit."""
    model = nnx.merge(graphdef, state)
    h_btd = model.trunk.hidden(tokens_bt, mask_bt)
    x_btd = standardise(h_btd) if isinstance(model, SARM) else h_btd.astype(jnp.float32)
    z_tbs = jax.lax.map(lambda x_bd: model.sae.encode(x_bd)[:, feature_s], x_btd.swapaxes(0, 1))
    return z_tbs.swapaxes(0, 1)


def _pooled(model: SARM | LinearReward, ids: Sequence[int]) -> int:
    """Returns the position that the reward model pools, as `pooled_position` finds it."""
    if isinstance(model, SARM) or model.config.pad_token_id is None:
        return len(ids) - 1
    counting = [t for t, token in enumerate(ids) if token != model.config.pad_token_id]
    return counting[-1] if counting else 0


def _response_start(model: RewardModel, prompt: Prompt, response: str, ids: Sequence[int]) -> int:
    """Returns the position of the first token of the response, in ids that may have been cut."""
    encode = partial(
        encode_conversation,
        model.tokenizer,
        prompt,
        max_length=sys.maxsize,
        ends_with_turn=isinstance(model.model, SARM),
    )
    whole = encode(response=response)
    cut = len(whole) - len(ids)
    bos = int(cut > 0 and ids[0] == model.tokenizer.bos_token_id)  # a cut keeps it
    return max(_common_prefix(whole, encode(response="")) - cut, bos)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens two encodings have in common at their start."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((t for t, (x, y) in pairs if x != y), min(len(a), len(b)))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int]]:
    """Splits tokens into pieces of text that can be read.

    A piece is a token, or the tokens that one character is split over. Blanks before words are
    kept, so the pieces make up the text.

    Returns:
        (text, number of tokens) of each piece.
    """

    decoded = partial(decode, tokenizer, keep_special=True)
    pieces, start, before = [], 0, 0
    while start < len(ids):
        stop = start + 1
        # Decoded behind the piece before it: a blank at the start of a text may be dropped.
        known, text = decoded(ids[before:start]), decoded(ids[before:stop])
        while text.endswith(INCOMPLETE) and stop < min(len(ids), start + MOST_PARTS):
            stop += 1
            text = decoded(ids[before:stop])
        follows = text.startswith(known)
        text = text[len(known) :] if follows else decoded(ids[start:stop])
        pieces.append((text, stop - start))
        before, start = start, stop
    return pieces
