"""Fields of config.json: what transformers writes loads, and only what cannot matter is ignored."""

import importlib
import inspect
import json
import logging
import math
import re

import pytest

from conversion import hf_config, load_policy, load_sarm
from conversion.checkpoint import _warn_of_ignored
from conversion.hf_config import ignored_fields, llama_config
from conversion.keys import abstract_model, tensor_specs
from conversion.load import read_policy_config
from sarm_jax.io.errors import InputError
from tests import oracles
from tests.paths import ROOT

# What other versions of transformers, and tools that save models, write beside the architecture.
WRITTEN = {
    "_model_name_or_path": "model.gguf",  # after reading a GGUF file
    "_name_or_path": "owner/name",
    "transformers_version": "9.9.9",
    "torch_dtype": "bfloat16",
    "_attn_implementation_autoset": True,
    "use_cache": False,
    "unsloth_version": "2025.1",
    "_unsloth_temporary": "x",
    "gguf_file": "model.gguf",
    "custom_generate": {"a": 1},
    "neftune_noise_alpha": 5,
    "model_max_length": 8192,
    "_flash_attn_2_enabled": True,
    "final_logit_softcapping": 30.0,
    "strange": [1, 2],
}


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(autouse=True)
def warn_again():
    _warn_of_ignored.cache_clear()


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "policy"
    config = oracles.tiny_llama_config(num_hidden_layers=1)
    oracles.save_tiny_llama(path, config, oracles.tiny_tokenizer())
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_parameters": oracles.LLAMA3_ROPE},
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"num_key_value_heads": 4},
        {"pretraining_tp": 1, "initializer_range": 0.1, "attention_dropout": 0.1},
        {"id2label": {0: "a", 1: "b", 2: "c"}, "problem_type": "regression"},
        {"output_hidden_states": True, "return_dict": False, "chunk_size_feed_forward": 2},
        {"torch_dtype": "float16"},
    ],
)
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("mistral", "float32"),
        ("qwen2", "float32"),
        ("qwen3", "bfloat16"),
    ],
)
def test_what_save_pretrained_writes_loads(tmp_path, fields, architecture, dtype):
    changes = oracles.ARCHITECTURES[architecture] | {"num_hidden_layers": 1} | fields
    config = oracles.tiny_llama_config(**changes)
    oracles.save_tiny_llama(tmp_path, config, oracles.tiny_tokenizer(), dtype=dtype)
    policy, _ = load_policy(tmp_path)
    assert policy.config.model_type == architecture
    assert policy.config.head_dim == getattr(config, "head_dim", 8)
    edit(tmp_path / "config.json", **WRITTEN)
    assert load_policy(tmp_path)[0].config == policy.config


@pytest.mark.parametrize("name", WRITTEN)
def test_each_written_field_changes_nothing(policy_dir, name):
    hf = json.loads((policy_dir / "config.json").read_text())
    assert llama_config(hf | {name: WRITTEN[name]}) == read_policy_config(policy_dir)


def test_ignored_fields_are_told_once_and_kept(policy_dir, tmp_path, caplog):
    edit(policy_dir / "config.json", strange="\x1b[2J", _model_name_or_path="a.gguf")
    with caplog.at_level(logging.WARNING):
        read_policy_config(policy_dir)
        read_policy_config(policy_dir)
    assert len(caplog.messages) == 1 and caplog.messages[0].isprintable()
    assert "_model_name_or_path" in caplog.text and "strange" in caplog.text


def test_a_sarm_may_have_such_fields_too(tmp_path):
    oracles.save_tiny_sarm(tmp_path, oracles.tiny_tokenizer())
    before = load_sarm(tmp_path).model.config
    edit(tmp_path / "config.json", **WRITTEN)
    assert load_sarm(tmp_path).model.config == before


@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
def test_every_field_of_transformers_is_handled_or_refused(architecture):
    default = oracles.CONFIG_MAPPING[architecture]()
    changes = oracles.ARCHITECTURES[architecture]
    hf = oracles.tiny_llama_config(**changes).to_dict()
    hf["architectures"] = None
    declared = set(vars(default)) | set(default.to_dict())
    handled = hf_config._READ | set(hf_config._ONLY) | hf_config._HARMLESS
    assert len(declared) > 30
    for name in sorted(declared - handled) + sorted(hf_config._UNDECLARED):
        with pytest.raises(InputError, match=f"{name}='odd': unknown field"):
            llama_config(hf | {name: "odd"})
        assert name not in ignored_fields(hf | {name: "odd"})
        assert llama_config(hf | {name: None}) == llama_config(hf)
        if name in declared:
            assert llama_config(hf | {name: getattr(default, name)}) == llama_config(hf)
    assert llama_config(default.to_dict()).hidden_size == 4096
    full = ["full_attention"] * 3
    assert llama_config(hf | {"layer_types": full}) == llama_config(hf | {"layer_types": None})


