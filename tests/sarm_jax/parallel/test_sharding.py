"""The same program on any mesh: a run on 2, 4 and 8 virtual devices equals that on one."""

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from conversion import from_hf, load_policy, load_sarm
from conversion.to_hf import save_policy, save_sarm
from ppo.logprobs import token_logprobs
from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.io.errors import InputError
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.lora import LoRAConfig, LoRAParam, add_lora
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.parallel.sharding import (
    BATCH,
    ONE_DEVICE,
    MeshConfig,
    Placement,
    make_mesh,
    padded_shape,
    partition_spec,
)
from sarm_jax.sampling.generate import Sampling, draw_index, draw_token, generate
from tests.closeness import assert_close, assert_same_metrics
from tests.further import further
from tests.meshes import (
    COMPARED_COLUMNS,
    divisible_llama_config,
    place_parameters,
    train_on_mesh,
)
from tests.tiny_models import ALGORITHMS, MODEL_TYPES, scale_matrices

pytestmark = pytest.mark.slow

# This mesh splits every axis in two; the further ones split fewer axes, or one in four.
MESHES = [(2, 2, 2)]
FURTHER_MESHES = [(1, 1, 4), (2, 1, 1), (1, 4, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2)]
TRAINED = 3e-4  # of a parameter's scale; Adam magnifies the rounding of gradients near 0


@pytest.fixture(scope="module")
def one_device(tokenizer, ppo_config, tmp_path_factory):
    """Returns the trainer and the metrics of a run on a single device."""
    workdir = tmp_path_factory.mktemp("one")
    trainer = train_on_mesh(tokenizer, ppo_config, placement=ONE_DEVICE, workdir=workdir)
    return trainer, read_metrics(workdir / "metrics.csv")


@pytest.mark.parametrize("shape", [*MESHES, *map(further, FURTHER_MESHES)])
def test_ten_steps_equal_those_of_one_device(one_device, tokenizer, ppo_config, tmp_path, shape):
    single, rows = one_device
    placement = Placement(make_mesh(MeshConfig(*shape)))
    trainer = train_on_mesh(tokenizer, ppo_config, placement=placement, workdir=tmp_path / "run")
    sharded = read_metrics(tmp_path / "run" / "metrics.csv")
    assert_same_metrics(sharded, rows, COMPARED_COLUMNS)
    assert all(row["ratio_0_max_dev"] <= 1e-5 for row in sharded)
    ours, theirs = (t.state.train.params for t in (trainer, single))
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(a, b, TRAINED)
    rows = trainer.base["embed_tokens"][...].shape[0]  # 262 tokens, which 4 does not divide
    assert rows == {1: 262, 2: 262, 4: 264}[shape[2]]
    kernel = nnx.to_flat_state(trainer.base)
    shards = {str(path[-2]): v[...].sharding for path, v in kernel if "kernel" in map(str, path)}
    split = P(None, "fsdp", "tensor")
    assert shards["q_proj"].spec == split and len(shards["q_proj"].device_set) == np.prod(shape)


@pytest.mark.parametrize(
    ("shape", "model_type"),
    [((1, 1, 2), "llama"), ((1, 2, 2), "llama"), ((1, 2, 2), "qwen2"), ((1, 2, 2), "qwen3")],
)
def test_decoding_with_adapters_equals_that_of_one_device(tokenizer, shape, model_type):
    """In float32 a rollout folds its adapters into the kernels; in half precision it does not."""
    results = []
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 200, (4, 7)))
    for placement in (Placement(), Placement(make_mesh(MeshConfig(*shape)))):
        config = divisible_llama_config(tokenizer, model_type=model_type)
        model = scale_matrices(Llama(config, rngs=nnx.Rngs(0)))
        policy = place_parameters(model, placement)
        policy.placement = placement
        add_lora(policy, LoRAConfig(rank=4), nnx.Rngs(1))
        adapter = jax.tree.map(
            lambda x: 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape),
            nnx.state(policy, LoRAParam),
        )
        nnx.update(policy, placement.replicated(adapter))
        mask = jnp.ones(tokens.shape, bool)
        out = generate(policy, tokens, mask, max_new_tokens=8, temperature=0.0, stop_ids=())
        results.append(jax.device_get((out.tokens_br, out.logp_br)))
    (tokens_br, logp_br), (expected_br, expected_logp_br) = results
    np.testing.assert_array_equal(tokens_br, expected_br)
    assert_close(logp_br, expected_logp_br)


