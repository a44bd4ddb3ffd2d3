"""Rows of data files: every reader, every format, and what is refused with its line and field."""

import json

import pytest
from trl.data_utils import maybe_extract_prompt

from sarm_jax.io.errors import InputError
from sarm_jax.models.conversation import Conversation, Prompt, parse_prompt, to_json
from sarm_jax.models.conversation_rows import (
    check_turns,
    read_demonstrations,
    read_pairs,
    read_probe_rows,
    read_prompts,
    read_responses,
)
from tests.oracles import tiny_tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
PROMPTS: dict[str, list] = {
    "text": ["which fruit?", "which fruit?"],
    "user turn": [[user("which fruit?")], "which fruit?"],
    "system turn": [[SYSTEM, user("which fruit?")]] * 2,
    "earlier turns": [[SYSTEM, user("hi"), assistant("yo"), user("which fruit?")]] * 2,
}


def parsed(value) -> Prompt:
    return parse_prompt(value, "expected")


def messages(value) -> list:
    return [user(value)] if isinstance(value, str) else value


TEXTS = {"response": "b", "chosen": "b", "rejected": "c"}


@pytest.fixture
def save(tmp_path):
    def write(*rows) -> str:
        path = tmp_path / "data.jsonl"
        path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts(save, kind):
    value, expected = PROMPTS[kind]
    prompts = read_prompts(save({"prompt": value, "id": 3}, {"prompt": "other"}))
    assert prompts == [parsed(expected), "other"]
    assert [to_json(prompt) for prompt in prompts] == [expected, "other"]


RESPONSES = {"text": "figs", "message": [assistant("figs")]}


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("kind", PROMPTS)
def test_demonstrations(save, kind, response):
    value, expected = PROMPTS[kind]
    reply = RESPONSES[response]
    rows = [
        {"prompt": value, "response": reply, "id": 3},
        {"prompt": value, "completion": reply, "id": 3},
        {"messages": [*messages(value), assistant("figs")], "id": 3},
        {"prompt": value, "messages": [*messages(value), assistant("figs")], "id": 3},
        {"prompt": value, "response": reply, "messages": 5, "completion": 5, "id": 3},
    ]
    for read in (read_demonstrations, lambda path: read_probe_rows(path, "pairs")):
        for row, read_row in zip(rows, read(save(*rows)), strict=True):
            fields = {"prompt": parsed(expected), "response": "figs"}
            assert read_row == row | fields


@pytest.mark.parametrize("kind", PROMPTS)
def test_pairs(save, kind):
    value, expected = PROMPTS[kind]
    whole = {side: [*messages(value), assistant(side)] for side in ("chosen", "rejected")}
    rows = [
        {"prompt": value, "chosen": "chosen", "rejected": "rejected"},
        {"prompt": value, "chosen": [assistant("chosen")], "rejected": [assistant("rejected")]},
        {"prompt": value, "chosen": "chosen", "rejected": [assistant("rejected")]},
        whole,
        {"prompt": value} | whole,
    ]
    rows = [row | {"source": "s"} for row in rows]
    readers = [
        read_pairs,
        lambda path: read_pairs(path, unequal=True),
        lambda path: read_probe_rows(path, "pairs"),
    ]
    for read in readers:
        for row in read(save(*rows)):
            assert row == {
                "prompt": parsed(expected),
                "chosen": "chosen",
                "rejected": "rejected",
                "source": "s",
            }


@pytest.mark.parametrize("kind", PROMPTS)
def test_implicit_prompts_are_those_of_trl(save, kind):
    value, _ = PROMPTS[kind]
    row = {side: [*messages(value), assistant(side)] for side in ("chosen", "rejected")}
    (own,) = read_pairs(save(row))
    for example in (row, row | {"prompt": "a text, which TRL ignores"}):
        theirs = maybe_extract_prompt(example)
        assert parsed(theirs["prompt"]) == own["prompt"]
        assert [theirs[side] for side in ("chosen", "rejected")] == [
            [assistant(own[side])] for side in ("chosen", "rejected")
        ]


@pytest.mark.parametrize("kind", PROMPTS)
def test_candidates(save, kind):
    value, expected = PROMPTS[kind]
    candidates = ["one", [assistant("two")], "three"]
    (row,) = read_probe_rows(save({"prompt": value, "candidates": candidates}), "bestofn")
    assert row == {"prompt": parsed(expected), "candidates": ["one", "two", "three"]}


