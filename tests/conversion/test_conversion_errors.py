"""Inputs that the conversion refuses, its messages, and that nothing is left behind."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from absl import flags
from flax import nnx
from safetensors.torch import load_file, save_file

from conversion import cli, from_hf, load_policy, load_sarm, to_hf
from conversion.directory import atomic_directory
from conversion.hf_config import hf_llama_dict, llama_config
from conversion.load import load_hf_tokenizer, read_policy_config, read_sarm_config
from conversion.peft import load_adapter, save_adapter
from conversion.safetensors_io import TensorFiles
from sarm_jax.io.errors import InputError
from sarm_jax.models import chat
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig, add_lora
from tests import oracles

Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def policy_dir(tmp_path):
    config = oracles.tiny_llama_config(num_hidden_layers=1)
    oracles.save_tiny_llama(tmp_path / "hf", config, oracles.tiny_tokenizer())
    return tmp_path / "hf"


@pytest.fixture
def sharded_dir(tmp_path):
    config = oracles.tiny_llama_config(num_hidden_layers=1)
    oracles.save_tiny_llama(
        tmp_path / "sharded", config, oracles.tiny_tokenizer(), max_shard_size="30KB"
    )
    return tmp_path / "sharded"


@pytest.fixture
def sarm_dir(tmp_path):
    oracles.save_tiny_sarm(tmp_path / "sarm", oracles.tiny_tokenizer())
    return tmp_path / "sarm"


def edit_json(path, **changes):
    """Sets keys of a JSON file; the value None deletes a key."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(call, *args, **kwargs):
    """Returns the one-line message of the `InputError` that a call raises."""
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- files


def shard_of(directory, name):
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def test_a_missing_and_a_truncated_shard_are_named(sharded_dir):
    missing, cut = shard_of(sharded_dir, Q), shard_of(sharded_dir, "model.norm.weight")
    assert missing != cut
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-4])
    message = refused(load_policy, sharded_dir)
    assert f"{missing.name}: the shard is missing" in message
    assert f"{cut.name}: truncated" in message


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 64])
def test_a_file_without_a_header_is_named(policy_dir, content):
    (policy_dir / "model.safetensors").write_bytes(content)
    assert "model.safetensors: truncated or not safetensors" in refused(load_policy, policy_dir)


def test_an_index_that_contradicts_its_shards_is_refused(sharded_dir):
    weight_map = json.loads((sharded_dir / INDEX).read_text())["weight_map"]
    one, other = shard_of(sharded_dir, Q), shard_of(sharded_dir, "lm_head.weight")
    norm = shard_of(sharded_dir, "model.norm.weight")
    assert len({one, other, norm}) == 3
    save_file(load_file(one) | {"surprise": torch.ones(1)}, one)
    save_file(load_file(other) | {"model.norm.weight": torch.ones(32)}, other)
    edit_json(sharded_dir / INDEX, weight_map={**weight_map, "ghost": one.name})
    message = refused(load_policy, sharded_dir)
    assert f"surprise: stored in {one.name} but missing from {INDEX}" in message
    assert "model.norm.weight: stored in both" in message
    assert f"ghost: {INDEX} says it is in {one.name}, which does not hold it" in message


@pytest.mark.parametrize("shard", ["../hf/model.safetensors", "/etc/passwd", "a\\b", "x.bin", 3])
def test_the_index_cannot_name_other_places(policy_dir, sharded_dir, shard):
    weight_map = json.loads((sharded_dir / INDEX).read_text())["weight_map"]
    edit_json(sharded_dir / INDEX, weight_map={**weight_map, Q: shard})
    message = refused(load_policy, sharded_dir)
    assert Q in message and repr(shard) in message


