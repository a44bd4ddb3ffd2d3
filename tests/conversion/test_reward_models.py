"""Compares sequence classifiers as reward models with transformers; tensors keep their bits."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from conversion import from_hf, load_policy, load_reward_model, load_sarm, to_hf
from conversion.classifier_config import ARCHITECTURES
from conversion.converted import save_with_sae
from conversion.load import read_reward_config
from sarm_jax.io.errors import InputError
from sarm_jax.models.chat_template import DATE_STRING
from sarm_jax.models.linear_reward import LinearReward, LinearRewardConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import ACTIVATIONS, SAEConfig
from sarm_jax.models.sarm import intervention
from tests import oracles

PROMPTS = ["name a colour", "count to three, slowly", "hi"]
RESPONSES = ["red", "one, two, three", "hello! what can I do for you today?"]
ROWS = [[256, 5, 80, 3, 199, 42, 260, 17, 11], [256, 9, 9, 200, 260], [7, 61]]
CASES = {
    **{name: (overrides, {}) for name, overrides in oracles.ARCHITECTURES.items()},
    "chatml": ({"tokenizer": oracles.chatml_tokenizer}, {}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "scaled_rope": ({"rope_parameters": oracles.LLAMA3_ROPE}, {}),
    "no_pad": ({}, {"pad_token_id": None}),
    "pad_ends_the_turn": ({}, {"pad_token_id": 260}),
    "pad_in_the_text": ({"tokenizer": oracles.chatml_tokenizer}, {"pad_token_id": 103}),
}


def save(path, overrides, changes):
    overrides = dict(overrides)
    tokenizer = overrides.pop("tokenizer", oracles.tiny_tokenizer)()
    config = oracles.tiny_llama_config(**overrides)
    model = oracles.save_tiny_classifier(path, config, tokenizer, **changes)
    return model, tokenizer


def oracle_score(model, ids):
    """Scores one unpadded row in transformers."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, 0].item()


