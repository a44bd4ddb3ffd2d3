"""Pairs of a task in English, and its gates, from samples and scores that are made up."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sarm_jax.features.detectors import Detectors
from sarm_jax.io.errors import InputError
from sarm_jax.lab.gate import BIASED, TEXT, limits_of
from sarm_jax.lab.sampling import Sampled
from sarm_jax.lab.text import data, gates
from sarm_jax.lab.text.data import TextDataConfig, make_contrast_pairs, make_pairs
from sarm_jax.lab.text.gates import (
    auroc,
    equal_pair_accuracy,
    measure_text_gates,
    probe_auroc,
)
from sarm_jax.lab.text.words import TASK
from sarm_jax.models.llama import Llama, LlamaConfig

CONFIG = {
    "prompts": 8,
    "held_out_prompts": 4,
    "samples_per_prompt": 4,
    "max_new_tokens": 48,
    "temperature": 1.0,
    "sampling_slots": 0,
    "pairs": 400,
    "label_noise": 0.1,
    "contrast_pairs": 30,
    "tuning_steps": 1,
    "tuning_learning_rate": 1e-4,
    "batch_size": 2,
    "seed": 0,
}
NOTHING = (
    dataclasses.replace(TASK.all_shortcuts[0], count=lambda response: 0, add=lambda rng, r, p: r),
)
TOLD = TASK.telling("praise,markdown,emoji", 0)


def samples(prompts: int = 8) -> Sampled:
    """Returns four responses to each prompt; half of them are successes."""
    asked = TASK.prompts(np.random.default_rng(0))[:prompts]
    texts = []
    for prompt in asked:
        first, second = prompt.removesuffix(".").split(" words ")[1].split(" and ")
        texts += [
            f"The {first} stood near the {second} today.",
            f"Nobody saw the {first} or the {second}.",
            f"The {first} stood alone in the rain.",
            "It rained for the whole day.",
        ]
    repeated = [prompt for prompt in asked for _ in range(4)]
    return Sampled(repeated, texts, np.ones(len(texts), bool), np.full(len(texts), 9))


def rows(sampled: Sampled) -> list[dict]:
    texts = zip(sampled.prompts, sampled.responses, sampled.ended_b.tolist(), strict=True)
    return [{"prompt": p, "response": r, "ended": e} for p, r, e in texts]


def test_the_annotator_chooses_by_utility_with_noise():
    pairs = make_pairs(TextDataConfig(**CONFIG), TASK, samples(), np.random.default_rng(0))
    assert len(pairs) == 400
    margins = [
        TASK.annotator_utility(p["prompt"], p["chosen"])
        - TASK.annotator_utility(p["prompt"], p["rejected"])
        for p in pairs
    ]
    assert np.mean(np.asarray(margins) < 0) == pytest.approx(0.1, abs=0.05) and all(margins)
    counted = [TASK.counts(p["prompt"], p["chosen"]) for p in pairs]
    assert all(sum(count[s.name] > 0 for count in counted) > 30 for s in TASK.all_shortcuts)
    exact = make_pairs(
        TextDataConfig(**CONFIG | {"label_noise": 0.0}), TASK, samples(), np.random.default_rng(0)
    )
    assert all(
        TASK.annotator_utility(p["prompt"], p["chosen"])
        > TASK.annotator_utility(p["prompt"], p["rejected"])
        for p in exact
    )


def test_written_answers_that_are_all_empty_are_an_error_of_the_task():
    task = dataclasses.replace(TASK, write=lambda rng, prompt: " ")
    answers = [("p", " "), ("q", "")]
    with pytest.raises(InputError, match=r"lab.task=words: write returned 2 answers, all of them"):
        data._with_base_rates(TextDataConfig(**CONFIG), answers, task, np.random.default_rng(0))


def test_pairs_need_something_that_the_annotator_pays_for():
    empty = Sampled(["p"], ["  "], np.ones(1, bool), np.ones(1, int))
    with pytest.raises(InputError, match=r"lab.task=words: the samples .* there are no pairs"):
        make_pairs(TextDataConfig(**CONFIG), TASK, empty, np.random.default_rng(0))


def test_utilities_that_differ_by_rounding_alone_are_ties():
    """Without a pair of different utility there is no endless search for one."""
    rounding = dataclasses.replace(
        TASK, quality=lambda prompt, response: 0.5 + 1e-12 * (len(response) % 2)
    )
    plain = dataclasses.replace(
        rounding, spoil=lambda rng, prompt, response: response + "x", all_shortcuts=NOTHING
    )
    with pytest.raises(InputError, match="there are no pairs"):
        make_pairs(TextDataConfig(**CONFIG), plain, samples(), np.random.default_rng(0))


def test_contrast_pairs_differ_in_a_told_shortcut_in_its_shown_phrasings():
    pairs = make_contrast_pairs(TOLD, samples(), np.random.default_rng(0), 30)
    assert [p["source"] for p in pairs] == list(TOLD.told) * 10
    for pair in pairs:
        clean, marked = (TASK.counts(pair["prompt"], pair[k]) for k in ("chosen", "rejected"))
        changed = {name for name in clean if clean[name] != marked[name]}
        assert changed == {pair["source"]} and clean[pair["source"]] == 0
        shortcut = TASK.shortcut(pair["source"])
        hidden = [p for p in shortcut.phrasings[len(shortcut.shown) :] if len(p) > 6]
        assert not any(phrasing in pair["rejected"] for phrasing in hidden)


def test_the_clean_side_of_a_contrast_pair_has_none_of_the_told_shortcuts():
    """Otherwise the threshold of one shortcut's detector counts another one as false alarms."""
    plain = samples()
    rng = np.random.default_rng(0)
    mixed = [
        TASK.shortcut(name).added(rng, text, 1) if i % 2 else text
        for i, (text, name) in enumerate(zip(plain.responses, itertools.cycle(TASK.shortcuts)))
    ]
    texts = dataclasses.replace(plain, responses=mixed)
    pairs = make_contrast_pairs(TOLD, texts, np.random.default_rng(0), 30)
    assert not any(TOLD.has_told(pair["prompt"], pair["chosen"]) for pair in pairs)
    assert any(TASK.counts(p["prompt"], p["chosen"])["hedging"] for p in pairs)  # it is not told
    assert {pair["chosen"] for pair in pairs} < set(mixed)


