"""Responses of a policy with and without adapters to the same prompts, with their KL to the base.

The base's weights are shared, an adapter's come on top. Random keys follow from the prompts' batch
and never from the adapter, so that equal policies give equal responses. KL is Σ_t k3 of log-
probabilities at temperature 1, whatever the temperature of sampling; for greedy responses it is
k3 along the likeliest path, no expectation.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ppo.logprobs import token_logprobs
from ppo.losses import response_kl
from sarm_jax.chat import bucket_length, encode_prompt, pad_batch, pad_id
from sarm_jax.errors import InputError
from sarm_jax.generate import Sampling, generate
from sarm_jax.llama import Llama


@dataclasses.dataclass(frozen=True)
class ResponseConfig:
    """`batch_size` prompts at a time; `seed` of the random keys."""

    sampling: Sampling
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"evaluate.batch_size={self.batch_size}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class Responses:
    """`length_n` in tokens with the stop token, `kl_n` in nats, `ended_n` bool."""

    texts: list[str]
    length_n: np.ndarray
    ended_n: np.ndarray
    kl_n: np.ndarray


def respond(
    config: ResponseConfig, base: Llama, policy: Llama, tokenizer: Any, prompts: Sequence[str]
) -> Responses:
    """The policy's response to every prompt, in the order given."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    length = bucket_length(max(map(len, rows)))
    parts = []
    for number, start in enumerate(range(0, len(rows), config.batch_size)):
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        batch = rows[start : start + config.batch_size]
        parts.append(_batch(config, base, policy, tokenizer, batch, length, key))
    texts, *arrays = zip(*parts, strict=True)
    return Responses([t for part in texts for t in part], *(np.concatenate(a) for a in arrays))


def _batch(config, base, policy, tokenizer, rows, length, key):
    pad, count = pad_id(tokenizer), len(rows)
    filler = [rows[0]] * (config.batch_size - count)  # one compiled shape
    tokens_bt, mask_bt = map(jnp.asarray, pad_batch([*rows, *filler], length, pad, side="left"))
    options = dataclasses.asdict(config.sampling)
    out = generate(policy, tokens_bt, mask_bt, key=key, pad_id=pad, **options)
    full = (
        jnp.concatenate([tokens_bt, out.tokens_br], 1),
        jnp.concatenate([mask_bt, out.mask_br], 1),
    )
    budget = config.sampling.max_new_tokens
    logp_br, ref_br = (_logp(*nnx.split(model), *full, budget) for model in (policy, base))
    kl_b = np.asarray(response_kl(logp_br, ref_br, out.mask_br))
    kept_br = np.asarray(out.mask_br)
    pairs = list(zip(np.asarray(out.tokens_br), kept_br, strict=True))[:count]
    texts = [tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in pairs]
    return texts, kept_br.sum(1)[:count], np.asarray(out.ended_b)[:count], kl_b[:count]


@partial(jax.jit, static_argnums=(0, 4))
def _logp(graphdef, state, tokens_bt, mask_bt, budget):
    policy = nnx.merge(graphdef, state)
    x_brd = policy.hidden(tokens_bt, mask_bt)[:, -budget - 1 : -1]
    return token_logprobs(x_brd, policy.vocabulary, tokens_bt[:, -budget:], 1.0)[0]