def test_an_ambiguous_or_broken_index_is_refused(sharded_dir):
    shard = shard_of(sharded_dir, Q)
    (sharded_dir / "model.safetensors").write_bytes(shard.read_bytes())
    assert "holds both" in refused(load_policy, sharded_dir)
    (sharded_dir / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    assert "key 'a' appears twice" in refused(load_policy, sharded_dir)
    (sharded_dir / INDEX).write_text("{}")
    assert "weight_map is missing" in refused(load_policy, sharded_dir)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused(policy_dir, name):
    (policy_dir / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refused(load_policy, policy_dir)
    (policy_dir / name).write_bytes(b"\x80\x04")
    message = refused(load_policy, policy_dir)
    assert name in message and "unpickling runs code" in message and "safetensors" in message


# ---- tensors


def test_every_wrong_tensor_is_reported_at_once(policy_dir):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
        tensors[Q] = tensors[Q][:, :-1].contiguous()
        down = "model.layers.0.mlp.down_proj.weight"
        tensors[down] = tensors[down].to(torch.int8)

    edit_tensors(policy_dir, spoil)
    for call in (load_policy, lambda src: from_hf.convert(src, policy_dir / "out", "policy")):
        message = refused(call, policy_dir)
        assert "model.norm.weight: missing" in message
        assert "self_attn.q_proj.bias: unexpected tensor" in message
        assert f"{Q}: shape [32, 31], expected [32, 32]" in message
        assert "mlp.down_proj.weight: dtype int8" in message
    assert not (policy_dir / "out").exists()


def test_a_long_list_of_problems_is_counted(policy_dir):
    edit_json(policy_dir / "config.json", num_hidden_layers=2)
    message = refused(load_policy, policy_dir)  # 9 tensors per layer
    assert message.count(": missing") == 8 and message.endswith("; and 1 more")


def test_a_square_kernel_of_a_converted_directory_is_checked_too(policy_dir, tmp_path):
    from_hf.convert(policy_dir, tmp_path / "ours", "policy")
    edit_tensors(tmp_path / "ours", lambda tensors: tensors.pop("layers.0.attn.q_proj.kernel"))
    assert "layers.0.attn.q_proj.kernel: missing" in refused(load_policy, tmp_path / "ours")


def test_a_tied_model_cannot_store_another_head(tmp_path):
    config = oracles.tiny_llama_config(num_hidden_layers=1, tie_word_embeddings=True)
    oracles.save_tiny_llama(tmp_path, config, oracles.tiny_tokenizer())

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][5, 5] += 1e-3

    edit_tensors(tmp_path, add_head)
    assert "lm_head.weight: differs from" in refused(load_policy, tmp_path)


def test_the_layers_of_a_sarm_are_counted_by_its_source_layer(sarm_dir):
    param = json.loads((sarm_dir / "config.json").read_text())["sarm_param"]
    edit_json(sarm_dir / "config.json", sarm_param={**param, "sae_source_layer": 1})
    assert "model.layers.1.mlp.down_proj.weight: unexpected" in refused(load_sarm, sarm_dir)
    edit_json(sarm_dir / "config.json", sarm_param={**param, "sae_latent_size": 63})
    message = refused(load_sarm, sarm_dir)
    assert "sae.encoder.weight: shape [64, 32], expected [63, 32]" in message
    assert "score.weight: shape [1, 64], expected [1, 63]" in message


# ---- config.json


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"expected \['MistralForCausalLM'\]"),
        *(
            (
                {"model_type": kind, "architectures": [name]},
                f"model_type='{kind}' .{name}.: only 'llama', 'mistral', 'qwen2' and 'qwen3' are",
            )
            for kind, name in (
                ("gemma2", "Gemma2ForCausalLM"),
                ("mixtral", "MixtralForCausalLM"),
                ("qwen2_moe", "Qwen2MoeForCausalLM"),
                ("qwen3_moe", "Qwen3MoeForCausalLM"),
                ("gpt2", "GPT2LMHeadModel"),
            )
        ),
        ({"model_type": ["llama"]}, "model_type=.'llama'. .*: only 'llama'"),
        ({"layer_types": ["full_attention", "x"], "num_hidden_layers": 2}, r"layer_types\[1\]='x'"),
        ({"layer_types": ["sliding_attention"]}, "there is no window"),
        ({"layer_types": [], "num_hidden_layers": 1}, "a list of 1 layers, found 0 entries"),
        ({"use_sliding_window": True}, "use_sliding_window=True: unknown field"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias=True: only False"),
        ({"mlp_bias": True}, "mlp_bias=True: only False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp=2: only 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: only 1.0"),
        ({"sliding_window": 4096}, "sliding_window=4096: unknown field"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: the weights are quantised"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map=.*: unknown field"),
        ({"is_causal": False}, "is_causal=False: only True is supported"),
        ({"vocab_size": 0}, "vocab_size=0: expected a positive integer"),
        ({"hidden_size": "32"}, "hidden_size='32': expected a positive integer"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1: expected a positive number"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4: not a multiple of 3"),
        ({"head_dim": 7}, "head_dim=7: must be even"),
        ({"head_dim": None, "hidden_size": 30}, "hidden_size=30: not a multiple of"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': expected true or false"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4}}, "rope_type='longrope': only"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type=.'yarn'.: only"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "original_max_position_embeddings=None: expected a positive integer",
        ),
        *(
            ({"rope_parameters": {**oracles.YARN_ROPE, name: value}}, f"{name}=")
            for name, value in (
                ("factor", None),
                ("factor", "4"),
                ("beta_fast", 0),
                ("beta_slow", -1),
                ("beta_fast", 1e-300),
                ("attention_factor", 0),
                ("truncate", None),
                ("truncate", 1),
                ("mscale", 1.0),
                ("rope_theta", 1.0),
            )
        ),
        ({"rope_parameters": {"rope_type": "default", "mrope": [1]}}, "rope_parameters.mrope"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "factor=None"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "factor=None: expected a positive number"),
        ({"rope_scaling": {"rope_type": "linear"}}, "contradicts rope_parameters"),
        ({"rope_theta": 5.0}, "rope_theta=5.0 contradicts rope_parameters.rope_theta=10000.0"),
        ({"rope_parameters": {**oracles.LLAMA3_ROPE, "factor": None}}, "factor=None: expected a"),
        ({"rope_parameters": {**oracles.LLAMA3_ROPE, "high_freq_factor": 1.0}}, "must exceed"),
    ],
)
def test_architectures_that_would_compute_something_else_are_refused(policy_dir, change, message):
    edit_json(policy_dir / "config.json", **change)
    with pytest.raises(InputError, match=message):
        read_policy_config(policy_dir)