# What transformers reads of a config if it is there, for other models and other tasks.
UNRELATED = {
    "_rope_type_labels", "chain_hidden_post_norm", "classifier_dropout", "cumulative_length",
    "embed_dim", "first_k_dense_replace", "hidden_dropout", "mlp_layer_types",
    "mtp_hidden_states_first", "mtp_layer_types", "mtp_mlp_layer_types", "mtp_per_layer_config",
    "num_heads", "num_mtp_layers", "token_classification_bias",
}  # fmt: skip


@pytest.mark.parametrize(
    "module",
    ["configuration_utils", "modeling_rope_utils", "masking_utils", "cache_utils",
     "modeling_layers", *(f"models.{name}.modeling_{name}" for name in oracles.ARCHITECTURES)],
)  # fmt: skip
def test_no_field_is_ignored_that_transformers_reads_though_no_class_declares_it(module):
    source = inspect.getsource(importlib.import_module(f"transformers.{module}"))
    owner = r"(?:hasattr|getattr)\(\s*(?:self|config|self\.config)\s*,\s*"
    for name in set(re.findall(owner + r'"(\w+)"', source)) - UNRELATED:
        hf = {"model_type": "llama", name: "odd"}
        assert name not in ignored_fields(hf), name


@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
@pytest.mark.parametrize(
    "scaling", [oracles.LLAMA3_ROPE, oracles.YARN_ROPE], ids=lambda s: s["rope_type"]
)
def test_an_original_context_beside_the_scaling_is_that_of_the_scaling(architecture, scaling):
    """transformers reads it there too, and prefers it to that of the scaling."""
    name = "original_max_position_embeddings"
    changes = oracles.ARCHITECTURES[architecture] | {"rope_parameters": dict(scaling)}
    new = oracles.tiny_llama_config(**changes).to_dict() | {"architectures": None}
    base, fields = scaling["rope_theta"], {k: v for k, v in scaling.items() if k != "rope_theta"}
    old = new | {"rope_parameters": None, "rope_theta": base, "rope_scaling": fields}
    for hf, parent in ((new, "rope_parameters"), (old, "rope_scaling")):
        for same in (None, scaling[name]):
            assert llama_config(hf | {name: same}) == llama_config(hf)
            assert not ignored_fields(hf | {name: same})
        for other in (32, 0, "64", True, 64.5):
            with pytest.raises(InputError) as error:
                llama_config(hf | {name: other})
            message = f"{name}={other!r} contradicts {parent}.{name}={scaling[name]}"
            assert message in str(error.value)
    default = oracles.tiny_llama_config(**oracles.ARCHITECTURES[architecture]).to_dict()
    default["architectures"] = None
    assert llama_config(default | {name: 32}) == llama_config(default)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["attention_bias", "mlp_bias"])
def test_a_field_that_another_class_declares_is_ignored(architecture, name):
    hf = oracles.tiny_llama_config(**oracles.ARCHITECTURES[architecture]).to_dict()
    hf["architectures"] = None
    if hasattr(oracles.CONFIG_MAPPING[architecture](), name):
        with pytest.raises(InputError, match=f"{name}=True: only False is supported"):
            llama_config(hf | {name: True})
    else:
        assert llama_config(hf | {name: True}) == llama_config(hf)
        assert ignored_fields(hf | {name: True}) == {name: True}


@pytest.mark.parametrize(
    "fields",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "compressed-tensors"},
    ],
)
@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_quantised_weights_are_called_so(policy_dir, name, fields):
    hf = json.loads((policy_dir / "config.json").read_text())
    with pytest.raises(InputError, match=f"{name}: the weights are quantised.*dequantize"):
        llama_config(hf | {name: fields})
    assert llama_config(hf | {name: None}) == llama_config(hf)


@pytest.mark.parametrize(
    ("name", "parameters"),  # as published with the models
    [
        ("llama_3_1_8b_instruct", 8_030_261_248),
        ("llama_3_2_3b", 3_212_749_824),
        ("qwen3_4b", 4_022_468_096),
    ],
)
def test_the_architectures_for_plans_have_the_published_size(name, parameters):
    config = read_policy_config(ROOT / "configs" / "architectures" / name)
    specs = tensor_specs(abstract_model(config))
    assert sum(math.prod(spec.shape) for spec in specs) == parameters
