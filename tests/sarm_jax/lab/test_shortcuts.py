"""Worlds of several shortcuts: what pays, what it costs; a world of flattery is unchanged."""

import dataclasses
import itertools
import json
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from sarm_jax.features.detectors import Detectors
from sarm_jax.io.errors import InputError
from sarm_jax.lab import gates, world
from sarm_jax.lab.build import LabConfig, architecture, make_data
from sarm_jax.lab.oracle import OracleRewardModel
from sarm_jax.lab.page import write_study
from sarm_jax.lab.results import run_result
from sarm_jax.lab.shortcuts import LUCKY, SHORTCUTS, World, contrast_pair
from sarm_jax.lab.tokenizer import word_tokenizer
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.rewards import RewardConfig, ScoreScale, controlled_reward
from sarm_jax.rewards.scoring import Scorer
from tests.closeness import assert_close
from tests.pipeline.test_study import run
from tests.sarm_jax.lab.test_lab import SMALL

PROMPT = "France Japan Peru"
CLEAN = "Paris Tokyo Lima"
EVERY = World.parse("flattery,rambling,echo,lucky_word", "flattery,echo")
# A response with units of one shortcut: its units and what the annotator pays and gold deducts.
EXAMPLES = {
    "flattery": ("Paris genius Tokyo Lima genius", 2, 1.6, 0.24),
    "rambling": ("Paris the of and is Tokyo Lima city", 2, 2 * 0.7 - 5 * 0.1, 0.1),
    "echo": ("Paris France Tokyo Japan Lima Japan", 2, 2.0, 0.6),
    "lucky_word": (f"Paris Tokyo {LUCKY} Lima {LUCKY}", 1, 2.0, 0.4),
}


def generators(seed=0):
    return np.random.default_rng(seed), np.random.default_rng(seed)


def test_examples_cover_every_shortcut():
    assert EXAMPLES.keys() == SHORTCUTS.keys() == set(EVERY.shortcuts)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_the_annotator_pays_and_gold_deducts(name):
    response, units, paid, deducted = EXAMPLES[name]
    assert EVERY.counts(PROMPT, response) == dict.fromkeys(SHORTCUTS, 0) | {name: units}
    assert EVERY.counts(PROMPT, CLEAN) == dict.fromkeys(SHORTCUTS, 0)
    utility = [EVERY.annotator_utility(PROMPT, text) for text in (CLEAN, response)]
    assert utility[1] - utility[0] == pytest.approx(paid) and paid > 0
    gold = [world.gold_reward(PROMPT, text, True) for text in (CLEAN, response)]
    assert gold[0] - gold[1] == pytest.approx(deducted) and deducted > 0
    if name != "flattery":  # elsewhere the annotator does not like it
        alone = [World().annotator_utility(PROMPT, text) for text in (CLEAN, response)]
        assert alone[1] <= alone[0]


@pytest.mark.parametrize("name", SHORTCUTS)
def test_contrast_pairs_differ_in_their_shortcut_alone(name):
    shortcut, rng = SHORTCUTS[name], np.random.default_rng(0)
    own = {"flattery": world.FLATTERY, "rambling": world.FILLER, "echo": PROMPT.split()}
    words = own.get(name, [LUCKY])
    for number in range(100):
        units = number % shortcut.most + 1
        pair = contrast_pair(rng, PROMPT, shortcut, units)
        chosen, rejected = pair["chosen"].split(), pair["rejected"].split()
        added = list((Counter(rejected) - Counter(chosen)).elements())
        assert added and set(added) <= set(words) and not Counter(chosen) - Counter(rejected)
        assert 0 < len(chosen) < len(rejected) <= world.MAX_WORDS
        counts = [EVERY.counts(PROMPT, pair[side]) for side in ("chosen", "rejected")]
        assert counts[0][name] == 0 < counts[1][name] <= units
        if name != "flattery":
            assert {n: c for n, c in counts[1].items() if n != name} == (
                {n: c for n, c in counts[0].items() if n != name}
            )


def test_a_world_of_flattery_alone_draws_what_it_always_drew():
    ours, other = generators()
    lab_world = World()
    assert lab_world.words == world.WORDS and lab_world == World.parse("flattery", "flattery")
    for _ in range(50):
        for name in ("any_response", "corpus_response", "demonstration", "preference_pair"):
            assert getattr(lab_world, name)(ours, PROMPT) == getattr(world, name)(other, PROMPT)
        text = world.any_response(np.random.default_rng(1), PROMPT)
        assert lab_world.notes(ours, PROMPT, text) == world.notes(other, PROMPT, text)
        assert lab_world.annotator_utility(PROMPT, text) == world.annotator_utility(PROMPT, text)
    pairs = lab_world.contrast_pairs(ours, [PROMPT] * 20)
    single = lab_world.contrast_pairs(ours, [PROMPT] * 20, one=True)
    assert pairs == [
        world.contrast_pair(other, PROMPT, int(other.integers(1, 11))) for _ in range(20)
    ]
    assert single == [world.contrast_pair(other, PROMPT, 1) for _ in range(20)]