def test_config_problems_are_reported_at_once_and_harmless_fields_are_not(policy_dir):
    before = read_policy_config(policy_dir)
    edit_json(policy_dir / "config.json", pruned_heads={}, tokenizer_class="X", sliding_window=None,
              rope_interleaved=False, is_llama_config=True, top_p=0.9, is_causal=True)  # fmt: skip
    assert read_policy_config(policy_dir) == before
    edit_json(policy_dir / "config.json", mlp_bias=True, is_causal=2, vocab_size=-4)
    message = refused(load_policy, policy_dir)
    assert all(text in message for text in ("mlp_bias=True", "is_causal=2", "vocab_size=-4"))
    assert str(policy_dir) in message


@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
@pytest.mark.parametrize(
    "rope",
    [
        None,
        oracles.LLAMA3_ROPE,
        oracles.YARN_ROPE,
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    ],
)
def test_a_written_config_reads_the_same(architecture, rope):
    case = oracles.ARCHITECTURES[architecture]
    hf = oracles.tiny_llama_config(**case | ({"rope_parameters": rope} if rope else {})).to_dict()
    config = llama_config(hf)
    assert config.model_type == architecture
    assert llama_config(hf_llama_dict(config)) == config
    assert (config.rope_scaling is not None) == bool(rope)
    written = oracles.CONFIG_MAPPING[architecture](**hf_llama_dict(config)).to_dict()
    for name in sorted(set(hf) & set(vars(config)) - {"rope_scaling"}):
        assert written[name] == hf[name], name


