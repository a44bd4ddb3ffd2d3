"""Policies against their base: metrics by hand, and the stage through the command line."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from conversion import load_policy
from conversion.peft import save_adapter
from pipeline.policy_evaluation import adapters_of
from ppo.comparison import response_metrics as metrics
from ppo.comparison.latent_map import largest_terms, principal_plane
from ppo.comparison.movers import movers, rows_by_group
from ppo.comparison.policy_comparison import compare, latent_map, response_rows, summary
from ppo.comparison.responses import ResponseConfig, Responses, respond
from ppo.prompts import encode_prompts
from sarm_jax.evaluation.controls import Controls
from sarm_jax.io.errors import InputError
from sarm_jax.models.latent_store import TopKLatents
from sarm_jax.models.lora import LoRAConfig, LoRAParam, add_lora
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARMConfig, intervention
from sarm_jax.sampling.generate import Sampling
from tests.closeness import assert_close
from tests.command import run_main
from tests.dense_latents import DenseLatents
from tests.oracles import save_tiny_llama, save_tiny_sarm, tiny_llama_config, tiny_tokenizer

PROMPTS = ["say 1", "say 2", "say 3"]


def test_repetition_and_wins_by_hand():
    assert metrics.repetition("a b c a b c") == pytest.approx(1 / 4)
    assert metrics.repetition("a b") == 0
    won = metrics.wins(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0]))
    assert won.tolist() == [0, 0.5, 1]


def test_intervals_against_a_loop():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 2)), rng.normal(size=(9, 2))
    index = metrics.bootstrap_indices(9, 100, 1)
    r, sample_r = metrics.bootstrap_correlation(x, y, index)
    loop = [np.corrcoef(x[i].ravel(), y[i].ravel())[0, 1] for i in index]
    assert r == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    np.testing.assert_allclose(sample_r, loop)
    mean = metrics.bootstrap_mean(x, index)
    assert mean["low"] == pytest.approx(np.quantile([x[i].mean() for i in index], 0.025))
    assert np.isnan(metrics.bootstrap_correlation(np.ones((9, 2)), y, index)[0])


def codes(rows: int = 12, size: int = 40, k: int = 4):
    """Returns sparse latents, dense and in TopK form; feature 39 is never active."""
    rng = np.random.default_rng(0)
    index = np.stack([rng.choice(size - 1, k, replace=False) for _ in range(rows)])
    value = rng.normal(size=(rows, k)).astype(np.float32)
    dense = np.zeros((rows, size), np.float32)
    np.put_along_axis(dense, index, value, axis=1)
    return dense, TopKLatents(value, index, size)


def test_largest_terms_against_sorting(monkeypatch):
    monkeypatch.setattr("sarm_jax.models.latent_store.BLOCK_BYTES", 0)  # many blocks
    dense, sparse = codes()
    weight = np.random.default_rng(1).normal(size=40).astype(np.float32)
    for terms, z in zip(largest_terms(sparse, weight, 3), dense, strict=True):
        product = z.astype(np.float64) * weight
        order = np.argsort(-np.abs(product))[:3]
        assert [t[0] for t in terms] == order.tolist()
        np.testing.assert_allclose([t[3] for t in terms], product[order])
        assert all(t[1] * t[2] == t[3] for t in terms)


@pytest.mark.parametrize("block", [0, 1 << 20])
def test_plane_against_the_covariance(monkeypatch, block):
    monkeypatch.setattr("sarm_jax.models.latent_store.BLOCK_BYTES", block)
    dense, sparse = codes()
    xy, share = principal_plane(sparse)
    values, vectors = np.linalg.eigh(np.cov(dense.T.astype(np.float64)))
    np.testing.assert_allclose(share, (values / values.sum())[[-1, -2]])
    expected = (dense - dense.mean(0)) @ vectors[:, [-1, -2]]
    assert_close(np.abs(xy), np.abs(expected), 3e-7)
    assert (xy[np.abs(xy).argmax(0), [0, 1]] > 0).all()
    assert principal_plane(DenseLatents(np.ones((1, 3), np.float32)))[1] == [0.0, 0.0]


def test_zero_adapter_is_the_base(policy, tokenizer):
    config = ResponseConfig(Sampling(5), samples=2, batch_size=4)
    rows = encode_prompts(PROMPTS, tokenizer, 500).rows
    adapted = nnx.merge(*nnx.split(policy))
    add_lora(adapted, LoRAConfig(rank=2), nnx.Rngs(0))
    base = respond(config, base=policy, policy=policy, tokenizer=tokenizer, prompts=rows)
    zero = respond(config, base=policy, policy=adapted, tokenizer=tokenizer, prompts=rows)
    assert base.texts == zero.texts and len(base.texts) == len(base.kl_n) == 6
    assert base.texts[0] != base.texts[1]
    np.testing.assert_allclose(zero.kl_n, base.kl_n, atol=1e-6)
    for _, value in nnx.to_flat_state(nnx.state(adapted, LoRAParam)):
        value[...] = jax.random.normal(jax.random.key(0), value[...].shape)
    moved = respond(config, base=policy, policy=adapted, tokenizer=tokenizer, prompts=rows)
    assert moved.kl_n.sum() > 0.1
    assert not nnx.to_flat_state(nnx.state(policy, LoRAParam))


def responses_of(texts: list[str]) -> Responses:
    """Returns responses of these texts; every character counts as a token."""
    lengths = np.array([len(text) for text in texts])
    count = len(texts)
    return Responses(texts, length_n=lengths, ended_n=np.ones(count, bool), kl_n=np.zeros(count))


def test_comparison_against_scores_one_by_one(reward_model):
    texts = {"base": ["a", "bb", "ccc"], "x": ["a!", "bb bb", "c"], "y": ["d", "e e", "ff"]}
    responses = {name: responses_of(own) for name, own in texts.items()}
    _, z = reward_model.score(PROMPTS * 3, [text for own in texts.values() for text in own])
    first, second = np.argsort(-(z > 0).mean(0))[:2].tolist()
    controls = Controls(
        intervention=intervention(64, set_to={first: 0.5}),
        penalize_features=(second,),
        tau_values=(0.0,),
        alpha_values=(0.3,),
        unit="sd",
    )
    human = [("say 9", "nine")]
    comparison = compare(reward_model, controls, prompts=PROMPTS, responses=responses, human=human)
    content = summary(comparison, resamples=100, seed=0)
    weight = np.asarray(reward_model.model.score[...])
    plain = {n: reward_model.score(PROMPTS, t)[0].astype(np.float64) for n, t in texts.items()}
    deviation, rows = plain["base"].std(), list(response_rows(comparison))
    expected = {}
    for number, (name, answers) in enumerate(texts.items()):
        clamped, own = reward_model.score(PROMPTS, answers, clamp={first: 0.5})
        penalty = 0.3 * deviation * (own[:, second] > 0)
        without = plain[name] - own[:, [first, second]] @ weight[[first, second]]
        expected[name] = clamped - penalty
        means = {"score": plain[name], "controlled_score": expected[name], "penalty": penalty}
        means |= {"score_without": without, f"active_{first}": own[:, first] > 0}
        for key, value in means.items():
            assert_close(content["runs"][name][key]["mean"], value.mean(), 1e-6, value, key)
        for n, row in enumerate(rows):
            shown = row["responses"][name]
            assert row["prompt"] == PROMPTS[n] and shown["response"] == answers[n]
            assert sum(term[3] for term in shown["terms"]) + shown["rest"] == shown["score"]
            assert shown["penalties"] == {str(second): pytest.approx(penalty[n], rel=1e-6)}
        assert [p["source"] for p in latent_map(comparison)["points"]][3 * number] == name
    _, base_z = reward_model.score(PROMPTS, texts["base"])
    moved = np.zeros(64)
    for name in ("x", "y"):
        _, own_z = reward_model.score(PROMPTS, texts[name])
        moved = np.maximum(moved, np.abs(weight * (own_z.mean(0) - base_z.mean(0))))
    found = movers(comparison, 5)
    assert len(found) == 5 and moved[found] == pytest.approx(np.sort(moved)[::-1][:5], rel=1e-5)
    assert set(movers(comparison, 64)) == set(np.flatnonzero(moved > 1e-7))
    groups = rows_by_group(comparison)
    assert {name: rows.tolist() for name, rows in groups.items()} == {
        "human": [9], "base": [0, 1, 2], "x": [3, 4, 5], "y": [6, 7, 8]
    }  # fmt: skip
    wins = np.mean(expected["x"] > expected["base"])
    assert content["runs"]["x"]["win_rate_controlled"]["mean"] == wins
    difference = (plain["y"] - plain["x"]).mean()
    between = content["between"]["y − x"]["score"]["mean"]
    assert_close(between, difference, 1e-6, plain["y"])
    assert set(content["paired"]) == {"x", "y"} and "win_rate" not in content["runs"]["base"]


def test_without_controls_and_without_topk(reward_model):
    reward_model.model.config = sarm = SARMConfig(
        reward_model.model.config.trunk, SAEConfig(32, latent_size=64, k=8, activation="identity")
    )
    reward_model.model.sae.config = sarm.sae
    answers = ["a", "bb", "ccc"]
    responses = {"base": responses_of(answers)}
    comparison = compare(reward_model, Controls(), prompts=PROMPTS, responses=responses)
    means = summary(comparison, resamples=100, seed=0)["runs"]["base"]
    expected, z = reward_model.score(PROMPTS, answers)
    assert (z != 0).all()  # every pre-activation counts
    for name in ("score", "controlled_score", "score_without"):
        assert_close(means[name]["mean"], expected.mean(), 1e-6, expected)
    assert means["penalty"]["mean"] == 0 and not any(name.startswith("latent_") for name in means)
    weight = np.asarray(reward_model.model.score[...])
    for n, row in enumerate(response_rows(comparison)):
        terms = [term[3] for term in row["responses"]["base"]["terms"]]
        largest = np.sort(np.abs(z[n] * weight))[::-1][: len(terms)]
        assert_close(np.abs(terms), largest, 1e-6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy, a SARM, prompts, and two adapters of that policy as PPO writes them."""
    root = tmp_path_factory.mktemp("policies")
    save_tiny_sarm(root / "sarm", tiny_tokenizer())
    save_tiny_llama(root / "policy", tiny_llama_config(), tiny_tokenizer())
    (root / "prompts.jsonl").write_text("".join(f'{{"prompt": "{p}"}}\n' for p in PROMPTS))
    (root / "demos.jsonl").write_text('{"prompt": "say 4", "response": "four"}\n')
    for seed, name in enumerate(("first", "second")):
        policy, tokenizer = load_policy(str(root / "policy"), "float32")
        lora = LoRAConfig(rank=2)
        add_lora(policy, lora, nnx.Rngs(seed))
        for _, value in nnx.to_flat_state(nnx.state(policy, LoRAParam)):
            value[...] = 0.3 * jax.random.normal(jax.random.key(seed), value[...].shape)
        (root / name).mkdir()
        save_adapter(root / name / "adapter", policy, lora, str(root / "policy"), tokenizer)
    return root


