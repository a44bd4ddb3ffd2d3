"""The one table between Hugging Face tensor names and the paths of our parameters.

A Hugging Face linear layer holds W `[out, in]` and computes x Wᵀ; our kernels are `[in, out]`.
Embeddings are `[V, D]` on both sides. Our layers are stacked `[L, …]` in memory and stored one by
one.
"""

import dataclasses
from functools import lru_cache
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sarm_jax.models.linear_reward import LinearReward, LinearRewardConfig
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.lora import LoRAParam
from sarm_jax.models.sarm import SARM, SARMConfig

Layout = Literal["same", "transposed", "row"]
Model = Llama | SARM | LinearReward
ModelConfig = LlamaConfig | SARMConfig | LinearRewardConfig

TABLE: dict[str, tuple[str, Layout]] = {  # our path without "trunk." → (HF name, its layout)
    "embed_tokens": ("model.embed_tokens.weight", "same"),
    "layers.attn.q_proj.kernel": ("model.layers.{}.self_attn.q_proj.weight", "transposed"),
    "layers.attn.k_proj.kernel": ("model.layers.{}.self_attn.k_proj.weight", "transposed"),
    "layers.attn.v_proj.kernel": ("model.layers.{}.self_attn.v_proj.weight", "transposed"),
    "layers.attn.q_proj.bias": ("model.layers.{}.self_attn.q_proj.bias", "same"),
    "layers.attn.k_proj.bias": ("model.layers.{}.self_attn.k_proj.bias", "same"),
    "layers.attn.v_proj.bias": ("model.layers.{}.self_attn.v_proj.bias", "same"),
    "layers.attn.q_norm.scale": ("model.layers.{}.self_attn.q_norm.weight", "same"),
    "layers.attn.k_norm.scale": ("model.layers.{}.self_attn.k_norm.weight", "same"),
    "layers.attn.o_proj.kernel": ("model.layers.{}.self_attn.o_proj.weight", "transposed"),
    "layers.mlp.gate_proj.kernel": ("model.layers.{}.mlp.gate_proj.weight", "transposed"),
    "layers.mlp.up_proj.kernel": ("model.layers.{}.mlp.up_proj.weight", "transposed"),
    "layers.mlp.down_proj.kernel": ("model.layers.{}.mlp.down_proj.weight", "transposed"),
    "layers.input_layernorm.scale": ("model.layers.{}.input_layernorm.weight", "same"),
    "layers.post_attention_layernorm.scale": (
        "model.layers.{}.post_attention_layernorm.weight",
        "same",
    ),
    "norm.scale": ("model.norm.weight", "same"),
    "lm_head": ("lm_head.weight", "same"),
    "sae.encoder": ("sae.encoder.weight", "transposed"),
    "sae.decoder": ("sae.decoder.weight", "transposed"),
    "sae.pre_bias": ("sae.pre_bias", "same"),
    "sae.latent_bias": ("sae.latent_bias", "same"),
    "sae.threshold": ("sae.threshold", "same"),
    "score": ("score.weight", "row"),  # HF [1, M], ours [M]; of a classifier [1, D] and [D]
    "score_bias": ("score.bias", "same"),  # of an ensemble, whose score.weight is [H, M] in both
}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One stored tensor; `shape` is ours, and that of one layer unless `layer` is None."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name in a converted directory: the path with the layer's number after `layers`."""
        if self.layer is None:
            return ".".join(self.path)
        at = self.path.index("layers") + 1
        return ".".join([*self.path[:at], str(self.layer), *self.path[at:]])

    @property
    def hf_name(self) -> str:
        """The name in a Hugging Face checkpoint."""
        return self._row[0].format(self.layer)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape in a Hugging Face checkpoint."""
        layout = self._row[1]
        if layout == "row":
            return (1, *self.shape)
        return self.shape[::-1] if layout == "transposed" else self.shape

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """Returns an HF tensor in our orientation (a view)."""
        layout = self._row[1]
        return {"same": array, "transposed": array.T, "row": array[0]}[layout]

    def hf_region(self, region: tuple[slice, ...]) -> tuple[slice, ...]:
        """Converts a region of our tensor to the region of the HF tensor."""
        layout = self._row[1]
        if layout == "row":
            return (slice(0, 1), *region)
        return region[::-1] if layout == "transposed" else region

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Returns our tensor in the HF orientation (a view)."""
        layout = self._row[1]
        return {"same": array, "transposed": array.T, "row": array[None]}[layout]

    @property
    def _row(self) -> tuple[str, Layout]:
        name, layout = TABLE[".".join(self.path).removeprefix("trunk.")]
        return name, "same" if layout == "row" and len(self.shape) == 2 else layout


def abstract_model(config: ModelConfig, dtype: str = "float32") -> Model:
    """Builds the model with shapes instead of weights, which costs nothing at any size."""
    models: dict[type, Any] = {
        LlamaConfig: Llama,
        SARMConfig: SARM,
        LinearRewardConfig: LinearReward,
    }

    def build() -> Model:
        return models[type(config)](config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

    return nnx.eval_shape(build)


def abstract_policy(config: LlamaConfig, dtype: str) -> Llama:
    """Builds a policy like `abstract_model`."""
    return cast(Llama, abstract_model(config, dtype))


def abstract_sarm(config: SARMConfig | LinearRewardConfig, dtype: str) -> SARM | LinearReward:
    """Builds a SARM, or another reward model, like `abstract_model`."""
    return cast(SARM | LinearReward, abstract_model(config, dtype))


def parameters(model: Model) -> dict[tuple[str, ...], nnx.Variable]:
    """Returns the model's weights by path, without adapters."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Not(LoRAParam)))
    return {tuple(map(str, path)): variable for path, variable in flat}


def tensor_specs(model: Model) -> list[TensorSpec]:
    """Lists the tensors that a model (abstract or not) is stored as, in a fixed order by layer."""
    specs = []
    for path, variable in parameters(model).items():
        if "layers" in path:
            layers, *shape = variable.shape
            specs += [TensorSpec(path, i, tuple(shape)) for i in range(layers)]
        else:
            specs.append(TensorSpec(path, None, tuple(variable.shape)))
    return sorted(specs, key=lambda spec: (spec.layer is not None, spec.layer or 0, spec.path))


@lru_cache(maxsize=64)
def specs_of(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Lists the tensors of a model of this config, like `tensor_specs`.

    They are kept, because a model is traced for them and a checkpoint asks for them several times.
    """
    return tuple(tensor_specs(abstract_model(config)))