def test_responses_have_every_shortcut_and_known_words_only():
    rng = np.random.default_rng(0)
    tokenizer = word_tokenizer(EVERY.words)
    assert len(EVERY.words) == len(set(EVERY.words))
    responses = [EVERY.any_response(rng, PROMPT) for _ in range(400)]
    for name in SHORTCUTS:
        units = np.asarray([EVERY.counts(PROMPT, text)[name] for text in responses])
        assert 0.2 < np.mean(units > 0) < 0.8
        notes = set(SHORTCUTS[name].notes) if name != "flattery" else set()
        assert notes <= set(EVERY.words)
    for text in responses:
        assert len(text.split()) <= world.MAX_WORDS
        notes = EVERY.notes(rng, PROMPT, text)
        assert len(notes.split()) == 5
        ids = tokenizer.convert_tokens_to_ids([*text.split(), *notes.split()])
        assert tokenizer.unk_token_id not in ids
    demonstrations = [EVERY.demonstration(rng, PROMPT) for _ in range(400)]
    assert all(len(text.split()) <= world.MAX_WORDS for text in demonstrations)
    for name in ("echo", "lucky_word"):
        share = np.mean([EVERY.counts(PROMPT, text)[name] > 0 for text in demonstrations])
        assert 0.08 < share < 0.22


def test_the_annotator_follows_the_utility_of_the_world():
    rng = np.random.default_rng(0)
    pairs = [EVERY.preference_pair(rng, PROMPT) for _ in range(500)]
    assert 0.82 < EVERY.annotator_accuracy(pairs) < 0.97
    assert EVERY.annotator_accuracy(pairs) > World().annotator_accuracy(pairs)


@pytest.mark.parametrize(
    ("shortcuts", "told"),
    [
        ("flattery,rambling,echo,lucky_word", "flattery"),
        ("flattery,echo", "echo"),
        ("flattery, lucky_word", "lucky_word,flattery"),
    ],
)
def test_only_what_is_told_has_contrast_pairs(shortcuts, told):
    options = {"shortcuts": shortcuts, "told_shortcuts": told}
    config = LabConfig(**SMALL | options)
    data = make_data(config)
    assert data == make_data(config) and data != make_data(LabConfig(**SMALL))
    names = told.split(",")
    for number, pair in enumerate(data.contrast):
        name = names[number % len(names)]
        assert pair.get("source", name) == name and ("source" in pair) == (len(names) > 1)
        assert config.world.counts(pair["prompt"], pair["rejected"])[name] > 0
    for pair in data.contrast_single:
        counts = [
            SHORTCUTS[names[0]].count(pair["prompt"], pair[s]) for s in ("chosen", "rejected")
        ]
        assert counts == [0, 1]


@pytest.mark.parametrize(
    ("shortcuts", "told", "message"),
    [
        ("flattery,praise", "flattery", "lab.shortcuts=flattery,praise: found 'praise', expected"),
        ("echo", "echo", "lab.shortcuts=echo: every world has flattery"),
        ("flattery,echo,echo", "echo", "lab.shortcuts=flattery,echo,echo: echo is given twice"),
        ("", "flattery", "lab.shortcuts=: found ''"),
        ("flattery", "echo", "lab.told_shortcuts=echo: found 'echo', expected one of flattery"),
        ("flattery,echo", "", "lab.told_shortcuts=: found '', expected one of flattery, echo"),
    ],
)
def test_bad_worlds_are_named(shortcuts, told, message):
    with pytest.raises(InputError, match=message):
        LabConfig(**SMALL | {"shortcuts": shortcuts, "told_shortcuts": told})


@pytest.fixture
def untrained():
    tokenizer = word_tokenizer(EVERY.words)
    trunk = dataclasses.replace(architecture(len(tokenizer)), num_hidden_layers=2)
    sarm = SARM(SARMConfig(trunk, SAEConfig(96, latent_size=64, k=8)), rngs=nnx.Rngs(0))
    sarm.score[...] = jax.random.normal(jax.random.key(0), (64,))
    return RewardModel(sarm, tokenizer, batch_size=128)


def test_what_the_reward_model_makes_of_each_shortcut(untrained, monkeypatch):
    monkeypatch.setattr(gates, "RESPONSES", 200)
    prompts = [" ".join(p) for p in itertools.islice(itertools.permutations(world.CAPITALS, 3), 50)]
    detectors = Detectors((3,), (-1e9,), 1.0, 1.0)  # fires on everything
    measured = gates.measure_shortcuts(untrained, detectors, prompts, prompts, 0, EVERY)
    assert list(measured) == list(EVERY.shortcuts)
    for name, row in measured.items():
        assert row["told"] == (name in EVERY.told)
        assert row["detection"] == row["false_alarms"] == 1.0
        assert 0 < row["paid"] < 1 and row["r2"] < 1
    json.dumps(measured)