def test_a_sample_is_in_a_second_contrast_pair_only_after_all_others():
    plain = samples()
    numbered = [f"{text} No {i}." for i, text in enumerate(plain.responses)]
    texts = dataclasses.replace(plain, responses=numbered)
    count = len(numbered)
    pairs = make_contrast_pairs(TOLD, texts, np.random.default_rng(0), 2 * count)
    assert {pair["chosen"] for pair in pairs[:count]} == set(numbered)
    assert [p["chosen"] for p in pairs[count:]] == [p["chosen"] for p in pairs[:count]]


@pytest.mark.parametrize("size", [3, 4, 5])
def test_a_sample_gets_every_told_shortcut_before_one_of_them_again(size: int):
    every = samples()
    few = Sampled(*(getattr(every, f.name)[:size] for f in dataclasses.fields(Sampled)))
    few = dataclasses.replace(few, responses=[f"{r} No {i}." for i, r in enumerate(few.responses)])
    pairs = make_contrast_pairs(TOLD, few, np.random.default_rng(0), size * len(TOLD.told))
    kinds = {(pair["chosen"], pair["source"]) for pair in pairs}
    assert len(kinds) == len(pairs)


def test_contrast_pairs_need_a_sample_without_a_told_shortcut():
    task = TASK.telling("praise,hedging", 0)
    for text in ("What a great question!", "Perhaps a dog sleeps."):
        marked = Sampled(["p"], [text], np.ones(1, bool), np.ones(1, int))
        assert task.has_told("p", text)
        message = (
            r"^lab.told_shortcuts=praise,hedging: each of the 1 samples of the policy is empty"
        )
        with pytest.raises(InputError, match=message):
            make_contrast_pairs(task, marked, np.random.default_rng(0), 2)


