"""Activations: which tokens are kept, their files, and training from files as from memory."""

import logging
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sarm_jax.io import matrix_files
from sarm_jax.io.errors import InputError
from sarm_jax.io.matrix_files import open_matrix, writing_matrix
from sarm_jax.models.sae import SAE, SAEConfig, standardise
from sarm_jax.parallel.sharding import MeshConfig, Placement, make_mesh
from sarm_jax.reporting.spread import is_constant
from sarm_jax.training import activations
from sarm_jax.training.activations import (
    ActivationFolder,
    Activations,
    Conversation,
    SelectedRows,
    all_equal,
    collect_pooled,
    mean_row,
)
from sarm_jax.training.sae_training import SAETraining, explained_variance, pretrain_sae
from sarm_jax.training.train_sae import scaling
from sarm_jax.training.train_sarm import truncate
from tests.closeness import assert_close


@pytest.fixture
def folder(tmp_path):
    made = ActivationFolder(tmp_path / "activations", {"seed": 0})
    yield made
    made.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("max_tokens", [3, 40, 90, 1000])
def test_tokens_are_sampled_without_replacement(max_tokens):
    lengths = [7, 1, 60, 30, 2]
    kept = activations._sample_tokens(lengths, max_tokens, np.random.default_rng(0))
    others = [(row, back) for row, n in enumerate(lengths) for back in range(1, n)]
    room = max(max_tokens - 5, 0)
    if len(others) > room:
        sample = np.random.default_rng(0).choice(len(others), room, replace=False)
        others = [others[i] for i in sample]
    for row, tokens in enumerate(kept):
        assert tokens.tolist() == sorted({0} | {b for r, b in others if r == row}, reverse=True)
    assert sum(map(len, kept)) == max(min(max_tokens, 100), 5)


def conversations(rng, lengths, turns):
    return [
        Conversation(rng.integers(1, 200, n).tolist(), turn)
        for n, turn in zip(lengths, turns, strict=True)
    ]


@pytest.mark.parametrize("tokens", [32, 64, 2048])
def test_activations_are_the_states_of_each_turn_in_order(folder, policy, monkeypatch, tokens):
    monkeypatch.setattr(activations, "TOKENS_PER_BATCH", tokens)
    trunk = truncate(policy, 2)
    rows = conversations(np.random.default_rng(0), [40, 9, 17, 33], [5, 1, 17, 12])
    collected = folder.collect("a", trunk, rows, max_tokens=1000, seed=0)
    expected = [
        standardise(trunk.hidden(jnp.asarray([r.ids]), jnp.ones((1, len(r.ids)), bool)))[0]
        for r in rows
    ]
    turns = [e[-r.turn_length :] for e, r in zip(expected, rows, strict=True)]
    assert_close(collected.x_nd[:], np.concatenate(turns))
    assert_close(collected.pooled_rd, [t[-1] for t in turns])
    np.testing.assert_array_equal(collect_pooled(trunk, rows), collected.pooled_rd)


@pytest.mark.parametrize(("max_tokens", "expected"), [(10, 10), (2, 4), (1000, 35)])
def test_the_limit_never_drops_pooled_tokens(folder, policy, max_tokens, expected):
    trunk = truncate(policy, 1)
    rows = conversations(np.random.default_rng(0), [40, 9, 17, 33], [5, 1, 17, 12])
    complete = folder.collect("complete", trunk, rows, max_tokens=1000, seed=0)
    limited = folder.collect("limited", trunk, rows, max_tokens=max_tokens, seed=0)
    assert len(limited.x_nd) == expected and limited.pooled_n.sum() == 4
    np.testing.assert_array_equal(limited.pooled_rd, complete.pooled_rd)
    kept = {row.tobytes() for row in limited.x_nd[:]}
    assert kept <= {row.tobytes() for row in complete.x_nd[:]} and len(kept) == expected


def collect(folder, policy, **changes):
    rows = conversations(np.random.default_rng(0), [40, 9, 17, 33], [5, 1, 17, 12])
    options = {"max_tokens": 30, "seed": 0} | changes
    return folder.collect("a", truncate(policy, 1), rows, **options)


def never(*arguments):
    raise AssertionError("the trunk runs")


