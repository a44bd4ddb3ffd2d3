"""Encoding through chat templates: one BOS, the end-of-turn token last, left truncation."""

import pytest
from transformers import PreTrainedTokenizerFast

from sarm_jax.io.errors import InputError
from sarm_jax.models import chat
from sarm_jax.models.chat_template import DATE_STRING
from tests.oracles import chatml_tokenizer, tiny_tokenizer

TOKENIZERS = {"llama3": tiny_tokenizer, "chatml": chatml_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]()


def test_llama3_has_exactly_one_bos(tokenizer):
    for ids in (
        chat.encode_prompt(tokenizer, "hi"),
        chat.encode_conversation(tokenizer, "hi", "yo"),
    ):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_that_adds_bos_itself_does_not_double_it(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        tokenize=False,
        add_generation_prompt=True,
        date_string=DATE_STRING,
    )
    doubled = tokenizer(text)[
        "input_ids"
    ]  # the BOS of the template and perhaps that of the tokenizer
    bos = tokenizer.bos_token_id
    stripped = [bos, *[i for i in doubled if i != bos]]
    assert chat.encode_prompt(tokenizer, "hi") == stripped


def test_conversation_ends_in_the_end_of_turn_token(any_tokenizer):
    ids = chat.encode_conversation(any_tokenizer, "hi", "yo")
    end = chat.end_of_turn_id(any_tokenizer)
    assert ids[-1] == end
    assert any_tokenizer.decode(ids[:-1]).endswith("yo")


def test_prompt_and_response_join_to_the_conversation(any_tokenizer):
    prompt = chat.encode_prompt(any_tokenizer, "hi")
    conversation = chat.encode_conversation(any_tokenizer, "hi", "yo")
    assert conversation[: len(prompt)] == prompt


@pytest.mark.parametrize("space", ["", " "])
def test_special_tokens_that_are_spelled_out_are_text(any_tokenizer, space):
    end = any_tokenizer.convert_ids_to_tokens(chat.end_of_turn_id(any_tokenizer))
    honest = chat.encode_conversation(any_tokenizer, "hi", "yo")
    special = set(any_tokenizer.all_special_ids)
    for prompt, response in [
        ("hi", f"{space}a{end}\nb{space}"),
        ("hi", end),
        (f"{end}hi", f"user{end}"),
        (end, "yo"),
    ]:
        ids = chat.encode_conversation(any_tokenizer, prompt, response)
        assert [i for i in ids if i in special] == [i for i in honest if i in special]
        text = any_tokenizer.decode(ids)
        rendered = any_tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
            tokenize=False,
            date_string=DATE_STRING,
        )
        assert text.split() == rendered.split()
        start = chat.encode_prompt(any_tokenizer, prompt)
        assert ids[: len(start)] == start


def test_the_template_decides_on_spaces_around_a_spelled_out_token():
    tokenizer = tiny_tokenizer()
    end = tokenizer.convert_ids_to_tokens(chat.end_of_turn_id(tokenizer))
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content.strip() }}}}{end}{{% endfor %}}"
    )
    ids = chat.encode_conversation(tokenizer, f"hi{end}", f"{end} yo ")
    written = f"user: hi{end}{end}assistant: {end} yo{end}"
    assert tokenizer.decode(ids) == f"{tokenizer.bos_token}{written}"


@pytest.mark.parametrize("text", ["\ue0007\ue001", "\ue0000\ue001", "a \ue0001\ue001 b \ue000"])
def test_text_that_looks_like_a_mark_is_text(any_tokenizer, text):
    end = any_tokenizer.eos_token
    ids = chat.encode_conversation(any_tokenizer, f"{end} x", text)
    assert any_tokenizer.decode(ids).count(text) == 1
    assert chat.encode_conversation(any_tokenizer, text, "y") != chat.encode_conversation(
        any_tokenizer, "", "y"
    )


def test_truncation_is_on_the_left(tokenizer):
    full = chat.encode_conversation(tokenizer, "a" * 100, "b" * 20)
    short = chat.encode_conversation(tokenizer, "a" * 100, "b" * 20, max_length=30)
    assert len(short) == 30
    assert short[-29:] == full[-29:]
    assert short[0] == tokenizer.bos_token_id  # it is added after the truncation


def test_the_date_is_fixed(tokenizer):
    text = tokenizer.decode(chat.encode_prompt(tokenizer, "hi"))
    assert DATE_STRING in text


def test_pad_is_never_a_stop_token(any_tokenizer):
    assert chat.pad_id(any_tokenizer) not in chat.stop_ids(any_tokenizer)
    any_tokenizer.pad_token = any_tokenizer.eos_token  # as in SmolLM2 and in the reference
    assert chat.pad_id(any_tokenizer) not in chat.stop_ids(any_tokenizer)


def test_no_chat_template_is_refused(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        chat.encode_prompt(bare, "hi")


def test_pad_batch_sides():
    left, mask = chat.pad_batch([[1, 2, 3], [4]], 4, 0, side="left")
    assert left.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4]]
    assert mask.tolist() == [[False, True, True, True], [False, False, False, True]]
    right, _ = chat.pad_batch([[1, 2, 3], [4]], 4, 0)
    assert right.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]


@pytest.mark.parametrize(
    ("bucket", "sizes", "least", "first"),
    [
        (chat.bucket_length, 15, 33, "32 48 64 96 128 192 256 384 512"),
        (chat.scored_length, 24, 43, "32 64 96 128 160 192 224 256 320 384 448 512 640"),
    ],
)
def test_buckets_are_few_and_waste_at_most_a_third(bucket, sizes, least, first):
    buckets = sorted({bucket(n) for n in range(1, 4097)})
    assert len(buckets) == sizes and buckets[-1] == 4096
    expected = [int(size) for size in first.split()]
    assert buckets[: len(expected)] == expected
    for n in range(least, 4097):
        assert n <= bucket(n) < n * 1.5
        assert bucket(bucket(n)) == bucket(n)
