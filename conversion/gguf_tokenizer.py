"""Builds the byte-level BPE tokenizer that the metadata of a GGUF file describes.

llama.cpp names the rule that splits text before merging (`tokenizer.ggml.pre`). The rules of
Llama, SmolLM and Qwen are implemented here; others are refused. The converter of transformers
needs PyTorch and does not split digits as SmolLM does. Source: llama.cpp, llama-vocab.cpp.
"""

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from sarm_jax.io.errors import InputError
from sarm_jax.io.libraries import as_input_error

CONTROL, USER_DEFINED = 3, 4  # token types

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")  # digit by digit
_GPT2 = ("gpt-2", "default")
_DIGIT_WISE = ("smollm",)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2",)


def tokenizer_from_metadata(metadata: dict[str, Any], max_length: int) -> PreTrainedTokenizerFast:
    """Builds the tokenizer, with its chat template if there is one.

    The pad token is never the end-of-sequence token. If the file names the same token for both,
    `<|endoftext|>`, the unknown token or the first other control token is used for padding.

    Args:
        metadata: the fields of the GGUF file.
        max_length: the number of positions of the model.

    Raises:
        InputError: the tokenizer is of another kind, or fields contradict each other.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise InputError(
            f"tokenizer.ggml.model={kind!r}: only 'gpt2' (byte-level BPE) is supported"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    if len(types) != len(tokens):
        raise InputError(f"tokenizer.ggml.token_type: {len(types)} types for {len(tokens)} tokens")
    core = _bpe(tokens, metadata["tokenizer.ggml.merges"], pre)
    control = [token for token, t in zip(tokens, types, strict=True) if t == CONTROL]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    user = [token for token, t in zip(tokens, types, strict=True) if t == USER_DEFINED]
    core.add_tokens([AddedToken(token, normalized=False) for token in user])
    if core.get_vocab_size() != len(tokens):
        raise InputError("tokenizer.ggml.tokens: a token appears twice")
    named = _named_tokens(metadata, tokens, control)
    if metadata.get("tokenizer.ggml.add_bos_token", pre in _LLAMA3):
        core.post_processor = _prepend(named["bos_token"], core)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{name: token for name, token in named.items() if token is not None},
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _bpe(tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    """Builds the BPE model with the splitting rule `pre`."""
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    with as_input_error("tokenizer.ggml.merges: not the merges of these tokens"):
        # As in Llama-3's own tokenizer, a word that is a token is not split.
        core = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in _LLAMA3))
    if pre in _GPT2:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre in _DIGIT_WISE:
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif pre in (*_LLAMA3, *_QWEN2):
        if pre in _QWEN2:  # as in Qwen's own tokenizer.json
            core.normalizer = normalizers.NFC()
        split = _QWEN2_SPLIT if pre in _QWEN2 else _LLAMA3_SPLIT
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        supported = ", ".join((*_GPT2, *_DIGIT_WISE, *_LLAMA3, *_QWEN2))
        raise InputError(f"tokenizer.ggml.pre={pre!r}: only {supported} are supported")
    core.decoder = decoders.ByteLevel()
    return core


def _named_tokens(
    metadata: dict[str, Any], tokens: list[str], control: list[str]
) -> dict[str, str | None]:
    """Returns the special tokens by their names in transformers; None if there is none."""
    named: dict[str, str | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if i is not None and not 0 <= i < len(tokens):
            raise InputError(f"tokenizer.ggml.{key}_token_id={i}: there are {len(tokens)} tokens")
        named[f"{name}_token"] = None if i is None else tokens[i]
    eos, bos = named["eos_token"], named["bos_token"]
    if eos is None:
        raise InputError("tokenizer.ggml.eos_token_id: missing")
    if named["pad_token"] in (eos, None):
        preferred = [t for t in ("<|endoftext|>", named["unk_token"]) if t in tokens]
        others = [t for t in [*preferred, *control] if t not in (eos, bos)]
        named["pad_token"] = others[0] if others else None
    return named


def _prepend(bos: str | None, core: Tokenizer) -> processors.TemplateProcessing:
    """Builds the post-processor that puts `bos` before every text."""
    if bos is None:
        raise InputError("tokenizer.ggml.add_bos_token is true, but bos_token_id is missing")
    return processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, core.token_to_id(bos))],
    )
