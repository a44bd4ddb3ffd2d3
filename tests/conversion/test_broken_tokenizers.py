"""Tokenizers and templates that anybody may have written: they work, or are refused in one line.

Every node of small tokenizer.json files, one for each kind of model, is replaced by bad values.
Rust code that panics raises a BaseException and writes to stderr itself; neither may be seen.
"""

import copy
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from conversion.load import load_hf_tokenizer
from sarm_jax.io.errors import InputError
from sarm_jax.io.libraries import as_input_error, native_messages_of_failure_dropped
from sarm_jax.models import chat
from tests.oracles import CHATML_TEMPLATE, tiny_tokenizer

DELETE = object()
BAD_VALUES = (DELETE, None, -1, 1 << 62, 0.5, "", "nope", "\ud800", [], [[]], {}, {"type": "nope"})
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
LETTERS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz.ATu", "▁", "▁a"]


def unigram() -> Tokenizer:
    core = Tokenizer(models.Unigram([(t, -float(n)) for n, t in enumerate(LETTERS)], 0, False))
    core.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("  ", " "), normalizers.Prepend("▁")]
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="$A $B", special_tokens=[("<|im_start|>", 1)]
    )
    return core


def word_piece() -> Tokenizer:
    vocab = {token: n for n, token in enumerate([*LETTERS, "##b"])}
    core = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("<|im_end|>", 2), ("<|im_start|>", 1))
    core.decoder = decoders.WordPiece()
    return core


def byte_fallback() -> Tokenizer:
    vocab = {token: n for n, token in enumerate([*LETTERS, "ab", "<0x0A>"])}
    core = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    core.enable_truncation(8)
    core.enable_padding(length=4)
    return core


KINDS = {"unigram": unigram, "word_piece": word_piece, "byte_fallback": byte_fallback}


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields the paths of all nodes; of a long list or vocabulary only the first two."""
    if path:
        yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for number, (key, child) in enumerate(items):
            if number < 2 or len(value) < 20:
                yield from nodes(child, (*path, key))


def replaced(tree: Any, path: tuple, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if value is DELETE:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return tree


def works_or_is_refused(directory) -> bool:
    """Uses the tokenizer of a directory; returns False if that raises an InputError."""
    try:
        tokenizer = load_hf_tokenizer(directory)
        chat.encode_prompt(tokenizer, "a text")
        chat.encode_conversation(tokenizer, "a <|im_end|>", "b")
        tokenizer.decode([0, 1, 2])
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return False
    return True


@pytest.fixture
def good(tmp_path, request):
    """A directory with a tokenizer of the kind in `request.param`, which works."""
    PreTrainedTokenizerFast(
        tokenizer_object=KINDS[request.param](),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL,
        chat_template=CHATML_TEMPLATE,
    ).save_pretrained(tmp_path)
    assert works_or_is_refused(tmp_path)
    return tmp_path


@pytest.mark.parametrize("good", KINDS, indirect=True)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_every_node_of_a_tokenizer_replaced(good, name, capfd):
    tree = json.loads((good / name).read_text())
    refused = 0
    paths = list(nodes(tree))
    for n, path in enumerate(paths):
        for value in BAD_VALUES[n % 4 :: 4]:
            (good / name).write_text(json.dumps(replaced(tree, path, value)))
            refused += not works_or_is_refused(good)
    assert refused > len(paths) / 2
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        (("model",), {"type": "Unigram", "unk_id": None, "vocab": []}),
        (("model", "vocab"), {}),
        (("post_processor", "special_tokens"), {}),
        (("post_processor", "single", 0, "SpecialToken", "id"), "nope"),
    ],
)
def test_what_makes_the_library_panic_is_one_line(tmp_path, path, value, capfd):
    tiny_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(replaced(json.loads(file.read_text()), path, value)))
    with pytest.raises(InputError, match=f"{tmp_path}: the tokenizer cannot be read"):
        load_hf_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ '\\ud800' }}",
        "{{ messages[0].content }}\\ud800{{ '\\udc00' }}",
        "{{ raise_exception('\\ud800 no') }}",
        "{{ 1 / 0 }}",
        "{{ messages[9].content.x }}",
        "{% for m in messages %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10**9) | list }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'nothing' %}",
        "{{ messages | map(attribute='content') | map('int', 'x') | sum }}",
        "",
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    assert not works_or_is_refused(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit])
def test_the_guard_lets_what_ends_the_process_through(error):
    with pytest.raises(error), as_input_error("a library fails"):
        raise error


def test_the_guard_needs_no_text_of_the_error():
    class SilentError(BaseException):
        def __str__(self):
            raise RuntimeError

    with pytest.raises(InputError) as refused, as_input_error("it fails", "mend it"):
        raise SilentError
    assert str(refused.value) == "it fails (SilentError): mend it"
    with pytest.raises(InputError, match="^as it is$"), as_input_error("it fails"):
        raise InputError("as it is")


def test_what_a_working_library_writes_is_shown(capfd):
    with native_messages_of_failure_dropped():
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"