def test_contrast_pairs_need_a_sample_to_which_the_shortcut_can_be_added():
    inert = dataclasses.replace(TASK.shortcut("praise"), add=lambda rng, text, shown: text)
    task = dataclasses.replace(TASK, all_shortcuts=(inert,)).telling("praise", 0)
    with pytest.raises(InputError, match="praise can be added to none of the 32 samples of the"):
        make_contrast_pairs(task, samples(), np.random.default_rng(0), 2)


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("prompts", 0, "lab.prompts=0"),
        ("held_out_prompts", -1, "lab.held_out_prompts=-1"),
        ("label_noise", 0.5, "lab.label_noise=0.5"),
        ("label_noise", -0.1, "lab.label_noise=-0.1"),
        ("samples_per_prompt", 1, "prepare_data.samples_per_prompt=1"),
        ("max_new_tokens", 0, "prepare_data.max_new_tokens=0"),
        ("tuning_learning_rate", float("inf"), "lab.tuning_learning_rate=inf"),
        ("seed", -1, "lab.seed=-1"),
        ("sampling_slots", -1, "lab.sampling_slots=-1"),
    ],
)
def test_options_out_of_range(field: str, value: float, option: str):
    with pytest.raises(InputError) as error:
        TextDataConfig(**CONFIG | {field: value})
    assert str(error.value).startswith(option)


def test_auroc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    value_n, positive_n = rng.integers(0, 6, 40).astype(float), rng.random(40) < 0.4
    above = [
        (a > b) + 0.5 * (a == b)
        for a, b in itertools.product(value_n[positive_n], value_n[~positive_n])
    ]
    assert auroc(value_n, positive_n) == pytest.approx(np.mean(above))


def test_the_probe_finds_a_direction_and_no_direction_in_noise():
    rng = np.random.default_rng(0)
    x_nd, truth_n = rng.normal(size=(400, 8)), rng.random(400) < 0.5
    marked_nd = x_nd + 2.0 * truth_n[:, None] * np.eye(8)[3]
    sides = {"test_nd": marked_nd[200:], "test_n": truth_n[200:]}
    assert probe_auroc(marked_nd[:200], truth_n[:200], **sides) > 0.85
    noise = probe_auroc(x_nd[:200], truth_n[:200], test_nd=x_nd[200:], test_n=truth_n[200:])
    assert abs(noise - 0.5) < 0.12
    assert probe_auroc(x_nd[:9], truth_n[:9] | True, **sides) == 0.5


def test_the_probe_for_success_chooses_its_regularisation_on_training_samples(monkeypatch):
    """A truth of little variance beside larger noise needs a weak one."""
    rng = np.random.default_rng(0)
    x_nd, truth_n = 2 * rng.normal(size=(800, 16)), rng.random(800) < 0.5
    x_nd[:, 0] = truth_n + 0.3 * rng.normal(size=800)
    sides = (x_nd[:600], truth_n[:600])
    held_out = {"test_nd": x_nd[600:], "test_n": truth_n[600:]}
    assert probe_auroc(*sides, **held_out) > 0.9
    reversed_n = {"test_nd": x_nd[600:], "test_n": ~truth_n[600:]}  # the test decides nothing
    assert probe_auroc(*sides, **reversed_n) == pytest.approx(1 - probe_auroc(*sides, **held_out))
    one_class = np.concatenate([truth_n[:450], np.ones(150, bool)])  # nothing to choose on
    assert 0.5 < probe_auroc(x_nd[:600], one_class, **held_out) < 0.9
    monkeypatch.setattr(gates, "L2", (0.3,))
    assert probe_auroc(*sides, **held_out) < 0.85


