"""One program, any mesh: the run of one device on 2, 4 and 8 virtual ones."""

import dataclasses
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from conversion import from_hf, load_policy, load_sarm
from conversion.to_hf import save_policy, save_sarm
from ppo.density_ratio import DiscriminatorConfig
from ppo.human_latents import collect_human_latents
from ppo.logprobs import token_logprobs
from ppo.prompts import PromptDeck
from ppo.reward import RewardConfig
from ppo.tracking.metrics_csv import read_metrics
from ppo.train import TrainConfig, Trainer
from sarm_jax.io.errors import InputError
from sarm_jax.models import chat
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.lora import LoRAConfig, LoRAParam, add_lora
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.parallel.sharding import (
    BATCH,
    MeshConfig,
    Placement,
    make_mesh,
    padded_shape,
    partition_spec,
)
from sarm_jax.sampling.generate import Sampling, draw_index, draw_token, generate
from tests.closeness import assert_close, assert_same_metrics
from tests.conftest import spread

PROMPTS = [f"say {i}" for i in range(10)]
MESHES = [(2, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (1, 2, 2), (2, 2, 2)]
TRAINED = 3e-4  # of a parameter's scale: Adam magnifies the rounding of gradients near 0
SAME = (
    "total_reward rm_score indicator_penalty kl_penalty ref_kl response_length_mean eos_fraction "
    "policy_loss value_loss entropy approx_kl advantage_std grad_norm disc_loss disc_acc"
).split()


def llama(tokenizer, layers: int = 3) -> LlamaConfig:
    """Eight heads over four key/value heads, so that four devices can share them."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
    )


def put(model: nnx.Module, placement: Placement):
    """The model with every parameter where the table says."""
    graphdef, state = nnx.split(model)
    placed = [
        (path, variable.replace(placement.parameter(".".join(map(str, path)), variable[...])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(placed))


def train(tokenizer, ppo_config, placement: Placement, workdir: Path, **changes) -> Trainer:
    """Ten steps with penalties and latent KL; everything that a run has, placed."""
    workdir.mkdir(exist_ok=True)
    config = llama(tokenizer)
    policy = spread(Llama(config, rngs=nnx.Rngs(0), stop_ids=chat.stop_ids(tokenizer)))
    trunk = dataclasses.replace(config, num_hidden_layers=2)
    sarm = SARM(SARMConfig(trunk, SAEConfig(32, latent_size=64, k=8)), rngs=nnx.Rngs(1))
    spread(sarm.trunk)
    sarm.score[...] = jax.random.normal(jax.random.key(2), (64,))
    policy.placement = sarm.trunk.placement = placement
    model = RewardModel(put(sarm, placement), tokenizer, max_length=512, batch_size=8)
    ppo = ppo_config(**{"batch_size": 8, "total_steps": 10, "learning_rate": 1e-3, **changes})
    demos = [{"prompt": p, "response": f"well, {p}"} for p in PROMPTS]
    options = TrainConfig(
        ppo,
        LoRAConfig(rank=4),
        RewardConfig((3, 5), (0.1, 0.2), (0.2, 0.1), beta=0.05),
        DiscriminatorConfig(1e-3, hidden_size=8, steps=2, batch_size=8, weight_decay=0.0),
    )
    trainer = Trainer(
        options,
        put(policy, placement),
        tokenizer,
        model,
        PromptDeck(PROMPTS, tokenizer, ppo),
        collect_human_latents(model, demos, (8, 18, 21, 29, 38, 39)),
        workdir,
    )
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def one_device(tokenizer, tmp_path_factory):
    """The run on a single device."""
    from configs import base
    from ppo.config import PPOConfig

    small = {"max_new_tokens": 6, "max_prompt_tokens": 200, "pack_levels": 1}
    config = {**base.get_config().ppo, **small}

    def make(**changes):
        return PPOConfig(**{**config, **changes})

    workdir = tmp_path_factory.mktemp("one")
    return train(tokenizer, make, Placement(), workdir), read_metrics(workdir / "metrics.csv"), make


@pytest.mark.parametrize("shape", MESHES)
def test_ten_steps_are_those_of_one_device(one_device, tokenizer, tmp_path, shape):
    single, rows, make = one_device
    placement = Placement(make_mesh(MeshConfig(*shape)))
    trainer = train(tokenizer, make, placement, tmp_path / "run")
    sharded = read_metrics(tmp_path / "run" / "metrics.csv")
    assert_same_metrics(sharded, rows, SAME)
    assert all(row["ratio_0_max_dev"] <= 1e-5 for row in sharded)
    ours, theirs = (t.state["train"].params for t in (trainer, single))
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(a, b, TRAINED)
    rows = trainer.base["embed_tokens"][...].shape[0]  # 262 tokens, which 4 does not divide
    assert rows == {1: 262, 2: 262, 4: 264}[shape[2]]
    kernel = nnx.to_flat_state(trainer.base)
    shards = {str(path[-2]): v[...].sharding for path, v in kernel if "kernel" in map(str, path)}
    split = P(None, "fsdp", "tensor")
    assert shards["q_proj"].spec == split and len(shards["q_proj"].device_set) == np.prod(shape)


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 2)])
def test_decoding_with_adapters_is_that_of_one_device(tokenizer, shape):
    """A float32 rollout folds its adapters into the kernels; in half precision they stay apart."""
    found = []
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 200, (4, 7)))
    for placement in (Placement(), Placement(make_mesh(MeshConfig(*shape)))):
        policy = put(spread(Llama(llama(tokenizer), rngs=nnx.Rngs(0))), placement)
        policy.placement = placement
        add_lora(policy, LoRAConfig(rank=4), nnx.Rngs(1))
        adapter = jax.tree.map(
            lambda x: 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape),
            nnx.state(policy, LoRAParam),
        )
        nnx.update(policy, placement.replicated(adapter))
        whole = jnp.ones(tokens.shape, bool)
        out = generate(policy, tokens, whole, max_new_tokens=8, temperature=0.0, stop_ids=())
        found.append(jax.device_get((out.tokens_br, out.logp_br)))
    (tokens_br, logp_br), (expected_br, expected_logp_br) = found
    np.testing.assert_array_equal(tokens_br, expected_br)
    assert_close(logp_br, expected_logp_br)


def test_minibatches_and_accumulation_on_a_mesh(one_device, tokenizer, tmp_path):
    _, _, make = one_device
    placement = Placement(make_mesh(MeshConfig(data=2)))
    cut = {"total_steps": 2, "num_minibatches": 2, "gradient_accumulation_steps": 2}
    runs = [
        train(tokenizer, make, where, tmp_path / str(n), **cut).state["train"].params
        for n, where in enumerate((Placement(), placement))
    ]
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        assert_close(a, b, TRAINED)


def test_a_checkpoint_goes_on_on_another_mesh(one_device, tokenizer, tmp_path):
    single, _, make = one_device
    first = Placement(make_mesh(MeshConfig(data=2, fsdp=2)))
    train(tokenizer, make, first, tmp_path / "run", total_steps=5)
    second = Placement(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    trainer = train(tokenizer, make, second, tmp_path / "run")
    params = trainer.state["train"].params
    for a, b in zip(*map(jax.tree.leaves, (params, single.state["train"].params)), strict=True):
        assert_close(a, b, TRAINED)


def test_every_parameter_has_one_row(tokenizer):
    mesh = make_mesh(MeshConfig(1, 2, 4))
    trunk = llama(tokenizer, layers=2)
    sarm = SARMConfig(trunk, SAEConfig(32, latent_size=64, k=8))
    for model in (Llama(trunk, rngs=nnx.Rngs(0)), SARM(sarm, rngs=nnx.Rngs(0))):
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            name = ".".join(map(str, path))
            partition_spec(name, padded_shape(name, variable[...].shape, mesh), mesh)
    with pytest.raises(ValueError, match="layers.new matches 0 rows"):
        partition_spec("layers.new", (4, 4), mesh)


def test_what_does_not_divide():
    mesh = make_mesh(MeshConfig(1, 2, 4))
    assert partition_spec("embed_tokens", (264, 32), mesh) == P("tensor", "fsdp")
    assert padded_shape("trunk.embed_tokens", (128257, 4096), mesh) == (128260, 4096)
    assert padded_shape("layers.mlp.up_proj.kernel", (3, 32, 62), mesh) == (3, 32, 62)
    with pytest.raises(InputError, match=r"mesh.tensor=4 does not divide dimension 2 of layers"):
        partition_spec("layers.mlp.up_proj.kernel", (3, 32, 62), mesh)
    with pytest.raises(InputError, match=r"mesh.tensor=4 .* sae.encoder, .* \(32, 66\)"):
        partition_spec("sae.encoder", (32, 66), mesh)
    with pytest.raises(InputError, match=r"mesh.fsdp=2 does not divide dimension 1 of lm_head"):
        partition_spec("lm_head", (264, 33), mesh)
    with pytest.raises(InputError, match=r"takes 16 devices; there are 8"):
        make_mesh(MeshConfig(data=16))
    with pytest.raises(InputError, match=r"mesh.fsdp=0: must be at least 1"):
        MeshConfig(fsdp=0)
    with pytest.raises(InputError, match=r"batch = 6 rows do not divide over data × fsdp = 4"):
        MeshConfig(data=2, fsdp=2).check_batch(6, "batch")
    config = LlamaConfig(264, 32, 64, 2, num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    with pytest.raises(InputError, match=r"mesh.tensor=4 does not divide num_key_value_heads=2"):
        MeshConfig(tensor=4).check_model(config)


def constraints(jaxpr):
    """The specs of all sharding constraints, those within loops too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            yield eqn.params["sharding"].spec
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from constraints(inner)


@pytest.mark.parametrize(("rows", "axes"), [(8, BATCH[0]), (6, None)])
def test_attention_gets_queries_keys_and_values_split_alike(tokenizer, rows, axes):
    policy = Llama(llama(tokenizer), rngs=nnx.Rngs(0))
    policy.placement = Placement(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    tokens, mask = np.ones((rows, 5), np.int32), np.ones((rows, 5), bool)
    found = list(constraints(jax.make_jaxpr(policy.hidden)(tokens, mask).jaxpr))
    assert found == 3 * [P(axes, None, "tensor")]


def test_rows_that_do_not_divide_are_replicated():
    placement = Placement(make_mesh(MeshConfig(data=4)))
    even, odd = placement.rows((np.zeros((8, 3)), np.zeros((6, 3))))
    assert even.sharding.spec == BATCH and odd.sharding.spec == P()


@pytest.fixture(scope="module")
def directories(tokenizer, tmp_path_factory):
    """A policy and a SARM of 262 tokens, which 4 does not divide, each in either layout."""
    parent = tmp_path_factory.mktemp("models")
    config = llama(tokenizer)
    trunk = dataclasses.replace(config, num_hidden_layers=2)
    sarm = SARM(SARMConfig(trunk, SAEConfig(32, latent_size=64, k=8)), rngs=nnx.Rngs(1))
    sarm.score[...] = jax.random.normal(jax.random.key(2), (64,))
    save_policy(parent / "policy", spread(Llama(config, rngs=nnx.Rngs(0))), tokenizer)
    save_sarm(parent / "sarm", spread(sarm), tokenizer)
    for kind in ("policy", "sarm"):
        from_hf.convert(parent / kind, parent / f"converted_{kind}", kind)
    return parent


def weights(model) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(v[...]) for path, v in flat}


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("", (1, 2, 4)),
        ("converted_", (1, 2, 4)),
        ("converted_", (8, 1, 1)),
        ("converted_", (2, 2, 2)),
    ],
)
def test_weights_are_read_into_their_shards_once(directories, layout, shape):
    placement = Placement(make_mesh(MeshConfig(*shape)))
    read: dict[str, list[int]] = {}

    def place(path, full, dtype, reader):
        def counted(region):
            piece = reader(region)
            read.setdefault(path, []).append(piece.size)
            return piece

        array = placement.load(path, full, dtype, counted)
        kept = [shard.data.size for shard in array.addressable_shards]
        assert len(kept) == 8 and max(read[path]) <= max(kept)  # the host holds one shard
        assert sum(read[path]) == np.prod(full)  # each weight once, whatever the copies
        return array

    loaded, single = (
        load_sarm(directories / f"{layout}sarm", place=place),
        load_sarm(directories / "sarm"),
    )
    model, expected = loaded.model, weights(single.model)
    for path, array in weights(model).items():
        rows = len(expected[path])
        np.testing.assert_array_equal(array[:rows], expected[path], err_msg=path)
        assert not array[rows:].any()
    rows = 264 if shape[2] == 4 else 262
    assert model.trunk.embed_tokens.shape == (rows, 32)
    model.trunk.placement = placement
    conversations = np.random.default_rng(0).integers(0, 262, (8, 12)).tolist()
    scored = (m.score_tokens(conversations) for m in (loaded, single))
    for ours, theirs in zip(*scored, strict=True):
        assert_close(ours, theirs, 5e-6)


