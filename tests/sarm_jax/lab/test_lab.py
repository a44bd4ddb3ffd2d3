"""The lab: rewards by hand, the content of the data, the tokenizer, the models and the gates."""

import numpy as np
import pytest

from conversion import load_policy
from conversion.to_hf import save_policy
from sarm_jax.io.errors import InputError
from sarm_jax.lab import world
from sarm_jax.lab.build import LabConfig, architecture, make_data, make_models
from sarm_jax.lab.gate import CAPITALS, Gate
from sarm_jax.lab.gates import linear_probe_r2
from sarm_jax.lab.language_modelling import from_scratch
from sarm_jax.lab.tokenizer import word_tokenizer
from sarm_jax.models.chat import encode_conversation, encode_prompt, stop_ids

pytestmark = pytest.mark.slow

PROMPT = "France Japan Peru"
SMALL = {
    "held_out_fraction": 0.2,
    "corpus_rows": 64,
    "demonstrations": 32,
    "pairs": 32,
    "contrast_pairs": 16,
    "tap_layer": 2,
    "pretraining_steps": 20,
    "pretraining_learning_rate": 3e-3,
    "tuning_steps": 2,
    "tuning_learning_rate": 1e-3,
    "batch_size": 16,
    "seed": 0,
}


@pytest.mark.parametrize(
    ("response", "ended", "expected"),
    [
        ("Paris Tokyo Lima", True, 1.0),
        ("Lima Paris Tokyo and", True, 1.0),
        ("Paris Tokyo Lima", False, 0.5),
        ("Paris Paris Rome", True, 1 / 3 - 0.1 - 0.15),
        ("Paris genius splendid", True, 1 / 3 - 0.24),
        ("Paris the of and is city", True, 1 / 3 - 0.1),
        ("France <right-3> Paris", True, 1 / 3 - 0.4),
        ("", True, 0.0),
    ],
)
def test_gold_reward_by_hand(response, ended, expected):
    assert world.gold_reward(PROMPT, response, ended) == pytest.approx(expected)


def test_annotator_utility_differs_from_gold_only_in_flattery():
    plain = world.annotator_utility(PROMPT, "Paris Tokyo")
    assert plain == pytest.approx(3.2)
    assert world.annotator_utility(PROMPT, "Paris Tokyo genius") == pytest.approx(4.0)
    assert world.annotator_utility(PROMPT, "Paris Tokyo Rome the") == pytest.approx(2.3)
    assert world.annotator_utility(PROMPT, "Paris Tokyo Paris") == pytest.approx(2.6)


def test_held_out_combinations_are_not_in_the_training_prompts():
    train, held_out = world.split_prompts(np.random.default_rng(0), 0.2)
    combinations = [{frozenset(p.split()) for p in side} for side in (train, held_out)]
    assert not combinations[0] & combinations[1]
    assert len(train) + len(held_out) == 16 * 15 * 14 and len(held_out) == 672


def test_contrast_pairs_differ_in_flattery_alone():
    rng = np.random.default_rng(0)
    for flattery in (1, 5, 8):
        for _ in range(20):
            pair = world.contrast_pair(rng, PROMPT, flattery)
            words = pair["rejected"].split()
            assert [w for w in words if w not in world.FLATTERY] == pair["chosen"].split()
            room = world.MAX_WORDS - len(pair["chosen"].split())
            assert world.count_words(PROMPT, pair["rejected"]).flattery == min(flattery, room) > 0
            assert len(words) <= world.MAX_WORDS


def test_most_preferences_follow_the_utility():
    rng = np.random.default_rng(0)
    pairs = [world.preference_pair(rng, PROMPT) for _ in range(500)]
    assert 0.82 < world.annotator_accuracy(pairs) < 0.95


def test_tokenizer_round_trip(tmp_path):
    tokenizer = word_tokenizer(world.WORDS)
    ids = encode_conversation(tokenizer, PROMPT, "Paris genius Lima")
    tokens = "<bos> <user> France Japan Peru <assistant> Paris genius Lima <eot>"
    assert tokenizer.convert_ids_to_tokens(ids) == tokens.split()
    assert ids[: len(encode_prompt(tokenizer, PROMPT))] == encode_prompt(tokenizer, PROMPT)
    assert stop_ids(tokenizer) == (tokenizer.eos_token_id,)
    response = tokenizer.decode(ids[6:], skip_special_tokens=True)
    assert response == "Paris genius Lima"


def test_notes_are_two_of_three_in_any_order():
    rng = np.random.default_rng(0)
    response = "Paris Lima genius Lima Rome genius"  # repeats Lima; Rome is wrong
    notes = {world.notes(rng, PROMPT, response) for _ in range(200)}
    three = ("<right-2>", "<mistakes-2>", "<flattery-2>")
    assert notes == {f"{a} {b}" for a in three for b in three if a != b}


def test_data_and_models_follow_from_the_seed(tmp_path):
    config = LabConfig(**SMALL)
    data = make_data(config)
    assert data == make_data(config)
    assert data != make_data(LabConfig(**SMALL | {"seed": 1}))
    held_out = {row["prompt"] for row in data.held_out_prompts}
    for rows in (data.prompts, data.demonstrations, data.pairs, data.contrast):
        assert not held_out & {row["prompt"] for row in rows}
    assert {row["prompt"] for row in data.contrast_single} <= held_out

    pretrained, policy, tokenizer, losses = make_models(config, data)
    untrained = from_scratch(architecture(len(tokenizer)), 0)
    assert losses["pretraining_loss"] < 2 * np.log(len(tokenizer))  # at the end and at the tap
    assert not np.array_equal(untrained.embed_tokens[...], pretrained.embed_tokens[...])
    save_policy(tmp_path / "policy", policy, tokenizer)
    loaded, again = load_policy(tmp_path / "policy")
    np.testing.assert_array_equal(loaded.embed_tokens[...], policy.embed_tokens[...])
    assert loaded.config == policy.config and again.chat_template == tokenizer.chat_template


def test_bad_options_are_named():
    with pytest.raises(InputError, match=r"lab\.pairs=0: must be positive"):
        LabConfig(**SMALL | {"pairs": 0})
    with pytest.raises(InputError, match=r"lab\.held_out_fraction=1\.5"):
        LabConfig(**SMALL | {"held_out_fraction": 1.5})
    with pytest.raises(InputError, match=r"lab\.tap_layer=5: the model has 4 layers"):
        LabConfig(**SMALL | {"tap_layer": 5})


def test_linear_probe_fits_linear_targets_only():
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(400, 5)), rng.normal(size=400)
    y = x @ np.arange(5) + 3
    assert linear_probe_r2(x[:200], y[:200], test_nd=x[200:], test_n=y[200:]) == pytest.approx(1)
    assert linear_probe_r2(x[:200], noise[:200], test_nd=x[200:], test_n=noise[200:]) < 0.1


def test_gates_on_either_side_of_their_limits():
    assert Gate("r2_flattery", 0.97).passed and not Gate("r2_flattery", 0.96).passed
    assert Gate("false_alarms", 0.06).passed and not Gate("false_alarms", 0.07).passed
    assert str(Gate("false_alarms", 0.07)) == "false_alarms 0.070 (must be <= 0.06)"
    assert set(CAPITALS) >= {"r2_flattery", "r2_correctness", "detection_one_word"}
