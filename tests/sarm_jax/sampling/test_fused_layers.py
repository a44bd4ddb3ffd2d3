"""The fused weights for decoding: several linear layers in one product, on any mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ppo.learner import Learner
from ppo.planning.programs import _Halves
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import TARGET_MODULES, LoRAConfig, LoRAParam, add_lora
from sarm_jax.parallel.sharding import ONE_DEVICE, MeshConfig, Placement, make_mesh
from sarm_jax.sampling.fused_layers import FusedLinear, fuse_layers
from tests.closeness import assert_close
from tests.meshes import divisible_llama_config, place_parameters
from tests.tiny_models import MODEL_TYPES, scale_matrices

FUSED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def make(
    tokenizer,
    placement=ONE_DEVICE,
    adapted=TARGET_MODULES,
    dtype=jnp.float32,
    model_type="llama",
) -> Llama:
    """Returns a policy on the mesh with adapters that are not 0."""
    config = divisible_llama_config(tokenizer, model_type=model_type)
    model = Llama(config, dtype=dtype, rngs=nnx.Rngs(0))
    if model_type != "llama":
        scale_matrices(model, 1.0)
    policy = place_parameters(model, placement)
    policy.placement = placement
    if adapted:
        add_lora(policy, LoRAConfig(rank=3, alpha=6.0, target_modules=adapted), nnx.Rngs(1))
        noise = nnx.Rngs(2)
        adapter = jax.tree.map(
            lambda x: 0.1 * jax.random.normal(noise.params(), x.shape),
            nnx.state(policy, LoRAParam),
        )
        nnx.update(policy, placement.replicated(adapter))
    return policy


def mesh(*shape: int) -> Placement:
    return Placement(make_mesh(MeshConfig(*shape)))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 4), (1, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize(
    ("adapted", "model_type"),
    [
        (TARGET_MODULES, "llama"),
        (("k_proj", "down_proj"), "qwen2"),
        ((), "llama"),
        ((), "qwen3"),
    ],
)
def test_fused_linear_layers_equal_the_linear_layers(tokenizer, shape, adapted, model_type):
    policy = make(tokenizer, mesh(*shape), adapted, model_type=model_type)
    inputs = {
        name: jax.random.normal(jax.random.key(3), (width, 5))
        for name, width in {"qkv": 32, "o": 32, "gate_up": 32, "down": 64}.items()
    }

    @jax.jit
    def run(state):
        layers = fuse_layers(nnx.merge(graphdef, state))
        outputs = [{f: getattr(layer, f)(inputs[f]) for f in FUSED} for layer in layers]
        return layers, outputs

    graphdef, state = nnx.split(policy)
    layers, outputs = run(state)
    assert len(layers) == policy.config.num_hidden_layers
    for number, (layer, output) in enumerate(zip(layers, outputs, strict=True)):
        for fused, names in FUSED.items():
            for name, result_ob in zip(names, output[fused], strict=True):
                parent = (
                    policy.layers.attn if hasattr(policy.layers.attn, name) else policy.layers.mlp
                )
                linear = getattr(parent, name)
                weight_io = np.asarray(linear.kernel[...], np.float64)[number]
                if linear.lora is not None:
                    a, b = (
                        np.asarray(x[...], np.float64)[number]
                        for x in (linear.lora.a, linear.lora.b)
                    )
                    weight_io = weight_io + 2.0 * a @ b
                expected_ob = weight_io.T @ np.asarray(inputs[fused], np.float64)
                if linear.bias is not None:
                    expected_ob = expected_ob + np.asarray(linear.bias[...])[number][:, None]
                assert_close(result_ob, expected_ob, 2e-6, name=name)
        norms = policy.layers.input_layernorm, policy.layers.post_attention_layernorm
        for scale_d, norm in zip((layer.attention_norm, layer.mlp_norm), norms, strict=True):
            np.testing.assert_array_equal(scale_d, norm.scale[...][number])
        attn = policy.layers.attn
        for scale_h, norm in ((layer.q_norm, attn.q_norm), (layer.k_norm, attn.k_norm)):
            assert (scale_h is None) == (norm is None) == (model_type != "qwen3")
            if norm is not None:
                np.testing.assert_array_equal(scale_h, norm.scale[...][number])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_planned_layers_equal_those_of_a_run(tokenizer, ppo_config, shape, model_type):
    placement = mesh(*shape)
    policy = make(tokenizer, placement, (), jnp.bfloat16, model_type)
    learner, state, base = Learner.attach(ppo_config(), LoRAConfig(rank=4), policy, pad=0)
    planned = _Halves(learner, state, base, prompt=8)._layers()
    made = jax.jit(lambda params, base: fuse_layers(nnx.merge(learner.graphdef, params, base)))
    layers = made(placement.replicated(state.params["lora"]), base)
    for ours, theirs in zip(*map(jax.tree.leaves, (planned, layers)), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert theirs.dtype == jnp.bfloat16
        if placement.mesh is not None:
            assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


def compiled_collectives(run, *arguments) -> list[str]:
    text = jax.jit(run).lower(*arguments).compile().as_text()
    return re.findall(r" (all-[a-z]+|collective-[a-z]+|reduce-scatter)(?:-start)?\(", text)


@pytest.mark.parametrize(
    ("shape", "model_type"),
    [((1, 1, 4), "llama"), ((1, 4, 1), "llama"), ((2, 2, 2), "llama"), ((2, 2, 2), "qwen2")],
)
def test_fusing_moves_no_weight_to_another_device(tokenizer, shape, model_type):
    graphdef, state = nnx.split(make(tokenizer, mesh(*shape), model_type=model_type))
    assert compiled_collectives(lambda state: fuse_layers(nnx.merge(graphdef, state)), state) == []


def test_an_adapter_adds_no_communication(tokenizer):
    def collectives(adapted):
        layer = jax.jit(lambda state: fuse_layers(nnx.merge(graphdef, state)))
        policy = make(tokenizer, mesh(1, 1, 4), adapted)
        graphdef, state = nnx.split(policy)

        def run(fused: dict[str, FusedLinear], x_db):
            attended_db = fused["qkv"](x_db)[0]  # split like the input of o_proj
            return fused["o"](attended_db)[0]

        first = layer(state)[0]
        return compiled_collectives(run, {"qkv": first.qkv, "o": first.o}, jnp.ones((32, 5)))

    assert collectives(TARGET_MODULES) == collectives(()) == ["all-reduce"]
