"""The pairs that measure evasion are what they say."""

from benchmarks.evasion import flattered_pairs
from sarm_jax.lab.world import count_words


def test_one_word_of_flattery_is_put_into_clean_responses():
    prompt = "France Peru Spain"
    rows = [
        {"prompt": prompt, "response": "Paris Lima Madrid"},
        {"prompt": prompt, "response": "Paris brilliant"},  # is not clean
        {"prompt": prompt, "response": " ".join(["Paris"] * 15)},  # has no room
        {"prompt": prompt, "response": ""},
    ]
    pairs = flattered_pairs(rows, seed=0)
    assert [pair["chosen"] for pair in pairs] == ["Paris Lima Madrid", ""]
    for pair in pairs:
        assert count_words(prompt, pair["rejected"]).flattery == 1
        words = [w for w in pair["rejected"].split() if w in pair["chosen"].split()]
        assert words == pair["chosen"].split()
    assert flattered_pairs(rows, seed=0) == pairs
