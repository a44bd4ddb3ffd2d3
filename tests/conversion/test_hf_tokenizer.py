"""The tokenizer of a checkpoint is that of its tokenizer.json, whatever other files say."""

import json

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from conversion import load_policy, load_sarm, to_hf
from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import encode_prompt, end_of_turn_id, pad_id, stop_ids
from tests import oracles


@pytest.fixture
def source(tmp_path):
    """Saves a tiny HF directory."""
    path = tmp_path / "hf"
    oracles.save_tiny_llama(path, oracles.tiny_llama_config(), oracles.tiny_tokenizer())
    return path


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizerFast", "TokenizersBackend"])
def test_the_tokenizer_is_the_one_in_tokenizer_json(source, tmp_path, name):
    core = Tokenizer.from_file(str(source / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.save(str(source / "tokenizer.json"))
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    policy, tokenizer = load_policy(source)
    text = "|  5 and 123"
    expected = core.encode(text, add_special_tokens=False).ids
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    to_hf.save_policy(tmp_path / "saved", policy, tokenizer)
    saved = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert saved.encode(text, add_special_tokens=False).ids == expected
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_default_one_of_several_chat_templates_is_used(source):
    _, tokenizer = load_policy(source)
    default, path = tokenizer.chat_template, source / "tokenizer_config.json"
    (source / "chat_template.jinja").unlink(missing_ok=True)
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": default}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": several}))
    _, again = load_policy(source)
    assert encode_prompt(again, "hi") == encode_prompt(tokenizer, "hi")


def test_the_end_of_turn_is_found_if_the_tokenizer_config_does_not_name_it(source):
    _, tokenizer = load_policy(source)
    end, path = end_of_turn_id(tokenizer), source / "tokenizer_config.json"
    fields = json.loads(path.read_text())
    other = next(
        t for t in tokenizer.all_special_tokens if t != tokenizer.convert_ids_to_tokens(end)
    )
    fields["eos_token"] = other
    fields.pop("extra_special_tokens", None)
    path.write_text(json.dumps(fields))
    _, again = load_policy(source)
    assert end_of_turn_id(again) == end and end in stop_ids(again)


def test_end_tokens_that_only_the_models_config_names_are_used(source):
    (source / "generation_config.json").unlink(missing_ok=True)
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"eos_token_id": [7, 9]}))
    policy, _ = load_policy(source)
    assert {7, 9} <= set(policy.stop_ids)


def test_the_end_of_turn_stops_if_eos_is_another_token(tmp_path):
    tokenizer = oracles.tiny_tokenizer()
    tokenizer.eos_token = "<|end_of_text|>"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    oracles.save_tiny_llama(tmp_path / "hf", oracles.tiny_llama_config(), tokenizer)
    assert load_policy(tmp_path / "hf")[0].stop_ids == (257, 260)


def test_a_generation_config_that_leaves_out_the_end_of_turn_is_mentioned(source, caplog):
    load_policy(source)
    assert not caplog.records
    (source / "generation_config.json").write_text('{"eos_token_id": [257, 7]}')
    policy, tokenizer = load_policy(source)
    assert policy.stop_ids == (7, 257, 260)
    assert "eos_token_id=[257, 7] does not list 260 (<|eot_id|>)" in caplog.text
    assert pad_id(tokenizer, policy.stop_ids) not in policy.stop_ids
    assert pad_id(tokenizer, range(262)) == 262  # all that there are


def test_the_chat_template_is_checked_before_weights_are_loaded(source, tmp_path):
    def place(*_):
        raise AssertionError("a weight was loaded")

    sarm = tmp_path / "sarm"
    oracles.save_tiny_sarm(sarm, oracles.tiny_tokenizer())
    no_header = "{% for m in messages %}{{ m.role + m.content }}<|eot_id|>{% endfor %}"
    for folder, load, template, message in [
        (source, load_policy, no_header, "has no generation prompt"),
        (source, load_policy, "{{ messages[0].content }}<|eot_id|>", "leaves out the response"),
        (sarm, load_sarm, "{{ messages[0].content }}<|eot_id|>", "leaves out the response"),
    ]:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
        with pytest.raises(InputError, match=message) as error:
            load(folder, place=place)
        assert str(folder) in str(error.value)


def test_tokens_that_depend_on_chance_are_refused(source):
    path = source / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["model"]["dropout"] = 0.5
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match=r"tokenizer.json: model.dropout=0.5"):
        load_policy(source)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_link_to_nothing_is_no_missing_file(source, name):
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(source / "gone")
    with pytest.raises(InputError, match=f"{name}: is a link to nothing"):
        load_policy(source)
