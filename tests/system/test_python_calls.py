"""Mistakes of Python callers: one error for each, and no plausible numbers."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conversion import load_policy
from conversion.peft import save_adapter
from ppo.config import PPOConfig
from sarm_jax.io.errors import InputError
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig, add_lora
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import Intervention, intervention
from sarm_jax.rewards.human_latents import collect_human_latents
from sarm_jax.sampling.generate import SMALLEST_TEMPERATURE, Sampling, generate
from sarm_jax.training.preference_pairs import PairsConfig
from tests.command import run_main
from tests.tiny_models import scale_matrices

BASE = Path("configs/base.py").resolve()
POSITIONS = 48
TOKENS, MASK = np.asarray([[5, 6, 7, 8], [9, 10, 0, 0]], np.int32), np.ones((2, 4), bool)
MASK[1, 2:] = False
LONG = np.full((1, POSITIONS + 1), 5, np.int32)


def at(place: tuple[int, int], value: int) -> np.ndarray:
    tokens = TOKENS.astype(np.int64)
    tokens[place] = value
    return tokens


ARRAYS = {  # tokens, mask, part of the message
    "an id beyond the vocabulary": (at((0, 1), 100_000), MASK, "id 100000 is not one of"),
    "a negative id": (at((1, 0), -1), MASK, "id -1 is not one of"),
    "a very negative id": (at((0, 0), -100_000), MASK, "id -100000 is not one of"),
    "ids beyond int32": (at((0, 0), 2**40), MASK, "is not one of"),
    "ids as floats": (TOKENS.astype(np.float32), MASK, "tokens: expected integers"),
    "ids as truth values": (TOKENS > 0, MASK, "tokens: expected integers"),
    "ids as a list": (TOKENS.tolist(), MASK, "tokens: expected an array"),
    "one row without a batch": (TOKENS[0], MASK[0], "tokens: expected an array"),
    "three axes": (TOKENS[None], MASK[None], "tokens: expected an array"),
    "a mask without a batch": (TOKENS, MASK[0], "mask: expected an array"),
    "a shorter mask": (TOKENS, MASK[:, :3], r"mask has shape \(2, 3\)"),
    "a mask of fewer rows": (TOKENS, MASK[:1], r"mask has shape \(1, 4\)"),
    "a transposed mask": (TOKENS, MASK.T, r"mask has shape \(4, 2\)"),
    "a mask of ids": (TOKENS, TOKENS, "mask: expected 0"),
    "a mask of NaN": (TOKENS, np.where(MASK, 1, np.nan), "mask: expected 0"),
    "a mask of -1": (TOKENS, -MASK.astype(int), "mask: expected 0"),
    "a mask of texts": (TOKENS, MASK.astype(str), "mask: expected truth values"),
    "more tokens than positions": (LONG, LONG > 0, f"{POSITIONS} positions"),
}
GOOD_ARRAYS = {
    "right padding": (TOKENS, MASK),
    "left padding": (TOKENS[:, ::-1], MASK[:, ::-1]),
    "a mask of numbers": (TOKENS, MASK.astype(np.float32)),
    "any id under the padding": (np.where(MASK, TOKENS, -100), MASK),
    "other integers": (TOKENS.astype(np.uint8), MASK.astype(np.int8)),
    "a hole": (TOKENS[:1], np.asarray([[1, 0, 1, 1]])),
    "padding beyond the positions": tuple(
        np.pad(array, ((0, 0), (60, 0))) for array in (TOKENS, MASK)
    ),
}
arrays = pytest.mark.parametrize("case", ARRAYS.values(), ids=ARRAYS)
good_arrays = pytest.mark.parametrize("case", GOOD_ARRAYS.values(), ids=GOOD_ARRAYS)


@pytest.fixture(scope="module")
def short(architecture, tokenizer):
    """A policy with few positions."""
    config = dataclasses.replace(architecture, max_position_embeddings=POSITIONS)
    return scale_matrices(Llama(config, rngs=nnx.Rngs(0), stop_ids=(1,)))


@pytest.fixture
def short_sarm(reward_model):
    """The SARM with few positions."""
    graphdef, state = nnx.split(reward_model.model)
    model = nnx.merge(graphdef, state)
    config = dataclasses.replace(model.config.trunk, max_position_embeddings=POSITIONS)
    model.config = dataclasses.replace(model.config, trunk=config)
    model.trunk.config = config
    return RewardModel(model, reward_model.tokenizer, batch_size=4)


def sample(policy, tokens, mask, **options):
    return generate(policy, tokens, mask, **{"max_new_tokens": 2, "temperature": 0.0} | options)


@arrays
def test_wrong_arrays_are_refused(short, short_sarm, case):
    tokens, mask, message = case
    for call in (short, lambda *batch: sample(short, *batch), short_sarm.model):
        with pytest.raises(InputError, match=message):
            call(tokens, mask)


@good_arrays
def test_right_arrays_are_not_refused(short, case):
    logits = short(*map(jnp.asarray, case))
    assert np.isfinite(logits[np.asarray(case[1], bool)]).all()


def test_right_arrays_are_sampled_from(short):
    for tokens, mask in (GOOD_ARRAYS["right padding"], GOOD_ARRAYS["any id under the padding"]):
        out = sample(short, tokens, mask)
        np.testing.assert_array_equal(out.tokens_br, sample(short, TOKENS, MASK).tokens_br)


def test_a_row_without_a_token_is_refused_where_it_is_read(short, short_sarm):
    mask = MASK.copy()
    mask[1] = False
    short(TOKENS, mask)  # whose logits nobody reads
    for call in (lambda *batch: sample(short, *batch), short_sarm.model):
        with pytest.raises(InputError, match="row 1 of the mask has no token"):
            call(TOKENS, mask)
        with pytest.raises(InputError, match="row 0 of the mask has no token"):
            call(TOKENS[:, :0], MASK[:, :0])


def test_shapes_are_checked_inside_a_program(short):
    with pytest.raises(InputError, match="mask has shape"):
        jax.jit(lambda tokens: short(tokens, MASK[:, :3]))(TOKENS)
    with pytest.raises(InputError, match="expected integers"):
        jax.eval_shape(short, TOKENS.astype(np.float32), MASK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": t, "key": jax.random.key(0)}, f"temperature={t}")
        for t in (1e-30, 1e-300, 1e-9, -1.0, float("nan"), float("inf"), 1e39)
    ]
    + [
        ({"max_new_tokens": n}, f"max_new_tokens={n}")
        for n in (0, -1, 1.5, True, POSITIONS - 3, 10**6, 2**40)
    ]
    + [({"top_k": k}, f"top_k={k}") for k in (-1, 1.5, 2**40)]
    + [({"top_p": p}, f"top_p={p}") for p in (0.0, -0.1, 1.1, 1e-50, float("nan"))]
    + [({"pad_id": i}, f"pad_id={i}") for i in (-1, 10**6, 1.0)]
    + [({"stop_ids": (i,)}, f"stop_ids={i}") for i in (-1, 10**6, 1.0)]
    + [({"temperature": 1.0}, "key=None")],
    ids=str,
)
def test_wrong_options_of_generate_are_refused(short, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        sample(short, TOKENS, MASK, **options)


def test_right_options_are_not_refused(short):
    for temperature in (0, 0.0, 1, 0.7, SMALLEST_TEMPERATURE, 1e30):
        assert Sampling(np.int64(5), temperature, top_k=np.int32(3), top_p=1e-6)
    out = sample(short, TOKENS, MASK, max_new_tokens=POSITIONS - 4, stop_ids=())
    assert out.tokens_br.shape == (2, POSITIONS - 4)
    out = sample(short, TOKENS, MASK, temperature=SMALLEST_TEMPERATURE, key=jax.random.key(0))
    np.testing.assert_array_equal(out.tokens_br, sample(short, TOKENS, MASK).tokens_br)
    assert np.isfinite(out.logp_br).all()


def test_empty_batches_give_empty_arrays(short, reward_model):
    out = sample(short, TOKENS[:0], MASK[:0], max_new_tokens=3)
    shapes = [x.shape for x in (out.tokens_br, out.mask_br, out.logp_br, out.ended_b)]
    assert shapes == [(0, 3), (0, 3), (0, 3), (0,)]
    assert sample(short, TOKENS, MASK, max_new_tokens=3).tokens_br.dtype == out.tokens_br.dtype
    assert short(TOKENS[:0], MASK[:0]).shape == (0, 4, short.config.vocab_size)
    size = reward_model.model.config.sae.latent_size
    for indices, width in ((None, size), ([3, 4], 2), ([], 0)):
        scores, latents = reward_model.score([], [], latent_indices=indices)
        assert (scores.shape, latents.shape) == ((0,), (0, width))
    scores, store = reward_model.store([], [])
    assert (scores.shape, len(store), store.columns([1, 2]).shape) == ((0,), 0, (0, 2))
    assert collect_human_latents(reward_model, [], (1, 2)).z_ns.shape == (0, 2)


@pytest.mark.parametrize(
    "indices",
    [[10**6], [-1], [1.5], ["1"], [[1, 2]], 3, [True], np.asarray([1.0]), [1, -5, 2], [2**40]],
    ids=str,
)
def test_wrong_features_are_refused(reward_model, indices):
    with pytest.raises(InputError, match="latent_indices: "):
        reward_model.score(["a"], ["b"], latent_indices=indices)


def test_right_features_are_not_refused(reward_model):
    _, everything = reward_model.score(["a"], ["b"])
    for indices in ([3, 1], (3, 1), np.asarray([3, 1]), jnp.asarray([3, 1]), np.uint8([3, 1])):
        _, some = reward_model.score(["a"], ["b"], latent_indices=indices)
        np.testing.assert_array_equal(some, everything[:, [3, 1]])


@pytest.mark.parametrize(
    "clamp",
    [{1: np.nan}, {1: np.inf}, {1: 1e300}, {1: "2"}, {1: None}, {1.5: 0}, {1.0: 0}, {True: 0},
     {"1": 0}, {-1: 0}, {10**6: 0}, {2**40: 0}],
    ids=str,
)  # fmt: skip
def test_wrong_clamps_are_refused(reward_model, clamp):
    with pytest.raises(InputError, match="feature"):
        reward_model.score(["a"], ["b"], clamp=clamp)
    size = reward_model.model.config.sae.latent_size
    for kind in ("set_to", "minimum", "maximum"):
        with pytest.raises(InputError, match="feature"):
            intervention(size, **{kind: clamp})
    with pytest.raises(InputError, match="feature"):
        intervention(size, steer={i: ("*", value) for i, value in clamp.items()})


@pytest.mark.parametrize(
    "changes",
    [{"indices": [10**6, 2]}, {"indices": [-1, 2]}, {"indices": [2, 2]}, {"indices": [1.0, 2.0]},
     {"add": [np.nan, 0]}, {"minimum": [0, np.nan]}],
    ids=str,
)  # fmt: skip
def test_wrong_interventions_are_refused(reward_model, changes):
    good = intervention(64, set_to={1: 0.5}, minimum={2: 0.0})
    wrong = dataclasses.replace(good, **{k: jnp.asarray(v) for k, v in changes.items()})
    with pytest.raises(InputError, match=r"the intervention(:| )"):
        reward_model.score(["a"], ["b"], clamp=wrong)
    with pytest.raises(InputError, match=r"the intervention(:| )"):
        reward_model.model(TOKENS, MASK, wrong)
    assert isinstance(good.neutral(), Intervention)
    reward_model.score(["a"], ["b"], clamp=good.neutral())


def test_right_clamps_are_not_refused(reward_model):
    expected, _ = reward_model.score(["a"], ["b"], clamp={1: 0.5})
    for clamp in ({np.int32(1): 0.5}, {1: np.float32(0.5)}, {1: jnp.float32(0.5)}):
        score, _ = reward_model.score(["a"], ["b"], clamp=clamp)
        np.testing.assert_array_equal(score, expected)


@pytest.mark.parametrize(
    ("prompts", "responses"),
    [("a", ["b"]), (["a"], "b"), (["a", "b"], ["c"]), ([1], ["b"]), (["a"], [None]),
     (["a"], [["b"]])],
    ids=str,
)  # fmt: skip
def test_wrong_texts_are_refused(reward_model, prompts, responses):
    for call in (reward_model.score, reward_model.store):
        with pytest.raises(InputError, match="prompts|responses"):
            call(prompts, responses)


@pytest.mark.parametrize(
    ("rows", "message"),
    [([[5, 10**6]], "id 1000000"), ([[5], [-1]], "id -1"), ([[]], "row 0"), ([[1.5]], "row 0"),
     ([[5], [5] * (POSITIONS + 1)], f"row 1 has {POSITIONS + 1} tokens"), ([5], "row 0")],
    ids=str,
)  # fmt: skip
def test_wrong_rows_are_refused(short_sarm, rows, message):
    with pytest.raises(InputError, match=message):
        short_sarm.score_tokens(rows)


def test_no_conversation_goes_beyond_the_positions(short_sarm):
    assert short_sarm.max_length == POSITIONS
    scores, _ = short_sarm.score(["a " * 100], ["b"])
    assert np.isfinite(scores).all()
    assert len(short_sarm.encode("a " * 100, "b")) == POSITIONS
    short_sarm.max_length = 10_000
    with pytest.raises(InputError, match=f"at most {POSITIONS} are scored"):
        short_sarm.score(["a " * 100], ["b"])


@pytest.mark.parametrize("options", [{"max_length": 1}, {"max_length": 9.5}, {"batch_size": 0}])
def test_wrong_sizes_are_refused(reward_model, options):
    with pytest.raises(InputError, match=next(iter(options))):
        RewardModel(reward_model.model, reward_model.tokenizer, **options)


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 1e39, -1.0])
def test_the_temperatures_of_the_stages_are_checked_alike(ppo_config, temperature):
    with pytest.raises(InputError, match=re.escape(f"ppo.temperature={temperature}")):
        ppo_config(temperature=temperature)
    with pytest.raises(InputError, match=re.escape(f"prepare_data.temperature={temperature}")):
        PairsConfig("demos.jsonl", 1, 5, temperature, 0)
    assert isinstance(ppo_config(temperature=SMALLEST_TEMPERATURE), PPOConfig)


@pytest.mark.parametrize(
    ("stage", "option"),
    [("train", "ppo"), ("prepare_data", "prepare_data"), ("evaluate", "ppo")],
)
def test_no_stage_samples_beyond_the_positions(world, tmp_path, capsys, stage, option):
    out, demos = tmp_path / "out", world / "demos.jsonl"
    options = f"""--config={BASE} --stage={stage} --workdir={out} --prompts_jsonl={demos}
        --policy_model={world / "policy"} --sarm_model={world / "sarm"}
        --config.prepare_data.demos_jsonl={demos} --config.evaluate.prompts_jsonl={demos}
        --config.{option}.max_new_tokens=500"""
    if stage == "evaluate":
        options += f" --config.evaluate.runs={adapter_of(world, tmp_path)}"
    assert run_main(*options.split()) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: {option}.max_new_tokens=500: ")
    assert "exceeds the 512 positions" in last
    assert not out.exists() or not [file for file in out.rglob("*") if file.is_file()]


def adapter_of(world: Path, folder: Path) -> Path:
    policy, tokenizer = load_policy(world / "policy")
    lora = LoRAConfig(rank=2)
    add_lora(policy, lora, nnx.Rngs(0))
    save_adapter(folder / "run" / "adapter", policy, lora, str(world / "policy"), tokenizer)
    return folder / "run"
