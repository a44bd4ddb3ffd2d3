"""Reads the adapter_config.json of PEFT: which layers have an adapter, of what rank and scale.

A layer with rank r and α adds s · B A with s = α / r, or s = α / √r for rsLoRA (Kalajdzievski,
2312.03732). Source of the rules: https://huggingface.co/docs/peft, LoraConfig.

- target_modules lists names or ends of names, or is a regular expression for a whole name.
- rank_pattern and alpha_pattern map regular expressions for the end of a name to its r and α.

Our adapters have one rank and one α. If the layers differ, the largest rank is taken, smaller
factors are padded with zeros, and B is multiplied by s, so that the products are the same.

Anybody may have written the expressions, and Python's `re` can take exponential time for one. They
are therefore matched by RE2, whose time is linear; what RE2 does not have is refused.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.problems import report
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.io.libraries import as_input_error
from sarm_jax.models.lora import TARGET_MODULES, LoRAConfig

_ONLY = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
}
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights",
}  # fmt: skip
_IGNORED = {  # fields that do not change what a trained adapter computes
    "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "megatron_core", "qalora_group_size", "eva_config",
}  # fmt: skip
# Those that leave the base's weights as they are; others change them as well.
_INITIALISERS = (None, True, False, "gaussian", "orthogonal", "eva")
_ALL_LINEAR = "all-linear"
_OTHER_MODULES = ("lm_head", "model.embed_tokens")  # PEFT adapts them, we do not
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_AMBIGUOUS = ("{,", "[[", "[:")  # RE2 reads these as something else than Python
_MAX_PATTERN = 4000  # characters


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The adapted modules: their ranks and scales by name, and the config of all together.

    `lora` has the largest rank. Its scale is that of all modules or, if they differ, 1.
    """

    lora: LoRAConfig
    ranks: dict[str, int]
    scales: dict[str, float]

    @property
    def scales_differ(self) -> bool:
        """True if B must be multiplied by the scale of its module."""
        return len(set(self.scales.values())) > 1


def read_peft_config(path: Path, modules: Sequence[str]) -> PeftConfig:
    """Reads an adapter_config.json for a base model with these linear layers in its blocks.

    Args:
        path: the file.
        modules: the names of the layers, such as "model.layers.0.self_attn.q_proj".

    Raises:
        InputError: a field is not supported; the message lists all such fields.
    """
    fields = read_json(path)
    report(path, _problems(fields))
    try:
        # Checks the fields that an adapter of ours has, too.
        plain = LoRAConfig(
            rank=fields["r"],
            alpha=float(fields["lora_alpha"]),
            dropout=float(fields.get("lora_dropout") or 0.0),
        )
        targets = _targets(fields, modules)
        ranks = _by_pattern(fields, "rank_pattern", targets, default=plain.rank)
        alphas = _by_pattern(fields, "alpha_pattern", targets, default=plain.alpha)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: {error}") from error
    root = bool(fields.get("use_rslora"))
    scales = {m: alphas[m] / (math.sqrt(ranks[m]) if root else ranks[m]) for m in targets}
    rank, scale = max(ranks.values()), next(iter(scales.values()))
    if len(set(scales.values())) > 1:
        scale = 1.0
    alpha = plain.alpha if scale == plain.alpha / rank else scale * rank
    lora = dataclasses.replace(
        plain, rank=rank, alpha=alpha, target_modules=_kinds(fields, targets)
    )
    return PeftConfig(lora, ranks, scales)


def _problems(fields: dict[str, Any]) -> list[str]:
    """Describes the fields that are not supported, or of another type than PEFT writes."""
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
    problems += [
        f"{name}={value!r}: not supported"
        for name, value in fields.items()
        if name not in {*_ONLY, *_IGNORED, *_READ} and value not in (None, False, {}, [])
    ]
    if fields.get("use_rslora") not in (None, True, False):
        problems.append(f"use_rslora={fields['use_rslora']!r}: expected true or false")
    if type(fields.get("r")) is not int:
        problems.append(f"r={fields.get('r')!r}: expected a whole number")
    for name in ("target_modules", "exclude_modules"):
        value = fields.get(name)
        missing = name == "target_modules" and not value
        if missing or not (value is None or isinstance(value, str) or _are_texts(value)):
            problems.append(f"{name}={value!r}: expected a list of names or a regular expression")
    if fields.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        problems.append(f"layers_pattern={fields['layers_pattern']!r}: only 'layers' is supported")
    layers = fields.get("layers_to_transform")
    if not (layers is None or type(layers) is int or _are(layers, int)):
        problems.append(f"layers_to_transform={layers!r}: expected layer numbers")
    for name, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
        problems += _pattern_problems(name, fields.get(name), least)
    return problems


