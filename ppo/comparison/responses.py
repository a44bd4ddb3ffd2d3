"""Responses of a policy with and without adapters to the same prompts, with their KL to the base.

Policies share the base's weights; each adds its own adapter. The random key of a batch depends only
on the number of the batch, so that equal policies give equal responses. The KL of a response is
Σ_t k3 of log-probabilities at temperature 1, whatever the sampling temperature. For greedy
responses it is k3 along the most likely path, which is not an expectation.
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
from sarm_jax.models.chat import bucket_length, decode, pad_batch, pad_id
from sarm_jax.models.llama import Llama
from sarm_jax.parallel.processes import fetch
from sarm_jax.sampling.generate import Sampling, generate


@dataclasses.dataclass(frozen=True)
class ResponseConfig:
    """Sampling options: `samples` responses to every prompt, `batch_size` at a time."""

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
                f"evaluate.samples={self.samples}: greedy responses are all equal; "
                "set evaluate.temperature"
            )


@dataclasses.dataclass(frozen=True)
class Responses:
    """N = prompts × samples responses; the responses to one prompt are consecutive.

    `length_n` is in tokens and includes the stop token, `ended_n` is bool, `kl_n` is in nats.
    """

    texts: list[str]
    length_n: np.ndarray
    ended_n: np.ndarray
    kl_n: np.ndarray


def respond(
    config: ResponseConfig,
    *,
    base: Llama,
    policy: Llama,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    chunk: int = 0,
    label: str = "base",
) -> Responses:
    """Samples the policy's responses to prompts, in the order of the prompts.

    Args:
        config: the sampling options.
        base: the base policy, which the KL refers to.
        policy: `base` itself, or a policy that shares its weights and has an adapter.
        tokenizer: the tokenizer of both.
        prompts: the token ids of each prompt.
        chunk: response positions per vocabulary projection, as in `token_logprobs`.
        label: the name of the policy in the progress bar.
    """
    rows = [row for row in prompts for _ in range(config.samples)]
    batches = []
    with tqdm(total=len(rows), desc=f"responses: {label}", unit="response") as bar:
        for number, start in enumerate(range(0, len(rows), config.batch_size)):
            batch = rows[start : start + config.batch_size]
            filler = [batch[0]] * (config.batch_size - len(batch))  # one compiled shape
            length = bucket_length(max(map(len, batch)))
            padded = pad_batch([*batch, *filler], length, pad_id(tokenizer), side="left")
            responses = _respond_to_batch(
                config,
                base=base,
                policy=policy,
                tokenizer=tokenizer,
                prompts=base.placement.rows(padded),
                key=jax.random.fold_in(jax.random.key(config.seed), number),
                chunk=chunk,
            )
            batches.append(responses)
            bar.update(len(batch))
    return Responses(
        texts=[text for batch in batches for text in batch.texts][: len(rows)],
        length_n=np.concatenate([batch.length_n for batch in batches])[: len(rows)],
        ended_n=np.concatenate([batch.ended_n for batch in batches])[: len(rows)],
        kl_n=np.concatenate([batch.kl_n for batch in batches])[: len(rows)],
    )


def _respond_to_batch(
    config: ResponseConfig,
    *,
    base: Llama,
    policy: Llama,
    tokenizer: Any,
    prompts: tuple[jax.Array, jax.Array],
    key: jax.Array,
    chunk: int,
) -> Responses:
    """Samples responses to one batch of padded prompts, (tokens, mask)."""
    tokens_bt, mask_bt = prompts
    sampling = dataclasses.asdict(config.sampling)
    out = generate(
        policy, tokens_bt, mask_bt, key=key, pad_id=pad_id(tokenizer, policy.stop_ids), **sampling
    )
    on_host = fetch(out)
    kept_br, kl_b = on_host.mask_br, np.zeros(len(out.tokens_br), np.float32)
    if policy is not base:
        all_tokens_bt = jnp.concatenate([tokens_bt, out.tokens_br], axis=1)
        all_mask_bt = jnp.concatenate([mask_bt, out.mask_br], axis=1)
        logp_br, ref_logp_br = (
            _response_logprobs(
                model,
                all_tokens_bt,
                all_mask_bt,
                max_new_tokens=config.sampling.max_new_tokens,
                chunk=chunk,
            )
            for model in (policy, base)
        )
        kl_b = fetch(response_kl(logp_br, ref_logp_br, out.mask_br))
    rows = zip(on_host.tokens_br, kept_br, strict=True)
    return Responses(
        texts=[decode(tokenizer, row_r[kept_r]) for row_r, kept_r in rows],
        length_n=kept_br.sum(axis=1),
        ended_n=on_host.ended_b,
        kl_n=kl_b,
    )


def _response_logprobs(
    policy: Llama,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    *,
    max_new_tokens: int,
    chunk: int,
) -> jax.Array:
    """Returns the log-probabilities of the last `max_new_tokens` tokens at temperature 1."""
    graphdef, state = nnx.split(policy)
    return _jitted_logprobs(
        state, tokens_bt, mask_bt, graphdef=graphdef, max_new_tokens=max_new_tokens, chunk=chunk
    )


@partial(jax.jit, static_argnames=("graphdef", "max_new_tokens", "chunk"))
def _jitted_logprobs(state, tokens_bt, mask_bt, *, graphdef, max_new_tokens, chunk):
    policy = nnx.merge(graphdef, state)
    x_brd = policy.hidden(tokens_bt, mask_bt)[:, -max_new_tokens - 1 : -1]
    logp_br, _ = token_logprobs(
        x_brd,
        policy.vocabulary,
        tokens_bt[:, -max_new_tokens:],
        temperature=1.0,
        chunk=chunk,
        vocab_size=policy.config.vocab_size,
    )
    return logp_br
