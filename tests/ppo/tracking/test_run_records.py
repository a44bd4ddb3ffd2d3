"""The records of a run, recomputed from its parts."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo.prompts import PromptDeck, encode_prompts
from ppo.rollout import Sampler
from ppo.tracking.metrics import COLUMNS, RunLog, columns_of, read_evaluations
from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.features.feature_names import FeatureNames
from sarm_jax.models.chat import encode_prompt
from sarm_jax.rewards.density_ratio import groups_of
from sarm_jax.rewards.scoring import Scorer
from sarm_jax.sampling.generate import Generation
from tests.closeness import assert_close
from tests.tiny_models import PROMPTS, REWARD, reward_options


def test_responses_have_no_special_tokens(tokenizer):
    eot = tokenizer.eos_token_id
    tokens = np.array([[*tokenizer("yes", add_special_tokens=False)["input_ids"], eot]])
    generation = Generation(tokens, np.ones_like(tokens, bool), None, None)
    assert Sampler(None, None, tokenizer)._decode(generation) == ["yes"]


def test_the_discriminators_features_in_the_order_given(reward_model):
    rollout = SimpleNamespace(prompts=["p"] * 3, responses=["a", "bb b", "c d e"])
    _, z = reward_model.score(rollout.prompts, rollout.responses)
    ids = tuple(sorted(np.argsort(-z.max(axis=0))[:3], reverse=True))
    assert all((z[:, i] != 0).any() for i in ids)
    options = reward_options(penalize_features=(9,), tau_values=(0.0,), alpha_values=(1.0,))
    scored = Scorer(reward_model, options, ids).score(rollout.prompts, rollout.responses)
    assert_close(scored.z_bs, z[:, ids], 2e-6)
    assert_close(scored.z_bn, z[:, [9]], 2e-6, terms=z)


def test_keys_of_a_run(make_trainer, tmp_path):
    options = {"evaluate": True, "eval_every": 1, "eval_batches": 2, "total_steps": 2}
    trainer = make_trainer(tmp_path / "run", calibration_batches=2, **options)
    keys = {}

    def noted(self, params, deck, *, key, **options):
        own = keys.setdefault(deck is trainer.deck, [])
        own.append(tuple(np.asarray(jax.random.key_data(key))))
        return original(self, params, deck, key=key, **options)

    original = Sampler.sample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "sample", noted)
        trainer.run()
    assert len(keys[True]) == 4 == len(set(keys[True]))  # calibration and steps
    assert keys[False] == 3 * keys[False][:2] and len(set(keys[False])) == 2


def test_a_metric_without_a_column_is_an_error(tmp_path):
    row = dict.fromkeys(columns_of((3,)), 1.0)
    with RunLog(tmp_path, (3,), 0, 4) as log:
        log.write(row, [])
        for name in ("new_metric", "feat_4_activation"):
            with pytest.raises(ValueError, match=name):
                log.write(row | {name: 1.0}, [])
    assert len(read_metrics(tmp_path / "metrics.csv")) == 1


def test_a_missing_metric_leaves_its_column_empty(tmp_path):
    row = {name: 1.0 for name in COLUMNS if not name.startswith("disc_")}
    with RunLog(tmp_path, (), 0, 4) as log:
        log.write(row, [])
    (read,) = read_metrics(tmp_path / "metrics.csv")
    assert {name for name, value in read.items() if np.isnan(value)} == {
        "disc_loss", "disc_acc", "skipped_updates", "distinct_responses",
    }  # fmt: skip


def test_rows_and_samples_tell_the_same(make_trainer, tmp_path):
    reward = reward_options(
        penalize_features=(3, 5), tau_values=(0.0, 100.0), alpha_values=(0.2, 0.1)
    )
    trainer = make_trainer(
        tmp_path / "run", reward=reward, stop_ids=(), total_steps=4, samples_per_step=4
    )
    names = FeatureNames({5: "flattery", 9: "unused"})
    trainer.config = dataclasses.replace(trainer.config, names=names)
    assert trainer.run()["feature_names"] == {"5": "flattery"}
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    for row in read_metrics(tmp_path / "run" / "metrics.csv"):
        own = [s for s in samples if s["step"] == row["step"]]
        for feature in ("3", "5"):
            share = np.mean([s["penalties"][feature] > 0 for s in own])
            assert row[f"feat_{feature}_above_tau"] == share
        assert row["eos_fraction"] == 0 and row["reward_max"] <= -1 + 1e-6


def test_held_out_latent_kl(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", reward=REWARD, evaluate=True)
    trainer.run()
    rows = [r for r in read_evaluations(tmp_path / "run") if r["step"] == 4]
    texts = SimpleNamespace(
        prompts=[r["prompt"] for r in rows], responses=[r["response"] for r in rows]
    )
    z_bs = jnp.asarray(trainer.scorer.score(texts.prompts, texts.responses).z_bs)
    d = trainer.density_ratio.read(trainer.state.density_ratio, z_bs)
    assert_close([r["kl_penalty"] for r in rows], REWARD.beta * np.asarray(d))
    assert np.abs(d).max() > 1e-4


def test_what_is_learned_is_the_whole_reward(make_trainer, tmp_path):
    reward = reward_options(
        penalize_features=(3, 5), tau_values=(0.0, 0.0), alpha_values=(1.0, 2.0), beta=0.5
    )
    trainer = make_trainer(
        tmp_path / "run", reward=reward, total_steps=1, samples_per_step=4, missing_eos_penalty=0.0
    )
    fresh = trainer.state.density_ratio
    summary = trainer.run()
    (row,) = read_metrics(tmp_path / "run" / "metrics.csv")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").open()]
    texts = SimpleNamespace(
        prompts=[s["prompt"] for s in samples], responses=[s["response"] for s in samples]
    )
    z_bs = trainer.scorer.score(texts.prompts, texts.responses).z_bs
    key = jax.random.fold_in(trainer._disc_data_key, 0)
    _, d, metrics = trainer.density_ratio.update(fresh, z_bs, key, groups_of(texts.prompts))
    assert_close([s["kl_penalty"] for s in samples], 0.5 * np.asarray(d))
    for name in ("latent_kl", "latent_kl_se", "disc_loss", "disc_acc"):
        assert_close(row[name], metrics[name])
    assert np.abs(d).max() > 1e-4 and row["indicator_penalty"] > 0
    expected = (row["total_reward"] - summary["score_mean_at_start"]) / summary[
        "score_std_at_start"
    ]
    assert_close(row["reward_mean"], expected)


def test_the_seed_orders_the_prompts(tokenizer, ppo_config):
    decks = [PromptDeck(PROMPTS, tokenizer, ppo_config(batch_size=10, seed=s)) for s in (1, 2)]
    orders = [deck.texts(0) for deck in decks]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_prompt_may_be_as_long_as_allowed(tokenizer):
    ids = encode_prompt(tokenizer, "hi")
    assert encode_prompts(["hi"], tokenizer, len(ids)).rows == [ids]
