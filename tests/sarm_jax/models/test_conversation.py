"""Conversations as prompts: what is parsed, what is refused, and the plain text of the turns."""

import json

import pytest

from sarm_jax.io.errors import InputError
from sarm_jax.models.conversation import (
    UNSUPPORTED,
    Conversation,
    Message,
    parse_prompt,
    parse_reply,
    plain_text,
    to_json,
)


def turn(role="user", content="hi", **fields):
    return {"role": role, "content": content, **fields}


SYSTEM, ASSISTANT = turn("system", "Be brief."), turn("assistant", "yo")
GOOD = {
    "a system turn": [SYSTEM, turn()],
    "an earlier answer": [turn(content="ho"), ASSISTANT, turn()],
    "both": [SYSTEM, turn(content="ho"), ASSISTANT, turn()],
    "several questions": [turn(content="ho"), turn()],
    "begins with an answer": [ASSISTANT, turn()],
    "white space and marks": [SYSTEM, turn(content=" \n a\u2028\ue0000\ue001<|eot_id|>\n")],
}


@pytest.mark.parametrize("name", GOOD)
def test_a_conversation_survives_json(name):
    prompt = parse_prompt(GOOD[name], "p")
    assert isinstance(prompt, Conversation)
    assert to_json(prompt) == GOOD[name]
    again = parse_prompt(json.loads(json.dumps(to_json(prompt))), "p")
    assert again == prompt and hash(again) == hash(prompt) and len({again, prompt, "hi"}) == 2
    assert parse_prompt(prompt, "p") is prompt


@pytest.mark.parametrize("text", ["hi", "", "  two\n\nlines "])
def test_a_text_stays_a_text(text):
    assert parse_prompt(text, "p") == text == to_json(text) == plain_text(text)


def test_one_user_turn_is_its_text():
    for value in ([turn(content=" hi ")], (turn(content=" hi "),)):
        assert parse_prompt(value, "p") == " hi "


@pytest.mark.parametrize(
    ("fields", "content"),
    [
        ({"name": "Ada", "weight": 0}, "hi"),
        (dict.fromkeys(UNSUPPORTED), "hi"),
        ({key: [] for key in UNSUPPORTED}, "hi"),
        ({}, [{"type": "text", "text": "hi"}]),
        ({}, [{"type": "text", "text": "hi", "image": None}]),
    ],
)
def test_fields_that_say_nothing_are_taken(fields, content):
    assert parse_prompt([turn(content=content, **fields)], "p") == "hi"
    messages = [Message("system", "hi"), Message("user", "a")]
    prompt = parse_prompt([turn("system", content, **fields), turn(content="a")], "p")
    assert prompt == Conversation(tuple(messages))


BAD = {
    "number": (3, "p must be str or a list of messages, found 3"),
    "null": (None, "found null"),
    "object": (turn(), "p must be str or a list of messages"),
    "no messages": ([], "p is empty"),
    "text for a message": (["hi"], "p[0] must be a message with role and content, found \"hi\""),
    "list for a message": ([[turn()]], "p[0] must be a message"),
    "no role": ([{"content": "a"}], 'p[0].role is missing, found ["content"]'),
    "no content": ([SYSTEM, {"role": "user"}], 'p[1].content is missing, found ["role"]'),
    "names of another format": ([{"from": "human", "value": "a"}], "p[0].role is missing"),
    "tool": ([turn(), turn("tool"), turn()], "p[1].role: expected system, user or assistant"),
    "developer": ([turn("developer"), turn()], 'p[0].role: expected system, user or assistant'),
    "role in capitals": ([turn("User")], 'found "User"'),
    "role that is no text": ([turn(["user"])], 'p[0].role: expected'),
    "content that is no text": ([turn(content=3)], "p[0].content must be a text"),
    "content that is null": ([turn(content=None)], "p[0].content must be a text"),
    "image": ([turn(content=[{"type": "image"}])], "p[0].content must be a text, or a list of one"),
    "two parts": ([turn(content=[{"type": "text", "text": "a"}] * 2)], "p[0].content must be a"),
    "part with more": (
        [turn(content=[{"type": "text", "text": "a", "image": "b"}])], "p[0].content must be a"
    ),
    "text as a part": ([turn(content=["a"])], "p[0].content must be a text"),
    "empty": ([turn(content="")], "p[0].content is empty"),
    "blank": ([SYSTEM, turn(content=" \n")], "p[1].content is empty"),
    "empty system turn": ([turn("system", ""), turn()], "p[0].content is empty"),
    "ends in an answer": (
        [turn(), ASSISTANT],
        "p[1].role: the last turn of a prompt must be 'user', found 'assistant'",
    ),
    "system turn alone": ([SYSTEM], "p[0].role: the last turn of a prompt must be 'user'"),
} | {
    f"has {field}": ([turn(**{field: "x"})], f"p[0].{field}: not supported")
    for field in UNSUPPORTED
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_other_values_are_refused(name):
    value, message = BAD[name]
    with pytest.raises(InputError) as error:
        parse_prompt(value, "p")
    assert str(error.value).startswith("p") and message in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "r must be str"),
        ([], "r is empty"),
        ([ASSISTANT, ASSISTANT], "r must hold one assistant message, found 2 messages"),
        ([turn()], "r[0].role must be 'assistant', found 'user'"),
        ([turn("assistant", "")], "r[0].content is empty"),
        ([turn("assistant", "a", tool_calls=[1])], "r[0].tool_calls: not supported, found [1]"),
    ],
)
def test_a_response_is_a_text_or_one_message(value, message):
    assert parse_reply("a", "r") == parse_reply([turn("assistant", "a")], "r") == "a"
    with pytest.raises(InputError) as error:
        parse_reply(value, "r")
    assert message in str(error.value)


def test_the_plain_text_has_all_turns():
    text = plain_text(parse_prompt(GOOD["both"], "p"))
    assert text == "System: Be brief.\n\nUser: ho\n\nAssistant: yo\n\nUser: hi"