@pytest.mark.parametrize("algorithm", ["grpo", further("ppo"), further("rloo")])
def test_minibatches_and_accumulation_on_a_mesh(tokenizer, ppo_config, tmp_path, algorithm):
    placement = Placement(make_mesh(MeshConfig(data=2)))
    cut = ALGORITHMS[algorithm] | {
        "total_steps": 2,
        "num_minibatches": 2,
        "gradient_accumulation_steps": 2,
    }
    if algorithm != "ppo":  # four of the responses to a prompt share it on one device, two on two
        cut |= {"batch_size": 16, "samples_per_prompt": 4, "pack_levels": 1}
        cut["rollout_slots"] = 4 if algorithm == "grpo" else 0
    trainers = [
        train_on_mesh(tokenizer, ppo_config, placement=place, workdir=tmp_path / str(n), **cut)
        for n, place in enumerate((ONE_DEVICE, placement))
    ]
    for trainer, copies in zip(trainers, (4, 2), strict=True):
        sizes = [slots for plan in trainer._slot_plans.values() for slots in plan.all_slots()]
        assert algorithm == "ppo" or {slots.copies for slots in sizes if slots} == {copies}
    runs = [trainer.state.train.params for trainer in trainers]
    for a, b in zip(*map(jax.tree.leaves, runs), strict=True):
        assert_close(a, b, TRAINED)


def test_a_run_resumes_on_another_mesh(one_device, tokenizer, ppo_config, tmp_path):
    single, _ = one_device
    workdir = tmp_path / "run"
    first = Placement(make_mesh(MeshConfig(*MESHES[0])))  # its programs are compiled
    train_on_mesh(tokenizer, ppo_config, placement=first, workdir=workdir, total_steps=5)
    second = Placement(make_mesh(MeshConfig(fsdp=2, tensor=2)))
    trainer = train_on_mesh(tokenizer, ppo_config, placement=second, workdir=workdir)
    params = trainer.state.train.params
    for a, b in zip(*map(jax.tree.leaves, (params, single.state.train.params)), strict=True):
        assert_close(a, b, TRAINED)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_parameter_has_one_row_of_the_table(tokenizer, model_type):
    mesh = make_mesh(MeshConfig(1, 2, 4))
    trunk = divisible_llama_config(tokenizer, layers=2, model_type=model_type)
    sarm = SARMConfig(trunk, SAEConfig(32, latent_size=64, k=8))
    for model in (Llama(trunk, rngs=nnx.Rngs(0)), SARM(sarm, rngs=nnx.Rngs(0))):
        for path, variable in nnx.to_flat_state(nnx.state(model)):
            name = ".".join(map(str, path))
            partition_spec(name, padded_shape(name, variable[...].shape, mesh), mesh)
    with pytest.raises(ValueError, match="layers.new matches 0 rows"):
        partition_spec("layers.new", (4, 4), mesh)