@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
def test_absent_fields_have_transformers_defaults(architecture):
    sizes = {
        "vocab_size": 9, "hidden_size": 128, "intermediate_size": 9, "num_hidden_layers": 30,
        "num_attention_heads": 32,
    }  # fmt: skip
    theirs = oracles.CONFIG_MAPPING[architecture](**sizes)
    ours = llama_config({"model_type": architecture, **sizes})
    window = getattr(theirs, "sliding_window", None)
    head_dim = getattr(theirs, "head_dim", 128 // 32)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == (window or theirs.max_position_embeddings)
    assert ours.positions.field == ("sliding_window" if window else "max_position_embeddings")
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.num_key_value_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    nothing = dict.fromkeys(("sliding_window", "layer_types"))
    theirs = oracles.CONFIG_MAPPING[architecture](**sizes, **nothing)
    ours = llama_config({"model_type": architecture, **sizes, **nothing})
    assert ours.max_position_embeddings == theirs.max_position_embeddings


@pytest.mark.parametrize(
    ("fields", "positions"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "mistral", "sliding_window": 16, "layer_types": 3 * ["full_attention"]},
         16),
        ({"model_type": "mistral", "sliding_window": 4096}, 512),
        ({"model_type": "mistral", "sliding_window": None}, 512),
        ({"model_type": "qwen2", "sliding_window": 16}, 512),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, 512),
        ({"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": True,
          "max_window_layers": 2}, 16),
        ({"model_type": "qwen3", "sliding_window": 16, "use_sliding_window": True,
          "max_window_layers": 0}, 16),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True,
          "layer_types": ["full_attention"] * 3, "max_window_layers": 0}, 512),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True,
          "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, 16),
    ],
)  # fmt: skip
def test_a_sliding_window_limits_the_positions(fields, positions):
    hf = {**oracles.tiny_llama_config(**oracles.ARCHITECTURES[fields["model_type"]]).to_dict()}
    hf.pop("layer_types", None)
    config = llama_config(hf | fields)
    assert config.max_position_embeddings == positions
    policy = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    tokens = np.zeros((1, positions + 1), np.int32)
    message = refused(policy, tokens, np.ones_like(tokens))
    assert f"{positions + 1} tokens exceed the {positions} positions" in message
    assert ("sliding_window" in message) == (positions == 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sae_k": 65}, "sae_k=65: exceeds sae_latent_size=64"),
        ({"sae_k": None}, "sarm_param.sae_k=None: expected a positive integer"),
        ({"sarm_use_activation": 1}, "sarm_use_activation=1: expected true or false"),
        ({"sae_activation": "relu"}, "sarm_param.sae_activation='relu': unknown field"),
    ],
)
def test_sarm_parameters_are_checked(sarm_dir, change, message):
    param = json.loads((sarm_dir / "config.json").read_text())["sarm_param"]
    edit_json(sarm_dir / "config.json", sarm_param={**param, **change})
    assert message in refused(read_sarm_config, sarm_dir)


def test_a_policy_is_not_a_sarm_nor_the_reverse(policy_dir, sarm_dir, tmp_path):
    assert "is a SARM" in refused(load_policy, sarm_dir)
    assert "not a SARM" in refused(load_sarm, policy_dir)
    from_hf.convert(policy_dir, tmp_path / "p", "policy")
    from_hf.convert(sarm_dir, tmp_path / "s", "sarm")
    assert "kind='sarm', expected 'policy'" in refused(load_policy, tmp_path / "s")
    assert "kind='policy', expected 'sarm'" in refused(load_sarm, tmp_path / "p")
    edit_json(tmp_path / "p" / "sarm_jax.json", format=2)
    assert "format=2, expected 1" in refused(load_policy, tmp_path / "p")
    edit_json(tmp_path / "p" / "sarm_jax.json", format=1, config={"vocab_size": 1})
    assert "config or hf_config is not usable" in refused(load_policy, tmp_path / "p")


# ---- tokenizer, source, dtype


