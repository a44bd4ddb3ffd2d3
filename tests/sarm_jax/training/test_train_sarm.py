"""Training of a SARM: the trunk, the split of the pairs, and the numbers of the summary."""

import dataclasses
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sarm_jax.io.errors import InputError
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.parallel.finite import NotFiniteError
from sarm_jax.reporting.statistics import wilson_interval
from sarm_jax.training import pair_set, preference_summary
from sarm_jax.training import train_sarm as training
from sarm_jax.training.activations import Conversation
from sarm_jax.training.divergence import DivergedError
from sarm_jax.training.sarm_options import TrainSARMConfig
from tests.closeness import assert_close
from tests.further import further
from tests.oracles import chatml_tokenizer

SMALL = TrainSARMConfig(
    pairs_jsonl=("pairs.jsonl",), held_out_fraction=0.25, max_length=200, source_layer=2,
    latent_size=48, k=6, use_topk=True, mode=0, reconstruction_weight=1.0, sae_tokens=300,
    sae_steps=40, sae_batch_tokens=64, sae_learning_rate=3e-3, dead_after_steps=10, aux_k=8,
    aux_weight=1 / 32, epochs=10, batch_size=4, learning_rate=1e-4, head_learning_rate=1e-2,
    weight_decay=1e-3, warmup_fraction=0.03, seed=0,
)  # fmt: skip


def tiny_pairs(count=16):
    return [
        {
            "prompt": f"Question {i // 2}?",
            "chosen": f"A good answer {i}.",
            "rejected": "no " * (i % 5 + 1),
            "source": "even" if i % 2 == 0 else "odd",
        }
        for i in range(count)
    ]


def tiny_ties(count=8):
    """Half of them are of prompts that the pairs have."""
    return [
        {
            "prompt": f"Question {i}?",
            "chosen": f"A plain answer {i}.",
            "rejected": f"A plain answer {i}, dear friend.",
            "source": "friend" if i % 2 else "dear",
        }
        for i in range(4, 4 + count)
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mode", 4), ("held_out_fraction", 0.0), ("k", 0), ("k", 49), ("aux_k", 49),
        ("warmup_fraction", 1.0), ("learning_rate", 0.0), ("epochs", 0), ("aux_weight", -1.0),
        ("sae_learning_rate", float("inf")), ("batch_size", 0), ("tie_weight", 2.0),
        ("tie_weight", 0.0), ("heads", 0),
    ],
)  # fmt: skip
def test_bad_options_are_named(name, value):
    with pytest.raises(InputError, match=f"train_sarm.{name}={value}"):
        dataclasses.replace(SMALL, **{name: value})


def test_the_trunk_is_the_first_layers_without_final_norm(policy):
    tokens = jnp.asarray([[5, 6, 7, 8]])
    mask = jnp.ones((1, 4), bool)
    whole = training.truncate(policy, 3)
    assert_close(policy.norm(whole.hidden(tokens, mask)), policy.hidden(tokens, mask), 3e-6)
    one_more = training.truncate(policy, 2).hidden(tokens, mask)
    assert not np.allclose(one_more, whole.hidden(tokens, mask))
    trunk = training.truncate(policy, 2)
    assert trunk.lm_head is None and trunk.layers.mlp.up_proj.kernel.shape[0] == 2
    pointer = trunk.embed_tokens[...].unsafe_buffer_pointer()
    assert pointer == policy.embed_tokens[...].unsafe_buffer_pointer()
    assert policy.layers.mlp.up_proj.kernel.shape[0] == 3 and policy.final_norm


def test_a_source_layer_beyond_the_model_is_refused(policy):
    with pytest.raises(InputError, match=r"source_layer=4: the model has 3 layers"):
        training.truncate(policy, 4)


def test_the_assembled_sarm_shares_its_parts(policy):
    trunk = training.truncate(policy, 2)
    sarm = training.assemble(trunk, SAE(SAEConfig(32, 48, 6), rngs=nnx.Rngs(0)))
    assert sarm.trunk is trunk and sarm.config.trunk.num_hidden_layers == 2
    score_b, z_bf = sarm(jnp.asarray([[5, 6, 7]]), jnp.ones((1, 3), bool))
    assert score_b.tolist() == [0.0] and (z_bf != 0).sum() == 6


