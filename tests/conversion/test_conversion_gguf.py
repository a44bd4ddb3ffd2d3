"""Compares tiny GGUF files, written with the gguf package, with the models they were made from."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import from_gguf
from sarm_jax.io.errors import InputError
from tests import oracles

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def permuted(weights, heads):
    """Reorders W_q or W_k like llama.cpp's converter."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, weights.shape[1])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def tensors_of(model):
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        for projection, heads in (("q_proj", 4), ("k_proj", 2)):
            if projection in name and model.config.model_type == "llama":
                array = permuted(array, heads)
        for hf, ours in GGUF_NAMES.items():
            name = name.replace(hf, ours)
        yield name, array


def write_gguf(path, model, changes=None, drop=(), extra=None, quantization=None, merged="Ā Ā"):
    """Writes a model as a GGUF file.

    `changes` maps metadata keys to (type, value), or to None to leave a key out. The last token,
    259, is the result of the only merge, `merged` (by default of two NUL bytes).
    """
    tokenizer = oracles.chatml_tokenizer()
    tokens = [*tokenizer.convert_ids_to_tokens(range(259)), merged.replace(" ", "")]
    metadata = {
        "llama.block_count": ("uint32", 3),
        "llama.context_length": ("uint32", 512),
        "llama.embedding_length": ("uint32", 32),
        "llama.feed_forward_length": ("uint32", 64),
        "llama.attention.head_count": ("uint32", 4),
        "llama.attention.head_count_kv": ("uint32", 2),
        "llama.attention.layer_norm_rms_epsilon": ("float32", 1e-5),
        "llama.rope.freq_base": ("float32", 5000.0),
        "llama.rope.dimension_count": ("uint32", 8),
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "smollm"),
        "tokenizer.ggml.tokens": ("array", tokens),
        "tokenizer.ggml.token_type": ("array", [3, 3, 3] + [1] * (len(tokens) - 3)),
        "tokenizer.ggml.merges": ("array", [merged]),
        "tokenizer.ggml.bos_token_id": ("uint32", 1),
        "tokenizer.ggml.eos_token_id": ("uint32", 2),
        "tokenizer.ggml.unknown_token_id": ("uint32", 0),
        "tokenizer.ggml.padding_token_id": ("uint32", 2),
        "tokenizer.ggml.add_bos_token": ("bool", False),
        "tokenizer.chat_template": ("string", tokenizer.chat_template),
    }
    kind = model.config.model_type
    if kind != "llama":
        head_dim = getattr(model.config, "head_dim", 8)
        metadata |= dict.fromkeys(
            ("llama.attention.key_length", "llama.attention.value_length"), ("uint32", head_dim)
        )
        del metadata["llama.rope.dimension_count"]
        metadata = {name.replace("llama.", f"{kind}."): v for name, v in metadata.items()}
    metadata |= changes or {}
    writer = gguf.GGUFWriter(path, kind)
    for key, entry in metadata.items():
        if entry is not None:
            getattr(writer, f"add_{entry[0]}")(key, entry[1])
    for name, array in {**dict(tensors_of(model)), **(extra or {})}.items():
        if name in drop:
            continue
        if quantization is not None and array.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(array, quantization),
                              raw_dtype=quantization)  # fmt: skip
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path, request):
    config = oracles.tiny_llama_config(
        vocab_size=260,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        **oracles.ARCHITECTURES[getattr(request, "param", "llama")],
    )
    return oracles.save_tiny_llama(tmp_path / "hf", config, oracles.chatml_tokenizer())


