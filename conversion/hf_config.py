"""Converts a Hugging Face `config.json` to our config dataclasses and back.

Both dialects are read and written (see `rope_fields`). Fields are on an allow-list: a field that
transformers' own class for this `model_type` declares, and that we neither use nor know to be
harmless, is refused by name unless it has the default of that class, because a model that ignored
it could silently compute something else. Fields that the class does not declare change nothing in
either, and are ignored with a warning. Absent fields have the defaults of the class.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from conversion.fields import is_off, number, positive
from conversion.problems import report
from conversion.rope_fields import read_rope, rope_fields
from conversion.window_fields import read_window
from sarm_jax.models.llama import MODEL_TYPES, LlamaConfig
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARMConfig

_READ = {
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings",
    "max_position_embeddings", "layer_types", "sliding_window", "use_sliding_window",
    "max_window_layers", "is_causal", "original_max_position_embeddings",
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, int]] = {  # of absent fields; other sizes follow from the rest
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
_ONLY = {  # fields that have one acceptable value
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
_OF_SOME = {"attention_bias", "mlp_bias", "pretraining_tp"}  # not all classes declare these
_HARMLESS = {  # names, bookkeeping, token ids (ours are the tokenizer's), initialisation, dropout
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "dtype",
    "torch_dtype", "use_cache", "initializer_range", "attention_dropout", "bos_token_id",
    "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "id2label", "label2id", "num_labels", "problem_type", "return_dict", "output_hidden_states",
    "output_attentions", "chunk_size_feed_forward", "tokenizer_class", "_attn_implementation",
    "attn_implementation", "_attn_implementation_autoset", "transformers.js_config",
    "is_llama_config", "unsloth_fixed", "unsloth_version", "finetuning_task", "prefix",
    # generation defaults, which older versions of transformers wrote here
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "remove_invalid_values",
}  # fmt: skip
_UNDECLARED = {  # fields that transformers reads of any model though LlamaConfig has none of them
    "auto_map", "attention_chunk_size", "decoder", "distributed_config", "fusion_config",
    "generator", "kv_sharing_modes", "logits_mup_width_multiplier", "pruned_heads", "text_config",
    "transformers_weights", "unpadded_vocab_size",
}  # fmt: skip
_QUANTISATION = ("quantization_config", "compression_config")
QUANTISED = (
    "the weights are quantised, which is not supported: take the original model, or write it "
    "without quantisation (load it with transformers, then model.dequantize() and save_pretrained)"
)
_SARM_ONLY = {"sarm_param", "sarm_use_topk", "sarm_train_mode", "sarm_rec_lambda", "auto_map"}
_SARM_PARAM = {
    "sae_source_layer", "sae_latent_size", "sae_k", "sae_use_sequence_level",
    "sarm_use_activation", "sarm_train_mode", "sarm_rec_lambda", "sarm_heads",
}  # fmt: skip


def is_sarm(hf: dict[str, Any]) -> bool:
    """Returns True if this config describes a SARM rather than a language model."""
    names = hf.get("architectures")
    names = names if isinstance(names, list) else [names]
    return "sarm_param" in hf or "sarm_use_topk" in hf or any("SARM" in str(n) for n in names)


def llama_config(hf: dict[str, Any]) -> LlamaConfig:
    """Reads the architecture of a language model.

    Raises:
        InputError: fields are not supported; the message lists them.
    """
    problems: list[str] = []
    if is_sarm(hf):
        problems.append("this is a SARM, not a policy")
    name = MODEL_TYPES.get(str(hf.get("model_type")))
    expected = [f"{name}ForCausalLM"]
    architectures = hf.get("architectures") or expected
    if name is not None and architectures != expected:
        hint = " (a reward model?)" if "SequenceClassification" in str(architectures) else ""
        problems.append(f"architectures={architectures}{hint}: expected {expected}")
    config = _read_llama(
        hf, layers=hf.get("num_hidden_layers"), also_allowed=set(), problems=problems
    )
    report("config.json", problems)
    assert config is not None
    return config


def sarm_config(hf: dict[str, Any], directory_name: str) -> SARMConfig:
    """Reads the architecture of a SARM from `sarm_param` or, in older checkpoints, from its name.

    `num_hidden_layers` counts the layers of the model that the trunk was cut from. It is not used.

    Args:
        hf: the fields of config.json.
        directory_name: the path of the directory, or the repository id.

    Raises:
        InputError: fields are missing or not supported; the message lists them.
    """
    problems: list[str] = []
    param = _sarm_param(hf, directory_name, problems)
    if not param:
        report("config.json", problems)
    layers, latent_size, k = (
        positive(param, name, problems, prefix="sarm_param.")
        for name in ("sae_source_layer", "sae_latent_size", "sae_k")
    )
    use_topk = param.get("sarm_use_activation")
    if not isinstance(use_topk, bool):
        problems.append(f"sarm_param.sarm_use_activation={use_topk}: expected true or false")
    heads = positive({"sarm_heads": 1} | param, "sarm_heads", problems, prefix="sarm_param.")
    if k > latent_size > 1:
        problems.append(f"sarm_param.sae_k={k}: exceeds sae_latent_size={latent_size}")
    trunk = _read_llama(hf, layers=layers, also_allowed=_SARM_ONLY, problems=problems)
    report("config.json", problems)
    assert trunk is not None and isinstance(use_topk, bool)
    activation = "topk" if use_topk else "identity"
    sae = SAEConfig(trunk.hidden_size, latent_size, k, activation=activation)
    return SARMConfig(trunk, sae, heads)


def hf_llama_dict(config: LlamaConfig, **extra: Any) -> dict[str, Any]:
    """Builds a `config.json` that transformers 4 and 5 both read.

    It has no sliding window, since `config.max_position_embeddings` is not longer than the window.
    """
    return {
        "architectures": [_causal_lm(config)],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        **_own_fields(config.model_type),
        "rms_norm_eps": config.rms_norm_eps,
        **rope_fields(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        **extra,
    }


def _own_fields(model_type: str) -> dict[str, Any]:
    """Returns fields of one model type that have one acceptable value."""
    if model_type == "llama":
        return {"attention_bias": False, "mlp_bias": False}
    if model_type == "mistral":
        return {"sliding_window": None}
    window = {"use_sliding_window": False}
    return window if model_type == "qwen2" else {"attention_bias": False, **window}


def _causal_lm(config: LlamaConfig) -> str:
    return f"{MODEL_TYPES[config.model_type]}ForCausalLM"


def hf_policy_dict(config: LlamaConfig, base: dict[str, Any]) -> dict[str, Any]:
    """Builds a policy's `config.json` for transformers 4 and 5 from that of its source."""
    return {**base, "architectures": [_causal_lm(config)], **rope_fields(config)}


