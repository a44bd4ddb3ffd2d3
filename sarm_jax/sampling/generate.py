"""Samples with a KV cache: one prefill, then one compiled loop until every row has stopped.

Log-probabilities are those of the distribution that is sampled from:
log π = log_softmax(logits / T), renormalised over the kept tokens if top-k or top-p drop some.
"""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx, struct

from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import bucket_length
from sarm_jax.models.checks import check_batch, check_no_row_is_empty, check_token_ids, is_index
from sarm_jax.models.llama import Llama
from sarm_jax.models.packing import Packing
from sarm_jax.parallel.finite import first_not_finite
from sarm_jax.parallel.sharding import ONE_DEVICE, Placement
from sarm_jax.sampling.decoding import (
    KVCache,
    compiler_options,
    decode,
    next_logits,
    prefill,
    repeat_rows,
)
from sarm_jax.sampling.fused_layers import fuse_layers

# A padding logit of −1e30, see `mask_padding`, stays finite when it is divided by it.
SMALLEST_TEMPERATURE = 1e-8
LARGEST_COUNT = 2**31


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Options for drawing tokens: temperature 0 is greedy, top_k 0 and top_p 1 keep every token."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not is_index(self.max_new_tokens, LARGEST_COUNT) or self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        check_temperature(self.temperature)
        if not is_index(self.top_k, LARGEST_COUNT):
            raise InputError(f"top_k={self.top_k}: must be 0 (off) or positive")
        if not float(jnp.finfo(jnp.float32).tiny) <= self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must lie in (0, 1]")


def check_temperature(temperature: float, option: str = "temperature") -> None:
    """Raises InputError, naming the option, unless logits / T can be finite, or T is 0: greedy."""
    largest = float(jnp.finfo(jnp.float32).max)
    if not (temperature == 0 or SMALLEST_TEMPERATURE <= temperature <= largest):
        raise InputError(
            f"{option}={temperature}: must be 0 (greedy) or at least {SMALLEST_TEMPERATURE:g}"
        )


@struct.dataclass
class Generation:
    """Responses `[B, R]`.

    Attributes:
        tokens_br: the tokens; padding after the end.
        mask_br: True up to and including the stop token.
        logp_br: float32 log-probabilities under the sampling distribution.
        ended_b: True if a stop token was drawn within the budget.
    """

    tokens_br: jax.Array
    mask_br: jax.Array
    logp_br: jax.Array
    ended_b: jax.Array


