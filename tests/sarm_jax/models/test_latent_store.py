"""Compares stores of latents with the dense array, and pair statistics with plain loops."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sarm_jax.features.contrast_statistics import (
    ContrastStatistics,
    assign_folds,
    bootstrap_differential,
    differential,
    half_differentials,
    measure_contrast,
    row_totals,
)
from sarm_jax.features.detectors import calibrated_tau, contrast_tau
from sarm_jax.features.median_test import MedianTest
from sarm_jax.models import latent_store
from sarm_jax.models.latent_store import Contrast, TopKLatents
from sarm_jax.parallel.compilation import compile_programs
from tests.closeness import assert_close
from tests.dense_latents import dense_contrast

TEXTS = [f"answer {i} " * (i % 4 + 1) for i in range(11)]


def test_topk_codes_are_the_dense_latents_exactly(reward_model):
    score, z = reward_model.score(["p"] * 11, TEXTS)
    stored_score, latents = reward_model.store(["p"] * 11, TEXTS)
    assert isinstance(latents, TopKLatents)
    np.testing.assert_array_equal(latents.columns(range(z.shape[1])), z)
    np.testing.assert_array_equal(latents.columns([7, 3]), z[:, [7, 3]])
    assert_close(stored_score, score, 2e-6)


def test_a_repeated_conversation_is_run_once(reward_model, monkeypatch):
    alone, latents = reward_model.store(["p"] * 11, TEXTS)
    rows = []
    pad = reward_model._pad
    monkeypatch.setattr(reward_model, "_pad", lambda r, shape: rows.extend(r) or pad(r, shape))
    order = [3, 3, 10, 0, 3, *range(11)]
    score, again = reward_model.store(["p"] * len(order), [TEXTS[i] for i in order])
    assert len(rows) == 11
    np.testing.assert_array_equal(score[5:], alone)
    np.testing.assert_array_equal(score[:5], alone[order[:5]])
    every = range(latents.size)
    np.testing.assert_array_equal(again.columns(every), latents.columns(every)[order])


def test_new_shapes_are_compiled_side_by_side_and_once(reward_model, monkeypatch):
    jax.clear_caches()  # other tests may have compiled the same programs
    requested, compiled = [], []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(len(requested))

    def recorded(programs):
        requested.append(len(programs))
        compile_programs(programs)
        requested.append(0)

    monkeypatch.setattr("sarm_jax.models.reward_model.compile_programs", recorded)
    model = type(reward_model)(reward_model.model, reward_model.tokenizer, 128, 3)
    rows = [[5] * length for length in (3, 30, 31, 40, 60, 64, 90, 100)]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = model.score_tokens(rows)[0]
        np.testing.assert_array_equal(model.score_tokens(rows)[0], first)
    finally:
        jax.monitoring.clear_event_listeners()
    assert requested == [3, 0]  # 3 × 32, 3 × 64, and the two longest rows in 2 × 128
    assert compiled == [1] * 3  # a later call compiles nothing


def test_without_topk_columns_are_encoded_again(reward_model):
    sarm = nnx.clone(reward_model.model)
    sae = dataclasses.replace(sarm.config.sae, activation="identity")
    sarm.config = dataclasses.replace(sarm.config, sae=sae)
    sarm.sae.config = sae
    model = type(reward_model)(sarm, reward_model.tokenizer, 64, 4)
    score, z = model.score(["p"] * 11, TEXTS)
    stored_score, latents = model.store(["p"] * 11, TEXTS)
    assert_close(latents.columns(range(z.shape[1])), z, 2e-6)
    assert_close(stored_score, score, 2e-6)


def codes(pairs=60, size=37, k=5, seed=0):
    """Returns a contrast of TopK codes with repeated rows, and its two dense sides."""
    rng = np.random.default_rng(seed)
    rows = pairs + 10
    index = np.array([rng.choice(size, k, replace=False) for _ in range(rows)], np.int32)
    value = rng.normal(1, 1, (rows, k)).astype(np.float32)
    dense = np.zeros((rows, size), np.float32)
    np.put_along_axis(dense, index, value, axis=1)
    sides = rng.integers(rows, size=pairs), rng.integers(rows, size=pairs)
    return Contrast(TopKLatents(value, index, size), *sides), dense[sides[0]], dense[sides[1]]


@pytest.mark.parametrize("block_bytes", [1, 10_000, 64 << 20])
def test_statistics_by_block_are_those_of_dense_arrays(block_bytes, monkeypatch):
    monkeypatch.setattr(latent_store, "BLOCK_BYTES", block_bytes)
    contrast, chosen, rejected = codes()
    prompt = np.arange(60) // 2
    source = (np.arange(60) > 39).astype(int)
    measured = measure_contrast(contrast, prompt, source, assign_folds(prompt, 0))
    np.testing.assert_array_equal(measured.chosen_f, chosen.mean(axis=0))
    np.testing.assert_array_equal(measured.rejected_f, rejected.mean(axis=0))
    np.testing.assert_array_equal(measured.fires_rejected_f, (rejected > 0).mean(axis=0))
    assert_close(measured.chosen_sf.sum(axis=1)[1], chosen[40:].sum(axis=0), 1e-6)
    total = row_totals(contrast)
    absolute = np.abs(chosen) + np.abs(rejected)
    np.testing.assert_allclose(total, absolute.sum(axis=1), rtol=1e-4)
    np.testing.assert_allclose(measured.activity_f, absolute.mean(axis=0), rtol=1e-5)
    for q in (0.5, 0.9, 0.98):
        np.testing.assert_array_equal(contrast_tau(contrast, q), calibrated_tau(chosen, q))
    test = MedianTest.from_pairs(prompt, contrast.chosen_p, contrast.rejected_p)
    p = test(contrast.latents.columns(range(37)))
    np.testing.assert_allclose(measured.p_f, p, rtol=1e-6)
    rank = np.argsort(np.argsort(p))
    by = np.array(p) * 37 * sum(1 / n for n in range(1, 38)) / (rank + 1)
    stepped = [min(1, by[rank >= r].min()) for r in rank]
    np.testing.assert_allclose(measured.q_f, stepped, rtol=1e-6)


def test_bootstrap_covers_what_it_should_and_a_constant_has_no_width():
    _, chosen, rejected = codes(pairs=400)
    contrast = dense_contrast(chosen, rejected)
    prompt = np.arange(400)
    low, high = bootstrap_differential(
        chosen, rejected, row_totals(contrast), 37, prompt, resamples=400, seed=1
    )
    activity = np.abs(chosen) + np.abs(rejected)
    means = (x.mean(axis=0) for x in (chosen, rejected, activity))
    s = differential(*means)
    assert ((low < s) & (s < high)).all()
    ones = np.ones((5, 37), np.float32)
    low, high = bootstrap_differential(
        2 * ones, ones, 3 * ones.sum(axis=1), 37, np.arange(5), resamples=100, seed=1
    )
    np.testing.assert_allclose([low, high], 1 / 6, rtol=1e-6)


def statistics(c_sf, j_sf, pairs_s):
    none = np.zeros(c_sf.shape[-1])
    return ContrastStatistics(*[none] * 7, c_sf, j_sf, c_sf + j_sf, pairs_s)


def test_halves_by_hand():
    rng = np.random.default_rng(0)
    c, j = rng.random((2, 1, 2, 5))
    halves = half_differentials(statistics(c, j, np.array([[3, 4]])), seed=0)
    expected = [
        differential(c[0, f] / n, j[0, f] / n, (c + j)[0, f] / n) for f, n in ((0, 3), (1, 4))
    ]
    for row in halves:
        assert min(np.abs(row - e).max() for e in expected) < 1e-12


def test_pairs_of_a_prompt_share_a_fold_and_a_resample():
    prompt = np.repeat(np.arange(30), 4)
    fold = assign_folds(prompt, 0)
    assert all(len(set(fold[prompt == q])) == 1 for q in range(30)) and len(set(fold)) == 10
    rng = np.random.default_rng(0)
    once = rng.random((2, 30, 3))
    total = once.sum(axis=(0, 2))
    alone = bootstrap_differential(*once, total, 3, np.arange(30), 200, 0)
    many = bootstrap_differential(
        *(np.repeat(x, 4, axis=0) for x in once), np.repeat(total, 4), 3, prompt, 200, 0
    )
    np.testing.assert_allclose(many, alone, rtol=1e-9)