@pytest.fixture
def run(world, tmp_path):
    """Runs the stage evaluate on the world's prompts; returns its exit code."""

    def call(*options: str) -> int:
        paths = [f"--{name}_model={world / name}" for name in ("sarm", "policy")]
        arguments = ["--config=configs/base.py", "--stage=evaluate", *paths]
        arguments += [f"--workdir={tmp_path / 'run'}"]
        arguments += [f"--config.evaluate.prompts_jsonl={world}/prompts.jsonl"]
        arguments += ["--config.ppo.max_new_tokens=6", "--config.evaluate.resamples=100"]
        return run_main(*arguments, *options)

    return call


def test_the_stage_compares_adapters_with_their_base(world, run, tmp_path):
    runs = f"--config.evaluate.runs={world}/first,other={world}/second/adapter"
    human = f"--config.evaluate.human_jsonl={world}/demos.jsonl"
    penalty = ["--penalize_features=1", "--tau_values=0.0", "--alpha_values=0.5"]
    (tmp_path / "names.json").write_text('{"1": "flattery", "2": "unused"}')
    names = f"--config.identify.feature_names={tmp_path / 'names.json'}"
    assert run(runs, human, *penalty, names) == 0
    folder = tmp_path / "run" / "eval"
    content = json.loads((folder / "policy.json").read_text())
    assert set(content["runs"]) == {"base", "first", "other"} and set(content["between"]) == {
        "other − first"
    }
    assert content["runs"]["first"]["kl"]["mean"] > 0 == content["runs"]["base"]["kl"]["mean"]
    rows = [json.loads(line) for line in (folder / "responses.jsonl").open()]
    assert [row["prompt"] for row in rows] == PROMPTS
    policy, tokenizer = load_policy(str(world / "policy"), "float32")
    config = ResponseConfig(Sampling(6, 0.0))
    encoded = encode_prompts(PROMPTS, tokenizer, 500).rows
    greedy = respond(config, base=policy, policy=policy, tokenizer=tokenizer, prompts=encoded)
    assert [row["responses"]["base"]["response"] for row in rows] == greedy.texts
    assert content["feature_names"] == {"1": "flattery"}
    pages = json.loads((folder / "feature_pages.json").read_text())["features"]
    assert pages[0]["feature"] == 1 and pages[0]["roles"][0] == "penalised"
    assert pages[0]["tau"] == 0 and len(pages) > 3
    for page in pages:
        i = page["feature"]
        assert list(page["groups"]) == ["human", "base", "first", "other"]
        assert page["roles"] == ["top mover"] or i == 1
    share = content["runs"]["first"]["active_1"]["mean"]
    assert pages[0]["groups"]["first"]["above_tau"] == pytest.approx(share)
    sources = [p["source"] for p in json.loads((folder / "latent_map.json").read_text())["points"]]
    assert sources == ["base"] * 3 + ["first"] * 3 + ["other"] * 3 + ["human"]


def test_names_of_runs(tmp_path):
    for name in ("a/x", "b/x", "base"):
        (tmp_path / name / "adapter").mkdir(parents=True)
        (tmp_path / name / "adapter" / "adapter_config.json").write_text("{}")
    assert adapters_of("", tmp_path) == {}
    with pytest.raises(InputError, match="two runs are called 'x'"):
        adapters_of(f"{tmp_path}/a/x,{tmp_path}/b/x", tmp_path)
    with pytest.raises(InputError, match="'base' has a meaning"):
        adapters_of(f"{tmp_path}/base", tmp_path)


def test_both_ends_of_a_bootstrap_interval():
    x = np.random.default_rng(0).normal(size=(9, 2))
    index = metrics.bootstrap_indices(9, 1000, 1)
    mean = metrics.bootstrap_mean(x, index)
    ends = np.quantile([x[i].mean() for i in index], [0.025, 0.975])
    assert (mean["low"], mean["high"]) == pytest.approx(tuple(ends))