def generate(
    policy: Llama,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    stop_ids: tuple[int, ...] | None = None,
    pad_id: int = 0,
) -> Generation:
    """Continues prompts that are padded on either side.

    Prompt lengths are padded to a few sizes, so that calls with different prompts share
    compilations.

    Args:
        policy: the model.
        tokens_bt: the prompts.
        mask_bt: marks their real tokens.
        max_new_tokens: as in `Sampling`.
        temperature: as in `Sampling`.
        top_k: as in `Sampling`.
        top_p: as in `Sampling`.
        key: the PRNG key; may be None only if `temperature` is 0.
        stop_ids: the tokens that end a response; by default those of the policy.
        pad_id: the token after the end of a response.

    Raises:
        InputError: an option is out of range, or the key is missing; a shape, a dtype or a token id
            is wrong; a row has no token, or more tokens than fit the positions of the policy with
            its response; or the policy's logits are not finite.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p
    )
    if key is None and temperature > 0:
        raise InputError("key=None: sampling at temperature > 0 needs a PRNG key")
    stops = policy.stop_ids if stop_ids is None else tuple(stop_ids)
    size = policy.config.vocab_size
    check_token_ids("stop_ids", stops, size)
    check_token_ids("pad_id", (pad_id,), size)
    length_b = check_batch(
        tokens_bt,
        mask_bt,
        vocab_size=size,
        positions=policy.config.positions,
        new_tokens=max_new_tokens,
    )
    check_no_row_is_empty(length_b)
    if not len(tokens_bt):
        return _no_responses(max_new_tokens)
    key = jax.random.key(0) if key is None else key
    return _run_padded(
        policy, tokens_bt, mask_bt, key=key, sampling=sampling, stops=stops, pad=pad_id
    )


def _run_padded(
    policy: Llama,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    *,
    key: jax.Array,
    sampling: Sampling,
    stops: tuple[int, ...],
    pad: int,
) -> Generation:
    """Runs the compiled program on prompts that are padded to one of a few lengths.

    Raises:
        InputError: the policy's logits are not finite.
    """
    extra = bucket_length(tokens_bt.shape[1]) - tokens_bt.shape[1]
    widths = ((0, 0), (extra, 0))
    tokens_bt, mask_bt = jnp.pad(tokens_bt, widths), jnp.pad(mask_bt, widths)
    graphdef, state = nnx.split(policy)
    run = _compiled(compiler_options(policy.platform, len(tokens_bt) // policy.placement.parts))
    generation = run(
        graphdef,
        state,
        tokens_bt=tokens_bt,
        mask_bt=mask_bt,
        key=key,
        sampling=sampling,
        stops=stops,
        pad=pad,
    )
    if first_not_finite([("log-probabilities", generation.logp_br)]):
        raise InputError("the policy's logits are not finite: nothing can be sampled from them")
    return generation


def _no_responses(max_new_tokens: int) -> Generation:
    """Returns the responses to no prompts."""
    return Generation(
        tokens_br=jnp.zeros((0, max_new_tokens), jnp.int32),
        mask_br=jnp.zeros((0, max_new_tokens), bool),
        logp_br=jnp.zeros((0, max_new_tokens), jnp.float32),
        ended_b=jnp.zeros((0,), bool),
    )


@cache
def _compiled(options):
    """Returns the compiled `sample` for a split policy."""
    static = ("graphdef", "sampling", "stops", "pad")
    return jax.jit(_sample, static_argnames=static, compiler_options=dict(options))


def _sample(graphdef, state, tokens_bt, mask_bt, key, sampling, stops, pad):
    return sample(
        nnx.merge(graphdef, state),
        tokens_bt=tokens_bt,
        mask_bt=mask_bt,
        key=key,
        sampling=sampling,
        stops=stops,
        pad=pad,
    )


def sample(
    policy: Llama,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    stops: tuple[int, ...],
    pad: int,
    packing: Packing | None = None,
    copies: int = 1,
    runs: str | None = None,
) -> Generation:
    """Samples like `generate`, without jit and bucketing, inside a larger program.

    With a packing of `mask_bt` the prefill computes no padding. With `copies` there are that many
    responses to each prompt, next to each other; a prompt is run once and its cache copied. `runs`
    names the axis of `jax.vmap` over several adapters, if there is one. The loop then ends once all
    responses of all of them have ended: a condition of each run's own would copy the cache of every
    run at every token.
    """
    batch, budget = len(tokens_bt) * copies, sampling.max_new_tokens
    stop_ids = jnp.asarray(stops, jnp.int32)

    def draw(x_b1d, key, running_b):
        logits_bv = next_logits(policy, x_b1d)
        token_b, logp_b = draw_token(logits_bv, key, sampling, policy.placement)
        return jnp.where(running_b, token_b, pad), jnp.where(running_b, logp_b, 0.0)

    def any_running(running_b):
        if runs is None:
            return running_b.any()
        return jax.lax.pmax(running_b.any().astype(jnp.int32), runs) > 0

    def unfinished(carry):
        return (carry[0] < budget) & any_running(carry[5])

    def step(carry):
        r, cache, key, tokens, logps, running_b = carry
        x_b1d, cache = decode(policy, tokens[:, r - 1], cache, layers)
        key, draw_key = jax.random.split(key)
        token_b, logp_b = draw(x_b1d, draw_key, running_b)
        tokens, logps = tokens.at[:, r].set(token_b), logps.at[:, r].set(logp_b)
        return r + 1, cache, key, tokens, logps, running_b & ~jnp.isin(token_b, stop_ids)

    x_b1d, cache = _run_prompts(
        policy, tokens_bt, mask_bt, new_tokens=budget, packing=packing, copies=copies
    )
    key, first_key = jax.random.split(key)
    running_b = jnp.ones((batch,), bool)
    token_b, logp_b = draw(x_b1d, first_key, running_b)
    tokens_br = jnp.full((batch, budget), pad, jnp.int32).at[:, 0].set(token_b)
    logp_br = jnp.zeros((batch, budget)).at[:, 0].set(logp_b)
    running_b &= ~jnp.isin(token_b, stop_ids)
    layers = fuse_layers(policy, separate_adapters=runs is not None)
    carry = (jnp.int32(1), cache, key, tokens_br, logp_br, running_b)
    _, _, _, tokens_br, logp_br, running_b = jax.lax.while_loop(unfinished, step, carry)

    mask_br, _ = ended_mask(tokens_br, stops)
    return Generation(tokens_br=tokens_br, mask_br=mask_br, logp_br=logp_br, ended_b=~running_b)


def _run_prompts(
    policy: Llama,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    *,
    new_tokens: int,
    packing: Packing | None,
    copies: int,
) -> tuple[jax.Array, KVCache]:
    """Returns the state of the last token of each prompt `[B, 1, D]`, and the cache of all.

    The cache has room for `new_tokens` tokens. Both have `copies` rows for each prompt.
    """
    length = tokens_bt.shape[1]
    size = length + new_tokens
    x_btd, cache = prefill(policy, tokens_bt, mask_bt, cache_size=size, packing=packing)
    last_b1 = (length - 1 - jnp.argmax(mask_bt[:, ::-1], axis=1))[:, None]
    x_b1d = jnp.take_along_axis(x_btd, last_b1[..., None], axis=1)
    if copies > 1:
        x_b1d, cache = jnp.repeat(x_b1d, copies, axis=0), repeat_rows(cache, copies)
    return x_b1d, cache


def ended_mask(tokens_br: jax.Array, stops: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns (mask up to and including the first stop token `[B, R]`, whether there is one)."""
    stopped_br = jnp.isin(tokens_br, jnp.asarray(stops, jnp.int32))
    return jnp.cumsum(stopped_br, axis=1) - stopped_br == 0, stopped_br.any(axis=1)


