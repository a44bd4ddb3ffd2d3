"""All stages on a sequence classifier with an SAE in place of a SARM, from training the SAE on."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from conversion import load_reward_model, load_sarm
from conversion.from_hf import convert
from conversion.saelens import read_sae
from conversion.to_hf import export
from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.features.dense_probe import load_probe
from sarm_jax.models.attribution import attribution
from sarm_jax.training import activations, sae_training
from tests.command import run_main
from tests.oracles import (
    save_tiny_classifier,
    save_tiny_llama,
    tiny_llama_config,
    tiny_tokenizer,
)
from tests.report_runs import mentions_of_features

pytestmark = pytest.mark.slow

PPO = (
    "--config.ppo.total_steps=2 --config.ppo.batch_size=4 --config.ppo.max_new_tokens=6 "
    "--config.ppo.calibration_batches=2 --config.ppo.max_prompt_tokens=120 --config.lora.rank=4"
).split()
TRAIN_SAE = "latent_size=64 k=8 aux_k=8 steps=60 batch_states=32 dead_after_steps=20".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny policy, a tiny classifier, demonstrations and pairs."""
    root, tokenizer = tmp_path_factory.mktemp("world"), tiny_tokenizer()
    save_tiny_llama(root / "policy", tiny_llama_config(), tokenizer)
    save_tiny_classifier(root / "classifier", tiny_llama_config(), tokenizer)
    words = ["red", "green", "blue", "round", "tall", "old", "new", "warm"]
    pairs = [
        {"prompt": f"name {n} {w}", "chosen": f"it is {w}, {n} times.", "rejected": "no " * (n + 1)}
        for n, w in enumerate(words)
    ]
    demos = [{"prompt": p["prompt"], "response": p["chosen"]} for p in pairs]
    for name, rows in (("demos", demos), ("pairs", pairs)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(world, workdir, *options) -> int:
    models = f"--policy_model={world / 'policy'}", f"--sarm_model={workdir / 'reward_model'}"
    data = f"--prompts_jsonl={world / 'demos.jsonl'}"
    base = f"--config={Path('configs/base.py').resolve()}", f"--workdir={workdir}"
    return run_main(*base, *models, data, *PPO, *options)


def train_sae(world, workdir, *options, states=0) -> int:
    section = [
        *TRAIN_SAE,
        f"model={world / 'classifier'}",
        f"responses_jsonl={world / 'pairs.jsonl'},{world / 'demos.jsonl'}",
        f"token_states={states}",
        *options,
    ]
    return run(world, workdir, "--stage=train_sae", *(f"--config.train_sae.{o}" for o in section))


@pytest.fixture(scope="module")
def workdir(world, tmp_path_factory):
    """A working directory with an SAE that was trained on pooled and on token states."""
    path = tmp_path_factory.mktemp("run") / "w"
    assert train_sae(world, path, states=50) == 0
    return path


def test_the_sae_leaves_the_scores_and_explains_part_of_them(world, workdir):
    plain, rm = load_reward_model(world / "classifier"), load_sarm(workdir / "reward_model")
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    prompts, responses = ([row[field] for row in rows] for field in ("prompt", "chosen"))
    score_b, z_bf = rm.score(prompts, responses)
    np.testing.assert_array_equal(score_b, plain.score(prompts, responses)[0])
    assert ((z_bf != 0).sum(axis=1) == 8).all()

    decoder_fd = np.asarray(rm.sae.decoder[...], np.float64)
    np.testing.assert_allclose(np.linalg.norm(decoder_fd, axis=1), 1, rtol=1e-5)
    summary = json.loads((workdir / "sae_summary.json").read_text())
    assert summary["responses_train"] + summary["responses_held_out"] == 16
    assert summary["states_train"] == summary["responses_train"] + 50
    sae, reward = summary["sae"], summary["reward"]
    assert sae["explained_variance_pooled"] > 0 and 0 <= sae["dead_fraction"] < 1
    assert 0 <= sae["silent_fraction_held_out"] < 1 and sae["l0"] == 8
    np.testing.assert_allclose(reward["share_features"] + reward["share_error"], 1, rtol=1e-6)
    assert json.loads((workdir / "sae_metrics.jsonl").read_text().splitlines()[-1])["step"] == 60


def test_attribution_adds_up_with_the_error_term_and_the_constant(world, workdir):
    rm = load_sarm(workdir / "reward_model")
    prompt, response = "name 3 round", "it is round"
    rows = attribution(rm, prompt, response)
    score_b, z_bf = rm.score([prompt], [response])
    assert [row["part"] for row in rows] == ["feature"] * 8 + ["error", "constant"]
    np.testing.assert_allclose(sum(row["reward"] for row in rows), score_b[0], rtol=1e-12)

    w = np.asarray(rm.model.score[...], np.float64)
    decoder_fd = np.asarray(rm.sae.decoder[...], np.float64)
    bias_d = np.asarray(rm.sae.pre_bias[...], np.float64)
    ids = np.array([rm.encode(prompt, response)])
    h_d = np.asarray(rm.model.pooled(ids, np.ones(ids.shape, bool)), np.float64)[0]
    error = (h_d - z_bf[0] @ decoder_fd - bias_d) @ w
    np.testing.assert_allclose(rows[-2]["reward"], error, rtol=1e-4)
    np.testing.assert_allclose(rows[-1]["reward"], bias_d @ w, rtol=1e-5)
    for row in rows[:8]:
        expected = z_bf[0, row["feature"]] * (decoder_fd[row["feature"]] @ w)
        np.testing.assert_allclose(row["reward"], expected, rtol=1e-4)


def run_later_stages(world, workdir):
    """Runs all stages after `train_sae`, each of which must succeed."""
    selected, demos = f"@{workdir}/probes/selected_features.json", world / "demos.jsonl"
    pairs = world / "pairs.jsonl"
    features = f"--latent_indices={selected}:safety_harming"
    reward = [
        features,
        f"--penalize_features={selected}:safety_harming[:2]",
        f"--tau_values={selected}:tau_harming[:2]",
        "--alpha_values=0.5,0.25",
        f"--clamp_features={selected}:safety_promoting[:1]",
        "--clamp_max_values=0.1",
        "--config.reward.unit=sd",
        "--beta=0.1",
        f"--human_latents={workdir}/human_latents.safetensors",
    ]
    stages = {
        "identify": [
            f"--config.identify.pairs_jsonl={pairs}",
            "--config.identify.top_k=4",
        ],
        "human_latents": [features, f"--config.human_latents.demos_jsonl={demos}"],
        "probe": [
            f"--config.probe.feature={selected}:safety_harming[:2]",
            f"--config.probe.data_jsonl={pairs}",
        ],
        "train": reward,
        "evaluate": [
            *reward,
            f"--config.evaluate.prompts_jsonl={demos}",
            f"--config.evaluate.data_jsonl={demos}",
            f"--config.evaluate.steering_json={workdir}/probes/steering_config.json",
            "--config.evaluate.resamples=100",
        ],
        "report": [],
    }
    names = {str(i): f"name of {i}" for i in range(64)}
    (world / "names.json").write_text(json.dumps(names))
    named = f"--config.identify.feature_names={world / 'names.json'}"
    for stage, options in stages.items():
        assert run(world, workdir, f"--stage={stage}", *options, named) == 0, stage
    check_pages(workdir)


def test_every_later_stage_works_on_it(world, workdir):
    run_later_stages(world, workdir)
    made = "probes/certificates.json adapter eval/policy.json eval/steering.json report.html"
    for name in made.split():
        assert (workdir / name).exists(), name
    row = json.loads((workdir / "eval/responses.jsonl").read_text().splitlines()[0])
    for shown in row["responses"].values():
        parts = [term[3] for term in shown["terms"]] + [*shown["outside"].values()]
        np.testing.assert_allclose(math.fsum(parts) + shown["rest"], shown["score"], rtol=1e-9)
        assert len(shown["terms"]) == 8 and abs(shown["rest"]) < 1e-9  # k is 8: no other features
        assert shown["outside"].keys() == {"error", "constant"}


@pytest.mark.evidence
def test_every_later_stage_works_on_an_sae_from_elsewhere(world, tmp_path):
    rng, d, m = np.random.default_rng(0), 32, 64
    shapes = {"W_enc": (d, m), "W_dec": (m, d), "b_enc": (m,), "b_dec": (d,), "threshold": (m,)}
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    fields = {"architecture": "jumprelu", "d_in": d, "d_sae": m}
    (tmp_path / "cfg.json").write_text(json.dumps(fields))
    workdir = tmp_path / "w"
    convert(world / "classifier", workdir / "reward_model", "reward", sae=tmp_path)
    run_later_stages(world, workdir)
    certificates = json.loads((workdir / "probes/certificates.json").read_text())["features"]
    assert any(row["effect"]["mean"] != 0 for row in certificates)
    assert (workdir / "adapter").exists() and (workdir / "report.html").exists()


def test_an_sae_with_a_relu_is_written_for_saelens(world, tmp_path):
    assert train_sae(world, tmp_path / "w", "activation=topk_relu", "steps=20") == 0
    own = load_sarm(tmp_path / "w/reward_model").sae
    export(tmp_path / "w/reward_model", tmp_path / "sae", "sae")
    written = read_sae(tmp_path / "sae")
    x_bd = 5 * np.random.default_rng(0).standard_normal((9, 32), np.float32)
    z_bf = np.asarray(own.encode(x_bd))
    assert own.config == written.config and (z_bf >= 0).all() and (z_bf > 0).any()
    np.testing.assert_array_equal(written.encode(x_bd), z_bf)
    np.testing.assert_array_equal(written.decode(z_bf), own.decode(z_bf))


def check_pages(workdir) -> None:
    """Checks the pages on features of both stages, and that the report shows names everywhere."""
    rm = load_sarm(workdir / "reward_model")
    weight_f = rm.feature_weights()
    selected = json.loads((workdir / "probes/selected_features.json").read_text())
    for place, groups in (("probes", "chosen rejected"), ("eval", "base w")):
        content = json.loads((workdir / place / "feature_pages.json").read_text())
        assert content["latents"] == 64 and content["features"]
        for page in content["features"]:
            assert list(page["groups"]) == groups.split()
            np.testing.assert_allclose(page["weight"], weight_f[page["feature"]], rtol=1e-6)
            for example in page["examples"]:
                assert example["tokens"][-1][1] == pytest.approx(example["z"], rel=1e-3, abs=1e-5)
    roles = {page["feature"]: page["roles"] for page in content["features"]}
    assert all("penalised" in roles[i] for i in selected["safety_harming"][:2])
    assert "clamped" in roles[selected["safety_promoting"][0]]
    assert all("latent KL" in roles[i] for i in selected["safety_harming"])
    mentions = mentions_of_features((workdir / "report.html").read_text("utf-8"))
    assert len(mentions) > 20
    for number, after in mentions:
        assert after.startswith(f' "name of {number}'[:12]), number + after


REFUSED = {  # fields of train_sae → the message
    "activation=relu": "train_sae.activation=relu: expected topk or topk_relu",
    "k=65": "train_sae.k=65: must be at most train_sae.latent_size=64",
    "token_states=-1": "train_sae.token_states=-1: must not be negative",
    "held_out_fraction=0.01": "train_sae.held_out_fraction=0.01: holds out 0 of 8 prompts",
    "model={world}/policy": "LlamaForCausalLM",
    "model=": "train_sae.model is empty",
    "responses_jsonl={world}/bad.jsonl": "bad.jsonl:1: field 'response' is missing",
}


@pytest.mark.parametrize("option", REFUSED)
def test_bad_options_are_refused_before_anything_is_written(world, tmp_path, capsys, option):
    (world / "bad.jsonl").write_text('{"prompt": "a"}\n')
    assert train_sae(world, tmp_path / "w", option.format(world=world)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and REFUSED[option] in last, last
    assert not (tmp_path / "w/reward_model").exists()


def test_an_interrupted_training_of_an_sae_uses_its_states_again(
    world, workdir, tmp_path, monkeypatch, capsys
):
    """There are no checkpoints. The states are complete, and the trunk does not run again."""

    class KilledError(Exception):
        """Stands for a SIGKILL."""

    def killed(*arguments, **options):
        raise KilledError

    w = tmp_path / "w"
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(sae_training, "_sae_steps", killed)
        train_sae(world, w, states=50)
    assert {path.name for path in (w / "sae_activations").iterdir()} == {"train", "held_out"}
    monkeypatch.setattr(activations, "_kept_states", killed)
    assert train_sae(world, w, states=50) == 0
    assert "activations in" in capsys.readouterr().err
    assert not (w / "sae_activations").exists()
    for name in ("reward_model/model.safetensors", "sae_metrics.jsonl", "sae_summary.json"):
        assert (w / name).read_bytes() == (workdir / name).read_bytes(), name


def test_a_classifier_without_an_sae_is_no_sarm(world, tmp_path, capsys):
    option = f"--sarm_model={world / 'classifier'}"
    features = "--penalize_features=1", "--tau_values=1", "--alpha_values=1"
    assert run(world, tmp_path / "w", "--stage=train", option, *features) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--stage=train_sae" in last and str(world / "classifier") in last


def test_rivals_of_features_need_no_sae(world, tmp_path, caplog):
    """A probe, human states, a bound and a length penalty on the classifier itself."""
    w = tmp_path / "w"
    common = [
        f"--sarm_model={world / 'classifier'}",
        f"--config.identify.pairs_jsonl={world / 'pairs.jsonl'}",
        f"--config.human_latents.demos_jsonl={world / 'demos.jsonl'}",
        "--config.human_latents.states=True",
        f"--config.reward.probe={w}/probes/dense_probe_logistic.safetensors",
        "--config.reward.probe_penalty=0.5",
        f"--config.reward.human_states={w}/human_states.safetensors",
        "--config.reward.distance_penalty=0.01",
        "--config.reward.length_penalty=0.01",
        "--config.reward.bound=sigmoid",
        "--config.reward.unit=sd",
    ]
    for stage in ("train_probe", "human_latents", "train", "report"):
        assert run(world, w, f"--stage={stage}", *common) == 0, stage
    summary = json.loads((w / "probes/dense_probes.json").read_text())
    assert summary["pairs"] == summary["prompts"] == 8 and summary["options"]["l2"] == 1e-3
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    rm = load_reward_model(world / "classifier")
    prompts = [pair["prompt"] for pair in pairs]
    sides = [
        rm.score_with_states(prompts, [p[s] for p in pairs])[2] for s in ("chosen", "rejected")
    ]
    for kind, content in summary["probes"].items():
        probe = load_probe(w / f"probes/dense_probe_{kind}.safetensors")
        alarms, hits = ((probe.margin(x_nd) > 0).mean() for x_nd in sides)
        assert content["false_alarms"] == alarms <= 0.05 + 1 / 8
        assert content["detection"] == hits and content["tau"] == probe.tau
        assert 0 <= content["detection_held_out"] <= 1
    assert not (w / "human_latents.safetensors").exists()
    row = read_metrics(w / "metrics.csv")[-1]
    assert row["state_distance"] > 0 and row["length_penalty"] > 0 and row["bound_deduction"]
    assert "penalty of the dense probe" in (w / "report.html").read_text()
    recorded = json.loads((w / "stages.json").read_text())
    assert any(path.endswith("logistic.safetensors") for path in recorded["train"]["inputs"])


def test_scores_and_states_come_from_one_pass(world, workdir):
    prompts, responses = ["name 1 red", "name 2"], ["it is red.", "no no no no"]
    plain, rm = load_reward_model(world / "classifier"), load_sarm(workdir / "reward_model")
    score_b, z_bf, x_bd = rm.score_with_states(prompts, responses, latent_indices=(3, 5))
    np.testing.assert_array_equal(score_b, plain.score(prompts, responses)[0])
    np.testing.assert_allclose(z_bf, rm.score(prompts, responses)[1][:, [3, 5]], atol=1e-6)
    np.testing.assert_allclose(x_bd @ np.asarray(rm.model.score[...]), score_b, rtol=1e-4)
    own_b, none, own_bd = plain.score_with_states(prompts, responses)
    assert none is None
    np.testing.assert_array_equal(own_b, score_b)
    np.testing.assert_allclose(own_bd, x_bd, rtol=1e-6)
