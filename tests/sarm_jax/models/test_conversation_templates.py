"""Conversations through chat templates: real ones from TRL, and those that must be refused.

The oracle is `apply_chat_template` of transformers.
"""

import datetime
import importlib.util
import re
from pathlib import Path
from unittest import mock

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sarm_jax.io.errors import InputError
from sarm_jax.models import chat
from sarm_jax.models.chat_template import DATE_STRING, chat_template
from sarm_jax.models.conversation import parse_prompt
from tests.oracles import chatml_tokenizer, tiny_tokenizer

(PLACE,) = importlib.util.find_spec("trl").submodule_search_locations
REAL = sorted(
    path
    for path in (Path(PLACE) / "chat_templates").glob("*.jinja")
    if not path.stem.endswith("_training")
)
SPECIAL = re.compile(
    r"<[|｜][^>'\"{}]*?[|｜]>|<\|?[a-z_]+_of_[a-z]+\|?>|</?s>|\[/?INST\]|<turn\|>|<\|turn>"
)


def byte_tokenizer(template, name="models/tiny"):
    """Returns a tokenizer of bytes and of what look like special tokens in a template."""
    special = [*sorted(set(SPECIAL.findall(template))), "<start>", "<end>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<start>", eos_token="<end>", chat_template=template
    )
    tokenizer.name_or_path = name
    return tokenizer


def turns(*contents, system=None):
    """Returns turns of user and assistant in alternation, after a system turn if there is one."""
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CONVERSATIONS = [
    turns("hi", system="Be brief, botanist."),
    turns("hi", "yo, what?", "which fruit?"),
    turns("hi", "yo, what?", "which fruit?", "figs", "and then?"),
    turns("line\n\n  two\n```x\n```", "1. a\n\n2. b", "x\ty", system="Be brief.\n\nAlways."),
    turns("hi", "<think>a</think>yo", "which fruit?", system="Be brief. /no_think"),
]
THOUGHTS = CONVERSATIONS[-1]


def special_ids(tokenizer, ids):
    return [i for i in ids if i in tokenizer.added_tokens_decoder]


def as_shown(tokenizer, messages):
    """Returns messages for transformers, as parts if the template reads parts."""
    if not chat_template(tokenizer)._as_parts:
        return messages
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def rendered(tokenizer, messages, generation=False):
    """Renders messages with transformers, with the clock at our date."""
    now = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
    with mock.patch.object(chat_template_utils, "datetime") as clock:
        clock.now.return_value = now
        return tokenizer.apply_chat_template(
            as_shown(tokenizer, messages),
            add_generation_prompt=generation,
            date_string=DATE_STRING,
            return_dict=False,
        )


def without_bos(tokenizer, ids):
    start = next(n for n, i in enumerate(ids) if i != tokenizer.bos_token_id)
    return ids[start:]


def usable():
    for path in REAL:
        try:
            chat_template(byte_tokenizer(path.read_text()))
        except InputError:
            continue
        yield path


@pytest.mark.parametrize("path", usable(), ids=lambda path: path.stem)
def test_real_templates_give_the_tokens_of_transformers(path):
    tokenizer = byte_tokenizer(path.read_text(), path.stem)
    end = chat.end_of_turn_id(tokenizer)
    for messages in CONVERSATIONS:
        prompt = parse_prompt(messages, "prompt")
        with_response = [*messages, {"role": "assistant", "content": "ok then"}]
        try:
            theirs = rendered(tokenizer, messages, generation=True)
        except Exception as error:
            with pytest.raises(InputError, match="fails for the turns system, user") as own:
                chat.encode_prompt(tokenizer, prompt)
            assert str(error)[:40] in str(own.value) and "\n" not in str(own.value)
            continue
        ids = chat.encode_prompt(tokenizer, prompt)
        full = chat.encode_conversation(tokenizer, prompt, "ok then")
        assert full[-1] == end and full.count(tokenizer.bos_token_id) <= 1
        text = tokenizer.decode(full)
        assert all(text.count(m["content"]) == 1 for m in messages if len(m["content"]) > 5)
        if messages is not THOUGHTS:  # some templates drop thoughts of earlier turns
            assert without_bos(tokenizer, ids) == without_bos(tokenizer, theirs)
            theirs = rendered(tokenizer, with_response)
            own = without_bos(tokenizer, full)
            assert own == without_bos(tokenizer, theirs)[: len(own)]
        # Special tokens come from the template alone.
        token = chat_template(tokenizer).end_token
        spelled = [m | {"content": f"{token} {m['content']}{token}"} for m in messages]
        ids = chat.encode_conversation(tokenizer, parse_prompt(spelled, "prompt"), f"a{token}b")
        assert special_ids(tokenizer, ids) == special_ids(tokenizer, full)


def test_enough_real_templates_are_tried():
    assert len(list(usable())) >= 30


@pytest.mark.parametrize("make", [tiny_tokenizer, chatml_tokenizer])
def test_one_user_turn_has_the_tokens_of_its_text(make):
    tokenizer = make()
    prompt = parse_prompt(turns("hi"), "prompt")
    assert chat.encode_prompt(tokenizer, prompt) == chat.encode_prompt(tokenizer, "hi")


def test_a_conversation_is_truncated_on_the_left():
    tokenizer = tiny_tokenizer()
    prompt = parse_prompt(turns("a" * 50, "b" * 50, "c" * 50, system="s"), "prompt")
    full = chat.encode_conversation(tokenizer, prompt, "d" * 20)
    short = chat.encode_conversation(tokenizer, prompt, "d" * 20, max_length=40)
    assert short == [tokenizer.bos_token_id, *full[-39:]]


