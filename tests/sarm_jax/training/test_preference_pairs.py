"""Preference pairs without a labeller: each kind of defect, their balance, and bad options."""

from collections import Counter

import numpy as np
import pytest
from flax import nnx

from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import read_jsonl
from sarm_jax.training import preference_pairs
from sarm_jax.training.preference_pairs import Answers, PairsConfig
from tests.paths import ROOT

TEXT = "Roll soft garments tightly, then fold stiff ones around them. Hang the rest up at once."
DEMOS = ROOT / "configs" / "data" / "everyday_demos.jsonl"


def rngs():
    return [np.random.default_rng(seed) for seed in range(50)]


def test_truncation_keeps_a_strict_beginning_without_closing_punctuation():
    for rng in rngs():
        cut = preference_pairs.truncate_text(TEXT, rng)
        assert TEXT.startswith(cut) and cut[-1].isalnum()
        assert 0.15 <= len(cut.split()) / len(TEXT.split()) <= 0.85
    assert preference_pairs.truncate_text("Yes", rngs()[0]) == "Yes"


def test_a_repeated_phrase_makes_up_at_least_half_and_about_the_length():
    words = TEXT.split()
    for rng in rngs():
        looped = preference_pairs.repeat_phrase(TEXT, rng).split()
        assert 0.8 * len(words) <= len(looped) <= len(words) * 1.5 + 15
        assert any(
            looped[-n:] == looped[-2 * n : -n] == looped[-3 * n : -2 * n] for n in (2, 3, 4, 5)
        )
        assert set(looped) <= set(words)
    assert preference_pairs.repeat_phrase("Yes.", rngs()[0]).startswith("Yes. Yes. Yes.")


def test_shuffling_keeps_the_words_and_looks_like_a_sentence():
    def bare(text):
        return Counter(word.strip(preference_pairs.PUNCTUATION).lower() for word in text.split())

    for rng in rngs():
        shuffled = preference_pairs.shuffle_words(TEXT, rng)
        assert bare(shuffled) == bare(TEXT)
        assert shuffled[0].isupper() and shuffled.endswith(".") and shuffled != TEXT


def test_length_accuracy_by_hand():
    rows = [("a b", "a"), ("a", "a b c"), ("a b", "b a"), ("a b c", "a")]
    pairs = [{"chosen": chosen, "rejected": rejected} for chosen, rejected in rows]
    assert preference_pairs.length_accuracy(pairs) == (1 + 0 + 0.5 + 1) / 4


def answers_of_the_demos():
    demos = read_jsonl(DEMOS, {"prompt": str, "response": str})
    long = " ".join(demo["response"] for demo in demos).split()
    cut = [" ".join(long[i : i + 45]) for i in range(len(demos))]
    return [Answers(d["prompt"], [d["response"]], [c]) for d, c in zip(demos, cut, strict=True)]


def test_pairs_are_balanced_and_deterministic_and_length_does_not_decide():
    answers = answers_of_the_demos()
    pairs = preference_pairs.pair_up(answers, np.random.default_rng(0))
    assert pairs == preference_pairs.pair_up(answers, np.random.default_rng(0))
    assert pairs != preference_pairs.pair_up(answers, np.random.default_rng(1))
    counts = Counter(pair["source"] for pair in pairs)
    assert set(counts) == set(preference_pairs.KINDS)
    assert max(counts.values()) == min(counts.values()) == len(answers)
    assert 0.35 < preference_pairs.length_accuracy(pairs) < 0.65

    good = {a.prompt: a.good for a in answers}
    all_good = {text for a in answers for text in a.good}
    for pair in pairs:
        assert pair["chosen"] in good[pair["prompt"]] and pair["chosen"] != pair["rejected"]
        if pair["source"] == "off_topic":
            assert pair["rejected"] in all_good - set(good[pair["prompt"]])


def test_another_prompt_replaces_a_missing_unfinished_answer():
    answers = [Answers("p", ["A good answer."], ["b c"] * 3), Answers("q", ["Another one."], [])]
    pairs = preference_pairs.pair_up(answers, np.random.default_rng(0))
    unfinished = [pair for pair in pairs if pair["source"] == "unfinished"]
    assert [pair["prompt"] for pair in unfinished] == ["p", "p"]


def test_sampled_answers_that_ran_into_the_budget_are_rejected(policy, tokenizer):
    demos = [{"prompt": f"Question {i}?", "response": f"Answer {i} is this."} for i in range(3)]
    config = PairsConfig("demos.jsonl", 2, max_new_tokens=6, temperature=1.0, seed=0)
    pairs = preference_pairs.make_pairs(config, policy, tokenizer=tokenizer, demos=demos)
    assert pairs == preference_pairs.make_pairs(config, policy, tokenizer=tokenizer, demos=demos)
    texts = {pair["rejected"] for pair in pairs if pair["source"] == "unfinished"}
    assert len(texts) > 1  # every batch and row has its own random key
    assert {pair["chosen"] for pair in pairs} == {demo["response"] for demo in demos}


def test_sampled_answers_end_at_every_stop_token_of_the_policy(policy, tokenizer):
    """generation_config.json may list more of them than the tokenizer knows."""
    stops = tuple(range(len(tokenizer) - 1))  # one is left for padding
    every_token_ends = nnx.clone(policy)
    every_token_ends.stop_ids = stops
    answers = [preference_pairs.Answers("p", [], [])]
    config = PairsConfig("d", 20, max_new_tokens=6, temperature=1.0, seed=0)
    preference_pairs.add_samples(config, every_token_ends, tokenizer=tokenizer, answers=answers)
    assert not answers[0].unfinished  # all ended, with their first token
    preference_pairs.add_samples(config, policy, tokenizer=tokenizer, answers=answers)
    assert answers[0].unfinished


@pytest.mark.parametrize(
    "change", [{"samples_per_prompt": -1}, {"max_new_tokens": 0}, {"temperature": 0.0}]
)
def test_bad_options_are_named(change):
    good = {"samples_per_prompt": 1, "max_new_tokens": 4, "temperature": 1.0}
    ((name, value),) = change.items()
    with pytest.raises(InputError, match=f"prepare_data.{name}={value}"):
        PairsConfig(demos_jsonl="d", seed=0, **{**good, **change})


def test_one_demonstration_is_too_few(policy, tokenizer):
    config = PairsConfig("demos.jsonl", 0, max_new_tokens=4, temperature=1.0, seed=0)
    demos = [{"prompt": "a", "response": "b"}]
    with pytest.raises(InputError, match=r"prepare_data\.demos_jsonl=demos\.jsonl: 1 row"):
        preference_pairs.make_pairs(config, policy, tokenizer=tokenizer, demos=demos)
