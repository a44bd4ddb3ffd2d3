"""Reads and writes LoRA adapters in the layout of the PEFT library.

    adapter_config.json  adapter_model.safetensors  [value_head.safetensors]  tokenizer files

PEFT stores, per linear layer, lora_A `[r, in]` and lora_B `[out, r]` and adds α/r · B A; ours are
the transposes, stacked over layers. `peft_config` reads which layers have an adapter. Source:
https://huggingface.co/docs/peft (checkpoint format).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from conversion.containment import require_contained
from conversion.directory import atomic_directory, save_tokenizer, write_hf_json
from conversion.keys import TensorSpec, tensor_specs
from conversion.peft_config import PeftConfig, read_peft_config
from conversion.problems import report
from conversion.safetensors_io import METADATA, TensorFiles
from sarm_jax.io.errors import InputError
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import TARGET_MODULES, LoRAConfig, LoRAParam, add_lora
from sarm_jax.parallel.finite import require_finite

CONFIG, WEIGHTS, VALUE_HEAD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "value_head.safetensors",
)
_WRITTEN = {  # fields that are the same in every adapter of ours
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in memory; `factors` maps the kernel of a layer to (A `[in, r]`, B `[r, out]`).

    A kernel without an adapter is not among them, even if others of its kind have one.
    """

    config: LoRAConfig
    factors: dict[TensorSpec, tuple[np.ndarray, np.ndarray]]


def save_adapter(
    dst: str | Path,
    policy: Llama,
    lora_config: LoRAConfig,
    base_model: str,
    tokenizer: Any = None,
    value_head: dict[str, np.ndarray] | None = None,
    replace: bool = False,
) -> None:
    """Writes the policy's adapter.

    Args:
        dst: the new directory.
        policy: the policy with its adapter.
        lora_config: the shape of the adapter.
        base_model: the repository id or directory of the model that it was trained on.
        tokenizer: the tokenizer to save with it, if any.
        value_head: the arrays of the value head to save with it, if any.
        replace: exchange an existing directory for the new one.

    Raises:
        InputError: `dst` exists and `replace` is false, or it cannot be written; or a number is not
            finite.
    """
    state = dict(nnx.to_flat_state(nnx.state(policy, LoRAParam)))
    targets = _targets(tensor_specs(policy), lora_config)
    if {path[:-2] for path in state} != {spec.path[:-1] for spec in targets}:
        raise ValueError("lora_config.target_modules are not those of the policy")
    tensors = {}
    for spec in targets:
        for factor in ("a", "b"):
            stack = state[(*spec.path[:-1], "lora", factor)]
            array = np.asarray(stack[spec.layer], np.float32).T
            tensors[_peft_name(spec, factor)] = np.asarray(array, order="C")
    heads = {name: np.asarray(a, order="C") for name, a in (value_head or {}).items()}
    require_finite(tensors | heads, dst)
    with atomic_directory(dst, replace) as directory:
        save_file(tensors, directory / WEIGHTS, metadata=METADATA)
        write_hf_json(directory / CONFIG, _config_dict(lora_config, base_model))
        if value_head is not None:
            save_file(heads, directory / VALUE_HEAD, metadata=METADATA)
        if tokenizer is not None:
            save_tokenizer(tokenizer, directory)