def draw_token(
    logits_bv: jax.Array, key: jax.Array, sampling: Sampling, placement: Placement = ONE_DEVICE
) -> tuple[jax.Array, jax.Array]:
    """Draws tokens; returns (token `[B]` int32, its log-probability `[B]` when sampled).

    `key` is one key for all rows, or an array of a key for each row.
    """
    if sampling.temperature == 0:
        logp_bv = jax.nn.log_softmax(logits_bv)
        token_b = jnp.argmax(logits_bv, axis=-1)
    else:
        logits_bv = logits_bv / sampling.temperature
        kept_bv = keep_top(logits_bv, sampling.top_k, sampling.top_p, placement)
        logp_bv = jax.nn.log_softmax(kept_bv)
        token_b = draw_index(jnp.exp(logp_bv), key, placement)
    logp_b = jnp.take_along_axis(logp_bv, token_b[:, None], axis=-1)[:, 0]
    return token_b.astype(jnp.int32), logp_b


def draw_index(p_bv: jax.Array, key: jax.Array, placement: Placement = ONE_DEVICE) -> jax.Array:
    """Draws `[B]` indices from rows of weights by inverting their cumulative sum in two levels.

    It takes one uniform number per row. On a CPU, a Gumbel variate per vocabulary entry would cost
    more than a sixth of a small model's decode step. An index of weight 0 is never drawn, although
    rounding may make a sum of partial sums increase there. (Suffixes here: k block, w column of a
    block.)
    """
    batch, size = p_bv.shape
    blocks = _blocks(size, placement.size("tensor"))
    width = -(-size // blocks)
    p_bkw = jnp.pad(p_bv, ((0, 0), (0, blocks * width - size))).reshape(batch, blocks, width)
    # If the vocabulary is split, each device first gets the sums of all blocks: along a split axis,
    # jax 0.11 computes the cumulative sum in a loop of as many steps as there are blocks.
    p_bk = placement.constrain_rows(p_bkw.sum(axis=-1))
    cdf_bk = jnp.cumsum(p_bk, axis=-1)
    uniform_b = jax.vmap(jax.random.uniform)(key) if key.ndim else jax.random.uniform(key, (batch,))
    target_b = uniform_b * cdf_bk[:, -1]
    block_b1 = _first_beyond(target_b, p_bk, cdf_bk)[:, None]
    before_b = jnp.take_along_axis(jnp.pad(cdf_bk, ((0, 0), (1, 0))), block_b1, 1)[:, 0]
    p_bw = jnp.take_along_axis(p_bkw, block_b1[..., None], axis=1)[:, 0]
    inside_b = _first_beyond(target_b - before_b, p_bw, jnp.cumsum(p_bw, axis=-1))
    return block_b1[:, 0] * width + inside_b


def _first_beyond(target_b: jax.Array, p_bn: jax.Array, cdf_bn: jax.Array) -> jax.Array:
    """Returns the first index of positive weight whose cumulative sum exceeds the target, `[B]`."""
    cdf_bn = jnp.where(p_bn > 0, cdf_bn, 0.0)
    # By rounding, the sum may end below the target; this keeps the index in range.
    target_b = jnp.minimum(target_b, jnp.nextafter(cdf_bn.max(axis=-1), 0.0))
    return jnp.argmax(cdf_bn > target_b[:, None], axis=-1)


def _blocks(size: int, parts: int) -> int:
    """Chooses the number of blocks: about √size, so that both levels are short.

    It is a multiple of `parts`, so that a vocabulary that is split over `parts` devices needs no
    communication. It is a divisor of `size` if one is near; otherwise the weights would have to be
    copied for padding. A multiple of 8 is preferred, so that other meshes use the same blocks.
    """
    root = math.isqrt(size)
    near = [n for n in range(max(root // 3, 1), 3 * root + 1) if size % n == n % parts == 0]
    if not near:
        return -(-root // parts) * parts
    return min(near, key=lambda n: (n % 8 != 0, abs(math.log(n * n / size))))


def keep_top(
    logits_bv: jax.Array, top_k: int, top_p: float, placement: Placement = ONE_DEVICE
) -> jax.Array:
    """Keeps the k likeliest tokens, then the nucleus of mass top_p; sets the others to −∞."""
    if 0 < top_k < logits_bv.shape[-1]:
        threshold_b1 = jax.lax.top_k(logits_bv, top_k)[0][:, -1:]
        logits_bv = jnp.where(logits_bv >= threshold_b1, logits_bv, -jnp.inf)
    if top_p < 1:
        descending_bv = placement.constrain_rows(-jnp.sort(-logits_bv, axis=-1))
        p_bv = jax.nn.softmax(descending_bv, axis=-1)
        inside_bv = jnp.cumsum(p_bv, axis=-1) - p_bv < top_p  # the token that crosses is kept
        threshold_b1 = jnp.min(jnp.where(inside_bv, descending_bv, jnp.inf), -1, keepdims=True)
        logits_bv = jnp.where(logits_bv >= threshold_b1, logits_bv, -jnp.inf)
    return logits_bv
