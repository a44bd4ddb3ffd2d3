"""Fused attention on an NVIDIA GPU, and a run on the GPU against the same run on the CPU.

JAX_PLATFORMS=cuda,cpu python -m pytest tests/system/test_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.models.llama import attention, attention_implementation, causal_mask
from sarm_jax.parallel.sharding import ONE_DEVICE
from tests.closeness import assert_same_metrics
from tests.meshes import COMPARED_COLUMNS, train_on_mesh

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """Returns ‖actual − expected‖ / ‖expected‖."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("length", "padding"), [(1, "left"), (64, "left"), (97, "left"), (97, "right")]
)
def test_fused_attention_and_its_gradient_match_float32(length, padding):
    rows, heads, kv_heads, width = 4, 8, 2, 64
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, upstream = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
    lengths_b = jnp.maximum(jnp.asarray([length, length - 1, length // 2, 1]), 1)
    real_bt = jnp.arange(length) < lengths_b[:, None]
    if padding == "left":
        real_bt = real_bt[:, ::-1]
    mask_bts = causal_mask(real_bt)
    upstream = jnp.where(real_bt[..., None, None], upstream, 0)  # padding has no gradient

    def run(dtype, implementation):
        def attend(q, k, v):
            out = attention(q, k, v, mask_bts, implementation)
            return (out.astype(jnp.float32) * upstream).sum(), out

        value_and_grad = jax.jit(jax.grad(attend, argnums=(0, 1, 2), has_aux=True))
        grads, out = value_and_grad(q.astype(dtype), k.astype(dtype), v.astype(dtype))
        return jnp.where(real_bt[..., None, None], out, 0), *grads

    assert attention_implementation("gpu", jnp.bfloat16, width) == "cudnn"
    with jax.default_matmul_precision("highest"):
        expected = run(jnp.float32, "xla")
    for actual, exact in zip(run(jnp.bfloat16, "cudnn"), expected, strict=True):
        assert np.isfinite(exact).all()
        if np.abs(exact).max() > 0:  # a single token has no gradient for its query and key
            assert relative_error(actual, exact) < 1e-2


def test_three_steps_match_those_of_a_cpu(tokenizer, ppo_config, tmp_path):
    rows = {}
    for platform in ("gpu", "cpu"):
        workdir = tmp_path / platform
        with (
            jax.default_device(jax.devices(platform)[0]),
            jax.default_matmul_precision("highest"),
        ):
            train_on_mesh(
                tokenizer, ppo_config, placement=ONE_DEVICE, workdir=workdir, total_steps=3
            )
        rows[platform] = read_metrics(workdir / "metrics.csv")
    assert_same_metrics(rows["gpu"], rows["cpu"], COMPARED_COLUMNS)
    assert all(row["ratio_0_max_dev"] <= 1e-5 for row in rows["gpu"])