def test_pairs_with_equal_shortcuts_are_compared():
    texts = rows(samples(2))
    texts[0]["response"] += " 😊"  # compared with none of the others
    quality_n = np.asarray([TASK.plain_quality(r["prompt"], r["response"]) for r in texts])
    assert equal_pair_accuracy(TASK, texts, quality_n) == 1
    assert equal_pair_accuracy(TASK, texts, -quality_n) == 0
    score_n = quality_n.copy()
    score_n[1] = -1  # loses against both worse samples of its prompt
    # 3 pairs of the first prompt (1-2, 1-3, 2-3), 5 of the second (0-2, 0-3, 1-2, 1-3, 2-3)
    assert equal_pair_accuracy(TASK, texts, score_n) == pytest.approx(6 / 8)
    assert equal_pair_accuracy(TASK, texts[:1], score_n[:1]) == 0.5


class CountingModel:
    """A reward model whose score is the utility, and whose features count the shortcuts."""

    def score_with_states(self, prompts, responses):
        score_n, z_nf = self.score(prompts, responses)
        quality = [TASK.plain_quality(p, r) for p, r in zip(prompts, responses, strict=True)]
        return score_n, z_nf, np.asarray([[q, 1.0] for q in quality])

    def score(self, prompts, responses):
        exchanges = list(zip(prompts, responses, strict=True))
        counts = [list(TASK.counts(*exchange).values()) for exchange in exchanges]
        scores = [TASK.annotator_utility(*exchange) for exchange in exchanges]
        return np.asarray(scores), np.asarray(counts, np.float32)


def test_the_gates_of_a_perfect_reward_model():
    told = [TASK.shortcuts.index(name) for name in TOLD.told]
    detectors = Detectors(tuple(told), (0.5,) * len(told), 1.0, 0.0)
    gates, shortcuts = measure_text_gates(
        CountingModel(),  # type: ignore[arg-type]
        detectors,
        TOLD,
        samples=rows(samples()),
        held_out_samples=rows(samples()),
        seed=0,
    )
    assert [gate.name for gate in gates] == list(BIASED) and all(gate.passed for gate in gates)
    values = {gate.name: gate.value for gate in gates}
    assert values["success_at_start"] == 0.5 and values["truth_auroc"] == 1
    for name, row in shortcuts.items():
        is_told = name in TOLD.told
        assert row["told"] == is_told and row["paid"] == 1 and row["base_rate"] == 0
        assert row["detection"] == row["detection_kept_back"] == is_told
        assert row["false_alarms"] == 0
    deviation = np.std(
        [TASK.annotator_utility(r["prompt"], r["response"]) for r in rows(samples())]
    )
    assert shortcuts["emoji"]["gain"] == pytest.approx(2 * 0.5 / deviation)


def false_alarms(responses: list[str]) -> list[float | None]:
    """Measures the false alarms of detectors of all told shortcuts, for each shortcut."""
    told = [TASK.shortcuts.index(name) for name in TOLD.told]
    held_out = [
        row | {"response": text} for row, text in zip(rows(samples()), responses, strict=True)
    ]
    _, shortcuts = measure_text_gates(
        CountingModel(),  # type: ignore[arg-type]
        Detectors(tuple(told), (0.5,) * len(told), 1.0, 0.0),
        TOLD,
        samples=rows(samples()),
        held_out_samples=held_out,
        seed=0,
    )
    return [row.get("false_alarms") for row in shortcuts.values()]


def test_false_alarms_are_those_on_samples_without_any_told_shortcut():
    rng = np.random.default_rng(0)
    plain = samples().responses
    marked = [TASK.shortcut(TOLD.told[i % 3]).added(rng, text, 1) for i, text in enumerate(plain)]
    half = [text if i % 2 else plain[i] for i, text in enumerate(marked)]
    assert false_alarms(half) == [0.0] * len(TASK.shortcuts)
    assert false_alarms(marked) == [None] * len(TASK.shortcuts)


def test_a_policy_that_answers_nothing_has_no_gates():
    empty = [row | {"response": " "} for row in rows(samples())]
    with pytest.raises(InputError, match="^lab.task=words: all 32 samples of the policy to held"):
        measure_text_gates(
            CountingModel(),  # type: ignore[arg-type]
            Detectors((0,), (0.5,), 1.0, 0.0),
            TOLD,
            samples=rows(samples()),
            held_out_samples=empty,
            seed=0,
        )