@pytest.mark.parametrize("make", [None, chatml_tokenizer])
def test_the_turn_is_the_response_with_its_end(tokenizer, make):
    tokenizer = make() if make else tokenizer
    row = pair_set.encode_turn(tokenizer, "How are you?", "Very well, thanks.", max_length=500)
    text = tokenizer.decode(row.ids[-row.turn_length :])
    assert text.startswith("Very well, thanks.<|") and text.count("<|") == 1
    short = pair_set.encode_turn(tokenizer, "How are you?", "Very well, thanks.", max_length=7)
    bos = int(short.ids[0] == tokenizer.bos_token_id)  # not a part of the turn
    assert len(short.ids) == 7 and short.turn_length == 7 - bos
    assert short.ids[1:] == row.ids[-6:] or short.ids == row.ids[-7:]


def test_no_prompt_is_on_both_sides(tokenizer):
    pairs = [*tiny_pairs(), {**tiny_pairs()[0], "rejected": "Something else."}]
    data = training.encode_pairs(tokenizer, pairs, SMALL)
    held_out = {p["prompt"] for p, h in zip(pairs, data.held_out_p, strict=True) if h}
    train = {p["prompt"] for p, h in zip(pairs, data.held_out_p, strict=True) if not h}
    assert len(held_out) == 2 and len(train) == 6 and not held_out & train
    first = data.pairs_p2[0]
    # The chosen responses of the first and the last pair are equal and share a row.
    assert data.pairs_p2[-1][0] == first[0] and data.pairs_p2[-1][1] != first[1]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (tiny_pairs(2), "holds out 0 of 1 prompts"),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "a"}],
            "train_sarm.pairs_jsonl: pair 1: chosen and rejected are equal",
        ),
    ],
)
def test_pairs_that_cannot_train_are_refused(tokenizer, pairs, message):
    with pytest.raises(InputError, match=message):
        training.encode_pairs(tokenizer, pairs, SMALL)


@pytest.mark.parametrize("mode", [0, further(1), further(2), 3])
def test_the_summary_agrees_with_the_reward_model(policy, tokenizer, mode):
    before = jax.tree.map(np.array, nnx.state(policy))
    config = dataclasses.replace(SMALL, mode=mode, epochs=10 if mode == 0 else 1)
    pairs, log = tiny_pairs(), []
    ties = tiny_ties() if mode == 1 else []  # they do not enter these numbers
    sarm, summary = training.train_sarm(config, policy, tokenizer, pairs, log.append, ties)
    chex.assert_trees_all_equal(before, jax.tree.map(np.array, nnx.state(policy)))

    model = RewardModel(sarm, tokenizer, max_length=200)
    chosen, rejected = (
        model.score([p["prompt"] for p in pairs], [p[side] for p in pairs])[0]
        for side in ("chosen", "rejected")
    )
    held_out = training.encode_pairs(tokenizer, pairs, config).held_out_p
    assert ("ties" in summary) == bool(ties)
    margin = chosen - rejected
    assert_close(summary["margin_train"], margin[~held_out].mean(), terms=chosen)
    assert_close(summary["margin_held_out"], margin[held_out].mean(), terms=chosen)
    assert_close(summary["score_chosen_std"], chosen[held_out].std(), terms=chosen)
    assert summary["accuracy_held_out"] == np.mean(margin[held_out] > 0)
    assert set(summary["accuracy_held_out_by_source"]) == {"even", "odd"}
    assert set(summary["sae"]) == {
        "explained_variance", "explained_variance_pooled", "l0", "dead_fraction"
    }  # fmt: skip
    assert ("sae_after" in summary) == (mode > 0)
    assert {row["stage"] for row in log} == {"sae", "preferences" if mode else "head"}


