"""The parts of the comparison of policies."""

import jax
import numpy as np
import pytest
from flax import nnx

from configs.policy_evaluation import adapters_of
from ppo.policy_comparison import ResponseConfig, respond
from sarm_jax.errors import InputError
from sarm_jax.evaluation import policy_metrics as metrics
from sarm_jax.evaluation.latent_map import principal_plane
from sarm_jax.generate import Sampling
from sarm_jax.lora import LoRAConfig, LoRAParam, add_lora


def test_repetition_and_wins_by_hand():
    assert metrics.repetition("a b c a b c") == pytest.approx(1 / 4)
    assert metrics.repetition("a b") == 0
    won = metrics.wins(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
    assert won.tolist() == [0, 0.5, 1]


def test_intervals_against_a_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=9), rng.normal(size=9)
    index = metrics.bootstrap_indices(9, 100, 1)
    found = metrics.correlation_interval(x, y, index)
    loop = [np.corrcoef(x[i], y[i])[0, 1] for i in index]
    assert found["mean"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(loop, [0.025, 0.975]))
    mean = metrics.bootstrap_mean(x, index)
    assert mean["low"] == pytest.approx(np.quantile([x[i].mean() for i in index], 0.025))
    assert metrics.correlation_interval(np.ones(9), y, index) is None


def test_terms_add_up():
    z, w = np.array([1.0, 0.0, 2.0, 3.0]), np.array([1.0, 5.0, -2.0, 0.1])
    terms, rest = metrics.score_terms(z, w, -2.7, 2)
    assert [t[0] for t in terms] == [2, 0]
    assert rest == pytest.approx(0.3)
    assert sum(t[3] for t in terms) + rest == pytest.approx(-2.7)


def test_plane_against_the_covariance():
    z = np.random.default_rng(0).normal(size=(12, 5))
    xy, share = principal_plane(z)
    values, vectors = np.linalg.eigh(np.cov(z.T))
    np.testing.assert_allclose(share, (values / values.sum())[[-1, -2]])
    expected = (z - z.mean(0)) @ vectors[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(xy), np.abs(expected), atol=1e-10)


def test_zero_adapter_is_the_base(policy, tokenizer):
    config = ResponseConfig(Sampling(5), batch_size=2)
    adapted = nnx.merge(*nnx.split(policy))
    add_lora(adapted, LoRAConfig(rank=2), nnx.Rngs(0))
    prompts = ["say 1", "say 2", "say 3"]
    base = respond(config, policy, policy, tokenizer, prompts)
    zero = respond(config, policy, adapted, tokenizer, prompts)
    assert base.texts == zero.texts
    np.testing.assert_allclose(zero.kl_n, 0, atol=1e-6)
    for _, value in nnx.to_flat_state(nnx.state(adapted, LoRAParam)):
        value[...] = jax.random.normal(jax.random.key(0), value[...].shape)
    assert respond(config, policy, adapted, tokenizer, prompts).kl_n.sum() > 0.1
    assert not nnx.to_flat_state(nnx.state(policy, LoRAParam))


def test_bad_runs(tmp_path):
    with pytest.raises(InputError, match=r"evaluate\.runs=.*no adapter"):
        adapters_of((str(tmp_path / "full"),), tmp_path)
    for name in ("a/x", "b/x", "base"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="named 'x'"):
        adapters_of((str(tmp_path / "a/x"), str(tmp_path / "b/x")), tmp_path)
    with pytest.raises(InputError, match="named 'base'"):
        adapters_of((str(tmp_path / "base"),), tmp_path)