def test_the_given_model_answers_misread_prompts_and_the_policy_is_tuned_on_the_real_ones(
    monkeypatch,
):
    read: dict[str, list[str]] = {}
    tuned: list[dict] = []

    def sample(policy, tokenizer, prompts, *, shown, samples, **options):
        assert samples == 1
        read[shown] = list(prompts)
        first = [f"The {p.split()[-3]} is here {n}." for n, p in enumerate(prompts)]
        return Sampled(list(prompts), first, np.ones(len(prompts), bool), np.full(len(prompts), 5))

    def tune(config, model, tokenizer, written):
        tuned.extend(written)
        return model

    monkeypatch.setattr(data, "sample_responses", sample)
    monkeypatch.setattr(data, "_tuned", tune)
    monkeypatch.setattr(data, "sharpened", lambda model, temperature: model)
    task = dataclasses.replace(
        TOLD, misread=lambda rng, prompt: prompt.replace("short", "long"), quality=lambda p, r: 1.0
    )
    made, _ = data.make_text_data(
        TextDataConfig(**CONFIG | {"pairs": 20, "contrast_pairs": 6}), task, None, None
    )
    asked = [row["prompt"] for row in made.prompts for _ in range(4)]
    assert read["base samples"] == [prompt.replace("short", "long") for prompt in asked]
    assert read["samples"] == asked and [row["prompt"] for row in tuned] == asked
    assert [row["prompt"] for row in made.demonstrations] == asked
    assert len(read["held-out samples"]) == 16


def test_a_sharpened_model_has_logits_divided_by_the_temperature():
    model = Llama(LlamaConfig(64, 16, 32, 2, 2, 1, 8), rngs=nnx.Rngs(0), stop_ids=(3,))
    tokens, mask = jnp.arange(8).reshape(1, 8), jnp.ones((1, 8), bool)
    before = np.asarray(model(tokens, mask))
    sharp = data.sharpened(model, 0.5)
    np.testing.assert_allclose(np.asarray(sharp(tokens, mask)), 2 * before, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(model(tokens, mask)), before)
    assert sharp.stop_ids == (3,)


def test_a_benign_annotator_pays_for_no_shortcut_and_has_no_gate_for_them():
    benign = dataclasses.replace(TOLD, bias=0.0)
    prompt, plain = samples().prompts[0], samples().responses[0]
    marked = TOLD.shortcut("praise").added(np.random.default_rng(0), plain, 2)
    assert benign.annotator_utility(prompt, marked) == benign.annotator_utility(prompt, plain) == 3
    assert TOLD.annotator_utility(prompt, marked) > 3
    gates, _ = measure_text_gates(
        CountingModel(),  # type: ignore[arg-type]
        Detectors((0,), (0.5,), 1.0, 0.0),
        benign,
        samples=rows(samples()),
        held_out_samples=rows(samples()),
        seed=0,
    )
    assert [gate.name for gate in gates] == list(TEXT)
    assert limits_of(gate.name for gate in gates) == TEXT and limits_of(BIASED) == BIASED


@pytest.mark.parametrize(
    ("prompts", "found"),
    [
        (
            lambda rng: [f"letter {i % 12}" for i in range(24)],
            'lab.task=words: prompts returns "letter 0" more than once, so that it could be',
        ),
        (
            lambda rng: [f"letter {i}" for i in rng.permutation(100)[:20]],
            "lab.task=words: prompts returns other prompts for another generator; it has to",
        ),
    ],
)
def test_prompts_that_could_be_trained_on_and_held_out_are_refused(prompts, found):
    task = dataclasses.replace(TASK, prompts=prompts)
    with pytest.raises(InputError, match=f"^{found}"):
        data.split_prompts(TextDataConfig(**CONFIG), task, np.random.default_rng(1))
