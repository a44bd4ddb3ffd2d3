"""Invariants of the decoder; parity with transformers is in test_conversion.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from sarm_jax.models.llama import (
    QUERY_BLOCK,
    REMAT,
    Llama,
    LlamaConfig,
    attention,
    attention_implementation,
    causal_mask,
    rms_norm,
    to_logits,
)
from sarm_jax.models.lora import (
    TARGET_MODULES,
    LoRAConfig,
    LoRAParam,
    add_lora,
    fold_lora,
    folded_matmul,
    merge_lora,
)
from sarm_jax.models.rope import Llama3Scaling, inverse_frequencies
from tests.closeness import assert_close
from tests.further import further
from tests.tiny_models import MODEL_TYPES, scale_matrices

DOT_PRODUCT_ATTENTION = jax.nn.dot_product_attention


def real_logits(policy, batch):
    mask = jnp.asarray(batch.mask, bool)
    return np.asarray(policy(jnp.asarray(batch.tokens), mask))[np.asarray(mask)]


@pytest.mark.parametrize("architecture", MODEL_TYPES, indirect=True)
def test_padding_side_and_place_do_not_matter(policy, batch_bt):
    left, right, middle = (
        real_logits(policy, b) for b in (batch_bt.left, batch_bt.right, batch_bt.middle)
    )
    assert_close(left, right, 2e-6)
    assert_close(left, middle, 2e-6)


def test_padding_tokens_are_never_seen(policy, batch_bt):
    tokens, mask = jnp.asarray(batch_bt.left.tokens), jnp.asarray(batch_bt.left.mask, bool)
    other = jnp.where(mask, tokens, 77)
    np.testing.assert_array_equal(policy(tokens, mask)[mask], policy(other, mask)[mask])


def cudnn_on_a_cpu(q, k, v, *, mask, implementation):
    """Computes attention with XLA; fails for arguments for which cuDNN has no gradient."""
    assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
    assert mask.any(axis=-1).all()  # cuDNN may return NaN for an empty row
    return DOT_PRODUCT_ATTENTION(q, k, v, mask=mask, implementation="xla")


def test_real_tokens_attend_to_real_tokens_and_padding_to_itself():
    real_bt = np.asarray([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0]], bool)
    mask_bts = causal_mask(jnp.asarray(real_bt))
    for mask_ts, real_t in zip(mask_bts, real_bt, strict=True):
        for t in range(4):
            expected = {s for s in range(t + 1) if real_t[s]} | {t}
            assert set(np.flatnonzero(mask_ts[t])) == expected


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "expected"),
    [
        ("gpu", jnp.bfloat16, 128, "cudnn"),
        ("gpu", jnp.bfloat16, 136, "xla"),
        ("gpu", jnp.bfloat16, 12, "xla"),
        ("gpu", jnp.float32, 128, "xla"),
        ("cpu", jnp.bfloat16, 128, "xla"),
    ],
)
def test_fused_attention_where_cudnn_has_it(backend, dtype, head_dim, expected):
    assert attention_implementation(backend, dtype, head_dim) == expected


@pytest.mark.parametrize("implementation", ["xla", "cudnn"])
@pytest.mark.parametrize("length", [1, 32, 33, 300])  # in one, one, two and eight blocks
def test_attention_by_blocks_is_that_of_torch(length, implementation, monkeypatch):
    if implementation == "cudnn":
        monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn_on_a_cpu)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, heads, 8)).astype(np.float32) for heads in (6, 2, 2))
    mask = np.tril(np.ones((length, length), bool)) & (rng.random((2, 1, length)) < 0.7)
    mask |= np.eye(length, dtype=bool)
    g = rng.normal(size=q.shape).astype(np.float32)
    theirs = [torch.tensor(x, requires_grad=True) for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in theirs),
        attn_mask=torch.tensor(mask)[:, None],
        enable_gqa=True,
    ).transpose(1, 2)
    out.backward(torch.tensor(g))
    computed = partial(attention, mask_bts=jnp.asarray(mask), implementation=implementation)

    def forward_and_backward(q, k, v):
        ours, pull = jax.vjp(computed, q, k, v)
        return ours, pull(jnp.asarray(g))

    if implementation == "xla":  # the other one, in these tests, looks at values
        forward_and_backward = jax.jit(forward_and_backward)
    ours, gradients = forward_and_backward(q, k, v)
    assert_close(ours, out.detach(), 2e-6)
    for gradient, x in zip(gradients, theirs, strict=True):
        assert_close(gradient, x.grad, 3e-6, terms=g)


def test_a_gpu_gets_fewer_blocks_of_queries_and_the_same_states(policy, monkeypatch):
    tokens = jax.random.randint(jax.random.key(0), (2, 70), 0, 200)
    mask = jnp.arange(70) >= jnp.asarray([[0], [20]])

    def products() -> int:
        return str(jax.make_jaxpr(policy.hidden)(tokens, mask)).count("dot_general")

    on_cpu, expected = products(), policy.hidden(tokens, mask)
    policy.backend = "gpu"  # with float32, attention is XLA's
    assert products() == on_cpu - 2 * 2  # one block instead of three
    monkeypatch.setitem(QUERY_BLOCK, "gpu", 50)
    assert products() == on_cpu - 2
    assert_close(policy.hidden(tokens, mask)[mask], expected[mask], 3e-6)


@pytest.mark.parametrize(
    "architecture", ["llama", further("qwen2"), further("qwen3")], indirect=True
)
def test_remat_changes_nothing_but_memory(policy, batch_bt):
    tokens, mask = jnp.asarray(batch_bt.left.tokens), jnp.asarray(batch_bt.left.mask, bool)

    def loss(state, graphdef):
        return jnp.square(nnx.merge(graphdef, state).hidden(tokens, mask)[mask]).sum()

    grads = []
    for remat in REMAT:
        policy.remat = remat
        graphdef, state = nnx.split(policy)
        grads.append(jax.grad(loss)(state, graphdef))
    for other in grads[1:]:
        for a, b in zip(*map(jax.tree.leaves, (grads[0], other)), strict=True):
            assert_close(a, b, 2e-6)


@pytest.mark.parametrize("architecture", MODEL_TYPES, indirect=True)
def test_program_size_does_not_grow_with_depth(architecture):
    def lines(layers):
        config = LlamaConfig(**{**vars(architecture), "num_hidden_layers": layers})
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        forward = jax.jit(lambda s, t: nnx.merge(graphdef, s)(t, t > 0))
        return len(forward.lower(state, tokens).as_text().splitlines())

    assert lines(2) == lines(32)


def test_the_8b_model_is_described_without_memory():
    config = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5)
    model = nnx.eval_shape(lambda: Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert count == 8_030_261_248  # the published parameter count of Llama-3.1-8B


def test_llama3_frequencies_by_hand():
    plain = inverse_frequencies(128, 500000.0)
    scaled = inverse_frequencies(128, 500000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192))
    wavelength = 2 * np.pi / plain
    fast, slow = wavelength < 8192 / 4.0, wavelength > 8192 / 1.0
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8.0, rtol=1e-6)
    between = ~fast & ~slow
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8.0))[between].all()


def test_fresh_adapter_is_the_base_model(policy, batch_bt):
    before = real_logits(policy, batch_bt.left)
    add_lora(policy, LoRAConfig(rank=4), nnx.Rngs(3))
    np.testing.assert_array_equal(real_logits(policy, batch_bt.left), before)


@pytest.mark.parametrize("architecture", MODEL_TYPES, indirect=True)
def test_adapter_equals_merged_weights(policy, batch_bt):
    config = LoRAConfig(rank=4, alpha=8.0, target_modules=("q_proj", "o_proj", "down_proj"))
    add_lora(policy, config, nnx.Rngs(3))
    for path, value in nnx.to_flat_state(nnx.state(policy, LoRAParam)):
        noise = jax.random.normal(jax.random.key(len(str(path))), value.shape)
        value[...] = 0.1 * noise
    nnx.update(policy, nnx.state(policy, LoRAParam))
    adapted = real_logits(policy, batch_bt.left)
    for parent, name in (
        (policy.layers.attn, "q_proj"),
        (policy.layers.attn, "o_proj"),
        (policy.layers.mlp, "down_proj"),
    ):
        linear = getattr(parent, name)
        lora = linear.lora
        linear.kernel[...] = merge_lora(linear.kernel[...], lora.a[...], lora.b[...], lora.scale)
        linear.lora = None
    assert_close(real_logits(policy, batch_bt.left), adapted)


def test_folded_matmul_has_the_gradients_of_the_plain_form():
    shapes = {"x": (3, 40, 16), "kernel": (16, 24), "a": (16, 4), "b": (4, 24), "out": (3, 40, 24)}
    rng = np.random.default_rng(0)
    *arrays, out = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes.values())

    def value_and_gradients(product):
        return jax.value_and_grad(lambda *args: (product(*args) * out).sum(), (0, 1, 2, 3))(*arrays)

    plain = value_and_gradients(lambda x, w, a, b: x @ w + 0.5 * ((x @ a) @ b))
    folded = value_and_gradients(lambda x, w, a, b: folded_matmul(x, w, a, b, 0.5))
    for expected, result in zip(jax.tree.leaves(plain), jax.tree.leaves(folded), strict=True):
        assert_close(result, expected, 2e-6)


@pytest.mark.parametrize("architecture", MODEL_TYPES, indirect=True)
def test_fold_lora_keeps_the_function(policy, batch_bt):
    add_lora(policy, LoRAConfig(rank=4, target_modules=TARGET_MODULES), nnx.Rngs(3))
    for path, value in nnx.to_flat_state(nnx.state(policy, LoRAParam)):
        noise = jax.random.normal(jax.random.key(len(str(path))), value.shape)
        value[...] = 0.1 * noise
    adapted = real_logits(policy, batch_bt.left)
    fold_lora(policy)
    assert not nnx.to_flat_state(nnx.state(policy, LoRAParam))
    assert_close(real_logits(policy, batch_bt.left), adapted)


def test_tied_and_untied_heads(architecture):
    for tied in (True, False):
        config = LlamaConfig(**{**vars(architecture), "tie_word_embeddings": tied})
        model = scale_matrices(Llama(config, rngs=nnx.Rngs(0)))
        assert (model.lm_head is None) == tied
        same = np.array_equal(model.vocabulary, model.embed_tokens[...])
        assert same == tied


def test_adapters_are_drawn_kaiming_uniform(policy):
    add_lora(policy, LoRAConfig(rank=4), nnx.Rngs(0))
    a = np.asarray(policy.layers.attn.q_proj.lora.a[...])
    assert np.abs(a).max() <= 32**-0.5 and a.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)


def test_the_norms_mean_is_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1024)), jnp.bfloat16)
    exact = x.astype(jnp.float32) / jnp.sqrt(
        jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
    )
    result = rms_norm(x, jnp.ones(1024, jnp.bfloat16), 0.0)
    np.testing.assert_array_equal(result, exact.astype(jnp.bfloat16))


def test_half_precision_logits_are_float32():
    rng = np.random.default_rng(0)
    x, e = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((2, 3, 64), (50, 64)))
    exact = x.astype(jnp.float32) @ e.astype(jnp.float32).T
    logits = to_logits(x, e)
    assert logits.dtype == jnp.float32
    assert_close(logits, exact, 1e-6)
