"""SAE pretraining: the loss against torch, planted dictionaries, and the sampled activations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.training import sae_training
from sarm_jax.training.activations import Activations
from sarm_jax.training.sae_training import SAETraining
from sarm_jax.training.schedule import warmup_cosine
from tests.closeness import assert_close

OPTIONS = SAETraining(
    steps=600, batch_tokens=256, learning_rate=5e-3, warmup_fraction=0.03, dead_after_steps=20,
    aux_k=8, aux_weight=1 / 32, seed=0,
)  # fmt: skip


def random_sae(d=12, m=40, k=5, seed=0):
    sae = SAE(SAEConfig(d, m, k), rngs=nnx.Rngs(seed))
    keys = jax.random.split(jax.random.key(seed + 1), 3)
    sae.encoder[...] = jax.random.normal(keys[0], (d, m))
    sae.pre_bias[...] = jax.random.normal(keys[1], (d,))
    sae.latent_bias[...] = jax.random.normal(keys[2], (m,))
    return sae


def torch_loss(p, x_bd, k, dead_f, aux_k, aux_weight):
    """Computes the loss of Gao et al. 2406.04093 with torch."""
    a_bf = (x_bd - p["pre_bias"]) @ p["encoder"] + p["latent_bias"]

    def keep(a, n):
        values, indices = a.topk(n, dim=-1)
        return torch.zeros_like(a).scatter(-1, indices, values)

    x_hat_bd = keep(a_bf, k) @ p["decoder"] + p["pre_bias"]
    loss = (((x_hat_bd - x_bd) ** 2).mean(-1) / (x_bd**2).mean(-1)).mean()
    dead = torch.nonzero(torch.from_numpy(dead_f))[:, 0]
    if len(dead) == 0:
        return loss
    e_bd = (x_bd - x_hat_bd).detach()
    e_hat_bd = keep(a_bf[:, dead], min(aux_k, len(dead))) @ p["decoder"][dead]
    return loss + aux_weight * (((e_hat_bd - e_bd) ** 2).mean(-1) / (e_bd**2).mean(-1)).mean()


@pytest.mark.parametrize("dead", [0, 3, 20])
def test_loss_and_gradient_agree_with_torch(dead):
    sae, x_bd = random_sae(), np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
    dead_f = np.arange(40) < dead
    graphdef, params = nnx.split(sae)

    def loss_fn(params):
        sae = nnx.merge(graphdef, params)
        return sae_training.sae_loss(sae, x_bd, dead_f=dead_f, options=OPTIONS)

    (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    tensors = {n: torch.tensor(np.asarray(params[n][...]), requires_grad=True) for n in params}
    expected = torch_loss(
        tensors,
        torch.from_numpy(x_bd),
        k=5,
        dead_f=dead_f,
        aux_k=8,
        aux_weight=OPTIONS.aux_weight,
    )
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    for name, tensor in tensors.items():
        assert_close(grads[name][...], tensor.grad, 5e-7, name=name)


def test_removing_the_parallel_component_keeps_row_lengths():
    rng = np.random.default_rng(0)
    rows = sae_training.unit_rows(jnp.asarray(rng.normal(size=(6, 4))))
    gradient = sae_training.remove_parallel(jnp.asarray(rng.normal(size=(6, 4))), rows)
    np.testing.assert_allclose(jnp.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose((gradient * rows).sum(axis=1), 0, atol=1e-6)


def planted(n, rng, dictionary, k=3):
    """Makes sparse sums of dictionary rows; every tenth one is marked as pooled."""
    z = np.zeros((n, len(dictionary)))
    for row in z:
        row[rng.choice(len(dictionary), k, replace=False)] = rng.uniform(1, 2, k)
    return Activations((z @ dictionary).astype(np.float32), np.arange(n) % 10 == 9)


def pretrain(train, held_out, options, log=lambda row: None):
    """Pretrains an SAE with 48 latents, 3 of them active, on states of size 32."""
    sae = SAE(SAEConfig(32, 48, 3), rngs=nnx.Rngs(0))
    return sae_training.pretrain_sae(sae, train=train, held_out=held_out, options=options, log=log)


def test_pretraining_finds_a_planted_dictionary():
    rng = np.random.default_rng(0)
    dictionary = rng.normal(size=(24, 32))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    train, held_out = planted(4000, rng, dictionary), planted(500, rng, dictionary)
    log = []
    sae, metrics = pretrain(train, held_out, OPTIONS, log=log.append)
    assert metrics["explained_variance"] > 0.9
    assert metrics["explained_variance_pooled"] > 0.9
    assert metrics["l0"] == pytest.approx(3, abs=0.01)
    decoder_fd = np.asarray(sae.decoder[...])
    np.testing.assert_allclose(np.linalg.norm(decoder_fd, axis=1), 1, atol=1e-5)
    cosine = np.abs(dictionary @ decoder_fd.T).max(axis=1)
    assert np.median(cosine) > 0.95
    assert log[-1]["step"] == OPTIONS.steps and log[-1]["loss"] < log[0]["loss"]


def test_only_the_auxiliary_loss_revives_dead_latents(monkeypatch):
    rng = np.random.default_rng(0)
    dictionary = rng.normal(size=(24, 32))
    train = planted(2000, rng, dictionary / np.linalg.norm(dictionary, axis=1, keepdims=True))
    initialise = sae_training.initialise

    def mostly_dead(sae, train, rng):
        sae = initialise(sae, train, rng)
        sae.latent_bias[...] = jnp.where(jnp.arange(48) < 32, -3.0, 0.0)
        return sae

    monkeypatch.setattr(sae_training, "initialise", mostly_dead)

    def dead_fraction(aux_weight):
        options = SAETraining(
            steps=300, batch_tokens=128, learning_rate=3e-3, warmup_fraction=0.03,
            dead_after_steps=20, aux_k=16, aux_weight=aux_weight, seed=0,
        )  # fmt: skip
        _, metrics = pretrain(train, train, options)
        return metrics["dead_fraction"]

    assert dead_fraction(0.0) > 0.5
    assert dead_fraction(1.0) < 0.1


def test_explained_variance_by_hand():
    x = np.asarray([[0.0, 0.0], [2.0, 0.0]])
    assert sae_training.explained_variance(x, x) == 1
    assert sae_training.explained_variance(x, np.asarray([[1.0, 0.0]] * 2)) == 0
    assert sae_training.explained_variance(x, np.asarray([[0.0, 0.0], [1.0, 0.0]])) == 0.5


def test_a_fixed_share_of_a_minibatch_is_pooled():
    pooled_n = np.arange(10_000) % 100 == 99
    rows = sae_training.sample_batches(pooled_n, (50, 400), np.random.default_rng(0))
    share = sae_training.POOLED_FRACTION
    assert rows.shape == (50, 400)
    assert pooled_n[rows].mean() == pytest.approx(share + (1 - share) * 0.01, abs=0.01)


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50, 1000])
def test_learning_rates_of_the_schedule(steps):
    rates = [float(warmup_cosine(2.0, 0.03, steps)(step)) for step in range(steps)]
    warmup = round(0.03 * steps)
    if warmup < 2:
        assert rates[0] == 2.0
        warmup = 0
    np.testing.assert_allclose(rates[:warmup], 2.0 * np.arange(warmup) / max(warmup, 1), rtol=1e-6)
    done = np.arange(steps - warmup) / (steps - warmup)
    np.testing.assert_allclose(rates[warmup:], 1 + np.cos(np.pi * done), atol=1e-6)


def test_metrics_are_measured_on_the_held_out_activations():
    rng = np.random.default_rng(0)
    train = planted(1000, rng, rng.normal(size=(24, 32)))
    held_out = planted(300, rng, rng.normal(size=(24, 32)))  # of another dictionary
    sae, metrics = pretrain(train, held_out, dataclasses.replace(OPTIONS, steps=200))
    x_hat, _ = sae_training.reconstruct(sae, held_out.x_nd)
    assert metrics["explained_variance"] == pytest.approx(
        sae_training.explained_variance(held_out.x_nd, x_hat)
    )


def test_the_bias_starts_at_the_mean_of_the_pooled_tokens():
    rng = np.random.default_rng(0)
    x, pooled = rng.normal(size=(500, 32)).astype(np.float32), np.arange(500) % 10 == 9
    x[pooled] += 5
    new = sae_training.initialise(
        SAE(SAEConfig(32, 48, 3), rngs=nnx.Rngs(0)), Activations(x, pooled), rng
    )
    np.testing.assert_allclose(new.pre_bias[...], x[pooled].mean(axis=0), rtol=1e-5)


def test_pretraining_removes_the_parallel_component_of_the_gradient(monkeypatch):
    calls = []
    original = sae_training.remove_parallel
    monkeypatch.setattr(
        sae_training, "remove_parallel", lambda g, d: calls.append(1) or original(g, d)
    )
    train = planted(200, np.random.default_rng(0), np.random.default_rng(1).normal(size=(24, 32)))
    pretrain(train, train, dataclasses.replace(OPTIONS, steps=2, batch_tokens=33))
    assert calls
