"""Numbers that are not finite: in every tensor that is read or written, and from training."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from conversion import from_hf, load_policy, load_sarm, to_hf
from conversion.keys import tensor_specs
from conversion.peft import VALUE_HEAD, WEIGHTS, load_adapter, read_adapter, save_adapter
from sarm_jax.evaluation.controls import Controls, apply_controls
from sarm_jax.features.probing import ProbeConfig, probe
from sarm_jax.io.errors import InputError
from sarm_jax.lab.language_modelling import LMTraining, WeightedText, train_language_model
from sarm_jax.models.lora import LoRAConfig, add_lora
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import intervention
from sarm_jax.parallel.finite import describe, first_not_finite, is_finite
from sarm_jax.rewards.density_ratio import DensityRatio
from sarm_jax.rewards.human_latents import HumanLatents, load_human_latents, save_human_latents
from sarm_jax.sampling.generate import generate
from sarm_jax.training.divergence import DivergedError
from sarm_jax.training.train_sarm import train_sarm
from tests.command import run_main
from tests.sarm_jax.training.test_train_sarm import SMALL, tiny_pairs
from tests.tiny_models import DISCRIMINATOR

BASE = Path("configs/base.py").resolve()
BAD = [np.nan, np.inf, -np.inf]
MODEL = "model.safetensors"
STAGES = {  # the models that each stage reads
    "train": ("policy", "sarm"),
    "prepare_data": ("policy",),
    "train_sarm": ("policy",),
    "evaluate": ("policy", "sarm"),
    "identify": ("sarm",),
    "probe": ("sarm",),
    "human_latents": ("sarm",),
}


@contextlib.contextmanager
def spoilt(path: Path, name: str, value: float):
    """Puts a value into the middle of one tensor of a file; restores the file afterwards."""
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    entry = json.loads(good[8 : 8 + length])[name]
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[entry["dtype"]]
    start, end = (8 + length + offset for offset in entry["data_offsets"])
    place = start + (end - start) // dtype(0).itemsize // 2 * dtype(0).itemsize
    raw = dtype(value).tobytes()
    path.write_bytes(good[:place] + raw + good[place + len(raw) :])
    try:
        yield
    finally:
        path.write_bytes(good)


def names(path: Path) -> list[str]:
    return sorted(load_file(path))


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("not_finite")
    for name in ("policy", "sarm"):
        shutil.copytree(world / name, root / name)
    policy, tokenizer = load_policy(root / "policy")
    lora = LoRAConfig(rank=2)
    add_lora(policy, lora, nnx.Rngs(0))
    head = {"kernel": np.ones(4, np.float32), "bias": np.zeros((), np.float32)}
    save_adapter(root / "run" / "adapter", policy, lora, str(root / "policy"), tokenizer, head)
    demos = [{"prompt": f"name {n}", "response": f"it is {n}"} for n in range(8)]
    pairs = [{"prompt": d["prompt"], "chosen": d["response"], "rejected": "no"} for d in demos]
    for name, rows in {"demos": demos, "pairs": pairs}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_check_finds_one_value_at_any_place(dtype, value):
    good = np.linspace(-3e4, 3e4, 600_001).astype(np.dtype(dtype))
    assert is_finite(good) and is_finite(jnp.asarray(good))
    for place in (0, 1, 300_000, 600_000):
        bad = good.copy()
        bad[place] = value
        assert not is_finite(bad) and not is_finite(jnp.asarray(bad))
        assert first_not_finite([("a", good), ("b", jnp.asarray(bad))]) == "b"
        assert "1 of 600001" in describe(bad)


@pytest.mark.parametrize("kind", ["policy", "sarm"])
def test_every_tensor_is_checked_when_a_model_is_loaded(root, kind):
    load = {"policy": load_policy, "sarm": load_sarm}[kind]
    path = root / kind / MODEL
    for number, name in enumerate(names(path)):
        with spoilt(path, name, BAD[number % 3]):
            with pytest.raises(InputError) as error:
                load(root / kind)
            assert f"{path}: {name}: holds " in str(error.value)
    load(root / kind)


@pytest.mark.parametrize("value", [0.0, 1e-42, -7e4, 3e38])
def test_finite_values_of_any_size_load(root, value):
    path = root / "policy" / MODEL
    with spoilt(path, "model.layers.1.mlp.up_proj.weight", value):
        load_policy(root / "policy")


def test_a_value_beyond_the_dtype_is_named(root):
    path = root / "policy" / MODEL
    good = path.read_bytes()
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64) * 1e300
    save_file(tensors, path)
    try:
        with pytest.raises(InputError, match=r"model\.norm\.weight: .* too large for dtype=float"):
            load_policy(root / "policy")
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("stage", "kind"), [(stage, kind) for stage, kinds in STAGES.items() for kind in kinds]
)
def test_every_stage_refuses_a_model_that_is_not_finite(root, tmp_path, capsys, stage, kind):
    path = root / kind / MODEL
    name = {"policy": "model.layers.0.mlp.up_proj.weight", "sarm": "sae.encoder.weight"}[kind]
    pairs, demos = root / "pairs.jsonl", root / "demos.jsonl"
    options = f"""--config={BASE} --stage={stage} --workdir={tmp_path / "out"}
        --policy_model={root / "policy"} --sarm_model={root / "sarm"} --prompts_jsonl={demos}
        --config.prepare_data.demos_jsonl={demos} --config.train_sarm.pairs_jsonl={pairs}
        --config.train_sarm.source_layer=2 --config.identify.pairs_jsonl={pairs}
        --config.probe.data_jsonl={pairs} --config.probe.feature=3
        --config.human_latents.demos_jsonl={demos} --config.evaluate.prompts_jsonl={demos}
        --config.evaluate.runs={root / "run"} --config.ppo.total_steps=1
        --config.ppo.batch_size=4 --config.ppo.max_new_tokens=6 --config.ppo.num_minibatches=1"""
    with spoilt(path, name, np.nan):
        assert run_main(*options.split()) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: {path}: {name}: holds NaN")
    left = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {file.name for file in left} <= {"config.json", "stages.json"}


def test_every_tensor_of_an_adapter_and_its_value_head_is_checked(root):
    adapter = root / "run" / "adapter"
    policy, _ = load_policy(root / "policy")
    specs = tensor_specs(policy)
    for file in (WEIGHTS, VALUE_HEAD):
        for number, name in enumerate(names(adapter / file)):
            with spoilt(adapter / file, name, BAD[number % 3]):
                with pytest.raises(InputError, match="expected finite") as error:
                    read_adapter(adapter, specs)
                assert f"{adapter / file}: {name}: holds " in str(error.value)
                with pytest.raises(InputError, match="expected finite"):
                    to_hf.export(adapter, root / "exported")
                assert not (root / "exported").exists()
    load_adapter(adapter, policy)
    to_hf.export(adapter, root / "exported")


@pytest.mark.parametrize("kind", ["policy", "sarm"])
def test_no_command_writes_a_model_that_is_not_finite(root, tmp_path, kind):
    path, dst = root / kind / MODEL, tmp_path / "new"
    for name in names(path)[::5]:
        with spoilt(path, name, np.inf):
            for write in (from_hf.convert, to_hf.export):
                with pytest.raises(InputError, match="holds infinity"):
                    write(root / kind, dst, kind)
                assert not list(tmp_path.iterdir())


def test_a_model_in_memory_that_is_not_finite_is_not_written(root, tmp_path):
    sarm = load_sarm(root / "sarm")
    sarm.model.score[...] = sarm.model.score[...].at[3].set(jnp.nan)
    with pytest.raises(InputError, match=r"score\.weight: holds NaN"):
        to_hf.save_sarm(tmp_path / "sarm", sarm.model, sarm.tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [*BAD, 1e300])
def test_human_latents_that_are_not_finite_are_refused(tmp_path, value):
    path = tmp_path / "human.safetensors"
    z = np.ones((4, 2))
    z[2, 1] = value
    save_file({"z": z, "latent_indices": np.arange(2, dtype=np.int32)}, path)
    with pytest.raises(InputError, match=r"reward\.human_latents=.*: z: holds"):
        load_human_latents(path)
    with np.errstate(over="ignore"), pytest.raises(InputError, match="z: holds"):
        save_human_latents(tmp_path / "new", HumanLatents(z.astype(np.float32), (0, 1)))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_human_latents_whose_variance_overflows_are_refused():
    z = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32) * np.float32(1e30)
    with pytest.raises(InputError, match="too large to be compared"):
        DensityRatio(DISCRIMINATOR, z)


SMALLER = dataclasses.replace(SMALL, sae_steps=40, epochs=4)


@pytest.mark.parametrize(
    ("mode", "option", "rate"),
    [
        (0, "sae_learning_rate", 1e4), (0, "sae_learning_rate", 1e30),
        (0, "head_learning_rate", 1e4), (0, "head_learning_rate", 1e30),
        (2, "learning_rate", 1e4), (3, "head_learning_rate", 1e30),
    ],
)  # fmt: skip
def test_a_sarm_whose_training_diverges_is_not_returned(policy, tokenizer, mode, option, rate):
    config = dataclasses.replace(SMALLER, mode=mode, **{option: rate})
    with pytest.raises(DivergedError, match=f"train_sarm.{option}") as error:
        train_sarm(config, policy, tokenizer, tiny_pairs(), lambda row: None)
    assert "diverged; lower" in str(error.value)


def test_a_stage_that_diverges_exits_with_3_and_writes_nothing(root, tmp_path, capsys):
    options = f"""--config={BASE} --stage=train_sarm --workdir={tmp_path / "out"}
        --policy_model={root / "policy"} --config.train_sarm.pairs_jsonl={root / "pairs.jsonl"}
        --config.train_sarm.source_layer=2 --config.train_sarm.latent_size=48
        --config.train_sarm.k=6 --config.train_sarm.aux_k=8 --config.train_sarm.sae_steps=20
        --config.train_sarm.sae_batch_tokens=64 --config.train_sarm.sae_learning_rate=1e30"""
    assert run_main(*options.split()) == 3
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert line.startswith("error: the SAE's loss") and "train_sarm.sae_learning_rate" in line
    left = {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert left <= {"config.json", "stages.json"}


@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_a_language_model_whose_training_diverges_is_not_returned(policy, rate):
    rows = [WeightedText(list(range(5, 12)), [1.0] * 7) for _ in range(4)]
    options = LMTraining(steps=20, batch_size=4, learning_rate=rate)
    with pytest.raises(DivergedError, match=r"lab\.pretraining_learning_rate"):
        train_language_model(policy, rows, options)


@pytest.mark.parametrize("value", [1e30, -3e38])
def test_a_probe_reports_no_infinity(reward_model, value):
    data = [{"prompt": f"p{i}", "chosen": f"a fine {i}", "rejected": "no"} for i in range(4)]
    for config in (
        ProbeConfig((3,), value, "pairs"),
        ProbeConfig((3,), None, "pairs", min_value=abs(value)),
    ):
        with pytest.raises(InputError, match=r"probe\.(set|min)_value=.*changes a reward by more"):
            probe(config, reward_model, data)


def test_scores_under_controls_that_overflow_are_refused(reward_model):
    weight = np.asarray(reward_model.model.score[...], np.float32)
    score, z = np.ones(3, np.float32), np.ones((3, 1), np.float32)
    for controls in (
        Controls(intervention(len(weight), set_to={3: 3e38})),
        Controls(None, (3,), (0.0,), (3e38,), unit="sd"),
    ):
        with np.errstate(over="ignore"), pytest.raises(InputError, match="holds infinity"):
            apply_controls(controls, plain_b=score, z_bn=z, weight_f=100 * weight, score_std=100.0)


def test_latents_that_overflow_are_refused(reward_model):
    graphdef, state = nnx.split(reward_model.model)
    model = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    model.sae.encoder[...] = model.sae.encoder[...] * 3e38  # finite
    sarm = RewardModel(model, reward_model.tokenizer)
    with pytest.raises(InputError, match="scores: holds|latents: holds"):
        sarm.store(["a"], ["b"])


def test_logits_that_overflow_are_refused(policy):
    policy.lm_head[...] = jnp.full_like(policy.lm_head[...], 3e38)
    tokens = jnp.asarray([[5, 6, 7]])
    for temperature in (0.0, 1.0):
        with pytest.raises(InputError, match="logits are not finite"):
            generate(
                policy, tokens, jnp.ones((1, 3), bool), max_new_tokens=2, key=jax.random.key(0),
                temperature=temperature,
            )  # fmt: skip
