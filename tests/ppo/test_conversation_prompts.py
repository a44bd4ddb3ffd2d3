"""Conversations as the prompts of a run: truncation, scores, records and the report."""

import json

import numpy as np
import pytest

from pipeline.report.page import ReportConfig, write_report
from ppo.prompts import encode_prompts
from sarm_jax.io.errors import InputError
from sarm_jax.models import chat
from sarm_jax.models.chat_template import DATE_STRING
from sarm_jax.models.conversation import parse_prompt, to_json
from tests.tiny_models import PROMPTS

SYSTEM = {"role": "system", "content": "Be brief, and kind."}


def talk(*contents, system=True):
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return [SYSTEM, *turns] if system else turns


TALKS = [talk(f"say {n}", "well", "and now?", system=n % 2 == 0) for n in range(5)]
TALKS += [talk(f"ask {n}") for n in range(5)]
TURNS = ["one " * 20, "two " * 20, "three " * 20, "four " * 20, "the last question, " * 5 + "ok?"]
LONG = talk(*TURNS)


def encoded(tokenizer, value, limit):
    prompts = [parse_prompt(value, "p")]
    return encode_prompts(prompts, tokenizer, limit, "data.jsonl", "truncate")


def length(tokenizer, value):
    return len(chat.encode_prompt(tokenizer, parse_prompt(value, "p")))


@pytest.mark.parametrize("system", [True, False])
def test_truncation_takes_the_oldest_turns_first(tokenizer, system):
    turns = LONG[1:]
    first = [SYSTEM] if system else []
    limits = [length(tokenizer, [*first, *turns[n:]]) for n in (0, 2, 4)]
    assert limits == sorted(limits, reverse=True)
    for kept, limit in zip((0, 2, 4), limits, strict=True):
        for room in (0, 5):
            result = encoded(tokenizer, [*first, *turns], limit + room)
            assert result.texts == [parse_prompt([*first, *turns[kept:]], "p")]
            assert result.rows == [chat.encode_prompt(tokenizer, result.texts[0])]
            assert result.truncated == (kept > 0)


@pytest.mark.parametrize("system", [True, False])
def test_the_last_turn_loses_its_beginning(tokenizer, system):
    value = LONG if system else LONG[1:]
    shortest = length(tokenizer, [*LONG[:system], LONG[-1] | {"content": "x"}])
    for limit in (shortest, shortest + 1, shortest + 40):
        result = encoded(tokenizer, value, limit)
        (prompt,), (row,) = result.texts, result.rows
        *before, last = [to_json(prompt)] if isinstance(prompt, str) else to_json(prompt)
        text = last["content"] if system else last
        assert before == value[:system] and LONG[-1]["content"].endswith(text) and text
        assert row == chat.encode_prompt(tokenizer, prompt) and len(row) == limit
    with pytest.raises(InputError, match=r"data.jsonl:1: .*without the user's text it has \d+"):
        encoded(tokenizer, value, shortest - 1)


def test_long_conversations_are_dropped_and_refused_like_texts(tokenizer):
    prompts = [parse_prompt(value, "p") for value in ("hi", LONG, TALKS[0])]
    dropped = encode_prompts(prompts, tokenizer, 180, "data.jsonl", "drop")
    assert dropped.texts == [prompts[0], prompts[2]] and dropped.dropped == 1
    with pytest.raises(InputError, match=r"data.jsonl:2: the prompt has \d+ tokens"):
        encode_prompts(prompts, tokenizer, 180, "data.jsonl")


def test_the_score_of_a_conversation_is_that_of_its_tokens(reward_model):
    """The tokens are written out by hand, after Llama-3's format."""
    tokenizer = reward_model.tokenizer
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"

    def by_hand(value, response):
        turns = [*value, {"role": "assistant", "content": response}]
        system, turns = (turns[0]["content"], turns[1:]) if turns[0] == SYSTEM else ("", turns)
        text = "<|begin_of_text|>" + header.format("system")
        text += f"Today Date: {DATE_STRING}\n\n{system}<|eot_id|>"
        for turn in turns:
            text += header.format(turn["role"]) + turn["content"] + "<|eot_id|>"
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    responses = [f"it is {n}." for n in range(len(TALKS))]
    rows = [by_hand(*row) for row in zip(TALKS, responses, strict=True)]
    expected, z_expected = reward_model.score_tokens(rows)
    assert expected.std() > 0
    parsed = [parse_prompt(value, "p") for value in TALKS]
    for prompts in (TALKS, parsed, [tuple(value) for value in TALKS]):
        score, z = reward_model.score(prompts, responses)
        np.testing.assert_array_equal(score, expected)
        np.testing.assert_array_equal(z, z_expected)
    stored, latents = reward_model.store(TALKS, responses)
    np.testing.assert_allclose(stored, expected, rtol=1e-5)
    np.testing.assert_allclose(latents.columns(range(64)), z_expected, rtol=1e-5, atol=1e-6)
    assert reward_model.encode(TALKS[0], responses[0]) == rows[0]
    alone, _ = reward_model.score([[{"role": "user", "content": "hi"}]], ["yo"])
    assert alone == reward_model.score(["hi"], ["yo"])[0]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (TALKS[0], "prompts: expected texts or conversations, found dict"),
        (["a", talk("a", "b")], r"prompts\[1\]\[2\].role: the last turn of a prompt must be"),
        ([[]], r"prompts\[0\] is empty"),
        ([3], "prompts: expected texts or conversations, found int"),
    ],
)
def test_prompts_that_are_neither_texts_nor_conversations_are_refused(
    reward_model, prompts, message
):
    for call in (reward_model.score, reward_model.store):
        with pytest.raises(InputError, match=message):
            call(prompts, ["x"] * len(prompts))


@pytest.mark.slow
def test_a_run_on_conversations_and_its_report(make_trainer, tmp_path):
    folder = tmp_path / "run"
    prompts = [parse_prompt(value, "p") for value in (*TALKS, *PROMPTS[:2])]
    trainer = make_trainer(
        folder,
        prompts=prompts,
        held_out=[parse_prompt(value, "p") for value in TALKS],
        evaluate=True,
        total_steps=2,
        eval_every=1,
        samples_per_step=4,
        ppo_epochs=1,  # fewer programs
        long_prompts="truncate",
    )
    trainer.run()
    samples, evaluations = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").open()]
        for name in ("samples", "evaluations")
    )
    shown = [row["prompt"] for row in samples]
    assert shown == [to_json(p) for step in range(2) for p in trainer.deck.texts(step)[:4]]
    assert any(isinstance(prompt, list) for prompt in shown)
    assert all(row["prompt"] in TALKS for row in evaluations)
    for row in (*samples, *evaluations):
        score, _ = trainer.scorer._model.score([row["prompt"]], [row["response"]])
        assert score[0] == pytest.approx(row["rm_score"], rel=1e-4, abs=1e-4)
    write_report(ReportConfig("", samples=0), folder)
    page = (folder / "report.html").read_text()
    (data,) = (part for part in page.split("<script") if "application/json" in part)
    rows = json.loads(data[data.index("{") : data.rindex("}") + 1])["rows"]
    assert [row["prompt"] for row in rows] == [
        row["prompt"] for row in evaluations if row["step"] == 2
    ]
