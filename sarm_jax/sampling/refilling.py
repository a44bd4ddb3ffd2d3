"""Samples many responses with few rows: a row that has ended is refilled with the next prompt.

In `sample` all rows run until the longest response has ended. With a long tail of lengths most rows
are then idle most of the time. Here S slots are kept busy by one compiled program, with no round
trip to the host: it decodes one token for all slots, and as soon as enough of them have ended, it
runs the next prompts and puts their cache into these slots.

All slots write the same column of the cache, the clock modulo its size C. A prompt of P columns is
put right before the clock, and at most C − P tokens follow it, so that a slot never reaches its own
prompt again. The order of the columns does not matter to attention: positions are in the keys, and
each slot has a mask of the columns that are its own.

The key of a draw is a function of (key, response, token), so that a response does not depend on its
slot, except for the rounding of its logits.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct

from sarm_jax.io.errors import InputError
from sarm_jax.models.llama import Llama
from sarm_jax.parallel.finite import first_not_finite
from sarm_jax.sampling.decoding import (
    KVCache,
    compiler_options,
    decode,
    next_logits,
    prefill,
    repeat_rows,
)
from sarm_jax.sampling.fused_layers import fuse_layers
from sarm_jax.sampling.generate import Generation, Sampling, draw_token, ended_mask

SHARE = 8  # slots are refilled as soon as this part of them, 1/8, is free


@struct.dataclass
class _State:
    """The state of the loop; S slots, B responses of at most R tokens.

    Attributes:
        cache: the cache of the slots; its column is the clock modulo its size.
        busy_s: True for slots with a response that has not ended.
        response_s: the response in each slot.
        length_s: the number of its tokens so far.
        token_s: the last of them.
        started: the number of responses that have been given a slot.
        tokens_br: the tokens of all responses.
        logp_br: their log-probabilities.
    """

    cache: KVCache
    busy_s: jax.Array
    response_s: jax.Array
    length_s: jax.Array
    token_s: jax.Array
    started: jax.Array
    tokens_br: jax.Array
    logp_br: jax.Array


def sample_refilling(
    policy: Llama,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    key: jax.Array,
    *,
    sampling: Sampling,
    stops: tuple[int, ...],
    pad: int,
    slots: int,
    copies: int = 1,
) -> Generation:
    """Samples `copies` responses to each prompt with `slots` rows.

    Args:
        policy: the model.
        tokens_bt: the prompts, padded on the left.
        mask_bt: marks their real tokens.
        key: the PRNG key.
        sampling: how tokens are drawn.
        stops: the tokens that end a response.
        pad: the token after the end of a response.
        slots: the number of rows, a multiple of `copies`.
        copies: responses per prompt, which are neighbours in the result.
    """
    loop = RefillingLoop(policy, tokens_bt, mask_bt, key, sampling, stops, pad, slots, copies)
    state = jax.lax.while_loop(loop.is_unfinished, loop.step, loop.start())
    mask_br, ended_b = ended_mask(state.tokens_br, stops)
    return Generation(
        tokens_br=state.tokens_br, mask_br=mask_br, logp_br=state.logp_br, ended_b=ended_b
    )


def generate_refilling(
    policy: Llama,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    *,
    key: jax.Array,
    sampling: Sampling,
    pad: int,
    slots: int,
    copies: int = 1,
) -> Generation:
    """Compiles and runs `sample_refilling`, whose arguments these are, with the policy's stop ids.

    Raises:
        InputError: the policy's logits are not finite.
    """
    graphdef, state = nnx.split(policy)
    generation = _compiled(compiler_options(policy.platform, slots))(
        graphdef,
        state,
        tokens_bt,
        mask_bt,
        key,
        sampling=sampling,
        stops=policy.stop_ids,
        pad=pad,
        slots=slots,
        copies=copies,
    )
    if first_not_finite([("log-probabilities", generation.logp_br)]):
        raise InputError("the policy's logits are not finite: nothing can be sampled from them")
    return generation


@cache
def _compiled(options):
    """Returns the compiled `sample_refilling` for a split policy."""

    def run(graphdef, state, tokens_bt, mask_bt, key, **options):
        return sample_refilling(nnx.merge(graphdef, state), tokens_bt, mask_bt, key, **options)

    static = ("graphdef", "sampling", "stops", "pad", "slots", "copies")
    return jax.jit(run, static_argnames=static, compiler_options=dict(options))


def refill_size(prompts: int, copies: int, slots: int) -> int:
    """Returns how many prompts are run at a time: a divisor of `prompts`, about slots / 8 rows."""
    most = max(1, slots // SHARE // copies)
    return max(n for n in range(1, most + 1) if prompts % n == 0)


class RefillingLoop:
    """The body of the loop; arguments as in `sample_refilling`."""

    def __init__(self, policy, tokens_bt, mask_bt, key, sampling, stops, pad, slots, copies):
        self.policy, self.key, self.sampling = policy, key, sampling
        self.tokens_bt, self.mask_bt = tokens_bt, mask_bt
        self.stops, self.pad = jnp.asarray(stops, jnp.int32), pad
        self.slots, self.copies = slots, copies
        self.responses = len(tokens_bt) * copies
        self.at_once = refill_size(len(tokens_bt), copies, slots)
        self.size = tokens_bt.shape[1] + sampling.max_new_tokens
        self.layers = fuse_layers(policy)

    def start(self) -> _State:
        """Returns the state with empty slots."""
        config, slots = self.policy.config, self.slots
        shape = (slots, config.num_key_value_heads, config.head_dim, self.size)
        empty = jnp.zeros(shape, self.policy.embed_tokens.dtype)
        layers = (empty,) * config.num_hidden_layers
        zeros_s = jnp.zeros((slots,), jnp.int32)
        cache = KVCache(
            k=layers,
            v=layers,
            mask_bs=jnp.zeros((slots, self.size), bool),
            column=jnp.int32(0),
            position_b=zeros_s,
        )
        length = (self.responses, self.sampling.max_new_tokens)
        return _State(
            cache=cache,
            busy_s=jnp.zeros((slots,), bool),
            response_s=zeros_s,
            length_s=zeros_s,
            token_s=zeros_s,
            started=jnp.int32(0),
            tokens_br=jnp.full(length, self.pad, jnp.int32),
            logp_br=jnp.zeros(length),
        )

    def is_unfinished(self, state: _State) -> jax.Array:
        """Returns True while responses are waiting or running."""
        return state.busy_s.any() | (state.started < self.responses)

    def step(self, state: _State) -> _State:
        """Refills free slots, then decodes one token for every slot."""
        state = jax.lax.while_loop(self._can_refill, self._refill, state)
        x_s1d, cache = decode(self.policy, state.token_s, state.cache, self.layers)
        cache = replace(cache, column=cache.column % self.size)
        token_s, logp_s = self._draw(x_s1d, state.response_s, state.length_s)
        return self._record(
            replace(state, cache=cache), state.busy_s, state.response_s, token_s, logp_s
        )

    def _can_refill(self, state: _State) -> jax.Array:
        free = self.slots - state.busy_s.sum()
        return (free >= self.at_once * self.copies) & (state.started < self.responses)

    def _refill(self, state: _State) -> _State:
        """Runs the next prompts and puts them into free slots, with the first tokens drawn."""
        rows = self.at_once * self.copies
        (slots_n,) = jnp.nonzero(~state.busy_s, size=rows)
        first = state.started // self.copies
        tokens_nt, mask_nt = (
            jax.lax.dynamic_slice_in_dim(y, first, self.at_once)
            for y in (self.tokens_bt, self.mask_bt)
        )
        x_ntd, prompts = prefill(self.policy, tokens_nt, mask_nt, cache_size=self.size)
        x_n1d = jnp.repeat(x_ntd[:, -1:], self.copies, axis=0)
        # Columns 0 … P − 1 become those right before the clock.
        shift = state.cache.column - tokens_nt.shape[1]
        prompts = jax.tree.map(lambda y: _rolled(y, shift), repeat_rows(prompts, self.copies))
        cache = jax.tree.map(
            lambda whole, new: whole if whole.ndim == 0 else whole.at[slots_n].set(new),
            state.cache,
            prompts,
        )
        response_n = state.started + jnp.arange(rows, dtype=jnp.int32)
        token_n, logp_n = self._draw(x_n1d, response_n, jnp.zeros((rows,), jnp.int32))

        def put(y_s, y_n):
            return y_s.at[slots_n].set(y_n)

        new_s = put(jnp.zeros((self.slots,), bool), True)
        state = replace(
            state,
            cache=cache,
            busy_s=state.busy_s | new_s,
            response_s=put(state.response_s, response_n),
            length_s=put(state.length_s, 0),
            started=state.started + rows,
        )
        token_s, logp_s = put(state.token_s, token_n), put(jnp.zeros((self.slots,)), logp_n)
        return self._record(state, new_s, state.response_s, token_s, logp_s)

    def _draw(self, x_n1d, response_n, length_n):
        """Draws the next token of responses from their last hidden states `[N, 1, D]`."""
        keys_n = jax.vmap(lambda r, t: jax.random.fold_in(jax.random.fold_in(self.key, r), t))(
            response_n, length_n
        )
        logits_nv = next_logits(self.policy, x_n1d)
        return draw_token(logits_nv, keys_n, self.sampling, self.policy.placement)

    def _record(self, state: _State, drawn_s, response_s, token_s, logp_s) -> _State:
        """Writes the tokens of the slots `drawn_s` to their responses, and ends responses."""
        row_s = jnp.where(drawn_s, response_s, self.responses)  # beyond the end: dropped
        place = row_s, state.length_s
        length_s = state.length_s + drawn_s
        ended_s = jnp.isin(token_s, self.stops) | (length_s >= self.sampling.max_new_tokens)
        return replace(
            state,
            busy_s=state.busy_s & ~(drawn_s & ended_s),
            length_s=length_s,
            token_s=jnp.where(drawn_s, token_s, state.token_s),
            tokens_br=state.tokens_br.at[place].set(token_s, mode="drop"),
            logp_br=state.logp_br.at[place].set(logp_s, mode="drop"),
        )


def _rolled(y: Any, shift: jax.Array) -> Any:
    """Rolls the columns of a cache's array, its last axis; positions and the column stay."""
    return jnp.roll(y, shift, axis=-1) if y.ndim > 1 else y
