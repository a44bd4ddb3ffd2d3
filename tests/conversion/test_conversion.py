"""Compares conversion with transformers, peft and a PyTorch SARM: same logits, same bits back."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import from_hf, load_policy, load_sarm, to_hf
from conversion.load import load_hf_tokenizer, read_policy_config, read_sarm_config
from conversion.peft import load_adapter, save_adapter
from conversion.safetensors_io import TensorFiles, TensorWriter
from sarm_jax.io.errors import InputError
from sarm_jax.models.lora import TARGET_MODULES, LoRAConfig, LoRAParam, add_lora
from sarm_jax.sampling.generate import generate
from tests import oracles
from tests.closeness import assert_close

ROWS = [[256, 5, 80, 3, 199, 42, 260, 17, 11], [256, 9, 9, 200, 260], [7, 61]]

CASES = {
    "gqa": ({}, {}),
    "mha": ({"num_key_value_heads": 4}, {}),
    "mqa": ({"num_key_value_heads": 1}, {}),
    "llama3_rope": ({"rope_parameters": oracles.LLAMA3_ROPE}, {}),
    "llama3_rope_old_dialect": ({"rope_parameters": oracles.LLAMA3_ROPE}, {"dialect": "old"}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "head_dim": ({"head_dim": 16}, {}),
    "eps_and_theta": (
        {"rms_norm_eps": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 37.0}},
        {"dialect": "old"},
    ),
    "sharded": ({}, {"max_shard_size": "30KB"}),
    "linear_rope": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"dialect": "old"},
    ),
    "dynamic_rope": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
        {},
    ),
    "yarn_rope": ({"rope_parameters": oracles.YARN_ROPE}, {}),
    "yarn_rope_old_dialect": (
        {
            "rope_parameters": oracles.YARN_ROPE
            | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
        },
        {"dialect": "old"},
    ),
    "mistral": (oracles.ARCHITECTURES["mistral"], {}),
    "mistral_window": ({"model_type": "mistral", "sliding_window": 16}, {}),
    "qwen2": (oracles.ARCHITECTURES["qwen2"], {"dialect": "old"}),
    "qwen2_tied_window": (
        {"model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": True,
         "sliding_window": 16, "max_window_layers": 1},
        {},
    ),
    "qwen3": (oracles.ARCHITECTURES["qwen3"], {}),
    "qwen3_yarn": (oracles.ARCHITECTURES["qwen3"] | {"rope_parameters": oracles.YARN_ROPE}, {}),
}  # fmt: skip
architectures = pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)


def hf_policy(path, dtype="float32", **overrides):
    """Saves a tiny HF directory; returns (path, the transformers model)."""
    config = oracles.tiny_llama_config(**overrides)
    tokenizer = oracles.tiny_tokenizer()
    return path, oracles.save_tiny_llama(path, config, tokenizer, seed=3, dtype=dtype)


def torch_logits(model, row):
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0].float().numpy()


def padded(rows):
    """Pads every row on the right, left and both sides; the padding is an ordinary token."""
    length = max(map(len, rows)) + 2
    tokens, mask = np.full((3 * len(rows), length), 7), np.zeros((3 * len(rows), length), bool)
    for n, row in enumerate(3 * rows):
        start = (0, length - len(row), 1)[n // len(rows)]
        tokens[n, start : start + len(row)] = row
        mask[n, start : start + len(row)] = True
    return tokens, mask


def assert_same_logits(policy, model):
    expected = 3 * [torch_logits(model, row) for row in ROWS]
    assert min(e.std() for e in expected) > 0.5  # otherwise the tolerance would prove little
    tokens, mask = padded(ROWS)
    graphdef, state = nnx.split(policy)  # one compilation instead of dozens
    logits = np.asarray(jax.jit(lambda s, *xs: nnx.merge(graphdef, s)(*xs))(state, tokens, mask))
    for n, row in enumerate(expected):
        assert_close(logits[n][mask[n]], row)


def assert_same_tensors(directory, other):
    """Asserts that two directories hold the same tensors, bit for bit and with the same dtype."""
    a, b = ({k: v for f in Path(d).glob("*.safetensors") for k, v in load_file(f).items()}
            for d in (directory, other))  # fmt: skip
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert b[name].dtype == tensor.dtype and torch.equal(b[name], tensor), name


def params(model):
    return {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_from_either_layout(tmp_path, case):
    overrides, saving = CASES[case]
    config = oracles.tiny_llama_config(**overrides)
    model = oracles.save_tiny_llama(tmp_path / "hf", config, oracles.tiny_tokenizer(), **saving)
    if case == "sharded":
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    policy, _ = load_policy(tmp_path / "hf")
    assert_same_logits(policy, model)
    from_hf.convert(tmp_path / "hf", tmp_path / "converted", "policy")
    converted, _ = load_policy(tmp_path / "converted")
    assert converted.config == policy.config == read_policy_config(tmp_path / "converted")
    assert nnx.split(converted)[0] == nnx.split(policy)[0]
    for path, array in params(policy).items():
        np.testing.assert_array_equal(params(converted)[path], array)


@architectures
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_policy_round_trip_is_bit_exact(tmp_path, architecture, dtype, tied):
    overrides = oracles.ARCHITECTURES[architecture]
    source, model = hf_policy(tmp_path / "hf", dtype, tie_word_embeddings=tied, **overrides)
    from_hf.convert(source, tmp_path / "ours", "policy")
    to_hf.export(tmp_path / "ours", tmp_path / "back")
    to_hf.save_policy(tmp_path / "saved", *load_policy(source, dtype))
    assert_same_tensors(source, tmp_path / "back")
    assert_same_tensors(source, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert type(saved) is type(model)
    np.testing.assert_array_equal(torch_logits(saved, ROWS[0]), torch_logits(model, ROWS[0]))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    np.testing.assert_array_equal(torch_logits(again, ROWS[0]), torch_logits(model, ROWS[0]))
    assert again.config.eos_token_id == 260
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template


def test_converting_to_another_dtype_rounds_once(tmp_path):
    source, model = hf_policy(tmp_path / "hf")
    from_hf.convert(source, tmp_path / "ours", "policy", dtype="bfloat16")
    to_hf.export(tmp_path / "ours", tmp_path / "back")
    expected = {n: t.to(torch.bfloat16) for n, t in model.state_dict().items()}
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[name])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.bfloat16
    policy, _ = load_policy(source, dtype="bfloat16")
    embedding = np.asarray(policy.embed_tokens[...].astype(jnp.float32))
    np.testing.assert_array_equal(embedding, expected["model.embed_tokens.weight"].float().numpy())


@architectures
def test_greedy_tokens_equal_those_of_transformers(tmp_path, architecture):
    source, model = hf_policy(tmp_path / "hf", **oracles.ARCHITECTURES[architecture])
    policy, _ = load_policy(source)
    tokens, mask = padded(ROWS[:2])
    out = generate(policy, tokens, mask, max_new_tokens=6, temperature=0.0, stop_ids=())
    for n, tokens_r in enumerate(out.tokens_br):
        row = torch.tensor([ROWS[n % 2]])
        expected = model.generate(row, max_new_tokens=6, do_sample=False, eos_token_id=None)
        np.testing.assert_array_equal(tokens_r, expected[0, row.shape[1] :])


def test_loading_places_every_parameter(tmp_path):
    source, _ = hf_policy(tmp_path / "hf")
    seen = {}

    def place(path, shape, dtype, read):
        seen[path] = read(tuple(slice(0, n) for n in shape))
        assert seen[path].shape == shape and seen[path].dtype == dtype
        return jnp.asarray(seen[path])

    policy, _ = load_policy(source, place=place)
    assert seen["layers.mlp.down_proj.kernel"].shape == (3, 64, 32)
    assert sorted(seen) == sorted(".".join(path) for path in params(policy))


def test_stop_ids_are_the_tokenizers_and_the_generation_configs(tmp_path):
    source, _ = hf_policy(tmp_path / "hf")
    assert load_policy(source)[0].stop_ids == (260,)
    (source / "generation_config.json").write_text('{"eos_token_id": [257, 260]}')
    assert load_policy(source)[0].stop_ids == (257, 260)
    from_hf.convert(source, tmp_path / "ours", "policy")
    assert load_policy(tmp_path / "ours")[0].stop_ids == (257, 260)
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load_policy(source)[0].stop_ids == (7, 260)


def test_tied_checkpoint_may_store_an_identical_head(tmp_path):
    source, model = hf_policy(tmp_path / "hf", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(
        4
    )  # older versions of transformers wrote it
    oracles.save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert_same_logits(load_policy(source)[0], model)


# ---- SARM


@pytest.mark.parametrize(
    ("use_activation", "dtype", "layout"),
    [(True, "float32", "hf"), (True, "bfloat16", "converted"), (False, "float32", "converted")],
)
@architectures
def test_sarm_scores_and_latents_equal_torch(tmp_path, use_activation, dtype, layout, architecture):
    tokenizer = oracles.tiny_tokenizer()
    oracle = oracles.save_tiny_sarm(
        tmp_path / "hf", tokenizer, use_activation=use_activation, dtype=dtype,
        rope_parameters=oracles.LLAMA3_ROPE, **oracles.ARCHITECTURES[architecture],
    )  # fmt: skip
    if layout == "converted":
        from_hf.convert(tmp_path / "hf", tmp_path / "converted", "sarm")
    sarm = load_sarm(tmp_path / layout)
    assert sarm.model.config == read_sarm_config(tmp_path / layout)
    assert sarm.model.config.trunk.num_hidden_layers == 2
    assert sarm.model.config.sae.use_topk is use_activation
    score_b, z_bf = sarm.score_tokens(ROWS)
    with torch.no_grad():
        expected = [oracle(torch.tensor([row])) for row in ROWS]
    weight_f = np.asarray(sarm.model.score[...], np.float32)
    for score, z_f, out in zip(score_b, z_bf, expected, strict=True):
        reference = out.z_m.numpy()
        np.testing.assert_array_equal(z_f != 0, reference != 0)
        assert (reference != 0).sum() == (8 if use_activation else 64)
        assert_close(z_f, reference)
        assert_close(score, out.score.item(), terms=reference * weight_f)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sarm_round_trip_is_bit_exact(tmp_path, dtype):
    oracles.save_tiny_sarm(tmp_path / "hf", oracles.tiny_tokenizer(), dtype=dtype)
    from_hf.convert(tmp_path / "hf", tmp_path / "ours", "sarm")
    to_hf.export(tmp_path / "ours", tmp_path / "back", kind="sarm")
    assert_same_tensors(tmp_path / "hf", tmp_path / "back")  # model.norm.weight included
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("hf", "back"))
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    ("folder", "field", "use_topk"),
    [
        ("Llama_token_Latent64_Layer2_K8_50M-SARM-TopK-LastToken-1/checkpoint-10", {}, True),
        ("Llama_token_Latent64_Layer2_K8_50M-SARM-woTopK-1", {}, False),
        ("Llama_token_Latent64_Layer2_K8_x", {"sarm_use_topk": False}, False),
        ("woTopK_runs/Llama_token_Latent64_Layer2_K8_50M-SARM-TopK-1", {}, True),
    ],
)
def test_older_sarm_checkpoints_have_their_sizes_in_the_name_of_the_directory(
    tmp_path, folder, field, use_topk
):
    source = tmp_path / folder
    oracles.save_tiny_sarm(source, oracles.tiny_tokenizer(), use_activation=use_topk)
    hf = json.loads((source / "config.json").read_text())
    expected = read_sarm_config(source)
    del hf["sarm_param"]
    (source / "config.json").write_text(json.dumps({**hf, **field}))
    assert read_sarm_config(source) == expected
    classifier = {**hf, **field, "architectures": ["LlamaForSequenceClassification"]}
    (source / "config.json").write_text(json.dumps(classifier))
    assert read_sarm_config(source) == expected
    assert expected.sae.use_topk is use_topk
    to_hf.export(
        source, tmp_path / "new", kind="sarm"
    )  # another name; the config now has sarm_param
    assert read_sarm_config(tmp_path / "new") == expected


def test_a_trained_sarm_is_saved_in_the_hf_layout(tmp_path):
    oracle = oracles.save_tiny_sarm(tmp_path / "hf", oracles.tiny_tokenizer())
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    sarm = load_sarm(tmp_path / "hf")
    sarm.model.score[...] = sarm.model.score[...] * 2
    trained_b = sarm.score_tokens(ROWS)[0]
    for name, config in (("with", hf), ("without", None)):
        to_hf.save_sarm(tmp_path / name, sarm.model, sarm.tokenizer, config)
        state = load_file(tmp_path / name / "model.safetensors")
        assert state.pop("model.norm.weight").shape == (32,)
        oracle.load_state_dict(state)  # strict, so with the names and shapes of the reference
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["architectures"] == ["LlamaSARM"]
        assert saved["sarm_param"]["sae_source_layer"] == 2
        assert (saved["pad_token_id"], saved["eos_token_id"]) == (261, 260)
        again = load_sarm(tmp_path / name)
        with torch.no_grad():
            expected = [oracle(torch.tensor([row])).score.item() for row in ROWS]
        assert_close(trained_b, expected)
        np.testing.assert_array_equal(again.score_tokens(ROWS)[0], trained_b)


# ---- adapters


def with_random_adapter(policy, config, seed=0):
    rng = np.random.default_rng(seed)
    add_lora(policy, config, nnx.Rngs(0))
    for _, variable in nnx.to_flat_state(nnx.state(policy, LoRAParam)):
        variable[...] = jnp.asarray(rng.normal(0, 0.2, variable.shape), jnp.float32)


def run_directory(tmp_path, source, config, **saving):
    """Writes config.json and adapter/ like a PPO run."""
    policy, tokenizer = load_policy(source)
    with_random_adapter(policy, config)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"policy_model": str(source)}))
    save_adapter(tmp_path / "run" / "adapter", policy, config, str(source), tokenizer, **saving)
    return policy


@architectures
@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=4, alpha=12.0),
        LoRAConfig(rank=2, alpha=0.5, dropout=0.1, target_modules=TARGET_MODULES),
    ],
)
def test_adapter_gives_the_same_logits_in_peft_and_merged(tmp_path, architecture, config):
    source, base = hf_policy(tmp_path / "hf", **oracles.ARCHITECTURES[architecture])
    head = {"kernel": np.ones((32, 1), np.float32), "bias": np.zeros((1,), np.float32)}
    policy = run_directory(tmp_path, source, config, value_head=head)
    adapter = tmp_path / "run" / "adapter"

    before = torch_logits(base, ROWS[0])
    wrapped = peft.PeftModel.from_pretrained(base, adapter).eval()
    assert np.abs(torch_logits(wrapped, ROWS[0]) - before).max() > 0.1
    assert_same_logits(policy, wrapped)
    assert load_file(adapter / "value_head.safetensors").keys() == head.keys()
    assert json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"] == config.alpha

    to_hf.export(tmp_path / "run", tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert type(merged) is type(base)
    assert_same_logits(policy, merged)

    to_hf.export(tmp_path / "run", tmp_path / "copy")
    fresh, _ = load_policy(source)
    load_adapter(tmp_path / "copy", fresh)
    for path, array in params(policy).items():
        np.testing.assert_array_equal(params(fresh)[path], array)


def test_merging_into_a_converted_bfloat16_base_sums_in_float32(tmp_path):
    source, base = hf_policy(tmp_path / "hf", "bfloat16")
    config = LoRAConfig(rank=2, alpha=4.0, target_modules=("v_proj", "down_proj"))
    run_directory(tmp_path, source, config)
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    from_hf.convert(source, tmp_path / "ours", "policy")
    run_config = tmp_path / "run" / "config.json"
    run_config.write_text(json.dumps({"policy_model": str(tmp_path / "ours")}))
    to_hf.export(tmp_path / "run", tmp_path / "merged", merge=True)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors.keys() == expected.keys()
    changed = [n for n, t in load_file(source / "model.safetensors").items()
               if not torch.equal(t, tensors[n])]  # fmt: skip
    assert len(changed) == 3 * 2
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-6)


def test_an_adapter_that_peft_wrote_loads(tmp_path):
    source, base = hf_policy(tmp_path / "hf")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(base, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    policy, _ = load_policy(source)
    load_adapter(tmp_path / "adapter", policy)
    assert_same_logits(policy, wrapped)


@pytest.mark.parametrize("initialiser", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_is_refused(tmp_path, initialiser):
    source, base = hf_policy(tmp_path / "hf")
    config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", init_lora_weights=initialiser)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    policy, _ = load_policy(source)
    with pytest.raises(InputError, match=f"init_lora_weights='{initialiser}': not supported"):
        load_adapter(tmp_path / "adapter", policy)


def test_saving_an_adapter_again_replaces_it_only_on_request(tmp_path):
    source, _ = hf_policy(tmp_path / "hf")
    policy, _ = load_policy(source)
    config = LoRAConfig(rank=2, alpha=2.0)
    with_random_adapter(policy, config)
    save_adapter(tmp_path / "adapter", policy, config, "base", value_head={"w": np.ones(3)})
    with pytest.raises(ValueError, match="exists already"):
        save_adapter(tmp_path / "adapter", policy, config, "other")
    assert (tmp_path / "adapter" / "value_head.safetensors").exists()
    save_adapter(tmp_path / "adapter", policy, config, "other", replace=True)
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "hf"]


# ---- files


def test_transformers_reads_the_shards_of_the_writer(tmp_path):
    source, model = hf_policy(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    files, writer = TensorFiles(source), TensorWriter(tmp_path / "out", shard_bytes=30_000)
    for name in files.names():
        writer.add(name, files.read(name))
    assert writer.close() == len(files.names())
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    shutil.copy(source / "config.json", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    np.testing.assert_array_equal(torch_logits(again, ROWS[0]), torch_logits(model, ROWS[0]))
    assert_same_tensors(source, tmp_path / "out")


def test_non_contiguous_arrays_are_written_correctly(tmp_path):
    writer, array = TensorWriter(tmp_path), np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add("transposed", array.T)
    writer.close()
    np.testing.assert_array_equal(TensorFiles(tmp_path).read("transposed"), array.T)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_mapped_tensors_equal_read_ones(tmp_path, dtype):
    arrays = {
        "odd": np.arange(3, dtype=np.uint8),
        "matrix": np.arange(1100 * 1001)
        .reshape(1100, 1001)
        .astype(dtype),  # copied by several threads
        "number": np.asarray(2.5, dtype),
        "none": np.zeros((0, 4), dtype),
    }
    with TensorWriter(tmp_path / "hf") as writer:
        (tmp_path / "hf").mkdir()
        for name, array in arrays.items():
            writer.add(name, array)
        writer.close()
    files = TensorFiles(tmp_path / "hf")
    for name, array in arrays.items():
        mapped = files.mapped(name)
        assert (mapped.dtype, mapped.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(mapped, array)
        np.testing.assert_array_equal(mapped, files.read(name))
    assert not files.mapped("matrix").flags.writeable
    (tmp_path / "ours").mkdir()
    with TensorWriter(tmp_path / "ours") as writer:
        writer.add("matrix", files.mapped("matrix").T)
        writer.close()
    np.testing.assert_array_equal(TensorFiles(tmp_path / "ours").read("matrix"), arrays["matrix"].T)


def test_tokenizer_is_the_same_from_either_layout(tmp_path):
    source, _ = hf_policy(tmp_path / "hf")
    from_hf.convert(source, tmp_path / "ours", "policy")
    text = "<|start_header_id|>é 🙂  x<|eot_id|>"
    ids = oracles.tiny_tokenizer()(text).input_ids
    for directory in (source, tmp_path / "ours"):
        tokenizer = load_hf_tokenizer(directory)
        assert tokenizer(text).input_ids == ids
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (260, 261)


def test_the_config_of_an_export_names_the_dtype_of_most_weights(tmp_path):
    source, _ = hf_policy(tmp_path / "hf", dtype="bfloat16")
    path = source / "model.safetensors"
    tensors = {n: t.float() if "norm" in n else t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    to_hf.export(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_the_index_has_the_size_of_all_tensors(tmp_path):
    writer = TensorWriter(tmp_path, shard_bytes=100)
    for n in range(5):
        writer.add(str(n), np.zeros(30, np.float32))
    writer.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 120