def test_texts_and_fields_of_other_uses_are_read_as_before(save):
    odd = {"chosen": [1], "rejected": None, "candidates": 5, "tools": [1], "messages": "x"}
    assert read_prompts(save({"prompt": "a"} | odd)) == ["a"]
    row = {"prompt": "a", "response": "b"} | odd
    assert read_demonstrations(save(row)) == [row]
    assert read_probe_rows(save(row), "pairs") == [row]
    row = {"prompt": "a", "candidates": ["b", ""], "response": [], "chosen": [[]]}
    assert read_probe_rows(save(row), "bestofn") == [row]
    row = {"prompt": "a", "response": ""}
    assert read_probe_rows(save(row), "pairs") == [row]
    row = {"prompt": "a", "chosen": "", "rejected": 3}
    assert read_probe_rows(save(row), "pairs") == [row]  # `check_probe` names what is wrong


ROW = {"prompt": "a", "response": "b", "completion": "b", "chosen": "b", "rejected": "c"}
ROW |= {"candidates": ["b", "c"]}
READERS = {
    "prompts": (read_prompts, ("prompt",)),
    "demonstrations": (read_demonstrations, ("prompt", "response")),
    "completions": (read_demonstrations, ("prompt", "completion")),
    "pairs": (read_pairs, ("prompt", "chosen", "rejected")),
    "probe, pairs": (lambda path: read_probe_rows(path, "pairs"), ("prompt", "response")),
    "probe, best of n": (lambda path: read_probe_rows(path, "bestofn"), ("prompt", "candidates")),
}
BAD_PROMPTS = [
    (..., "field 'prompt' is missing"),
    (None, "field 'prompt' must be str or a list of messages, found null"),
    ("  ", "field 'prompt' is empty"),
    ([], "field 'prompt' is empty"),
    ([user("a"), {"role": "tool", "content": "b"}], "field 'prompt'[1].role: expected system"),
    ([user("a"), assistant("b")], "field 'prompt'[1].role: the last turn of a prompt must be"),
    ([user("")], "field 'prompt'[0].content is empty"),
    ([user([{"type": "image"}])], "field 'prompt'[0].content must be a text"),
    ([user("a") | {"tool_calls": [1]}], "field 'prompt'[0].tool_calls: not supported"),
]


def refused(read, path: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: {message}"), error.value


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_names_the_line_of_a_bad_prompt(save, kind):
    read, fields = READERS[kind]
    good = {field: ROW[field] for field in fields}
    read(save(good, good))
    for value, message in BAD_PROMPTS:
        bad = good | {"prompt": value}
        if value is ...:
            del bad["prompt"]
        refused(read, save(good, bad, good), message)
    conversation = good | {"prompt": [SYSTEM, user("a")]}
    assert len(read(save(conversation | {"tools": []}))) == 1
    refused(read, save(good, conversation | {"tools": [{"f": 1}]}), "field 'tools': not supported")


@pytest.mark.parametrize(
    ("kind", "field"),
    [(kind, field) for kind in READERS for field in READERS[kind][1] if field != "prompt"],
)
def test_every_reader_names_the_line_of_a_bad_response(save, kind, field):
    read, fields = READERS[kind]
    good = {name: ROW[name] for name in fields}
    bad_values = {
        f"field '{field}' is empty": [],
        f"field '{field}'[0].role must be 'assistant', found 'user'": [user("a")],
        f"field '{field}'[0].content is empty": [assistant(" ")],
        f"field '{field}'[0].role is missing": [{"from": "gpt", "value": "a"}],
    }
    for message, value in bad_values.items():
        row = good | {field: value}
        if field == "candidates":
            row, message = good | {field: ["x", value]}, message.replace("s'", "s'[1]", 1)
        refused(read, save(good, row), message)


WHOLE = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
BAD_PAIRS = [
    ({}, "field 'prompt' is missing, found []"),
    ({"chosen": "a b", "rejected": "a c"}, "field 'prompt' is missing"),
    ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, "field 'chosen' must be str, found 3"),
    ({"prompt": "a", "chosen": "b", "rejected": " "}, "field 'rejected' is empty"),
    (WHOLE | {"rejected": "c"}, "field 'prompt' is missing"),
    (WHOLE | {"prompt": "a", "rejected": "c"}, "fields 'chosen' and 'rejected' must both be lists"),
    (WHOLE | {"prompt": "x"}, "field 'chosen' holds another conversation than field 'prompt'"),
    (WHOLE | {"prompt": [SYSTEM, user("a")]}, "field 'chosen' holds another conversation"),
    (WHOLE | {"rejected": [user("x"), assistant("c")]}, "fields 'chosen' and 'rejected' differ"),
    (WHOLE | {"rejected": [SYSTEM, *WHOLE["rejected"]]}, "fields 'chosen' and 'rejected' differ"),
    (WHOLE | {"rejected": [assistant("c")]}, "field 'rejected' has no prompt before"),
    (WHOLE | {"rejected": [user("a")]}, "field 'rejected'[0].role: the last turn must be"),
    (
        {side: [user("a"), assistant("x"), assistant(side)] for side in ("chosen", "rejected")},
        "field 'chosen'[1].role: the last turn of a prompt must be 'user'",
    ),
    (WHOLE | {"source": 3}, "field 'source' must be str"),
    (WHOLE | {"tools": [1]}, "field 'tools': not supported"),
    (WHOLE | {"rejected": WHOLE["chosen"]}, "fields 'chosen' and 'rejected' are the same"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS)
def test_bad_pairs_are_refused(save, row, message):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    refused(lambda path: read_pairs(path, unequal=True), save(good, row), message)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "field 'messages' is empty"),
        ({"messages": "hi"}, "field 'messages' must be str or a list"),
        ({"messages": [user("a")]}, "field 'messages'[0].role: the last turn must be 'assistant'"),
        ({"messages": [assistant("a")]}, "field 'messages' has no prompt before"),
        ({"messages": [SYSTEM, assistant("a")]}, "field 'messages'[0].role: the last turn of a"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "field 'prompt' is missing"),
        ({"prompt": "a"}, "field 'response' is missing"),
        ({"prompt": "a", "response": 3}, "field 'response' must be str, found 3"),
    ],
)
def test_bad_demonstrations_are_refused(save, row, message):
    refused(read_demonstrations, save({"prompt": "a", "response": "b"}, row), message)