def load_adapter(src: str | Path, policy: Llama) -> LoRAConfig:
    """Attaches the adapter of a PEFT directory to a policy that has none, in place.

    A layer without an adapter, in a stack in which others have one, gets factors of zeros.

    Returns:
        The shape of the adapter, with which `save_adapter` can write it again.

    Raises:
        InputError: the adapter does not fit the policy, or has fields that are not supported.
    """
    if nnx.to_flat_state(nnx.state(policy, LoRAParam)):
        raise InputError(f"{src}: the policy has an adapter already")
    adapter = read_adapter(src, tensor_specs(policy))
    add_lora(policy, adapter.config, nnx.Rngs(0))
    stacks: dict[tuple[str, ...], dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for spec, factors in adapter.factors.items():
        assert spec.layer is not None
        stacks.setdefault(spec.path, {})[spec.layer] = factors
    for path, layers in stacks.items():
        lora = getattr(getattr(policy.layers, path[1]), path[2]).lora
        zeros = tuple(np.zeros_like(factor) for factor in next(iter(layers.values())))
        ordered = [layers.get(n, zeros) for n in range(policy.config.num_hidden_layers)]
        lora.a[...] = jnp.asarray(np.stack([a for a, _ in ordered]))
        lora.b[...] = jnp.asarray(np.stack([b for _, b in ordered]))
    return adapter.config


def read_adapter(src: str | Path, base: Sequence[TensorSpec]) -> Adapter:
    """Reads the adapter of a PEFT directory and checks it against the tensors of the base model.

    Raises:
        InputError: tensors are missing, unexpected, not finite or of another shape, or a field of
            the config is not supported; the message lists them. Or the value head beside the
            adapter is not finite.
    """
    src = Path(src)
    require_contained(src)
    kernels = {_module(spec): spec for spec in base if _may_be_adapted(spec)}
    config = read_peft_config(src / CONFIG, list(kernels))
    files = TensorFiles(src, single=WEIGHTS)
    unmatched = set(files.names())
    problems = []
    for module, rank in config.ranks.items():
        d_in, d_out = kernels[module].shape
        shapes = {"a": (rank, d_in), "b": (d_out, rank)}
        for factor, shape in shapes.items():
            name = _peft_name(kernels[module], factor)
            if name not in unmatched:
                problems.append(f"{name}: missing")
            elif files.shape(name) != shape:
                problems.append(f"{name}: shape {list(files.shape(name))}, expected {list(shape)}")
            elif files.dtype(name).name not in ("float16", "bfloat16", "float32"):
                problems.append(f"{name}: dtype {files.dtype(name)}, expected a float")
            unmatched.discard(name)
    problems += [f"{name}: unexpected tensor" for name in sorted(unmatched)]
    report(src / WEIGHTS, problems)

    if (src / VALUE_HEAD).is_file():
        head = TensorFiles(src, single=VALUE_HEAD)
        require_finite({name: head.read(name) for name in head.names()}, src / VALUE_HEAD)
    factors = {
        kernels[module]: _factors(files, config, kernels[module], src / WEIGHTS)
        for module in config.ranks
    }
    return Adapter(config.lora, factors)


def _factors(
    files: TensorFiles, config: PeftConfig, spec: TensorSpec, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Reads A `[in, r]` and B `[r, out]` of a kernel, of the rank and scale of `config.lora`.

    Raises:
        InputError: a factor in the file at `path` is not finite.
    """
    names = [_peft_name(spec, factor) for factor in ("a", "b")]
    arrays = {name: files.read(name).astype(np.float32) for name in names}
    require_finite(arrays, path)
    a, b = (arrays[name].T for name in names)
    if config.scales_differ:
        b = b * np.float32(config.scales[_module(spec)])
    if missing := config.lora.rank - len(b):
        a, b = np.pad(a, ((0, 0), (0, missing))), np.pad(b, ((0, missing), (0, 0)))
    return a, b


def _may_be_adapted(spec: TensorSpec) -> bool:
    return spec.path[-1] == "kernel" and spec.path[-2] in TARGET_MODULES


def _targets(specs: list[TensorSpec], config: LoRAConfig) -> list[TensorSpec]:
    """Selects the kernels that have an adapter."""
    return [s for s in specs if s.path[-1] == "kernel" and s.path[-2] in config.target_modules]


def _module(spec: TensorSpec) -> str:
    """Returns the name of the linear layer in the Hugging Face model."""
    return spec.hf_name.removesuffix(".weight")


def _peft_name(spec: TensorSpec, factor: str) -> str:
    return f"base_model.model.{_module(spec)}.lora_{factor.upper()}.weight"


def _config_dict(config: LoRAConfig, base_model: str) -> dict[str, Any]:
    alpha = config.alpha
    return {
        **_WRITTEN,
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
