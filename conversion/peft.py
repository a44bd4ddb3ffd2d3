"""Reads and writes LoRA adapters in the layout of the PEFT library.

    adapter_config.json  adapter_model.safetensors  [value_head.safetensors]  tokenizer files

PEFT stores, per linear layer, lora_A `[r, in]` and lora_B `[out, r]` and adds α/r · B A; ours are
the transposes, stacked over layers. Source: https://huggingface.co/docs/peft (checkpoint format).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from conversion.containment import require_contained
from conversion.directory import atomic_directory, save_tokenizer, write_hf_json
from conversion.keys import TensorSpec, tensor_specs
from conversion.problems import report
from conversion.safetensors_io import METADATA, TensorFiles
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig, LoRAParam, add_lora
from sarm_jax.parallel.finite import require_finite

CONFIG, WEIGHTS, VALUE_HEAD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "value_head.safetensors",
)
_ONLY = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
}
_IGNORED = {  # fields that do not change what a trained adapter computes
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "r", "lora_alpha", "lora_dropout", "target_modules",
}  # fmt: skip
_INITIALISERS = (None, True, False, "gaussian")  # others also change the weights of the base


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter in memory; `factors` maps the kernel of a layer to (A `[in, r]`, B `[r, out]`)."""

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


def load_adapter(src: str | Path, policy: Llama) -> None:
    """Attaches the adapter of a PEFT directory to a policy that has none, in place.

    Raises:
        InputError: the adapter does not fit the policy, or has fields that are not supported.
    """
    if nnx.to_flat_state(nnx.state(policy, LoRAParam)):
        raise InputError(f"{src}: the policy has an adapter already")
    adapter = read_adapter(src, tensor_specs(policy))
    add_lora(policy, adapter.config, nnx.Rngs(0))
    stacks: dict[tuple[str, ...], list[tuple[int, tuple[np.ndarray, np.ndarray]]]] = {}
    for spec, factors in adapter.factors.items():
        assert spec.layer is not None
        stacks.setdefault(spec.path, []).append((spec.layer, factors))
    for path, layers in stacks.items():
        lora = getattr(getattr(policy.layers, path[1]), path[2]).lora
        ordered = [factors for _, factors in sorted(layers, key=lambda item: item[0])]
        lora.a[...] = jnp.asarray(np.stack([a for a, _ in ordered]))
        lora.b[...] = jnp.asarray(np.stack([b for _, b in ordered]))


def read_adapter(src: str | Path, base: list[TensorSpec]) -> Adapter:
    """Reads the adapter of a PEFT directory and checks it against the tensors of the base model.

    Raises:
        InputError: tensors are missing, unexpected, not finite or of another shape, or a field of
            the config is not supported; the message lists them. Or the value head beside the
            adapter is not finite.
    """
    src = Path(src)
    require_contained(src)
    config = _read_config(src / CONFIG)
    files = TensorFiles(src, single=WEIGHTS)
    unmatched = set(files.names())
    problems = []
    factors = {}
    for spec in _targets(base, config):
        d_in, d_out = spec.shape
        shapes = {"a": (config.rank, d_in), "b": (d_out, config.rank)}
        for factor, shape in shapes.items():
            name = _peft_name(spec, factor)
            if name not in unmatched:
                problems.append(f"{name}: missing")
            elif files.shape(name) != shape:
                problems.append(f"{name}: shape {list(files.shape(name))}, expected {list(shape)}")
            elif files.dtype(name).name not in ("float16", "bfloat16", "float32"):
                problems.append(f"{name}: dtype {files.dtype(name)}, expected a float")
            unmatched.discard(name)
        factors[spec] = tuple(_peft_name(spec, factor) for factor in shapes)
    problems += [f"{name}: unexpected tensor" for name in sorted(unmatched)]
    report(src / WEIGHTS, problems)

    if (src / VALUE_HEAD).is_file():
        head = TensorFiles(src, single=VALUE_HEAD)
        require_finite({name: head.read(name) for name in head.names()}, src / VALUE_HEAD)

    def read(name: str) -> np.ndarray:
        array = files.read(name).astype(np.float32)
        require_finite({name: array}, src / WEIGHTS)
        return array.T

    return Adapter(config, {spec: (read(a), read(b)) for spec, (a, b) in factors.items()})


def _targets(specs: list[TensorSpec], config: LoRAConfig) -> list[TensorSpec]:
    """Selects the kernels that have an adapter."""
    return [s for s in specs if s.path[-1] == "kernel" and s.path[-2] in config.target_modules]


def _peft_name(spec: TensorSpec, factor: str) -> str:
    stem = spec.hf_name.removesuffix(".weight")
    return f"base_model.model.{stem}.lora_{factor.upper()}.weight"


def _config_dict(config: LoRAConfig, base_model: str) -> dict[str, Any]:
    alpha = config.alpha
    return {
        **_ONLY,
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.target_modules),
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _read_config(path: Path) -> LoRAConfig:
    fields = read_json(path)
    problems = [
        f"{name}={fields[name]!r}: only {value!r} is supported"
        for name, value in _ONLY.items()
        if fields.get(name) not in (value, None)
    ]
    initialiser = fields.get("init_lora_weights")
    if initialiser not in _INITIALISERS:
        problems.append(
            f"init_lora_weights={initialiser!r}: not supported, it changes the base's weights too "
            "(PEFT's save_pretrained can convert the adapter to one that does not)"
        )
    handled = {*_ONLY, *_IGNORED, "init_lora_weights"}
    problems += [
        f"{name}={value!r}: not supported"
        for name, value in fields.items()
        if name not in handled and value not in (None, False, {}, [])
    ]
    targets = fields.get("target_modules")
    if not isinstance(targets, list):
        problems.append(f"target_modules={targets!r}: expected a list of names")
    report(path, problems)
    try:
        return LoRAConfig(
            rank=fields["r"],
            alpha=float(fields["lora_alpha"]),
            dropout=float(fields.get("lora_dropout") or 0.0),
            target_modules=tuple(fields["target_modules"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