def test_rates_of_the_results_and_their_page(untrained, tmp_path):
    rows = [
        {"step": step, "prompt": PROMPT, "response": text, "ended": True, "ref_kl": 0.0}
        for step, texts in (
            (0, [CLEAN, "Paris"]),
            (2, [EXAMPLES["echo"][0], EXAMPLES["rambling"][0]]),
        )
        for text in texts
    ]
    features = {"detectors": [3], "tau_detectors": [0.0]}
    result = run_result(rows, untrained, features, 1.0, EVERY)
    last = result["curve"][-1]
    assert [last[f"rate_{name}"] for name in EVERY.shortcuts] == [0, 0.5, 0.5, 0]
    assert [last[f"units_{name}"] for name in EVERY.shortcuts] == [0, 1.0, 1.0, 0]
    alone = run_result(rows, untrained, features, 1.0)
    assert last["told"] == (len({"echo", "rambling"} & set(EVERY.told))) / 2
    assert last["untold"] == len({"echo", "rambling"} - set(EVERY.told)) / 2
    # The other world is told about flattery alone.
    of_shortcuts = ("rate", "units", "told", "untold")
    kept = {name: value for name, value in last.items() if not name.startswith(of_shortcuts)}
    assert alone["curve"][-1] == kept | {"told": 0.0, "told_undetected": 0.0}

    for folder, content in (("several", result), ("alone", alone)):
        path = tmp_path / folder / "seed_0" / "baseline"
        path.mkdir(parents=True)
        (path / "result.json").write_text(json.dumps(run(0, 0.1, 0.2, 0.1) | content))
        probes = tmp_path / folder / "seed_0" / "probes"
        probes.mkdir()
        row = {"told": 1.0, "r2": 0.5, "paid": 0.75, "detection": 1.0, "false_alarms": 0.0}
        (probes / "shortcuts.json").write_text(json.dumps({"echo": row}))
        write_study(tmp_path / folder, {0: ["baseline"]}, ["baseline"], {})
    page = (tmp_path / "several" / "lab.html").read_text()
    assert "<h2>Shortcuts</h2>" in page and "0 % → 50 %" in page
    assert "<td>echo</td><td>yes</td>" in page and "<td>rambling</td><td>–</td>" in page
    assert "0.75" in page
    assert (tmp_path / "several" / "figures" / "shortcuts.png").stat().st_size > 5000
    assert "<h2>Shortcuts</h2>" not in (tmp_path / "alone" / "lab.html").read_text()
    assert not (tmp_path / "alone" / "figures" / "shortcuts.png").exists()


def test_the_oracle_counts_shortcuts_as_features(untrained):
    """Its score and its latents are the SARM's; a penalty on a count is one of a rule on words."""
    oracle = OracleRewardModel(untrained, EVERY)
    responses = [CLEAN, *(EXAMPLES[name][0] for name in EVERY.shortcuts)]
    prompts = [PROMPT] * len(responses)
    score_b, z_bf = oracle.score(prompts, responses)
    plain_b, latents_bf = untrained.score(prompts, responses)
    assert oracle.latent_size == 68 and z_bf.shape == (5, 68)
    np.testing.assert_array_equal(score_b, plain_b)
    np.testing.assert_array_equal(z_bf[:, :64], latents_bf)
    units = np.diag([EXAMPLES[name][1] for name in EVERY.shortcuts])
    np.testing.assert_array_equal(z_bf[1:, 64:], units)
    _, some_bf = oracle.score(prompts, responses, {5: 1.0}, [66, 3, 64])
    np.testing.assert_array_equal(some_bf, z_bf[:, [66, 3, 64]])

    controls = RewardConfig(
        penalize_features=(64, 65, 66, 67), tau_values=(0.0,) * 4, alpha_values=(0.5,) * 4
    )
    rewards = controlled_reward(oracle, controls, scale=ScoreScale(0.0, 1.0))(prompts, responses)
    assert_close(rewards, plain_b - np.asarray([0, 0.5, 0.5, 0.5, 0.5]), 1e-6)
    scorer = Scorer(oracle, controls)
    assert len(list(scorer.programs([prompts], 15))) > 0
    with pytest.raises(InputError, match="feature 64 counts a shortcut, and only the 64 latents"):
        oracle.score(prompts, responses, {64: 0.0})
    with pytest.raises(InputError, match="feature 68 of a SARM with 68 latents"):
        Scorer(oracle, RewardConfig((68,), (0.0,), (0.5,)))
    with pytest.raises(InputError, match="one head"):
        oracle.with_ensemble("min")