def test_ties_are_reported_beside_the_preferences(policy, tokenizer):
    config = dataclasses.replace(SMALL, tie_pairs_jsonl=("t",), tie_weight=2.0)
    pairs, ties, log = tiny_pairs(), tiny_ties(), []
    sarm, summary = training.train_sarm(config, policy, tokenizer, pairs, log.append, ties)
    # The SAE and the split do not depend on ties.
    plain: list[dict] = []
    without, of_pairs = training.train_sarm(SMALL, policy, tokenizer, pairs, plain.append)
    for name in ("pairs_train", "pairs_held_out", "prompts_held_out", "sae"):
        assert summary[name] == of_pairs[name]
    assert "ties" not in of_pairs and not any("tie_margin" in row for row in plain)
    np.testing.assert_array_equal(sarm.sae.encoder[...], without.sae.encoder[...])

    model = RewardModel(sarm, tokenizer, max_length=200)
    chosen, rejected = (
        model.score([p["prompt"] for p in ties], [p[side] for p in ties])[0]
        for side in ("chosen", "rejected")
    )
    held_out = training.encode_pairs(tokenizer, pairs, config, ties).held_out_p[len(pairs) :]
    assert 0 < held_out.sum() < len(ties)
    for part, keep in (("train", ~held_out), ("held_out", held_out)):
        own = summary["ties"][part]
        assert own["pairs"] == own["prompts"] == keep.sum()
        assert_close(own["margin_abs"], np.abs(chosen - rejected)[keep].mean(), terms=chosen)
        assert own["prefers_rejected"] == np.mean(rejected[keep] > chosen[keep])
    by_source = summary["ties"]["held_out_by_source"]
    assert sum(own["pairs"] for own in by_source.values()) == held_out.sum()
    assert all("tie_margin" in row for row in log if row["stage"] != "sae")


def test_an_ensemble_of_heads(policy, tokenizer):
    config = dataclasses.replace(SMALL, heads=3)
    pairs, log = tiny_pairs(), []
    sarm, summary = training.train_sarm(config, policy, tokenizer, pairs, log.append)
    again, _ = training.train_sarm(config, policy, tokenizer, pairs, lambda row: None)
    chex.assert_trees_all_equal(*(jax.tree.map(np.array, nnx.state(run)) for run in (sarm, again)))
    one, of_one = training.train_sarm(SMALL, policy, tokenizer, pairs, lambda row: None)
    np.testing.assert_array_equal(one.sae.encoder[...], sarm.sae.encoder[...])
    assert one.score.shape == (48,) and sarm.score.shape == (3, 48)
    assert summary["sae"] == of_one["sae"] and "heads" not in of_one
    assert {row["head"] for row in log if row["stage"] == "head"} == {0, 1, 2}

    model = RewardModel(sarm, tokenizer, max_length=200)
    data = training.encode_pairs(tokenizer, pairs, config)
    held_out = [pair for pair, held in zip(pairs, data.held_out_p, strict=True) if held]
    train = [pair for pair, held in zip(pairs, data.held_out_p, strict=True) if not held]

    def by_head(prompts, texts):
        return np.asarray(sarm.scores_by_head(jnp.asarray(model.score(prompts, texts)[1])))

    def sides(rows, scores):
        prompts = [row["prompt"] for row in rows]
        return [scores(prompts, [row[side] for row in rows]) for side in ("chosen", "rejected")]

    chosen, rejected = sides(held_out, by_head)
    assert summary["heads"]["accuracy"] == (chosen > rejected).mean(axis=0).tolist()
    right = chosen.min(axis=1) > rejected.min(axis=1)
    assert summary["heads"]["accuracy_min"] == right.mean()
    assert sum(summary["heads"]["worst_share"]) == pytest.approx(1)
    spread = (chosen - rejected).std(axis=1).mean()
    assert_close(summary["heads"]["margin_std"], spread, 1e-4)
    right = np.subtract(*sides(held_out, lambda *texts: model.score(*texts)[0])) > 0
    assert summary["accuracy_held_out"] == right.mean()
    # On the distinct training responses all heads have the same mean score.
    texts = dict.fromkeys((row["prompt"], row[side]) for row in train for side in pair_set.SIDES)
    means = by_head(*map(list, zip(*texts, strict=True))).mean(axis=0)
    assert_close(means, np.full(3, means.mean()), 1e-4, chosen)


@pytest.mark.parametrize("mode", [1, 2, 3])
def test_several_heads_need_a_frozen_trunk(mode):
    message = rf"train_sarm.heads=2: train_sarm.mode={mode} trains the trunk; several heads need"
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, mode=mode, heads=2)