def test_shapes_that_the_mesh_does_not_divide():
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
    """Yields the specs of all sharding constraints, also within loops."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "sharding_constraint":
            yield eqn.params["sharding"].spec
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from constraints(inner)


@pytest.mark.parametrize(("rows", "axes"), [(8, BATCH[0]), (6, None)])
def test_attention_gets_queries_keys_and_values_split_alike(tokenizer, rows, axes):
    policy = Llama(divisible_llama_config(tokenizer), rngs=nnx.Rngs(0))
    policy.placement = Placement(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    tokens, mask = np.ones((rows, 5), np.int32), np.ones((rows, 5), bool)
    specs = list(constraints(jax.make_jaxpr(policy.hidden)(tokens, mask).jaxpr))
    assert specs == 3 * [P(axes, None, "tensor")]


def test_rows_that_do_not_divide_are_replicated():
    placement = Placement(make_mesh(MeshConfig(data=4)))
    even, odd = placement.rows((np.zeros((8, 3)), np.zeros((6, 3))))
    assert even.sharding.spec == BATCH and odd.sharding.spec == P()


@pytest.fixture(scope="module")
def directories(tokenizer, tmp_path_factory):
    """Saves a policy and a SARM with 262 tokens, which 4 does not divide, in both layouts."""
    parent = tmp_path_factory.mktemp("models")
    config = divisible_llama_config(tokenizer)
    trunk = dataclasses.replace(config, num_hidden_layers=2)
    sarm = SARM(SARMConfig(trunk, SAEConfig(32, latent_size=64, k=8)), rngs=nnx.Rngs(1))
    sarm.score[...] = jax.random.normal(jax.random.key(2), (64,))
    save_policy(parent / "policy", scale_matrices(Llama(config, rngs=nnx.Rngs(0))), tokenizer)
    save_sarm(parent / "sarm", scale_matrices(sarm), tokenizer)
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
            values = reader(region)
            read.setdefault(path, []).append(values.size)
            return values

        array = placement.load(path, full, dtype, counted)
        kept = [shard.data.size for shard in array.addressable_shards]
        assert len(kept) == 8 and max(read[path]) <= max(kept)  # the host holds one shard
        assert sum(read[path]) == np.prod(
            full
        )  # each weight is read once, even if it is replicated
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


@pytest.mark.parametrize("size", [1024, 1044])  # one device would use 29 blocks for the latter
def test_drawing_from_a_split_vocabulary_gathers_the_sums_of_blocks(size):
    """Otherwise GPUs compute the sum in a loop with a step per block, which a CPU does not show."""
    placement = Placement(make_mesh(MeshConfig(1, 1, 4)))
    p_bv, key = jax.random.uniform(jax.random.key(0), (4, size)) ** 8, jax.random.key(1)

    def on_mesh(p_bv, key):
        return draw_index(placement.constrain(p_bv, P(None, "tensor")), key, placement)

    np.testing.assert_array_equal(jax.jit(on_mesh)(p_bv, key), draw_index(p_bv, key))
    draw = jax.make_jaxpr(lambda p_bv, key: draw_index(p_bv, key, placement))(p_bv, key)
    assert list(constraints(draw.jaxpr)) == [BATCH]
    text = jax.jit(on_mesh).lower(p_bv, key).compile().as_text()
    assert f"f32[4,{size // 4}]" in text and f"f32[4,{size}]" not in text  # p is not gathered


def test_padding_of_the_vocabulary_is_never_drawn(directories, tmp_path):
    policy, tokenizer = load_policy(directories / "policy")
    placement = Placement(make_mesh(MeshConfig(1, 2, 4)))
    padded, _ = load_policy(directories / "converted_policy", place=placement.load)
    for name in ("embed_tokens", "lm_head"):  # with values that would win every draw
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
        """Returns logits, greedy and drawn tokens, log-probabilities, entropies and gradients."""
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
                logp, entropy = token_logprobs(x, model.vocabulary, tokens_bt, 0.7, chunk, size)
                return logp.sum(), entropy

            graded = [jax.value_and_grad(loss, has_aux=True)(x_btd, chunk) for chunk in (0, 4)]
            return model(tokens_bt, mask_bt), drawn, graded

        return jax.jit(program)(state)

    ours, theirs = answers(padded, 262), answers(policy, None)
    assert ours[0].shape == (4, 9, 262)
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert_close(a, b, 3e-6)