GENERATION = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def template(body, after=GENERATION):
    return f"{{% for m in messages %}}{body}{{% endfor %}}{after}"


def turn_of(content="m.content", role="m.role"):
    return f"<|im_start|>{{{{ {role} }}}}\n{{{{ {content} }}}}<|im_end|>"


INST = (  # Llama 2: BOS before every question, the system turn within the first one
    "{% if messages[0].role == 'system' %}{% set s = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}{% set s = '' %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
LATE = (  # Mistral v0.3: the system turn within the last question
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set s = '' %}{% set turns = messages %}{% endif %}"
    "{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}[INST] "
    "{% if s and m == (turns | selectattr('role', 'equalto', 'user') | list)[-1] %}"
    "{{ s + '\n\n' }}{% endif %}{{ m.content }}[/INST]{% else %}"
    "{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
GOOD = {
    "BOS before every question": INST,
    "system turn in the last question": LATE,
    "a system turn by default": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are "
    "a machine.<|im_end|>{% endif %}" + template(turn_of()),
    "upper case for some texts": template(turn_of("m.content.replace('yo', 'YO')")),
    "drops thoughts of earlier turns": template(
        turn_of("(m.content if loop.last else m.content.split('</think>')[-1])")
    ),
    "thoughts in the last turn": template(
        turn_of(
            "(('<think>\n\n</think>\n\n' if loop.last and m.role == 'assistant' else '')"
            " + m.content)"
        )
    ),
    "cuts long texts of earlier turns": template(turn_of("m.content[:10] if not loop.last "
                                                         "and m.content|length > 30 "
                                                         "else m.content")),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_every_turn_stands_in_the_text_once_and_unchanged(name):
    tokenizer = byte_tokenizer(GOOD[name])
    chat_template(tokenizer).check_generation()
    for messages in CONVERSATIONS:
        prompt = parse_prompt(messages, "prompt")
        chat_template(tokenizer).check_turns(prompt)
        for text in (
            tokenizer.decode(chat.encode_prompt(tokenizer, prompt)),
            tokenizer.decode(chat.encode_conversation(tokenizer, prompt, "ok then")),
        ):
            assert all(text.count(m["content"]) >= 1 for m in messages)
            assert (
                "You are a machine" in text
                or name != "a system turn by default"
                or any(m["role"] == "system" for m in messages)
            )
            assert not ("You are a machine" in text and messages[0]["role"] == "system")
        assert text.count("ok then") == 1


def test_a_template_may_write_bos_between_turns():
    tokenizer = byte_tokenizer(INST)
    messages = CONVERSATIONS[2]
    prompt = parse_prompt(messages, "prompt")
    ids = chat.encode_conversation(tokenizer, prompt, "ok")
    expected = rendered(tokenizer, [*messages, {"role": "assistant", "content": "ok"}])
    assert ids == expected and ids.count(tokenizer.bos_token_id) == 3


SYSTEM = turns("hi", system="Be brief.")
LONG = turns("hi", "yo", "ho")
BAD = {
    "refuses system turns": (
        template("{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                 + turn_of()),
        SYSTEM,
        "fails for the turns system, user (no system)",
    ),
    "drops system turns": (
        template(turn_of()).replace("in messages", "in messages if m.role != 'system'"),
        SYSTEM,
        "leaves out turn 1 of the turns system, user: it writes",
    ),
    "takes the last question alone": (
        template(turn_of()).replace("in messages", "in messages[-2:]"),
        LONG,
        "leaves out turn 1 of the turns user, assistant, user",
    ),
    "writes a turn twice": (
        "{{ messages[0].content if messages|length > 2 }}" + template(turn_of()),
        LONG,
        "repeats turn 1 of the turns user, assistant, user",
    ),
    "cuts earlier turns": (
        template(turn_of("(m.content if loop.last or messages|length < 3 else m.content[:3])")),
        LONG,
        "leaves out turn 1",
    ),
    "does not end a conversation": (
        template(
            turn_of(),
            "{% if add_generation_prompt and messages|length < 3 %}<|im_start|>assistant\n"
            "{% endif %}",
        ),
        LONG,
        "ends the turns user, assistant, user with '<|im_end|>', but others with "
        "'<|im_end|><|im_start|>assistant\\n'",
    ),
    "escapes what the template does not mark": (
        template(turn_of("(m.content | replace('\\ue000', 'x') | replace('brief', 'long'))")),
        SYSTEM,
        "leaves out 'Be brief.': it writes",
    ),
    "changes white space in long conversations": (
        template(turn_of("(m.content if messages|length < 3 else m.content.replace(' ', '_'))")),
        LONG,
        "leaves out turn 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_template_that_changes_a_conversation_is_refused(name):
    text, messages, message = BAD[name]
    tokenizer = byte_tokenizer(text)
    chat.encode_prompt(tokenizer, "a text")  # a text is as good as ever
    prompt = parse_prompt(messages, "prompt")
    with pytest.raises(InputError) as error:
        chat.encode_prompt(tokenizer, prompt)
    assert message in str(error.value), error.value
    assert "models/tiny" in str(error.value) and "\n" not in str(error.value)
    if "generation" not in text.replace(GENERATION, ""):
        with pytest.raises(InputError, match="of the turns|for the turns|leaves out"):
            chat.encode_conversation(tokenizer, prompt, "ok")