@pytest.mark.parametrize("field", ["tools", "images", "chat_template_kwargs"])
def test_a_conversation_with_tools_or_images_is_refused(save, field):
    """Nothing here reads them; a row of texts keeps them as any other field."""
    extra = {field: {"a": 1}}
    for row, read in (
        ({"prompt": [user("a")]}, read_prompts),
        ({"prompt": "a", "completion": [assistant("b")]}, read_demonstrations),
        ({"messages": [user("a"), assistant("b")]}, read_demonstrations),
        ({"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}, read_pairs),
    ):
        assert read(save(row | {field: None}))
        refused(read, save({"prompt": "a", **TEXTS}, row | extra), f"field '{field}': not supp")
    assert read_prompts(save({"prompt": "a"} | extra)) == ["a"]


def test_a_prompt_beside_messages_is_what_they_begin_with(save):
    """A data set may repeat the first question beside a conversation of several turns."""
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    for prompt in ("a", [user("a")], turns[:3]):
        for system in ([], [{"role": "system", "content": "s"}]):
            (row,) = read_demonstrations(save({"prompt": prompt, "messages": system + turns}))
            assert row["prompt"] == parsed(system + turns[:3]) and row["response"] == "d"
    for prompt in ("x", [user("a"), assistant("x"), user("c")]):
        message = "field 'messages' does not begin with field 'prompt'"
        row = {"prompt": prompt, "messages": turns}
        refused(read_demonstrations, save({"prompt": "a", **TEXTS}, row), message)
    row = {"prompt": "a", "response": "b", "completion": "c"}
    message = "fields 'response' and 'completion' are both given and differ"
    refused(read_demonstrations, save({"prompt": "a", **TEXTS}, row), message)
    assert read_demonstrations(save(row | {"completion": "b"}))[0]["response"] == "b"


def test_messages_beside_a_pair_do_not_hide_its_sides(save):
    """UltraFeedback's rows repeat the chosen conversation as `messages`."""
    chosen, rejected = ([user("a"), assistant(text)] for text in "bc")
    row = {"prompt": "a", "chosen": chosen, "rejected": rejected, "messages": chosen}
    assert read_responses(save(row)) == [("a", ("b", "c"))]


def test_turns_that_a_template_refuses_are_named_by_line(save):
    tokenizer = tiny_tokenizer()
    path = save({"prompt": "a"}, {"prompt": [user("a"), assistant("b"), user("c")]})
    prompts = read_prompts(path)
    check_turns(tokenizer, prompts, path)
    assert isinstance(prompts[1], Conversation)
    tokenizer.chat_template = (
        "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
        + tokenizer.chat_template
    )
    with pytest.raises(InputError, match="one turn only") as error:
        check_turns(tokenizer, prompts, path)
    assert str(error.value).startswith(f"{path}:3: the chat template of")


def test_responses_are_those_of_demonstrations_and_of_both_sides_of_pairs(tmp_path):
    turn = [{"role": "user", "content": "a"}]
    rows = [
        {"prompt": "a", "response": "b"},
        {"prompt": turn, "completion": "b"},
        {"messages": [*turn, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c", "response": "d"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [texts for _, texts in read_responses(str(path))]
    assert found == [("b",), ("b",), ("b",), ("b", "c"), ("d",)]
    path.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": " "}))
    with pytest.raises(InputError, match="1: field 'rejected' is empty"):
        read_responses(str(path))
