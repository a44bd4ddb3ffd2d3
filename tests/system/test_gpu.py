"""What no CPU shows: fused attention, and the run of a CPU on an NVIDIA GPU, where there is one.

JAX_PLATFORMS=cuda,cpu python -m pytest tests/system/test_gpu.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from ppo.config import PPOConfig
from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.models.llama import attention, attention_implementation, causal_mask
from sarm_jax.parallel.sharding import ONE_DEVICE
from tests.closeness import assert_same_metrics
from tests.sarm_jax.parallel.test_sharding import SAME, train

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")


def relative(found: jax.Array, expected: jax.Array) -> float:
    """‖found − expected‖ / ‖expected‖."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("length", "padding"), [(1, "left"), (64, "left"), (97, "left"), (97, "right")]
)
def test_fused_attention_and_its_gradient_are_those_of_float32(length, padding):
    rows, heads, kv_heads, width = 4, 8, 2, 64
    keys = jax.random.split(jax.random.key(length), 4)
    shapes = [(rows, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, upstream = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
    lengths_b = jnp.maximum(jnp.asarray([length, length - 1, length // 2, 1]), 1)
    real_bt = jnp.arange(length) < lengths_b[:, None]
    if padding == "left":
        real_bt = real_bt[:, ::-1]
    mask_bts = causal_mask(real_bt)
    upstream = jnp.where(real_bt[..., None, None], upstream, 0)  # nobody reads what is padding

    def run(dtype, implementation):
        def attend(q, k, v):
            out = attention(q, k, v, mask_bts, implementation)
            return (out.astype(jnp.float32) * upstream).sum(), out

        arrays = (x.astype(dtype) for x in (q, k, v))
        grads, out = jax.jit(jax.grad(attend, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return jnp.where(real_bt[..., None, None], out, 0), *grads

    assert attention_implementation("gpu", jnp.bfloat16, width) == "cudnn"
    with jax.default_matmul_precision("highest"):
        expected = run(jnp.float32, "xla")
    for found, exact in zip(run(jnp.bfloat16, "cudnn"), expected, strict=True):
        assert np.isfinite(exact).all()
        if np.abs(exact).max() > 0:  # a single token has no gradient for its query and key
            assert relative(found, exact) < 1e-2


@pytest.fixture
def make():
    """A PPOConfig like that of `test_sharding`."""
    small = {"max_new_tokens": 6, "max_prompt_tokens": 200, "pack_levels": 1}
    config = {**base.get_config().ppo, **small}
    return lambda **changes: PPOConfig(**{**config, **changes})


def test_three_steps_are_those_of_a_cpu(tokenizer, make, tmp_path):
    found = {}
    for platform in ("gpu", "cpu"):
        with (
            jax.default_device(jax.devices(platform)[0]),
            jax.default_matmul_precision("highest"),
        ):
            train(tokenizer, make, ONE_DEVICE, tmp_path / platform, total_steps=3)
        found[platform] = read_metrics(tmp_path / platform / "metrics.csv")
    assert_same_metrics(found["gpu"], found["cpu"], SAME)
    assert all(row["ratio_0_max_dev"] <= 1e-5 for row in found["gpu"])