@pytest.mark.parametrize(
    ("model", "tied"),
    [("llama", False), ("llama", True), ("qwen2", False), ("qwen2", True), ("qwen3", False)],
    indirect=["model"],
)
def test_logits_and_tokenizer_survive_gguf(tmp_path, model, tied):
    if tied:
        model.lm_head.weight.data = model.model.embed_tokens.weight.data
    file = write_gguf(tmp_path / "m.gguf", model, drop=["output.weight"] if tied else [])
    from_gguf.convert(file, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(again) is type(model)
    assert again.config.tie_word_embeddings is tied
    assert again.config.rms_norm_eps == 1e-5
    ids = torch.tensor([[1, 50, 200, 3, 2]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)

    tokenizer, expected = (
        AutoTokenizer.from_pretrained(tmp_path / "out"),
        oracles.chatml_tokenizer(),
    )
    for text in ("Hello, wörld 12  3\n\n🙂", "<|im_start|>user\nx<|im_end|>\n", "don't  "):
        assert tokenizer(text).input_ids == expected(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.eos_token_id == again.generation_config.eos_token_id == 2
    assert tokenizer.pad_token_id == 0  # the file has 2, which is eos


def test_quantised_weights_are_dequantised(tmp_path, model):
    q8 = gguf.GGMLQuantizationType.Q8_0
    file = write_gguf(tmp_path / "m.gguf", model, quantization=q8)
    from_gguf.convert(file, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        largest = tensor.abs().max()
        # Half a step of Q8_0, which is at most largest / 127 and is stored in float16.
        tolerance = (0.5 / 127 + 2**-11) * largest
        assert (again.state_dict()[name] - tensor).abs().max() <= tolerance, name


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "Ġ", "1", "2"]),
        ("qwen2", ["1", "2", "Ġ", "1", "2"]),
        ("gpt-2", ["12", "Ġ", "12"]),
        ("llama-bpe", None),
    ],
)
def test_digits_are_split_by_the_rule_of_the_file(tmp_path, model, pre, expected):
    changes = {"tokenizer.ggml.pre": ("string", pre)}
    if pre == "llama-bpe":
        changes["tokenizer.ggml.add_bos_token"] = None  # it is true by default for this rule
        expected = ["<|im_start|>", "12", "Ġ", "12"]
    file = write_gguf(tmp_path / "m.gguf", model, changes=changes, merged="1 2")
    from_gguf.convert(file, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 12").input_ids) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"llama.rope.scaling.factor": ("float32", 2.0)},
            r"llama.rope.scaling.factor=2.0: unknown",
        ),
        ({"llama.expert_count": ("uint32", 8)}, "llama.expert_count=8: unknown metadata"),
        ({"llama.rope.dimension_count": ("uint32", 4)}, "rope.dimension_count=4: only the head"),
        (
            {"llama.attention.head_count": ("array", [4, 4, 4])},
            r"llama.attention.head_count=\[4, 4, 4\]: expected int",
        ),
        ({"tokenizer.ggml.merges": ("string", "a b")}, "merges=a b: expected list"),
        ({"llama.block_count": None}, "llama.block_count: missing"),
        ({"tokenizer.ggml.model": ("string", "llama")}, "tokenizer.ggml.model='llama'"),
        ({"tokenizer.ggml.pre": ("string", "viking")}, "tokenizer.ggml.pre='viking'"),
        ({"llama.vocab_size": ("uint32", 300)}, "llama.vocab_size=300"),
        ({"tokenizer.ggml.eos_token_id": ("uint32", 900)}, "eos_token_id=900"),
        ({"llama.block_count": ("uint32", 4)}, r"blk.3.attn_norm.weight: missing; .*; and 1 more"),
        ({"llama.feed_forward_length": ("uint32", 65)}, r"shape \[64, 32\], expected \[65, 32\]"),
    ],
)
def test_unsupported_metadata_are_refused(tmp_path, model, change, message):
    file = write_gguf(tmp_path / "m.gguf", model, changes=change)
    with pytest.raises(InputError, match=message):
        from_gguf.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit_are_refused(tmp_path, model):
    extra = {"rope_freqs.weight": np.ones(4, np.float32), "blk.0.ffn_gate_inp.weight": np.ones(2)}
    file = write_gguf(tmp_path / "m.gguf", model, drop=["blk.1.attn_q.weight"], extra=extra)
    with pytest.raises(InputError) as error:
        from_gguf.convert(file, tmp_path / "out")
    for text in ("blk.1.attn_q.weight: missing", "rope_freqs.weight: scaled RoPE",
                 "blk.0.ffn_gate_inp.weight: unexpected tensor"):  # fmt: skip
        assert text in str(error.value)


@pytest.mark.parametrize("model", ["qwen2", "qwen3"], indirect=True)
def test_missing_biases_and_norms_are_named(tmp_path, model):
    name = "attn_q.bias" if model.config.model_type == "qwen2" else "attn_q_norm.weight"
    file = write_gguf(tmp_path / "m.gguf", model, drop=[f"blk.1.{name}"])
    with pytest.raises(InputError, match=f"blk.1.{name}: missing"):
        from_gguf.convert(file, tmp_path / "out")


def test_other_files_are_refused(tmp_path, model):
    gemma = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma2")
    gemma.write_header_to_file()
    gemma.write_kv_data_to_file()
    gemma.close()
    content = write_gguf(tmp_path / "m.gguf", model).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.gguf").write_text("hello, this is not a model at all")
    for name, message in (
        ("gemma.gguf", "architecture='gemma2': only 'llama', 'qwen2' and 'qwen3' are"),
        ("cut.gguf", "truncated"),
        ("text.gguf", "not a GGUF file"),
        ("none.gguf", "no such file"),
    ):
        with pytest.raises(InputError, match=message):
            from_gguf.convert(tmp_path / name, tmp_path / "out")


def test_gguf_defaults(tmp_path, model):
    changes = {"llama.rope.freq_base": None}
    from_gguf.convert(write_gguf(tmp_path / "a.gguf", model, changes=changes), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["rope_theta"] == 10000.0
    file = write_gguf(tmp_path / "b.gguf", model, changes={"llama.attention.head_count_kv": None})
    with pytest.raises(Exception, match=r"attn_k.weight: shape \[16, 32\], expected \[32, 32\]"):
        from_gguf.convert(file, tmp_path / "b")