def _pattern_problems(name: str, patterns: Any, least: int) -> list[str]:
    """Describes entries that are no positive number; `least` is 1 for a whole one."""
    if patterns is None:
        return []
    if not isinstance(patterns, dict):
        return [f"{name}={patterns!r}: expected an object"]
    types = (int,) if least else (int, float)
    expected = "a whole number of at least 1" if least else "a positive number"
    return [
        f"{name}.{key}={value!r}: expected {expected}"
        for key, value in patterns.items()
        if type(value) not in types or not 0 < value < float("inf")
    ]


def _targets(fields: dict[str, Any], modules: Sequence[str]) -> list[str]:
    """Returns the modules that have an adapter.

    Raises:
        InputError: there are none, or modules that cannot have one here are among them.
    """
    value = fields["target_modules"]
    every = (*modules, *_OTHER_MODULES)
    if isinstance(value, str) and value.lower() == _ALL_LINEAR:
        chosen = set(modules)
    elif isinstance(value, str):
        chosen = _full_matches("target_modules", value, every)
    else:
        chosen = {m for m in every if m in value or (_ends(m, value) and _in_layers(m, fields))}
    excluded = fields.get("exclude_modules") or []
    if isinstance(excluded, str):
        chosen -= _full_matches("exclude_modules", excluded, every)
    else:
        chosen = {m for m in chosen if m not in excluded and not _ends(m, excluded)}
    shown = value if isinstance(value, str) else ",".join(value)
    if outside := chosen & set(_OTHER_MODULES):
        raise InputError(
            f"target_modules={shown}: chooses {min(outside)}; only "
            f"{','.join(TARGET_MODULES)} can have an adapter"
        )
    if not chosen:
        raise InputError(f"target_modules={shown}: chooses no layer of the base model")
    return [m for m in modules if m in chosen]


def _kinds(fields: dict[str, Any], targets: Iterable[str]) -> tuple[str, ...]:
    """Returns the kinds of the adapted layers, such as q_proj, in the order of the file."""
    kinds = {module.rpartition(".")[2] for module in targets}
    listed = fields["target_modules"] if isinstance(fields["target_modules"], list) else []
    return tuple(dict.fromkeys(k for k in (*listed, *TARGET_MODULES) if k in kinds))


def _by_pattern(
    fields: Mapping[str, Any], name: str, modules: Sequence[str], default: Any
) -> dict[str, Any]:
    """Returns the value of the first pattern that matches the end of each module's name."""
    values = dict.fromkeys(modules, default)
    for key, value in reversed((fields.get(name) or {}).items()):
        for module in _full_matches(name, key, modules, before=r"(.*\.)?"):
            values[module] = value
    return values


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module.endswith(f".{name}") for name in names)


def _in_layers(module: str, fields: Mapping[str, Any]) -> bool:
    """Returns True if the module's layer is one of layers_to_transform, or if all are meant."""
    layers = fields.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    match = _LAYER.match(module)
    return match is not None and int(match[1]) in ([layers] if type(layers) is int else layers)


def _full_matches(option: str, pattern: str, names: Sequence[str], before: str = "") -> set[str]:
    """Returns the names that a regular expression, after `before`, matches as a whole.

    Raises:
        InputError: the expression is wrong, or RE2 reads it differently or not at all.
    """
    import pyarrow
    from pyarrow import compute

    if len(pattern) > _MAX_PATTERN or any(text in pattern for text in _AMBIGUOUS):
        raise InputError(f"{option}: the expression {pattern[:60]!r} is not supported")
    with as_input_error(f"{option}: the expression {pattern[:60]!r} is not supported"):
        re.compile(
            f"{before}({pattern})" if before else pattern
        )  # what Python refuses, PEFT does not read either
        whole = f"^(?:{before}(?:{pattern}))$"
        mask = compute.match_substring_regex(pyarrow.array(names, pyarrow.string()), whole)
    return {name for name, matches in zip(names, mask.to_pylist(), strict=True) if matches}


def _are_texts(value: Any) -> bool:
    return _are(value, str)


def _are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)