def assert_close(actual, expected):
    """Asserts equality up to 1e-5 of the largest value; values near 0 are sums that cancel."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_transformers_in_batches_of_any_composition(tmp_path, case):
    model, tokenizer = save(tmp_path / "hf", *CASES[case])
    rm = load_reward_model(tmp_path / "hf", dtype="float32")
    chats = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": r}]
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    ids = [
        tokenizer.apply_chat_template(chat, return_dict=False, date_string=DATE_STRING)
        for chat in chats
    ]
    expected = [oracle_score(model, row) for row in ids]
    assert np.std(expected) > 0.1
    score_b, z_bf = rm.score(PROMPTS, RESPONSES)
    assert z_bf is None
    assert_close(score_b, expected)
    for batch_size in (1, 2):
        again = RewardModel(rm.model, rm.tokenizer, batch_size=batch_size)
        assert_close(again.score(PROMPTS[::-1], RESPONSES[::-1])[0][::-1], expected)
    assert_close(
        [rm.score([p], [r])[0][0] for p, r in zip(PROMPTS, RESPONSES, strict=True)], score_b
    )


@pytest.mark.parametrize("pad", [261, 260, 9, None])
def test_pooling_is_that_of_transformers_whatever_the_padding(tmp_path, pad):
    model, _ = save(tmp_path, {}, {"pad_token_id": pad})
    rm = load_reward_model(tmp_path)
    length = max(map(len, ROWS)) + 2
    filler = 7 if pad is None else pad  # without a padding token, transformers takes single rows
    tokens, mask, expected = [], [], []
    for row in ROWS:
        for left in (0, 1, length - len(row)):
            right = length - len(row) - left
            tokens.append([filler] * left + row + [filler] * right)
            mask.append([False] * left + [True] * len(row) + [False] * right)
            batch = [row] if pad is None else [tokens[-1]]
            attended = torch.ones(1, len(row)) if pad is None else torch.tensor(mask[-1:]).int()
            with torch.no_grad():
                logits = model(torch.tensor(batch), attention_mask=attended).logits
            expected.append(logits[0, 0].item())
    score_b, _ = nnx.jit(lambda m, *xs: m(*xs))(rm.model, jnp.array(tokens), jnp.array(mask))
    assert_close(score_b, expected)


def test_a_converted_directory_holds_the_same_bits_and_converts_back(tmp_path):
    save(tmp_path / "hf", {}, {})
    from_hf.convert(tmp_path / "hf", tmp_path / "ours", "reward")
    a, b = load_reward_model(tmp_path / "hf"), load_reward_model(tmp_path / "ours")
    assert a.model.config == b.model.config == read_reward_config(tmp_path / "ours")
    np.testing.assert_array_equal(*(rm.score(PROMPTS, RESPONSES)[0] for rm in (a, b)))
    to_hf.export(tmp_path / "ours", tmp_path / "back", "reward")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert old.keys() == new.keys()
    assert all(np.array_equal(old[name], new[name]) for name in old)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert len(config["id2label"]) == 1


def with_sae(rm, activation="topk", seed=5):
    """Returns the reward model with a random SAE, which explains nothing."""
    trunk = rm.model.config.trunk
    sae = SAEConfig(trunk.hidden_size, latent_size=64, k=8, activation=activation)
    config = LinearRewardConfig(trunk, rm.model.config.pad_token_id, sae)
    model = LinearReward(config, rngs=nnx.Rngs(seed))
    model.trunk, model.score = rm.model.trunk, rm.model.score
    model.sae.pre_bias[...] = jnp.linspace(-1, 1, trunk.hidden_size)
    model.sae.latent_bias[...] = jnp.linspace(-0.5, 0.5, 64)
    if activation == "jumprelu":
        model.sae.threshold[...] = jnp.linspace(-1, 1, 64)
    return RewardModel(model, rm.tokenizer, batch_size=rm.batch_size)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_sae_leaves_every_bit_of_the_score_and_an_intervention_adds_its_own_part(
    tmp_path, activation
):
    save(tmp_path, {}, {})
    plain = load_reward_model(tmp_path)
    rm = with_sae(plain, activation)
    score_b, _ = plain.score(PROMPTS, RESPONSES)
    with_b, z_bf = rm.score(PROMPTS, RESPONSES)
    stored_b, latents = rm.store(PROMPTS, RESPONSES)
    fired = int(np.argmax(np.abs(z_bf[0])))
    change = intervention(64, set_to={fired: 3.0}, maximum={1: 0.1}, steer={2: ("*", -2.0)})
    neutral_b, _ = rm.score(PROMPTS, RESPONSES, clamp=change.neutral())
    for other_b in (with_b, stored_b, neutral_b):
        np.testing.assert_array_equal(other_b, score_b)
    assert_close(latents.columns(np.arange(64)), z_bf)

    w, decoder = (np.asarray(p[...], np.float64) for p in (rm.model.score, rm.model.sae.decoder))
    np.testing.assert_allclose(rm.model.feature_weights(), decoder @ w, rtol=1e-5)
    expected_b = score_b + (np.asarray(change(jnp.array(z_bf)), np.float64) - z_bf) @ (decoder @ w)
    assert np.abs(expected_b - score_b).min() > 0.01
    changed_b, before_bf = rm.score(PROMPTS, RESPONSES, clamp=change)
    assert_close(changed_b, expected_b)
    np.testing.assert_array_equal(before_bf, z_bf)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_latents_are_those_of_the_formula_and_survive_storage(tmp_path, activation):
    save(tmp_path / "hf", {}, {})
    rm = with_sae(load_reward_model(tmp_path / "hf"), activation)
    sae = rm.sae
    h_bd = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
    a_bf = np.asarray(sae.pre_activations(h_bd))
    kept_bf = np.where(a_bf >= np.sort(a_bf)[:, [-8]], a_bf, 0)
    expected_bf = {
        "topk": kept_bf,
        "topk_relu": np.maximum(kept_bf, 0),
        "jumprelu": np.where(a_bf > np.linspace(-1, 1, 64), np.maximum(a_bf, 0), 0),
        "relu": np.maximum(a_bf, 0),
        "identity": a_bf,
    }[activation]
    np.testing.assert_array_equal(sae.encode(h_bd), expected_bf)
    reconstructing_bf = kept_bf if activation == "identity" else expected_bf
    np.testing.assert_array_equal(sae.reconstructing(a_bf), reconstructing_bf)

    save_with_sae(tmp_path / "hf", tmp_path / "ours", sae)
    again = load_sarm(tmp_path / "ours")
    assert again.model.config == rm.model.config
    np.testing.assert_array_equal(again.sae.encode(h_bd), expected_bf)
    line = to_hf.export(tmp_path / "ours", tmp_path / "back", "reward")
    assert "without its SAE" in line and read_reward_config(tmp_path / "back").sae is None


def damaged(path, name, fields):
    """Changes fields of a JSON file; a field that is None is removed."""
    content = json.loads((path / name).read_text()) | fields
    content = {key: value for key, value in content.items() if value is not None}
    (path / name).write_text(json.dumps(content))


NO_LABELS = {"id2label": None, "label2id": None}
BAD_CONFIGS = [
    ({"id2label": {"0": "bad", "1": "good"}}, 'id2label={"0": "bad", "1": "good"}'),
    ({"num_labels": 2}, "num_labels=2: expected 1"),
    ({"num_labels": True}, "num_labels=true: expected 1"),
    (NO_LABELS, "num_labels and id2label are missing, which means 2 labels"),
    ({"num_labels": 1.0}, "num_labels=1.0: expected 1"),
    ({"pad_token_id": "<pad>"}, 'pad_token_id="<pad>"'),
    ({"pad_token_id": 2**31}, "pad_token_id=2147483648"),
    ({"architectures": [["LlamaForSequenceClassification"]]}, "architectures=[["),
    ({"architectures": ["BertForSequenceClassification"]}, "BertForSequenceClassification"),
    ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ({"architectures": None}, "architectures=null"),
    ({"architectures": "LlamaForSequenceClassification"}, "architectures="),
    ({"sarm_param": {}, "architectures": ["LlamaSARM"]}, "a SARM, whose kind is sarm"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS)
def test_other_configs_are_refused_with_what_was_found(tmp_path, fields, message):
    save(tmp_path / "hf", {}, {})
    damaged(tmp_path / "hf", "config.json", fields)
    for call in (load_reward_model, lambda src: from_hf.convert(src, tmp_path / "x", "reward")):
        with pytest.raises(InputError) as error:
            call(tmp_path / "hf")
        assert str(error.value).startswith(str(tmp_path / "hf")) and message in str(error.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("fields", [NO_LABELS | {"num_labels": 1}, {"num_labels": 1}])
def test_one_label_may_be_given_as_a_number(tmp_path, fields):
    save(tmp_path, {}, {})
    damaged(tmp_path, "config.json", fields)
    assert read_reward_config(tmp_path).trunk.hidden_size == 32


BAD_TENSORS = {
    "score.weight: missing": lambda t: t.pop("score.weight"),
    "score.weight: shape [2, 32], expected [1, 32]": lambda t: t.update(
        {"score.weight": np.repeat(t["score.weight"], 2, 0)}
    ),
    "score.bias: unexpected tensor": lambda t: t.update({"score.bias": np.zeros(1, np.float32)}),
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_a_head_that_is_missing_or_another_one_is_refused(tmp_path, message):
    save(tmp_path, {}, {})
    tensors = load_file(tmp_path / "model.safetensors")
    BAD_TENSORS[message](tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        load_reward_model(tmp_path)
    assert message in str(error.value)


def test_features_need_an_sae(tmp_path):
    save(tmp_path, {}, {})
    rm = load_reward_model(tmp_path)
    calls = [
        lambda: rm.score(PROMPTS, RESPONSES, clamp={0: 1.0}),
        lambda: rm.score(PROMPTS, RESPONSES, latent_indices=[0]),
        lambda: rm.store(PROMPTS, RESPONSES),
        lambda: load_sarm(tmp_path),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"no SAE|without an SAE"):
            call()
    change = intervention(4, set_to={0: 1.0})
    with pytest.raises(InputError, match="does not exist|feature"):
        rm.model(jnp.array([[1]]), jnp.array([[True]]), change)
    with pytest.raises(InputError):
        load_policy(tmp_path)


def test_every_architecture_names_its_language_model():
    for name, causal_lm in ARCHITECTURES.items():
        assert name.removesuffix("ForSequenceClassification") == causal_lm.removesuffix(
            "ForCausalLM"
        )
