"""Converts a GGUF file of a Llama, Qwen2 or Qwen3 to a Hugging Face directory, without PyTorch.

    python -m conversion.from_gguf --src=FILE.gguf --dst=DIR

Weights are dequantised to float32. In files of architecture `llama`, which Mistral's are too, the
rows of W_q and W_k are in another order, in which the two rows of a rotated pair are neighbours;
here they are put back in the order of Hugging Face. Source: llama.cpp, convert_hf_to_gguf.py.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from conversion import cli
from conversion.checkpoint import OVERHEAD
from conversion.directory import atomic_directory, save_tokenizer, write_hf_json
from conversion.gguf_tokenizer import tokenizer_from_metadata
from conversion.hf_config import hf_llama_dict, llama_config
from conversion.keys import TensorSpec, specs_of
from conversion.problems import report
from conversion.safetensors_io import TensorWriter
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_file
from sarm_jax.io.libraries import as_input_error
from sarm_jax.models.llama import LlamaConfig

FLAGS = flags.FlagValues()
flags.DEFINE_string("src", None, "A .gguf file.", FLAGS, required=True)
flags.DEFINE_string("dst", None, "New directory to write.", FLAGS, required=True)

TABLE = {  # our path → GGUF name
    "embed_tokens": "token_embd.weight",
    "layers.attn.q_proj.kernel": "blk.{}.attn_q.weight",
    "layers.attn.k_proj.kernel": "blk.{}.attn_k.weight",
    "layers.attn.v_proj.kernel": "blk.{}.attn_v.weight",
    "layers.attn.q_proj.bias": "blk.{}.attn_q.bias",
    "layers.attn.k_proj.bias": "blk.{}.attn_k.bias",
    "layers.attn.v_proj.bias": "blk.{}.attn_v.bias",
    "layers.attn.q_norm.scale": "blk.{}.attn_q_norm.weight",
    "layers.attn.k_norm.scale": "blk.{}.attn_k_norm.weight",
    "layers.attn.o_proj.kernel": "blk.{}.attn_output.weight",
    "layers.mlp.gate_proj.kernel": "blk.{}.ffn_gate.weight",
    "layers.mlp.up_proj.kernel": "blk.{}.ffn_up.weight",
    "layers.mlp.down_proj.kernel": "blk.{}.ffn_down.weight",
    "layers.input_layernorm.scale": "blk.{}.attn_norm.weight",
    "layers.post_attention_layernorm.scale": "blk.{}.ffn_norm.weight",
    "norm.scale": "output_norm.weight",
    "lm_head": "output.weight",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_REQUIRED = (  # {} is the architecture
    "general.architecture", "{}.block_count", "{}.context_length", "{}.embedding_length",
    "{}.feed_forward_length", "{}.attention.head_count", "{}.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges",
)  # fmt: skip
_KNOWN = (
    *_REQUIRED, "{}.vocab_size", "{}.attention.head_count_kv", "{}.rope.freq_base",
    "{}.rope.dimension_count", "{}.attention.key_length", "{}.attention.value_length",
    "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.scores",
    "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.eot_token_id",
    "tokenizer.chat_template",
)  # fmt: skip
_KINDS = {  # the types of fields that are not whole numbers
    "{}.attention.layer_norm_rms_epsilon": float,
    "{}.rope.freq_base": float,
    "tokenizer.ggml.tokens": list,
    "tokenizer.ggml.token_type": list,
    "tokenizer.ggml.merges": list,
}
_DESCRIPTIVE = ("GGUF.", "general.", "quantize.")
_SPECIAL = ("bos", "eos", "pad")


def convert(src: str | Path, dst: str | Path) -> str:
    """Writes the HF directory and returns a summary line.

    Raises:
        InputError: `src` is not a GGUF file or of another architecture, or its metadata or tensors
            are not supported.
    """
    start = time.perf_counter()
    reader = _open(Path(src))
    with as_input_error(f"{src}: its metadata cannot be read"):
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(metadata, tied="output.weight" not in tensors)
        with as_input_error("the tokenizer cannot be built"):
            tokenizer = tokenizer_from_metadata(metadata, config.max_position_embeddings)
        specs = specs_of(config)
        _check_tensors(specs, tensors)
    except InputError as error:
        raise InputError(f"{src}: {error}") from error
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
    ids = {name: i for name, i in ids.items() if i is not None}
    needed = 4 * sum(math.prod(spec.shape) for spec in specs) + OVERHEAD
    with atomic_directory(dst, needed=needed) as directory, TensorWriter(directory) as writer:
        for spec in tqdm(specs, desc=f"writing {dst}", unit="tensor"):
            writer.add(spec.hf_name, _weights(tensors[_gguf_name(spec)], spec, config))
        writer.close()
        write_hf_json(
            directory / "config.json", hf_llama_dict(config, torch_dtype="float32", **ids)
        )
        write_hf_json(directory / "generation_config.json", ids)
        save_tokenizer(tokenizer, directory)
    seconds = time.perf_counter() - start
    return f"{dst}: {len(specs)} tensors, {writer.total_bytes:,} bytes, {seconds:.1f} s"


def _open(src: Path) -> Any:
    if not src.exists():
        raise InputError(f"{src}: no such file")
    check_file(src)
    try:
        import gguf  # an extra package that only this command needs
    except ImportError:
        raise InputError(f"{src}: reading it needs one more package: pip install gguf") from None
    with as_input_error(f"{src}: truncated or not a GGUF file"):
        return gguf.GGUFReader(src)


def _config(metadata: dict[str, Any], tied: bool) -> LlamaConfig:
    model_type = _check_metadata(metadata)

    def field(name: str, default: Any = None) -> Any:
        return metadata.get(f"{model_type}.{name}", default)

    heads = field("attention.head_count")
    head_dim = field("attention.key_length", field("embedding_length") // max(heads, 1))
    problems = []
    for name in ("rope.dimension_count", "attention.value_length"):
        value = field(name, head_dim)
        if value != head_dim:
            problems.append(
                f"{model_type}.{name}={value}: only the head size {head_dim} is supported"
            )
    vocab_size = len(metadata["tokenizer.ggml.tokens"])
    if field("vocab_size", vocab_size) != vocab_size:
        problems.append(f"{model_type}.vocab_size={field('vocab_size')}: {vocab_size} tokens")
    report("metadata", problems)
    return llama_config(
        {
            "model_type": model_type,
            "vocab_size": vocab_size,
            "hidden_size": field("embedding_length"),
            "intermediate_size": field("feed_forward_length"),
            "num_hidden_layers": field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": field("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": _shortest(field("attention.layer_norm_rms_epsilon")),
            "rope_theta": _shortest(field("rope.freq_base", 10000.0)),
            "tie_word_embeddings": tied,
            "max_position_embeddings": field("context_length"),
        }
    )


def _check_metadata(metadata: dict[str, Any]) -> str:
    """Returns the architecture; raises InputError if a field is missing, unknown or mistyped."""
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        *others, last = map(repr, _ARCHITECTURES)
        raise InputError(
            f"general.architecture={architecture!r}: only {', '.join(others)} and {last} are "
            "supported"
        )
    known = {name.format(architecture) for name in _KNOWN}
    required = [name.format(architecture) for name in _REQUIRED]
    kinds = {name.format(architecture): kind for name, kind in _KINDS.items()}
    problems = [f"{name}: missing" for name in required if name not in metadata]
    for name, value in metadata.items():
        if name not in known and not name.startswith(_DESCRIPTIVE):
            problems.append(f"{name}={str(value)[:60]}: unknown metadata")
    if metadata.get("tokenizer.ggml.add_eos_token"):
        problems.append("tokenizer.ggml.add_eos_token=True: only False is supported")
    for name, value in metadata.items():
        kind = kinds.get(name, int if name.startswith(f"{architecture}.") else None)
        if kind is not None and type(value) is not kind:
            problems.append(f"{name}={str(value)[:60]}: expected {kind.__name__}")
    report("metadata", problems)
    return architecture


def _shortest(value: float) -> float:
    """Rounds to the shortest decimal of the same float32: 9.999999747378752e-06 becomes 1e-05."""
    return float(str(np.float32(value)))


def _gguf_name(spec: TensorSpec) -> str:
    """Returns the tensor's name in a GGUF file."""
    return TABLE[".".join(spec.path)].format(spec.layer)