def test_the_split_of_ties(tokenizer):
    pairs, config = tiny_pairs(), dataclasses.replace(SMALL, tie_pairs_jsonl=("t",))
    alone = config.held_out(pairs)
    assert config.held_out(pairs, tiny_ties()) >= alone
    one = [{"prompt": "new", "chosen": "a", "rejected": "b"}]
    assert config.held_out(pairs, one) == alone  # too few for a share of their own
    data = training.encode_pairs(tokenizer, pairs, config, one)
    assert data.tie_p.tolist() == [False] * 16 + [True] and not data.held_out_p[-1]
    assert len(data.rows) == len(data.preferences.rows) + 2
    summary = preference_summary.tie_summary(data.ties, np.zeros(len(data.rows), np.float32))
    assert summary["held_out"]["pairs"] == 0 and summary["held_out"]["margin_abs"] is None
    assert summary["train"]["prefers_rejected"] == 0.5
    gone = [{"prompt": next(iter(alone)), "chosen": "a", "rejected": "b"}]
    with pytest.raises(InputError, match="the prompts of all 1 ties are held out"):
        config.held_out(pairs, gone)
    equal = [{"prompt": "new", "chosen": "a", "rejected": "a"}]
    with pytest.raises(InputError, match="tie_pairs_jsonl: pair 1: chosen and rejected are equal"):
        training.encode_pairs(tokenizer, pairs, config, equal)


@pytest.mark.parametrize("error", [NotFiniteError("NaN"), InputError("process 1: disk full")])
def test_only_states_that_are_not_finite_are_a_divergence(monkeypatch, error):
    """A training that diverged loses its checkpoints; a full disk of another host is no reason."""

    def fails(*arguments, **options):
        raise error

    monkeypatch.setattr(training, "_collect", fails)
    diverged = isinstance(error, NotFiniteError)
    with pytest.raises(DivergedError if diverged else InputError, match=str(error)):
        training._collect_again(SMALL, SimpleNamespace(trunk=None), None, None)


def test_training_is_deterministic_in_the_seed(policy, tokenizer):
    runs = [
        training.train_sarm(SMALL, policy, tokenizer, pairs=tiny_pairs(), log=lambda row: None)[0]
        for _ in range(2)
    ]
    chex.assert_trees_all_equal(*(jax.tree.map(np.array, nnx.state(run)) for run in runs))


def test_accuracies_of_the_summary(policy, tokenizer):
    pairs = tiny_pairs()
    sarm, summary = training.train_sarm(SMALL, policy, tokenizer, pairs=pairs, log=lambda row: None)
    data = training.encode_pairs(tokenizer, pairs, SMALL)
    model = RewardModel(sarm, tokenizer, max_length=200)
    chosen, rejected = (
        model.score([p["prompt"] for p in pairs], [p[s] for p in pairs])[0]
        for s in ("chosen", "rejected")
    )
    right, held_out = chosen > rejected, data.held_out_p
    assert summary["accuracy_train"] == right[~held_out].mean()
    for source in ("even", "odd"):
        selected = held_out & np.array([p["source"] == source for p in pairs])
        assert summary["accuracy_held_out_by_source"][source] == right[selected].mean()
    prompts = len({p["prompt"] for p, h in zip(pairs, held_out, strict=True) if h})
    assert summary["accuracy_held_out_95"] == wilson_interval(right[held_out].mean(), prompts)
    lengths = [
        [len(model.encode(p["prompt"], p[s])) for s in ("chosen", "rejected")] for p in pairs
    ]
    longer = np.mean(
        [(np.sign(c - r) + 1) / 2 for (c, r), h in zip(lengths, held_out, strict=True) if h]
    )
    assert summary["length_only_accuracy_held_out"] == max(longer, 1 - longer)


def test_accuracy_by_source_uses_held_out_pairs_only():
    data = pair_set.PairSet(
        rows=[Conversation([1] * (n + 2), 1) for n in range(8)],
        pairs_p2=np.array([[0, 1], [2, 3], [5, 4], [7, 6]]),
        prompt_p=np.arange(4),
        held_out_p=np.array([1, 1, 0, 0], bool),
        source_p=["a", "b", "a", "b"],
    )
    summary = preference_summary.preference_summary(
        data, np.array([1, 0, 0, 1, 1, 0, 0, 1], np.float32)
    )
    assert summary["accuracy_held_out_by_source"] == {"a": 1.0, "b": 0.0}
    assert summary["accuracy_train"] == 0.5 and summary["length_only_accuracy_held_out"] == 1.0
