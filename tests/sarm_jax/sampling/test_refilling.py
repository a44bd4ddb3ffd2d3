"""Sampling with slots that are refilled: the responses are those of rows of their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sarm_jax.models.llama import Llama
from sarm_jax.sampling.generate import Sampling, sample
from sarm_jax.sampling.refilling import refill_size, sample_refilling
from tests.closeness import assert_close
from tests.further import further
from tests.tiny_models import MODEL_TYPES, scale_matrices

PROMPTS, LENGTH, NEW = 12, 9, 14
STOPS = tuple(range(0, 30))  # a ninth of the vocabulary, so that lengths vary


@pytest.fixture(scope="module")
def policy(architecture):
    return scale_matrices(Llama(architecture, rngs=nnx.Rngs(0)), 3.0)


@pytest.fixture(scope="module")
def prompts(architecture):
    rng = np.random.default_rng(0)
    tokens = rng.integers(30, architecture.vocab_size, (PROMPTS, LENGTH))
    mask = np.arange(LENGTH)[None] >= rng.integers(0, LENGTH, PROMPTS)[:, None]
    return jnp.asarray(np.where(mask, tokens, 0), jnp.int32), jnp.asarray(mask)


def run(policy, prompts, slots, temperature=1.0, copies=1, key=0):
    graphdef, state = nnx.split(policy)

    @partial(jax.jit, static_argnums=())
    def program(state, tokens, mask, key):
        return sample_refilling(
            nnx.merge(graphdef, state),
            tokens,
            mask,
            key,
            sampling=Sampling(NEW, temperature),
            stops=STOPS,
            pad=261,
            slots=slots,
            copies=copies,
        )

    return jax.device_get(program(state, *prompts, jax.random.key(key)))


@pytest.fixture(scope="module")
def all_at_once(policy, prompts):
    return run(policy, prompts, slots=PROMPTS)


@pytest.mark.parametrize("slots", [1, 5, further(2), further(8)])
def test_a_response_does_not_depend_on_its_slot(policy, prompts, all_at_once, slots):
    few = run(policy, prompts, slots=slots)
    np.testing.assert_array_equal(few.tokens_br, all_at_once.tokens_br)
    np.testing.assert_array_equal(few.mask_br, all_at_once.mask_br)
    np.testing.assert_array_equal(few.ended_b, all_at_once.ended_b)
    assert_close(few.logp_br, all_at_once.logp_br, 2e-6)
    lengths = few.mask_br.sum(axis=1)
    assert lengths.min() < 4 and lengths.max() == NEW and not few.ended_b.all()


@pytest.mark.parametrize("architecture", MODEL_TYPES, indirect=True)
@pytest.mark.parametrize("slots", [3, further(12)])
def test_greedy_responses_are_those_of_rows_without_refilling(policy, prompts, slots):
    few = run(policy, prompts, slots=slots, temperature=0.0)
    expected = sample(
        policy, *prompts, jax.random.key(0), sampling=Sampling(NEW, 0.0), stops=STOPS, pad=261
    )
    np.testing.assert_array_equal(few.tokens_br, expected.tokens_br)
    np.testing.assert_array_equal(few.mask_br, expected.mask_br)
    np.testing.assert_array_equal(few.ended_b, expected.ended_b)
    assert_close(few.logp_br, expected.logp_br, 2e-6)


@pytest.mark.parametrize("slots", [6, further(4)])
def test_copies_of_a_prompt_share_its_prefill(policy, prompts, slots):
    tokens, mask = (y[:4] for y in prompts)
    copied = run(policy, (tokens, mask), slots=slots, copies=2)
    repeated = [jnp.repeat(y, 2, axis=0) for y in (tokens, mask)]
    np.testing.assert_array_equal(copied.tokens_br, run(policy, repeated, slots=slots).tokens_br)
    assert len(np.unique(copied.tokens_br, axis=0)) == 8


def test_keys_give_other_responses(policy, prompts, all_at_once):
    other = run(policy, prompts, slots=PROMPTS, key=1)
    assert (other.tokens_br != all_at_once.tokens_br).any()


@pytest.mark.parametrize(
    ("prompts", "copies", "slots", "expected"),
    [(64, 1, 64, 8), (256, 1, 32, 4), (12, 1, 40, 4), (7, 1, 64, 7), (64, 4, 64, 2), (5, 4, 4, 1)],
)
def test_prompts_are_run_a_few_at_a_time(prompts, copies, slots, expected):
    assert refill_size(prompts, copies, slots) == expected