def _check_tensors(specs: Sequence[TensorSpec], tensors: dict[str, Any]) -> None:
    """Raises InputError if a tensor is missing, unexpected or of another shape."""
    unmatched = set(tensors)
    problems = []
    for spec in specs:
        name = _gguf_name(spec)
        if name not in tensors:
            problems.append(f"{name}: missing")
            continue
        unmatched.discard(name)
        shape = tuple(
            int(n) for n in reversed(tensors[name].shape)
        )  # GGUF lists the fastest axis first
        if shape != spec.hf_shape:
            problems.append(f"{name}: shape {list(shape)}, expected {list(spec.hf_shape)}")
    if "rope_freqs.weight" in unmatched:
        unmatched.discard("rope_freqs.weight")
        problems.append("rope_freqs.weight: scaled RoPE is not supported, convert the HF model")
    problems += [f"{name}: unexpected tensor" for name in sorted(unmatched)]
    report("tensors", problems)


def _weights(tensor: Any, spec: TensorSpec, config: LlamaConfig) -> np.ndarray:
    """Dequantises a tensor to float32, in the HF orientation."""
    from gguf.quants import dequantize

    with as_input_error(f"{tensor.name}: cannot be dequantised"):
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        array = array.reshape(spec.hf_shape)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    permuted = config.model_type == "llama"
    if permuted and spec.path[-1] == "kernel" and spec.path[-2] in heads:
        pairs = array.reshape(heads[spec.path[-2]], config.head_dim // 2, 2, -1)
        array = pairs.swapaxes(1, 2).reshape(spec.hf_shape)
    return array


def main(values: Any) -> str:
    """Runs the command with parsed flags."""
    return convert(values.src, values.dst)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