def test_a_later_call_uses_complete_files_again(folder, policy, tmp_path, monkeypatch, caplog):
    x_nd = collect(folder, policy).x_nd[:]
    again = ActivationFolder(tmp_path / "activations", {"seed": 0})
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(activations, "_kept_states", never)
        np.testing.assert_array_equal(collect(again, policy).x_nd[:], x_nd)
        assert "using the 30 activations in" in caplog.text
        other = ActivationFolder(tmp_path / "activations", {"seed": 1})
        with pytest.raises(AssertionError, match="the trunk runs"):
            collect(other, policy)
        with pytest.raises(AssertionError, match="the trunk runs"):
            collect(again, policy, reuse=False)


def test_damaged_files_are_named_and_collected_again(folder, policy, tmp_path, caplog):
    x_nd = collect(folder, policy).x_nd[:]
    path = tmp_path / "activations/a/rows_00000.f32"
    path.write_bytes(path.read_bytes()[:-1])
    again = ActivationFolder(tmp_path / "activations", {"seed": 0})
    np.testing.assert_array_equal(collect(again, policy).x_nd[:], x_nd)
    assert f"{path}: has 3,839 bytes, expected 3,840; the activations are coll" in caplog.text


def test_what_cannot_be_removed_is_named_and_does_not_end_the_training(
    folder, policy, tmp_path, caplog
):
    collect(folder, policy)
    place = tmp_path / "activations"
    (place / "notes.txt").write_text("own")
    (place / "a" / "rows_00001.f32").mkdir()
    folder.remove()
    assert f"activations stay in {place}/a: {place}/a/rows_00001.f32: Is a dir" in caplog.text
    (place / "a" / "rows_00001.f32").rmdir()
    folder.remove()
    assert [path.name for path in place.iterdir()] == ["notes.txt"]
    (place / "notes.txt").unlink()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_states_that_are_not_finite_are_counted(folder, policy, value, tmp_path):
    embedding = policy.embed_tokens[...]
    graphdef, state = nnx.split(policy)
    broken = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    token = 5
    broken.embed_tokens[...] = embedding.at[token].set(value)
    rows = [Conversation([1, 2, 3, 4], 3), Conversation([1, 2, token], 1)]
    message = r"the model: the states of the first layers: holds NaN \(32 of 128 numbers"
    with pytest.raises(InputError, match=message):
        folder.collect("a", truncate(broken, 1), rows, max_tokens=9, seed=0)
    assert not (tmp_path / "activations/a").exists()
    with pytest.raises(InputError, match="32 of 64 numbers"):
        collect_pooled(truncate(broken, 1), rows)


def stored(tmp_path, x_nd, name="m"):
    """Writes an array to files, a few rows in each, and opens them."""
    with writing_matrix(tmp_path / name, x_nd.shape) as matrix:
        matrix.write(0, x_nd)
    return open_matrix(tmp_path / name, x_nd.shape, None)


@pytest.fixture
def small_pieces(monkeypatch):
    """Makes pieces of 32 rows of 32 numbers, and files of 100 such rows."""
    monkeypatch.setattr(activations, "BLOCK", 32)
    monkeypatch.setattr(activations, "PIECE_BYTES", 1)
    monkeypatch.setattr(matrix_files, "FILE_BYTES", 100 * 32 * 4)


@pytest.mark.parametrize("shape", [(1, 2), (31, 3), (33, 32), (1000, 5), (1000, 32)])
def test_the_mean_of_pieces_has_the_bits_of_the_mean(tmp_path, small_pieces, shape):
    x_nd = (np.random.default_rng(0).standard_normal(shape) * 3 + 7).astype(np.float32)
    for x in (x_nd, stored(tmp_path, x_nd)):
        np.testing.assert_array_equal(mean_row(x), x_nd.mean(axis=0))
        np.testing.assert_array_equal(mean_row(x, np.float64), x_nd.mean(axis=0, dtype=np.float64))


@pytest.mark.parametrize("place", [None, 0, 31, 32, 99])
def test_equal_rows_are_found_over_pieces(tmp_path, small_pieces, place):
    x_nd = np.full((100, 3), 1 / 3, np.float32)
    if place is not None:
        x_nd[place, 1] += 1e-5
    assert all_equal(stored(tmp_path, x_nd)) == is_constant(x_nd, axis=0).all() == (place is None)


def test_the_scaling_of_pieces_is_that_of_an_array(tmp_path, small_pieces):
    x_nd = (np.random.default_rng(0).standard_normal((300, 32)) * 3 + 7).astype(np.float32)
    mean_d, scale = scaling(stored(tmp_path, x_nd))
    mean = x_nd.mean(axis=0, dtype=np.float64)
    np.testing.assert_array_equal(mean_d, mean.astype(np.float32))
    np.testing.assert_allclose(scale, 1 / np.sqrt(np.square(x_nd - mean).mean()), rtol=1e-14)