def test_a_missing_chat_template_matters_only_for_encoding(tmp_path):
    tokenizer = oracles.tiny_tokenizer()
    tokenizer.chat_template = None
    oracles.save_tiny_llama(tmp_path, oracles.tiny_llama_config(), tokenizer)
    policy, loaded = load_policy(tmp_path)
    assert policy.stop_ids == (260,)
    assert "no chat template" in refused(chat.encode_prompt, loaded, "hello")


def test_tokenizers_that_do_not_fit_are_refused(policy_dir):
    assert "id 261, but the model embeds 261" in refused(load_hf_tokenizer, policy_dir, 261)
    (policy_dir / "generation_config.json").write_text('{"eos_token_id": [262]}')
    assert "eos_token_id=262, expected ids below 262" in refused(load_policy, policy_dir)
    (policy_dir / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    assert "the tokenizer cannot be read" in refused(load_policy, policy_dir)
    (policy_dir / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refused(load_policy, policy_dir)


def test_sources_that_do_not_exist(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert "no such directory" in refused(load_policy, tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(load_policy, tmp_path / "file")
    message = refused(load_policy, "owner/name")
    for text in ("owner/name", "no network", "hf download owner/name", "conversion.from_hf"):
        assert text in message
    (tmp_path / "empty").mkdir()
    assert "config.json: cannot be read (No such file" in refused(load_policy, tmp_path / "empty")


def test_a_repository_id_is_downloaded_without_code_or_pickles(policy_dir, tmp_path, monkeypatch):
    requests = []

    def download(name, allow_patterns, ignore_patterns):
        requests.append((name, *allow_patterns))
        return str(policy_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_policy_config("owner/name").hidden_size == 32
    assert requests[0] == ("owner/name", "config.json", "sarm_jax.json")
    from_hf.convert("owner/name", tmp_path / "ours", "policy")
    assert json.loads((tmp_path / "ours" / "sarm_jax.json").read_text())["source"] == "owner/name"
    assert not any(
        Path(p).suffix in (".py", ".bin", ".pt", "") for request in requests for p in request[1:]
    )


def test_only_two_dtypes(policy_dir):
    assert "dtype='float16'" in refused(load_policy, policy_dir, dtype="float16")


# ---- output directories


def test_an_existing_destination_is_untouched(policy_dir, tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "precious").write_text("x")
    assert "exists already" in refused(from_hf.convert, policy_dir, tmp_path / "dst", "policy")
    assert [p.name for p in (tmp_path / "dst").iterdir()] == ["precious"]
    (tmp_path / "dst" / "precious").unlink()
    from_hf.convert(policy_dir, tmp_path / "dst", "policy")  # an empty directory is accepted
    assert load_policy(tmp_path / "dst")[0].config.hidden_size == 32
    mode = (tmp_path / "dst" / "model.safetensors").stat().st_mode
    assert mode & 0o777 == (tmp_path / "dst" / "sarm_jax.json").stat().st_mode & 0o777


def test_a_failure_leaves_nothing(policy_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(TensorFiles, "mapped", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        from_hf.convert(policy_dir, tmp_path / "dst", "policy")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_parent_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="cannot be written"),
        atomic_directory(tmp_path / "file" / "dst"),
    ):
        pass


def test_replacing_keeps_the_old_directory_until_the_end(tmp_path):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "old").write_text("")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "dst", replace=True) as new:
        (new / "half").write_text("")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.rglob("*")] == ["dst", "old"]
    with atomic_directory(tmp_path / "dst", replace=True) as new:
        (new / "new").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["dst", "new"]


# ---- adapters


@pytest.fixture
def adapter_dir(policy_dir, tmp_path):
    policy, _ = load_policy(policy_dir)
    config = LoRAConfig(rank=2, alpha=4.0)
    add_lora(policy, config, nnx.Rngs(0))
    save_adapter(tmp_path / "adapter", policy, config, str(policy_dir))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True: only False"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']: not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "q_proj.lora_A.weight: shape [2, 32], expected [4, 32]"),
        ({"target_modules": "all-linear"}, "mlp.up_proj.lora_A.weight: missing"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules=q_proj,lm_head"),
        ({"lora_alpha": 0}, "lora.alpha=0.0: must be positive"),
        ({"r": 3}, "lora_A.weight: shape [2, 32], expected [3, 32]"),
        ({"target_modules": ["q_proj", "up_proj"]}, "mlp.up_proj.lora_A.weight: missing"),
        ({"target_modules": ["q_proj", "up_proj"]}, "v_proj.lora_B.weight: unexpected tensor"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(policy_dir, adapter_dir, change, message):
    edit_json(adapter_dir / "adapter_config.json", **change)
    policy, _ = load_policy(policy_dir)
    assert message in refused(load_adapter, adapter_dir, policy)
    assert not any("lora" in path for path, _ in nnx.to_flat_state(nnx.state(policy)))


def test_a_second_adapter_and_a_pickled_one_are_refused(policy_dir, adapter_dir):
    policy, _ = load_policy(policy_dir)
    load_adapter(adapter_dir, policy)
    assert "has an adapter already" in refused(load_adapter, adapter_dir, policy)
    (adapter_dir / "adapter_model.safetensors").rename(adapter_dir / "adapter_model.bin")
    assert "pickled" in refused(load_adapter, adapter_dir, load_policy(policy_dir)[0])


def test_exports_without_an_adapter_or_a_base(policy_dir, adapter_dir, tmp_path):
    message = refused(to_hf.export, policy_dir, tmp_path / "out", merge=True)
    assert "--merge" in message and "no adapter" in message
    (tmp_path / "config.json").write_text("{}")
    assert "policy_model=None" in refused(to_hf.export, tmp_path, tmp_path / "out")
    to_hf.export(
        adapter_dir, tmp_path / "out", merge=True
    )  # the config of the adapter names the base
    assert load_policy(tmp_path / "out")[0].config.hidden_size == 32


# ---- commands


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", *args], capture_output=True, text=True, check=False
    )


def test_commands_end_with_one_line(policy_dir, tmp_path):
    good = command("conversion.from_hf", "--kind=policy", f"--src={policy_dir}",
                   f"--dst={tmp_path / 'ours'}")  # fmt: skip
    assert (good.returncode, good.stdout.count("\n")) == (0, 1), good.stderr
    assert "12 tensors" in good.stdout
    bad = command("conversion.to_hf", "--kind=sarm", f"--src={policy_dir}",
                  f"--dst={tmp_path / 'back'}")  # fmt: skip
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--size=x"], "flag --size=x"),
        ([], "flag --size=None"),
        (["--sise=3"], "Unknown command line flag 'sise'"),
        (["--size=3", "stray"], "unexpected argument 'stray'"),
        (["--size=-1"], "two lines"),
    ],
)
def test_bad_flags_end_with_one_line(argv, message, capsys):
    values = flags.FlagValues()
    flags.DEFINE_integer("size", None, "A size.", flag_values=values, required=True)

    def main(values):
        raise InputError("two\nlines")

    with pytest.raises(SystemExit) as stopped:
        cli.run(main, values, "usage", ["command", *argv])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and captured.out == ""


def test_help_and_success(capsys):
    values = flags.FlagValues()
    flags.DEFINE_integer("size", None, "A size.", flag_values=values)
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda _: "", values, "How to use it.", ["command", "--help"])
    assert stopped.value.code == 0
    assert "How to use it." in (text := capsys.readouterr().out) and "A size." in text
    cli.run(lambda v: f"size {v.size}", values, "", ["command", "--size=3"])
    assert capsys.readouterr().out == "size 3\n"
    np.testing.assert_equal(values.size, 3)


def test_embeddings_are_not_tied_by_default():
    hf = oracles.tiny_llama_config(architectures=["LlamaForCausalLM"]).to_dict()
    del hf["tie_word_embeddings"]
    assert llama_config(hf).tie_word_embeddings is False