@pytest.mark.parametrize("size", [1024, 1044])  # of the latter 29 blocks would do for one device
def test_drawing_from_a_split_vocabulary_adds_up_whole_rows(size):
    """Else GPUs would do it in a loop of as many steps as there are blocks, which no CPU shows."""
    placement = Placement(make_mesh(MeshConfig(1, 1, 4)))
    p_bv, key = jax.random.uniform(jax.random.key(0), (4, size)) ** 8, jax.random.key(1)

    def on_mesh(p_bv, key):
        return draw_index(placement.keep(p_bv, P(None, "tensor")), key, placement)

    np.testing.assert_array_equal(jax.jit(on_mesh)(p_bv, key), draw_index(p_bv, key))
    draw = jax.make_jaxpr(lambda p_bv, key: draw_index(p_bv, key, placement))(p_bv, key)
    assert list(constraints(draw.jaxpr)) == [BATCH]
    text = jax.jit(on_mesh).lower(p_bv, key).compile().as_text()
    assert f"f32[4,{size // 4}]" in text and f"f32[4,{size}]" not in text  # p stays where it is


def test_rows_added_to_the_vocabulary_are_no_tokens(directories, tmp_path):
    policy, tokenizer = load_policy(directories / "policy")
    placement = Placement(make_mesh(MeshConfig(1, 2, 4)))
    padded, _ = load_policy(directories / "converted_policy", place=placement.load)
    for name in ("embed_tokens", "lm_head"):  # rows that would win every draw
        value = getattr(padded, name)
        assert value[...].shape == (264, 32) and value[...].sharding.spec == P("tensor", "fsdp")
        value[...] = value[...].at[262:].set(1e3)
    save_policy(tmp_path / "saved", padded, tokenizer)
    again, _ = load_policy(tmp_path / "saved")
    for path, array in weights(again).items():
        np.testing.assert_array_equal(array, weights(policy)[path], err_msg=path)
    tokens_bt = np.random.default_rng(0).integers(0, 262, (4, 9))
    mask_bt = np.ones((4, 9), bool)

    def answers(model, size):
        """Logits; greedy and drawn tokens; log-probabilities, entropies and gradients."""
        graphdef, state = nnx.split(model)

        def program(state):
            model = nnx.merge(graphdef, state)
            x_btd = model.hidden(tokens_bt, mask_bt)
            key = jax.random.key(1)
            drawn = [
                draw_token(model.logits(x_btd)[:, -1], key, Sampling(1, temperature, top_k))
                for temperature, top_k in ((0.0, 0), (1.0, 0), (3.0, 263))
            ]

            def loss(x, chunk):
                given = (x, model.vocabulary, tokens_bt)
                logp, entropy = token_logprobs(*given, 0.7, chunk, size)
                return logp.sum(), entropy

            graded = [jax.value_and_grad(loss, has_aux=True)(x_btd, chunk) for chunk in (0, 4)]
            return model(tokens_bt, mask_bt), drawn, graded

        return jax.jit(program)(state)

    ours, theirs = answers(padded, 262), answers(policy, None)
    assert ours[0].shape == (4, 9, 262)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(a, b, 3e-6)
