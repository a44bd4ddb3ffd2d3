"""Training of a SARM on a mesh: the numbers of one device, and arrays that lie in shards."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sarm_jax.models.llama import Llama
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.parallel.sharding import ONE_DEVICE, MeshConfig, Placement, make_mesh
from sarm_jax.training import preference_training
from sarm_jax.training.activations import Conversation, temporary_folder
from sarm_jax.training.head_training import train_heads
from sarm_jax.training.preference_training import PreferenceTraining
from sarm_jax.training.sae_training import SAETraining, pretrain_sae
from sarm_jax.training.train_sarm import assemble, truncate
from tests.closeness import assert_close
from tests.further import further
from tests.meshes import divisible_llama_config, place_parameters
from tests.tiny_models import scale_matrices

pytestmark = pytest.mark.slow

TEN_STEPS = PreferenceTraining(
    mode=2, reconstruction_weight=0.5, epochs=2, batch_size=4, learning_rate=1e-3,
    head_learning_rate=1e-2, warmup_fraction=0.0, weight_decay=0.1, seed=0, tie_weight=2.0,
)  # fmt: skip
STEPS = 1e-4  # of the scale of a number, after ten steps


def tiny_rows(count=40):
    rng = np.random.default_rng(0)
    return [
        Conversation(rng.integers(1, 200, n).tolist(), int(rng.integers(1, n)))
        for n in rng.integers(8, 33, count)  # one bucket, one compilation
    ]


def tiny_trunk(tokenizer, placement):
    policy = scale_matrices(Llama(divisible_llama_config(tokenizer), rngs=nnx.Rngs(0)))
    policy = place_parameters(policy, placement)
    policy.placement = placement
    return truncate(policy, 2)


def train(tokenizer, placement, options):
    """Trains a tiny SARM on 20 pairs, some of them ties; returns it and its log."""
    trunk = tiny_trunk(tokenizer, placement)
    sarm = assemble(trunk, SAE(SAEConfig(32, 64, 8), rngs=nnx.Rngs(3)))
    sarm.score[...] = jax.random.normal(jax.random.key(4), (64,))
    log: list[dict] = []
    trained = preference_training.fine_tune(
        sarm,
        tiny_rows(),
        np.arange(40).reshape(20, 2),
        options=options,
        log=log.append,
        tie_p=np.arange(20) % 3 == 0,
    )
    return trained, log


def assert_same_rows(log, expected):
    for row, other in zip(log, expected, strict=True):
        assert row.keys() == other.keys() and row["stage"] == other["stage"]
        for name in row.keys() - {"stage"}:
            assert_close(row[name], other[name], STEPS, 1.0, name)


def assert_same_training(ours, theirs):
    (sarm, log), (expected, expected_log) = ours, theirs
    assert_same_rows(log, expected_log)
    flat = (nnx.to_flat_state(nnx.state(module)) for module in (sarm, expected))
    for (path, a), (_, b) in zip(*flat, strict=True):
        assert_close(np.asarray(a[...])[: len(b[...])], b[...], STEPS, name=str(path))
        assert not np.any(np.asarray(a[...])[len(b[...]) :])


@pytest.fixture(scope="module")
def one_device(tokenizer):
    """Returns a function mode → the training on one device, with whole batches."""

    @cache
    def trained(mode):
        return train(tokenizer, ONE_DEVICE, dataclasses.replace(TEN_STEPS, mode=mode))

    return trained


@pytest.mark.parametrize(
    ("mode", "shape", "pieces"),
    [
        *(further(1, (4, 1, 1), 1), (2, (2, 2, 2), 1), further(3, (1, 2, 1), 1)),
        *((2, (1, 1, 1), 4), (3, (1, 2, 2), 2)),
    ],
)
def test_ten_steps_equal_those_of_one_device(one_device, tokenizer, mode, shape, pieces):
    options = dataclasses.replace(TEN_STEPS, mode=mode, gradient_accumulation_steps=pieces)
    placement = Placement(make_mesh(MeshConfig(*shape)))
    sarm, log = train(tokenizer, placement, options)
    expected, expected_log = one_device(mode)
    assert_same_training((sarm, log), (expected, expected_log))
    assert len(log) == 10 and sarm.trunk.placement == placement
    # The means are those of the whole batch, also with ties, and with turns of any length.
    for name in ("loss", "bradley_terry", "reconstruction", "tie_margin"):
        np.testing.assert_allclose(log[0][name] or 0, expected_log[0][name] or 0, rtol=2e-6)
    kernel = sarm.trunk.layers.mlp.up_proj.kernel[...]
    assert kernel.dtype == jnp.float32
    if placement.mesh is not None:
        split = NamedSharding(placement.mesh, P(None, "fsdp", "tensor"))
        assert kernel.sharding.is_equivalent_to(split, 3)


def train_frozen(tokenizer, placement, batch):
    """Collects activations, pretrains an SAE and trains three heads; returns arrays and the log."""
    trunk = tiny_trunk(tokenizer, placement)
    with temporary_folder() as folder:
        activations = folder.collect("tiny", trunk, tiny_rows(), max_tokens=300, seed=0)
        return train_on(activations, placement, batch)


def train_on(activations, placement, batch):
    options = SAETraining(
        steps=30, batch_tokens=8 * batch, learning_rate=3e-3, warmup_fraction=0.1,
        dead_after_steps=3, aux_k=8, aux_weight=1 / 32, seed=0,
    )  # fmt: skip
    log: list[dict] = []
    sae, metrics = pretrain_sae(
        SAE(SAEConfig(32, 48, 4), rngs=nnx.Rngs(0)), activations, activations, options, log.append,
        placement,
    )  # fmt: skip
    log.append({"stage": "sae", **metrics})
    heads_hm = train_heads(
        sae,
        activations.pooled_rd,
        np.arange(40).reshape(20, 2),
        options=dataclasses.replace(TEN_STEPS, mode=0, batch_size=batch),
        log=log.append,
        heads=3,
        tie_p=np.arange(20) % 3 == 0,
        placement=placement,
    )
    return activations.x_nd[:], sae, heads_hm, log


@pytest.mark.parametrize(
    ("shape", "batch"), [further((4, 1, 1), 4), ((1, 2, 2), 4), ((2, 2, 2), 3)]
)
def test_states_sae_and_heads_equal_those_of_one_device(tokenizer, shape, batch):
    """(2, 2, 2) does not divide batches of 3 rows, so that the heads are not sharded there."""
    placement = Placement(make_mesh(MeshConfig(*shape)))
    x_nd, sae, heads_hm, log = train_frozen(tokenizer, placement, batch)
    expected_x_nd, expected_sae, expected_heads_hm, expected_log = train_frozen(
        tokenizer, ONE_DEVICE, batch
    )
    assert_close(x_nd, expected_x_nd, 5e-6)
    assert_same_rows(log, expected_log)
    for a, b in zip(*map(jax.tree.leaves, map(nnx.state, (sae, expected_sae))), strict=True):
        assert_close(a, b, STEPS)
        assert len(a.sharding.device_set) == np.prod(shape) and a.sharding.is_fully_replicated
    assert_close(heads_hm, expected_heads_hm, STEPS)
