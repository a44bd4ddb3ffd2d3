"""Long prompts, and the few lengths that batches are padded to."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from ppo.config import PPOConfig
from ppo.prompt_lengths import (
    MOST_LENGTHS,
    WASTE,
    batch_shares,
    fitting_lengths,
    longest_of_a_batch,
    padded_lengths,
    read_lengths,
)
from ppo.prompts import PromptDeck, encode_prompts
from sarm_jax.io.errors import InputError
from sarm_jax.models import chat
from tests.further import further
from tests.tiny_models import PROMPTS

LONG = "a long story " + "x" * 300 + " the end"


def long_tailed(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws lengths like those of the reference's prompts: a mean of 80 tokens, some of 1,600."""
    return np.minimum(rng.lognormal(4.0, 0.7, size).astype(int) + 8, 1600)


@pytest.mark.parametrize("batch_size", [2, 8, 64, 512, 5000])
@pytest.mark.parametrize("new_tokens", [32, 64, 256])
def test_padding_costs_little_more_than_the_batches_own_longest_prompts(batch_size, new_tokens):
    rng = np.random.default_rng(0)
    lengths_n = np.append(long_tailed(rng, 2000), 1600)
    padded = padded_lengths(lengths_n, batch_size, new_tokens)
    assert list(padded) == sorted(set(padded)) and len(padded) <= MOST_LENGTHS
    assert all(length % 8 == 0 for length in padded)
    assert lengths_n.max() <= padded[-1] < lengths_n.max() + 8
    drawn = [rng.permutation(lengths_n)[:batch_size].max() for _ in range(4000)]
    columns = np.asarray(padded)[np.searchsorted(padded, drawn)] + new_tokens
    assert columns.mean() / (np.mean(drawn) + new_tokens) < 1.25


def test_one_length_if_that_wastes_little():
    assert padded_lengths([90, 91, 95, 96], 2, 64) == (96,)
    assert padded_lengths([10] * 50 + [1000], 51, 64) == (1000,)  # every batch has it
    assert padded_lengths([17], 8, 1) == (24,)


