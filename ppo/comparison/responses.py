"""Responses of a policy with and without adapters to the same prompts, with their KL to the base.

The base's weights are shared, an adapter's come on top. Random keys follow from a batch's place
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
from tqdm import tqdm

from ppo.logprobs import token_logprobs
from ppo.losses import response_kl
from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import bucket_length, pad_batch, pad_id
from sarm_jax.models.llama import Llama
from sarm_jax.sampling.generate import Sampling, generate


@dataclasses.dataclass(frozen=True)
class ResponseConfig:
    """`samples` responses to every prompt, `batch_size` at a time; `seed` of the random keys."""

    sampling: Sampling
    samples: int = 1
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"evaluate.{name}={getattr(self, name)}: must be at least 1")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise InputError(
                f"evaluate.samples={self.samples}: greedy responses are all alike; "
                "set evaluate.temperature"
            )


@dataclasses.dataclass(frozen=True)
class Responses:
    """The `samples` responses to a prompt follow each other: N = prompts × samples.

    `length_n` in tokens with the stop token, `kl_n` in nats, `ended_n` bool.
    """

    texts: list[str]
    length_n: np.ndarray
    ended_n: np.ndarray
    kl_n: np.ndarray


def respond(
    config: ResponseConfig,
    base: Llama,
    policy: Llama,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    chunk: int = 0,
    label: str = "base",
) -> Responses:
    """The policy's responses to encoded prompts, in the order given; `chunk`: `token_logprobs`."""
    rows = [row for row in prompts for _ in range(config.samples)]
    parts = []
    with tqdm(total=len(rows), desc=f"responses: {label}", unit="response") as bar:
        for number, start in enumerate(range(0, len(rows), config.batch_size)):
            batch = rows[start : start + config.batch_size]
            filler = [batch[0]] * (config.batch_size - len(batch))  # one compiled shape
            length = bucket_length(max(map(len, batch)))
            padded = pad_batch([*batch, *filler], length, pad_id(tokenizer), side="left")
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            placed = base.placement.rows(padded)
            parts.append(_batch(config, base, policy, tokenizer, placed, key, chunk))
            bar.update(len(batch))
    texts, *arrays = zip(*parts, strict=True)
    flat = [text for part in texts for text in part][: len(rows)]
    return Responses(flat, *(np.concatenate(a)[: len(rows)] for a in arrays))


def _batch(config, base, policy, tokenizer, prompts, key, chunk):
    tokens_bt, mask_bt = prompts
    options = dataclasses.asdict(config.sampling)
    out = generate(policy, tokens_bt, mask_bt, key=key, pad_id=pad_id(tokenizer), **options)
    kept_br, kl_b = np.asarray(out.mask_br), np.zeros(len(out.tokens_br), np.float32)
    if policy is not base:
        full = (
            jnp.concatenate([tokens_bt, out.tokens_br], axis=1),
            jnp.concatenate([mask_bt, out.mask_br], axis=1),
        )
        budget = config.sampling.max_new_tokens
        logp_br, ref_br = (
            _logp(*nnx.split(model), *full, budget, chunk) for model in (policy, base)
        )
        kl_b = np.asarray(response_kl(logp_br, ref_br, out.mask_br))
    tokens = zip(np.asarray(out.tokens_br), kept_br, strict=True)
    texts = [tokenizer.decode(row_r[mask_r], skip_special_tokens=True) for row_r, mask_r in tokens]
    return texts, kept_br.sum(axis=1), np.asarray(out.ended_b), kl_b


@partial(jax.jit, static_argnums=(0, 4, 5))
def _logp(graphdef, state, tokens_bt, mask_bt, budget, chunk):
    policy = nnx.merge(graphdef, state)
    x_brd = policy.hidden(tokens_bt, mask_bt)[:, -budget - 1 : -1]
    given = (x_brd, policy.vocabulary, tokens_bt[:, -budget:])
    return token_logprobs(*given, 1.0, chunk, policy.config.vocab_size)[0]