def planted(n, seed):
    """Makes states of 32 numbers from 24 directions; every fifth one is pooled."""
    rng = np.random.default_rng(seed)
    dictionary = np.random.default_rng(9).normal(size=(24, 32))
    z = rng.exponential(size=(n, 24)) * (rng.random((n, 24)) < 0.1)
    return (z @ dictionary + rng.normal(size=32) / 10).astype(np.float32), np.arange(n) % 5 == 4


OPTIONS = SAETraining(
    steps=45, batch_tokens=16, learning_rate=3e-3, warmup_fraction=0.1, dead_after_steps=3, aux_k=8,
    aux_weight=1 / 32, seed=0,
)  # fmt: skip


def pretrained(train, held_out, placement):
    log: list[dict] = []
    sae = SAE(SAEConfig(32, 48, 4), rngs=nnx.Rngs(0))
    sae, metrics = pretrain_sae(sae, train, held_out, OPTIONS, log.append, placement)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(sae))], log, metrics


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1), (1, 2, 2), (3, 1, 1)])
def test_training_from_files_has_the_bits_of_training_from_memory(tmp_path, monkeypatch, shape):
    """The last mesh does not divide the minibatches, which all devices then have."""
    monkeypatch.setattr(matrix_files, "FILE_BYTES", 100 * 32 * 4)
    placement = Placement(make_mesh(MeshConfig(*shape)))
    x_nd, pooled_n = planted(1000, 0)
    files = Activations(stored(tmp_path, x_nd), pooled_n)
    keep_n = np.random.default_rng(1).random(1000) < 0.8
    memory = (Activations(x_nd[keep], pooled_n[keep]) for keep in (keep_n, ~keep_n))
    expected, expected_log, expected_metrics = pretrained(*memory, placement)
    ours, log, metrics = pretrained(files.select(keep_n), files.select(~keep_n), placement)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert log == expected_log and metrics == expected_metrics


def test_metrics_of_many_pieces_are_those_of_one(tmp_path, small_pieces):
    x_nd, pooled_n = planted(1000, 0)
    held_out, held_out_pooled_n = planted(500, 1)
    files = Activations(stored(tmp_path, held_out), held_out_pooled_n)
    ours, _, metrics = pretrained(Activations(x_nd, pooled_n), files, Placement())
    encoder, decoder, latent_bias, pre_bias = (ours[i] for i in (1, 0, 2, 3))
    a = (held_out - pre_bias) @ encoder + latent_bias
    kept = a >= np.sort(a, axis=1)[:, [-4]]
    x_hat = (a * kept) @ decoder + pre_bias
    pooled = held_out_pooled_n
    assert metrics["l0"] == pytest.approx(4, abs=0.01)
    for name, keep in (("", pooled | True), ("_pooled", pooled)):
        expected = explained_variance(held_out[keep], x_hat[keep])
        assert metrics[f"explained_variance{name}"] == pytest.approx(expected, abs=1e-5)


def test_memory_does_not_grow_with_the_activations(tmp_path, monkeypatch):
    """NumPy reports its arrays to tracemalloc. What may grow are 8 bytes or so of a row."""
    monkeypatch.setattr(activations, "PIECE_BYTES", 1)
    monkeypatch.setattr(matrix_files, "FILE_BYTES", 1 << 20)
    peaks = []
    for n in (5_000, 40_000):
        x_nd, pooled_n = np.tile(planted(5000, 0)[0], (n // 5000, 1)), np.arange(n) % 5 == 4
        files = Activations(stored(tmp_path, x_nd, str(n)), pooled_n)
        del x_nd
        tracemalloc.start()
        pretrained(files.select(pooled_n | True), files, Placement())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 35_000 * 48, peaks  # a state has 128 bytes


def test_selected_rows_are_those_of_an_array():
    x_nd = np.random.default_rng(0).standard_normal((20, 3), np.float32)
    rows = SelectedRows(SelectedRows(x_nd, np.arange(0, 20, 2)), np.asarray([9, 1, 4]))
    assert rows.shape == (3, 3) and len(rows) == 3
    np.testing.assert_array_equal(rows[:], x_nd[[18, 2, 8]])
    np.testing.assert_array_equal(rows[np.asarray([[2, 0]])], x_nd[[[8, 18]]])