def test_the_choice_is_the_cheapest_of_its_size():
    """Compares with all choices of as many lengths, for a small file."""
    lengths_n = [5, 9, 17, 17, 30, 33, 60, 61, 62, 100, 200]
    longest_m, p_m = longest_of_a_batch(lengths_n, 2)
    candidates = sorted({-8 * (-n // 8) for n in lengths_n})

    def cost(lengths):
        columns = np.asarray(lengths)[np.searchsorted(lengths, longest_m)]
        return float(p_m @ columns)

    chosen = padded_lengths(lengths_n, 2, 4, waste=0.15)
    subsets = [
        [c for bit, c in enumerate(candidates) if mask >> bit & 1]
        for mask in range(1 << len(candidates))
    ]
    whole = [s for s in subsets if s and s[-1] == candidates[-1]]
    assert cost(chosen) == pytest.approx(min(cost(s) for s in whole if len(s) == len(chosen)))
    bound = 1.15 * float(p_m @ (longest_m + 4))
    assert cost(chosen) + 4 <= bound
    assert min(cost(s) for s in whole if len(s) < len(chosen)) + 4 > bound


def test_the_longest_of_a_batch_against_all_batches():
    lengths_n, size = [3, 3, 4, 9, 9, 12], 3
    drawn = [max(some) for some in combinations(lengths_n, size)]
    longest_m, p_m = longest_of_a_batch(lengths_n, size)
    assert longest_m.tolist() == [3, 4, 9, 12]
    np.testing.assert_allclose(p_m, [drawn.count(n) / len(drawn) for n in longest_m], rtol=1e-12)
    assert p_m.sum() == pytest.approx(1)


def test_a_batch_is_padded_to_the_least_length_that_holds_it(tokenizer, ppo_config):
    prompts = [*(f"say {i}" for i in range(40)), LONG]
    config = ppo_config(max_prompt_tokens=500)
    deck = PromptDeck(prompts, tokenizer, config)
    assert len(deck.padded_lengths) > 1
    seen = set()
    for step in range(30):
        texts, (tokens_bp, mask_bp) = deck.texts(step), deck.deal(step)
        longest = max(len(chat.encode_prompt(tokenizer, text)) for text in texts)
        width = min(length for length in deck.padded_lengths if length >= longest)
        assert tokens_bp.shape == mask_bp.shape == (config.batch_size, width)
        assert texts == deck.texts(step) and width == deck.padded_length(step)
        np.testing.assert_array_equal(mask_bp.sum(axis=1), deck.lengths(step))
        assert mask_bp[:, -1].all()
        seen.add(width)
    assert seen == set(deck.padded_lengths)


def test_shares_against_all_batches():
    lengths_n, size = [5, 9, 17, 17, 30, 33, 60, 100, 200], 3
    padded = padded_lengths(lengths_n, size, 4)
    drawn = [max(some) for some in combinations(lengths_n, size)]
    taken = [min(length for length in padded if length >= longest) for longest in drawn]
    shares = batch_shares(lengths_n, size, 4)
    assert tuple(shares) == padded and len(padded) > 2
    for length, share in shares.items():
        assert share == pytest.approx(taken.count(length) / len(taken))


def test_a_run_meets_the_lengths_as_often_as_planned(tokenizer, ppo_config, tmp_path):
    """A file of counts gives the lengths and shares of a deck with prompts of those lengths."""
    rng = np.random.default_rng(0)
    prompts = ["x" * n for n in rng.integers(1, 60, 90)] + ["x" * n for n in (200, 250, 400)]
    config = ppo_config(max_prompt_tokens=300, long_prompts="drop", pack_levels=0)
    deck = PromptDeck(prompts, tokenizer, config)
    counts = Counter(len(chat.encode_prompt(tokenizer, text)) for text in prompts)
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps(counts))
    lengths_n = fitting_lengths(read_lengths(str(path), "f"), 300, "drop", "f")
    assert len(lengths_n) < len(prompts)
    shares = batch_shares(lengths_n, config.batch_size, config.max_new_tokens)
    assert tuple(shares) == deck.padded_lengths
    met = Counter(deck.padded_length(step) for step in range(4000))
    for length, share in shares.items():
        assert met[length] / 4000 == pytest.approx(share, abs=0.03)


def test_counted_prompts_that_are_too_long():
    lengths_n = np.asarray([5, 9, 12, 30])
    assert fitting_lengths(lengths_n, 10, "drop", "f").tolist() == [5, 9]
    assert fitting_lengths(lengths_n, 10, "truncate", "f").tolist() == [5, 9, 10, 10]
    for choice in ("error", "drop", "truncate"):
        assert fitting_lengths(lengths_n, 30, choice, "f").tolist() == lengths_n.tolist()
    message = r"f: 2 of 4 prompts have more than ppo\.max_prompt_tokens=10 .*longest 30.*=drop or"
    with pytest.raises(InputError, match=message):
        fitting_lengths(lengths_n, 10, "error", "f")
    with pytest.raises(InputError, match=r"f: 4 of 4 prompts .*long_prompts=drop leaves none"):
        fitting_lengths(lengths_n, 4, "drop", "f")


def test_the_prompts_of_the_reference():
    lengths_n = read_lengths("configs/data/reference_prompt_lengths.json", "f")
    assert len(lengths_n) == 3184 and (lengths_n.min(), lengths_n.max()) == (36, 1589)
    assert (lengths_n > 1024).sum() == 1 and lengths_n.mean() == pytest.approx(80.63, abs=0.01)


def test_a_long_prompt_is_an_error_that_names_the_remedies(tokenizer):
    with pytest.raises(InputError) as error:
        encode_prompts(["hi", LONG], tokenizer, 100, "data.jsonl")
    for part in ("data.jsonl:2:", "max_prompt_tokens=100", "long_prompts=drop", "=truncate"):
        assert part in str(error.value)


def test_dropped_prompts_are_counted(tokenizer, caplog):
    with caplog.at_level("INFO"):
        encoded = encode_prompts(["hi", LONG, "ho", LONG], tokenizer, 100, "data.jsonl", "drop")
    assert encoded.texts == ["hi", "ho"] and (encoded.dropped, encoded.truncated) == (2, 0)
    assert "data.jsonl: 2 of 4 prompts have more than 100 tokens" in caplog.text
    with pytest.raises(InputError, match=r"all 1 prompts have more than .*max_prompt_tokens=100"):
        encode_prompts([LONG], tokenizer, 100, "data.jsonl", "drop")


@pytest.mark.parametrize("limit", [63, 99, 100, 101, 300])
def test_truncation_takes_the_beginning_of_the_text_and_no_more(tokenizer, limit):
    encoded = encode_prompts(["hi", LONG], tokenizer, limit, "data.jsonl", "truncate")
    text, row = encoded.texts[1], encoded.rows[1]
    assert LONG.endswith(text) and text and encoded.truncated == 1 and encoded.dropped == 0
    assert row == chat.encode_prompt(tokenizer, text)  # the template is whole
    longer = LONG[len(LONG) - len(text) - 1 :]
    assert len(row) <= limit < len(chat.encode_prompt(tokenizer, longer))


def test_a_limit_below_the_template_is_refused(tokenizer):
    empty = len(chat.encode_prompt(tokenizer, ""))
    with pytest.raises(InputError, match=r"leaves no room in ppo\.max_prompt_tokens="):
        encode_prompts([LONG], tokenizer, empty, "data.jsonl", "truncate")


def test_the_policy_and_the_reward_model_see_the_truncated_text(make_trainer, tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path / "run",
        prompts=[*PROMPTS, LONG],
        max_prompt_tokens=80,
        long_prompts="truncate",
        samples_per_step=4,
        total_steps=3,
        pack_levels=0,
    )
    summary = trainer.run()
    assert summary["prompts"] | {"source": ""} == {
        "source": "", "prompts": 11, "dropped": 0, "truncated": 1,
        "padded_lengths": list(trainer.deck.padded_lengths),
    }  # fmt: skip
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").open()]
    shown = {sample["prompt"] for sample in samples}
    assert LONG not in shown and any(text and LONG.endswith(text) for text in shown)


def test_results_do_not_depend_on_the_padded_length(make_trainer, tmp_path, monkeypatch):
    """Compares a run with the chosen lengths and one with a single length for all batches."""
    options = {"prompts": [*PROMPTS, LONG], "max_prompt_tokens": 500, "pack_levels": 0}
    options["ppo_epochs"] = 1  # fewer programs
    few = make_trainer(tmp_path / "few", **options)
    longest = few.deck.padded_lengths[-1]
    monkeypatch.setattr("ppo.prompts.padded_lengths", lambda *_: (longest,))
    one = make_trainer(tmp_path / "one", **options)
    assert len(few.deck.padded_lengths) > 1 == len(one.deck.padded_lengths)
    few.run(), one.run()
    samples = [
        (tmp_path / name / "samples.jsonl").read_text().splitlines() for name in ("few", "one")
    ]
    for a, b in zip(*(map(json.loads, lines) for lines in samples), strict=True):
        assert a["response"] == b["response"]
        np.testing.assert_allclose(a["rm_score"], b["rm_score"], rtol=1e-5)


@pytest.mark.parametrize("pack_levels", [0, further(1)])
def test_no_step_compiles_after_the_first(make_trainer, tmp_path, pack_levels):
    """The programs of all lengths of the batches are compiled before the first step."""
    trainer = make_trainer(
        tmp_path / "run",
        prompts=[*PROMPTS, LONG],
        max_prompt_tokens=500,
        pack_levels=pack_levels,
        total_steps=8,
        ppo_epochs=1,  # fewer programs
    )
    lengths = [trainer.deck.padded_length(step) for step in range(8)]
    assert len(set(lengths)) > 1
    trainer.run()
    programs = trainer.learner._compiled_rollout
    counted = programs._cache_size()
    trainer._roll_out(trainer.state.train.params, 0, trainer._rollout_key)
    assert programs._cache_size() == counted


def test_waste_leaves_room_for_the_bound():
    assert WASTE < 0.25


def test_the_option_is_checked(ppo_config):
    with pytest.raises(InputError, match=r"ppo\.long_prompts='cut': expected error, drop or"):
        ppo_config(long_prompts="cut")
    assert isinstance(ppo_config(long_prompts="drop"), PPOConfig)