def hf_sarm_dict(config: SARMConfig, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Builds a SARM's `config.json` from `base` and the SARM's own fields.

    The result names no code; see `copy_model_code`.

    Args:
        config: the architecture.
        base: the config.json of the SARM or of the model that its trunk was cut from, if known.
    """
    hf = {**(base or hf_llama_dict(config.trunk)), **rope_fields(config.trunk)}
    old = hf.pop("sarm_param", None) or {}
    for name in ("sarm_use_topk", "sarm_train_mode", "sarm_rec_lambda", "auto_map", "num_labels"):
        hf.pop(name, None)
    hf["vocab_size"] = config.trunk.vocab_size
    heads = config.heads
    # The reference sizes its head by the number of labels.
    if len(hf.get("id2label") or ()) != heads:
        hf |= {
            "id2label": {str(n): f"LABEL_{n}" for n in range(heads)},
            "label2id": {f"LABEL_{n}": n for n in range(heads)},
        }
    if heads > 1:  # no other library combines the heads, so none is to load them as one
        hf["architectures"] = [f"{MODEL_TYPES[config.trunk.model_type]}SARMEnsemble"]
        old = old | {"sarm_heads": heads}
    elif not is_sarm(hf):
        hf["architectures"] = [f"{MODEL_TYPES[config.trunk.model_type]}SARM"]
    hf["sarm_param"] = old | {
        "sae_source_layer": config.trunk.num_hidden_layers,
        "sae_latent_size": config.sae.latent_size,
        "sae_k": config.sae.k,
        "sae_use_sequence_level": old.get("sae_use_sequence_level", False),
        "sarm_use_activation": config.sae.use_topk,
    }
    return hf


def with_dtype(hf: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Adds the dtype of the stored weights, under the name that transformers 4 and 5 both read."""
    return {name: v for name, v in hf.items() if name != "dtype"} | {"torch_dtype": dtype}


def _read_llama(
    hf: dict[str, Any], layers: Any, also_allowed: set[str], problems: list[str]
) -> LlamaConfig | None:
    """Reads the fields of a decoder; `layers` replaces num_hidden_layers."""
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        problems.append(_unsupported(hf))
        return None  # every other field would be reported as well
    problems += _field_problems(hf, model_type, also_allowed)
    sizes = {
        name: positive({**hf, "num_hidden_layers": layers}, name, problems)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads")
    }  # fmt: skip
    heads = sizes["num_attention_heads"]
    defaults = _DEFAULTS[model_type]
    optional = {
        "num_key_value_heads": heads,
        "head_dim": max(sizes["hidden_size"] // heads, 1),
        **defaults,
    }
    if "num_key_value_heads" in hf:  # null stands for the number of heads
        optional["num_key_value_heads"] = heads
    present = {name: value for name, value in hf.items() if value is not None}
    sizes |= {name: positive({**optional, **present}, name, problems) for name in optional}
    implied_head_dim = "head_dim" not in {**defaults, **present}
    problems += _size_problems(sizes, implied_head_dim)
    theta, scaling = read_rope(hf, problems)
    eps = number({"rms_norm_eps": 1e-6, **present}, "rms_norm_eps", problems)
    tied = present.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        problems.append(f"tie_word_embeddings={tied!r}: expected true or false")
    window = read_window(hf, model_type, sizes["num_hidden_layers"], problems)
    shorter = window is not None and window < sizes["max_position_embeddings"]
    if window is not None and shorter:
        sizes["max_position_embeddings"] = window
    return LlamaConfig(
        **sizes,
        rms_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=bool(tied),
        model_type=model_type,
        positions_field="sliding_window" if shorter else "max_position_embeddings",
    )


def _unsupported(hf: dict[str, Any]) -> str:
    """Describes a model of another architecture."""
    *others, last = map(repr, MODEL_TYPES)
    names = hf.get("architectures")
    found = f" ({names[0]})" if isinstance(names, list) and names else ""
    return (
        f"model_type={hf.get('model_type')!r}{found}: only {', '.join(others)} and {last} are "
        "supported"
    )


def _field_problems(hf: dict[str, Any], model_type: str, also_allowed: set[str]) -> list[str]:
    """Describes fields whose effect is not supported, or not known."""
    problems = []
    for name, value in hf.items():
        expected = _ONLY.get(name)
        if name in _ONLY:
            if value is not None and value != expected and _is_read(name, model_type):
                problems.append(f"{name}={value!r}: only {expected!r} is supported")
        elif name == "is_causal":  # unlike other fields, it changes the model if it is off
            if value is not True:
                problems.append(f"{name}={value!r}: only True is supported")
        elif name in _QUANTISATION and not is_off(value):
            problems.append(f"{name}: {QUANTISED}")
        elif _is_unknown(name, value, also_allowed) and not (
            _is_ignored(name, model_type) or _is_default(name, value, model_type)
        ):
            problems.append(f"{name}={value!r}: unknown field")
    return problems


def ignored_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that transformers does not read of this model, and that we do not read.

    They cannot change what the model computes.
    """
    model_type = hf["model_type"]
    return {
        name: value
        for name, value in hf.items()
        if name not in _QUANTISATION
        and (
            (name in _ONLY and value != _ONLY[name] and not _is_read(name, model_type))
            or (name not in _ONLY and _is_unknown(name, value, _SARM_ONLY))
        )
        and _is_ignored(name, model_type)
    }


def _is_read(name: str, model_type: str) -> bool:
    """Returns False for a field of `_ONLY` that this model of transformers does not have."""
    return name not in _OF_SOME or _is_declared(name, model_type)


def _is_unknown(name: str, value: Any, also_allowed: set[str]) -> bool:
    return name not in _READ | _HARMLESS | also_allowed and not is_off(value)


def _is_ignored(name: str, model_type: str) -> bool:
    return name not in _UNDECLARED and not _is_declared(name, model_type)


def _is_default(name: str, value: Any, model_type: str) -> bool:
    """Returns True if a declared field has the default of its class."""
    return name not in _UNDECLARED and getattr(_default_config(model_type), name) == value


def _is_declared(name: str, model_type: str) -> bool:
    """Returns True if the installed transformers knows this field of such a model."""
    return hasattr(_default_config(model_type), name)


@cache
def _default_config(model_type: str) -> Any:
    from transformers import CONFIG_MAPPING  # slow to import, and rarely needed

    return CONFIG_MAPPING[model_type]()


def _size_problems(sizes: dict[str, int], implied_head_dim: bool) -> list[str]:
    """Describes the sizes that contradict each other."""
    hidden, heads, head_dim = (sizes[n] for n in ("hidden_size", "num_attention_heads", "head_dim"))
    kv_heads = sizes["num_key_value_heads"]
    problems = []
    if implied_head_dim and hidden % heads:
        problems.append(f"hidden_size={hidden}: not a multiple of num_attention_heads={heads}")
    elif head_dim % 2 and hidden > 1:
        problems.append(f"head_dim={head_dim}: must be even")
    if heads % kv_heads:
        problems.append(
            f"num_attention_heads={heads}: not a multiple of {kv_heads} key-value heads"
        )
    return problems


def _sarm_param(hf: dict[str, Any], directory_name: str, problems: list[str]) -> dict[str, Any]:
    """Returns sarm_param, or the same fields read from the name of an older checkpoint."""
    param = hf.get("sarm_param")
    if param is not None:
        if not isinstance(param, dict):
            problems.append(f"sarm_param={param!r}: expected an object")
            return {}
        if not param:
            problems.append("sarm_param={}: is empty")
        for name, value in param.items():
            if name not in _SARM_PARAM and not is_off(value):
                problems.append(f"sarm_param.{name}={value!r}: unknown field")
        return param
    facts = facts_in_name(directory_name)
    if not facts and (what := _other_model(hf)):
        problems.append(f"not a SARM but {what}")
        return {}
    if not facts:
        problems.append(
            "not a SARM: there is no sarm_param, and the directory's name does not give its sizes "
            f"either (expected …_Latent65536_Layer16_K192_…, found {directory_name!r})"
        )
        return {}
    if isinstance(hf.get("sarm_use_topk"), bool):
        facts["sarm_use_activation"] = hf["sarm_use_topk"]
    return facts


def _other_model(hf: dict[str, Any]) -> str:
    """Describes a model that is certainly no SARM, else ""."""
    names = str(hf.get("architectures"))
    if "SequenceClassification" in names:
        return (
            "a classifier without an SAE, whose score no latents explain; --stage=train_sae trains "
            f"one for it (architectures={names})"
        )
    if "ForCausalLM" in names:
        return (
            "a language model; --stage=train_sarm makes a SARM from it, or is it the model of the "
            f"other option? (architectures={names})"
        )
    return ""


def facts_in_name(directory_name: str) -> dict[str, Any]:
    """Reads the SAE's sizes from a name such as …_Latent65536_Layer16_K192_…; {} if it has none.

    With `-TopK-` in the name the head reads latents, with `-woTopK-` pre-activations.
    """
    pattern = re.compile(r"_Latent(\d+)_Layer(\d+)_K(\d+)(?:_|$)")
    matches = [
        (name, match) for name in Path(directory_name).parts for match in pattern.findall(name)
    ]
    if not matches:
        return {}
    name, numbers = matches[-1]
    latent_size, layer, k = map(int, numbers)
    facts: dict[str, Any] = {"sae_latent_size": latent_size, "sae_source_layer": layer, "sae_k": k}
    if "TopK" in name:
        facts["sarm_use_activation"] = "woTopK" not in name
    return facts
