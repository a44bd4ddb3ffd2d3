"""Training a language model on texts of different lengths."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sarm_jax.lab import language_modelling
from sarm_jax.lab.language_modelling import LMTraining, WeightedText, train_language_model
from sarm_jax.models.chat import pad_batch

OPTIONS = LMTraining(steps=6, batch_size=2, learning_rate=1e-2, warmup_fraction=0.0, seed=3)


def texts(longest: int) -> list[WeightedText]:
    """Makes texts of 10 to 40 tokens, and one of `longest`; the first half is not learned."""
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(10, 40, size=5), longest]
    ids = [rng.integers(3, 60, size=length).tolist() for length in lengths]
    return [WeightedText(row, [0.0] * (len(row) // 2) + [1.0] * -(-len(row) // 2)) for row in ids]


def trained_without_padding(policy, rows: list[WeightedText]) -> tuple[nnx.State, list[float]]:
    """Makes the same steps with the gradients of one text at a time."""
    schedule = language_modelling.warmup_cosine(OPTIONS.learning_rate, 0.0, OPTIONS.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=OPTIONS.weight_decay)
    )
    graphdef, params = nnx.split(policy)
    state, rng, losses = optimizer.init(params), np.random.default_rng(OPTIONS.seed), []

    def summed(params, row):
        tokens_bt, mask_bt = pad_batch([row.ids], len(row.ids), 0)
        logits_tv = nnx.merge(graphdef, params)(tokens_bt, mask_bt)[0, :-1]
        log_p_tv = jax.nn.log_softmax(logits_tv)
        log_p_t = log_p_tv[np.arange(len(row.ids) - 1), row.ids[1:]]
        return -(np.asarray(row.weights[1:]) * log_p_t).sum()

    for _ in range(OPTIONS.steps):
        batch = [rows[n] for n in rng.integers(len(rows), size=OPTIONS.batch_size)]
        learned = sum(sum(row.weights[1:]) for row in batch)
        parts = [jax.value_and_grad(summed)(params, row) for row in batch]
        losses.append(float(sum(loss for loss, _ in parts)) / learned)
        scaled = [jax.tree.map(partial(jnp.multiply, 1 / learned), grads) for _, grads in parts]
        grads = jax.tree.map(jnp.add, *scaled)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, losses


@pytest.mark.parametrize("longest", [50, 150])  # padded alike, and each minibatch on its own
def test_padding_does_not_affect_what_is_learned(policy, longest):
    rows = texts(longest)
    trained, loss = train_language_model(policy, rows, OPTIONS)
    expected, losses = trained_without_padding(policy, rows)
    assert loss == pytest.approx(np.mean(losses), abs=1e-4)
    start, end, target = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state)])
        for state in (nnx.state(policy), nnx.state(trained), expected)
    )
    # Adam makes a whole step of a gradient that is 0 but for rounding, so single weights differ.
    assert np.linalg.norm(end - target) < 1e-3 * np.linalg.norm(target - start)


def test_long_minibatches_have_the_length_of_their_longest_text(policy, monkeypatch):
    shapes = []
    steps = language_modelling._steps

    def recorded(*arguments, batches, **named):
        shapes.append(batches[0].shape)
        return steps(*arguments, batches=batches, **named)

    monkeypatch.setattr(language_modelling, "_steps", recorded)
    train_language_model(policy, texts(150), OPTIONS)
    assert {shape[:2] for shape in shapes} == {(1, 2)} and len(shapes) == OPTIONS.steps
    assert min(shape[2] for shape in shapes) <= 48 and max(shape[2] for shape in shapes) <= 192
    shapes.clear()
    train_language_model(policy, texts(50), OPTIONS)
    assert shapes == [(OPTIONS.steps, 2, 64)]  # short texts have one program
