"""Properties of every parser of user input: a valid result, or an `InputError` on one line.

A parser must not raise anything else, and must not take long or much memory. By default the number
of examples is small and they are always the same. To run a long campaign with new examples:

    FUZZ_EXAMPLES=100000 python -m pytest tests/system/test_fuzzing.py --hypothesis-show-statistics
"""

import dataclasses
import gzip
import json
import os
import resource
import struct

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow.parquet import write_table
from safetensors.numpy import save

from conversion.checkpoint import open_checkpoint
from conversion.classifier_config import classifier_config
from conversion.hf_config import llama_config, sarm_config
from conversion.saelens import read_sae
from conversion.safetensors_io import INDEX, SINGLE, TensorFiles
from pipeline.report.feature_pages import LEVELS, read_feature_pages
from ppo.tracking.metrics_csv import read_metrics
from ppo.tracking.trackers.record import FIELDS, FILE, TrackedRun, read_runs
from sarm_jax.evaluation.controls import read_steering
from sarm_jax.features.dense_probe import DenseProbe, load_probe
from sarm_jax.features.feature_lists import parse_bounds, parse_features, parse_values
from sarm_jax.features.feature_names import MAX_CHARACTERS, NO_NAMES, read_feature_names
from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import parse_jsonl
from sarm_jax.io.row_files import read_placed_rows, read_rows
from sarm_jax.models.conversation import Conversation, parse_prompt, to_json
from sarm_jax.models.conversation_rows import (
    read_demonstrations,
    read_pairs,
    read_probe_rows,
    read_prompts,
)
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.llama import LlamaConfig
from sarm_jax.models.rope import YarnScaling
from sarm_jax.models.sae import ACTIVATIONS
from sarm_jax.models.sarm import SARMConfig
from sarm_jax.rewards.human_states import load_human_states
from sarm_jax.rewards.options import reward_config
from tests.oracles import ARCHITECTURES, LLAMA3_ROPE, YARN_ROPE, tiny_llama_config

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
MEMORY = 300 << 20  # bytes by which the process may grow
bounded = settings(
    max_examples=EXAMPLES or 80,
    derandomize=not EXAMPLES,
    database=None,
    deadline=10_000,  # milliseconds per example
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 10**30, 10**400, 2**31, 2**63, True, 1e308, float("nan")]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8))
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
    """Checks that the process grows by at most `MEMORY` over all examples."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def result(call, *args):
    """Returns the result of a call, or None for an `InputError` with one printable line."""
    try:
        return call(*args)
    except InputError as error:
        assert str(error) and str(error).isprintable() and len(str(error)) < 2500
        return None


def damaged(draw, content: bytes) -> bytes:
    """Returns the content with a few bytes changed, removed or inserted."""
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        piece = draw(
            st.binary(max_size=6) | st.sampled_from([b"{", b"[" * 2000, b'"', b"\n", b","])
        )
        content = content[:at] + piece + content[at + draw(st.integers(0, 8)) :]
    return content


@st.composite
def lines(draw):
    rows = draw(
        st.lists(st.dictionaries(st.sampled_from(["prompt", "n", "x"]), values), max_size=4)
    )
    return damaged(draw, "\n".join(json.dumps(row) for row in rows).encode())


@bounded
@given(st.one_of(lines(), st.binary(max_size=60)))
def test_jsonl(content):
    rows = result(parse_jsonl, content, {"prompt": str, "n": float}, "x.jsonl")
    for row in rows or ():
        assert row["prompt"].strip() and isinstance(row["n"], (int, float))
        assert json.loads(json.dumps(row, allow_nan=False).encode()) == row


table_values = st.one_of(
    st.lists(st.one_of(st.none(), st.text(max_size=5)), min_size=2, max_size=2),
    st.lists(st.integers(0, 9), min_size=2, max_size=2),
    st.lists(
        st.lists(st.fixed_dictionaries({"role": st.text(max_size=3)})), min_size=2, max_size=2
    ),
    st.lists(st.binary(max_size=4), min_size=2, max_size=2),
)


def parquet(columns: dict) -> bytes:
    sink = pyarrow.BufferOutputStream()
    write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


PACKERS = (
    bytes,
    gzip.compress,
    lambda content: pyarrow.Codec("zstd").compress(content, asbytes=True),
)


@st.composite
def row_files(draw):
    """Draws a file in one of the formats, perhaps packed, and damaged before or after that."""
    if draw(st.booleans()):
        columns = draw(st.dictionaries(st.sampled_from(["prompt", "n"]), table_values, max_size=2))
        content = parquet(columns)
    else:
        names = st.sampled_from(["prompt", "n", "x"])
        rows = draw(st.lists(st.dictionaries(names, values) | values, max_size=4))
        content = json.dumps(rows, indent=draw(st.sampled_from([None, 1]))).encode()
    damage = draw(st.sampled_from(["none", "before", "after", "cut"]))
    content = damaged(draw, content) if damage == "before" else content
    content = draw(st.sampled_from(PACKERS))(content)
    if damage == "cut":
        return content[: draw(st.integers(0, len(content)))]
    return damaged(draw, content) if damage == "after" else content


@bounded
@given(st.one_of(lines(), row_files(), st.binary(max_size=60)), st.sampled_from(["x.jsonl", "x"]))
def test_row_files(folder, content, name):
    path = folder / name
    path.write_bytes(content)
    for row in result(read_rows, path, {"prompt": str}) or ():
        assert row["prompt"].strip() and row["prompt"].encode()
    for row in result(read_placed_rows, path) or ():
        assert row.place.startswith(f"{path}:")


roles = st.sampled_from(["system", "user", "assistant", "tool", "", 1])
contents = st.sampled_from(["a", "b", " ", "é\u2028"]) | st.just([{"type": "text", "text": "a"}])
message = st.fixed_dictionaries(
    {},
    optional={
        "role": roles | values,
        "content": contents | values,
        "name": scalars,
        "tool_calls": st.none() | values,
    },
)
turn = st.fixed_dictionaries({"role": roles, "content": contents})
talk = st.lists(turn | message, max_size=3) | contents | values
ROW_FIELDS = "prompt response completion messages chosen rejected candidates source tools".split()


@st.composite
def talks(draw):
    fields = st.dictionaries(st.sampled_from(ROW_FIELDS), talk | st.lists(talk, max_size=2))
    # Otherwise hardly a pair would be whole.
    start = draw(st.lists(turn, min_size=1, max_size=3))
    sides = {side: [*start, draw(turn)] for side in ("chosen", "rejected")}
    rows = draw(st.lists(fields | st.just(sides), min_size=1, max_size=2))
    return damaged(draw, "\n".join(json.dumps(row) for row in rows).encode())


@bounded
@given(talks())
def test_rows_with_conversations(folder, content):
    path = folder / "talks.jsonl"
    path.write_bytes(content)
    readers = {
        ("prompt",): lambda p: [{"prompt": prompt} for prompt in read_prompts(p)],
        ("prompt", "response"): read_demonstrations,
        ("prompt", "chosen", "rejected"): lambda p: read_pairs(p, unequal=True),
        (): lambda p: [*read_probe_rows(p, "pairs"), *read_probe_rows(p, "bestofn")],
    }
    for fields, read in readers.items():
        for row in result(read, str(path)) or ():
            prompt = row["prompt"]
            assert isinstance(prompt, (str, Conversation))
            assert parse_prompt(json.loads(json.dumps(to_json(prompt))), "p") == prompt
            assert all(row[field].strip() for field in fields if field != "prompt")
            hash(prompt)


entries = st.one_of(
    st.text(max_size=12),
    st.text("0123456789.-+einfa_, ", max_size=12),
    st.integers().map(str),
    st.sampled_from(["none", "inf", "9" * 5000, "@f.json:a", "@f.json:a[:99999999999999]", "@:"]),
)


@bounded
@given(st.lists(entries, max_size=4).map(",".join))
def test_feature_lists(text):
    assert all(0 <= i < 2**31 for i in result(parse_features, "o", text) or ())
    assert np.isfinite(result(parse_values, "o", text) or ()).all()
    assert all(v is None or np.isfinite(v) for v in result(parse_bounds, "o", text) or ())


@bounded
@given(values | st.dictionaries(st.just("a"), st.lists(scalars, max_size=4)))
def test_feature_lists_of_files(folder, content):
    path = folder / "lists.json"
    path.write_text(json.dumps(content))
    for parse in (parse_features, parse_values, parse_bounds):
        result(parse, "o", f"@{path}:a[:2]")
        result(parse, "o", f"@{path}:a")


actions = st.tuples(st.sampled_from(["*", "+", "x", 1]), scalars).map(list) | values


@st.composite
def steering(draw):
    keys = st.integers(-1, 10**11).map(str) | st.text(max_size=4)
    return damaged(draw, json.dumps(draw(st.dictionaries(keys, actions, max_size=4))).encode())


@bounded
@given(steering())
def test_steering_files(folder, content):
    path = folder / "steering.json"
    path.write_bytes(content)
    for feature, (operation, value) in (result(read_steering, path) or {}).items():
        assert 0 <= feature < 2**31 and operation in "*+" and np.isfinite(np.float32(value))


name_rows = st.fixed_dictionaries(
    {},
    optional={
        "feature": st.integers(-1, 10**11) | scalars,
        "index": st.integers(-1, 10**11).map(str) | scalars,
        "name": st.text(max_size=100) | scalars,
        "description": st.text(max_size=100) | scalars,
        "layer": st.sampled_from(["1", "2"]),
        "explanationModelName": st.just("x"),
    },
)


@st.composite
def name_files(draw):
    keys = st.integers(-1, 10**11).map(str) | st.text(max_size=4)
    value = draw(st.dictionaries(keys, st.text(max_size=9) | values) | st.lists(name_rows))
    lines = [json.dumps(row) for row in value] if isinstance(value, list) else []
    text = "\n".join(lines) if lines and draw(st.booleans()) else json.dumps(value)
    return damaged(draw, text.encode("utf-8", "surrogatepass"))


@bounded
@given(name_files(), st.sampled_from(["n.json", "n.jsonl", "n"]))
def test_feature_names(folder, content, name):
    path = folder / name
    path.write_bytes(content)
    names = result(read_feature_names, str(path))
    for feature, shown in names.by_feature.items() if names else ():
        assert 0 <= feature < 2**31 and 0 < len(shown) <= MAX_CHARACTERS and shown.isprintable()


@st.composite
def feature_files(draw):
    """A good file with some values, at any depth, replaced."""
    group = {"responses": 4, "fires": 0.5, "above_tau": None, "range": [0, 1], "counts": [1, 2]}
    example = {"z": 1.0, "groups": ["a"], "prompt": "p", "tokens": [{"left_out": 1}, ["t", 1.0]]}
    row = {"feature": 3, "roles": ["x"], "weight": 1.0, "weight_rank": 1, "tau": 0.5}
    row |= {"groups": {"a": group}, "examples": [example]}
    content = {"latents": 9, "features": [row | {"neighbours": [{"feature": 1, "cosine": 0.5}]}]}

    def change(value):
        if draw(st.integers(0, 25)) == 0:
            return draw(values | scalars)
        if isinstance(value, dict):
            return {k: change(v) for k, v in value.items() if draw(st.integers(0, 40))}
        return [change(v) for v in value] if isinstance(value, list) else value

    return damaged(draw, json.dumps(change(content)).encode("utf-8", "surrogatepass"))


@bounded
@given(feature_files(), feature_files())
def test_feature_pages(folder, probes, evaluated):
    for name, content in (("probes", probes), ("eval", evaluated)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "feature_pages.json").write_bytes(content)
    for pages in result(read_feature_pages, {"x": folder}, [], NO_NAMES) or ():
        for page in pages.pages:
            assert all(0 <= bar.height <= 1 for strip in page.strips for bar in strip.bars)
            assert all(0 <= p.level <= LEVELS for e in page.examples for p in e.pieces)


cells = st.one_of(st.floats().map(str), st.text(max_size=6), st.just("step"), st.just('"'))


@bounded
@given(st.lists(st.lists(cells, max_size=4).map(",".join), max_size=5).map("\n".join), st.data())
def test_metrics(folder, text, data):
    path = folder / "metrics.csv"
    path.write_bytes(damaged(data.draw, f"step,a\n{text}\n".encode("utf-8", "surrogatepass")))
    for row in result(read_metrics, path) or ():
        assert "step" in row and all(isinstance(value, float) for value in row.values())


TRACKED = {"id": "0123abcd", "name": "n", "project": "p", "position": 3}


@bounded
@given(
    st.dictionaries(
        st.sampled_from(["wandb", "trackio"]) | st.text(max_size=6),
        st.dictionaries(st.sampled_from(list(FIELDS)), values | scalars).map(
            lambda changes: TRACKED | changes
        )
        | values,
        max_size=3,
    ),
    st.data(),
)
def test_records_of_trackers(folder, runs, data):
    text = json.dumps(runs).encode("utf-8", "surrogatepass")
    (folder / FILE).write_bytes(damaged(data.draw, text))
    for run in (result(read_runs, folder) or {}).values():
        assert isinstance(run, TrackedRun) and type(run.position) is int and len(run.id) == 8


GOOD = [
    tiny_llama_config(**changes).to_dict() | {"architectures": None}
    for changes in ARCHITECTURES.values()
]
ROPES = [LLAMA3_ROPE, YARN_ROPE | {"beta_fast": 8.0, "attention_factor": 1.3, "truncate": False}]
PARAM = {"sae_source_layer": 2, "sae_latent_size": 64, "sae_k": 8, "sarm_use_activation": True}


@bounded
@given(
    st.sampled_from(GOOD),
    st.sampled_from(ROPES),
    st.dictionaries(
        st.sampled_from(sorted(set().union(*GOOD))) | st.text(max_size=6), values, max_size=4
    ),
    st.dictionaries(st.sampled_from(sorted(PARAM)), values, max_size=2) | values,
    st.dictionaries(st.sampled_from(sorted(set().union(*ROPES))), values, max_size=2),
)
def test_hf_configs(good, good_rope, changes, param, rope):
    for hf in (good | changes, good | {"rope_parameters": good_rope | rope} | changes):
        config = result(llama_config, hf)
        assert config is None or isinstance(config, LlamaConfig)
        if config is not None:
            assert 0 < config.num_hidden_layers <= 4096 and config.head_dim % 2 == 0
            assert np.isfinite([config.rms_norm_eps, config.rope_theta]).all()
            if isinstance(config.rope_scaling, YarnScaling):
                scaling = config.rope_scaling
                assert np.isfinite(scaling.interpolated(8, config.rope_theta)).all()
                assert np.isfinite(scaling.magnitude)
        sarm = PARAM | param if isinstance(param, dict) else param
        config = result(sarm_config, hf | {"sarm_param": sarm}, "x_Latent64_Layer2_K8_")
        assert config is None or isinstance(config, SARMConfig)


CLASSIFIER = GOOD[0] | {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 261}
CLASSIFIER |= {"id2label": {"0": "LABEL_0"}, "num_labels": 1}
OWN = ["architectures", "pad_token_id", "id2label", "num_labels"]
SAE = {"hidden_size": 32, "latent_size": 64, "k": 8, "activation": "topk"}
SAELENS = {
    "architecture": "topk", "k": 2, "d_in": 4, "d_sae": 6, "apply_b_dec_to_input": True,
    "normalize_activations": "none", "reshape_activations": "none", "activation_fn": "relu",
    "activation_fn_kwargs": {"k": 2}, "rescale_acts_by_decoder_norm": True, "dtype": "float32",
    "metadata": {"hook_name": "norm"}, "finetuning_scaling_factor": False,
}  # fmt: skip


@bounded
@given(
    st.dictionaries(st.sampled_from(OWN), values, max_size=2),
    st.dictionaries(st.sampled_from([*SAE, "use_topk"]) | st.text(max_size=6), values, max_size=2)
    | values,
)
def test_descriptions_of_reward_models(folder, changes, sae):
    config = result(classifier_config, CLASSIFIER | changes)
    assert config is None or isinstance(config, LinearRewardConfig)
    fields = {
        "trunk": dataclasses.asdict(classifier_config(CLASSIFIER).trunk),
        "pad_token_id": changes.get("pad_token_id", 261),
        "sae": SAE | sae if isinstance(sae, dict) else sae,
    }
    description = {"format": 1, "kind": "reward", "config": fields, "hf_config": CLASSIFIER}
    (folder / "sarm_jax.json").write_text(json.dumps(description))
    checkpoint = result(open_checkpoint, folder, "reward")
    if checkpoint is not None and checkpoint.config.sae is not None:
        own = checkpoint.config.sae
        assert own.hidden_size == 32 and 1 <= own.k <= own.latent_size
        assert own.activation in ACTIVATIONS


@bounded
@given(st.dictionaries(st.sampled_from(list(SAELENS)), values, max_size=3), st.data())
def test_saes_of_saelens(folder, changes, data):
    directory = folder / "sae"
    directory.mkdir(exist_ok=True)
    shapes = {"W_enc": (4, 6), "W_dec": (6, 4), "b_enc": (6,), "b_dec": (4,)}
    content = save({name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    (directory / "sae_weights.safetensors").write_bytes(damaged(data.draw, content))
    text = json.dumps(SAELENS | changes).encode("utf-8", "surrogatepass")
    (directory / "cfg.json").write_bytes(damaged(data.draw, text))
    sae = result(read_sae, directory)
    assert sae is None or (sae.encoder.shape == (4, 6) and sae.config.k <= 6)


WHOLE = save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})
tensor = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "X", 3]),
        "shape": st.lists(numbers, max_size=3),
        "data_offsets": st.lists(st.integers(-1, 40) | numbers, max_size=3),
    },
)


@st.composite
def safetensors(draw):
    if draw(st.booleans()):
        return damaged(draw, WHOLE)
    header = json.dumps(draw(st.dictionaries(st.text(max_size=3), tensor, max_size=3))).encode()
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + header + draw(st.binary(max_size=40))


def read_all(folder):
    files = TensorFiles(folder)
    for name in files.names():
        assert len(files.shape(name)) >= 0 and files.dtype(name)
        array = result(files.read, name)
        assert array is None or array.nbytes <= 1 << 12  # no more than the file holds


@bounded
@given(safetensors())
def test_safetensors(tmp_path_factory, folder, content):
    directory = folder / "single"
    directory.mkdir(exist_ok=True)
    (directory / SINGLE).write_bytes(content)
    result(read_all, directory)


STATE_FILES = {
    load_probe: {"direction": np.eye(1, 3, dtype=np.float32)[0], "tau": np.ones(1, np.float32)},
    load_human_states: {
        "mean": np.ones(3, np.float32),
        "axes": np.eye(2, 3, dtype=np.float32),
        "variance": np.ones(2, np.float32),
        "floor": np.ones(1, np.float32),
    },
}
shapes = st.sampled_from([(), (0,), (1,), (2,), (3,), (1, 3), (2, 3), (3, 3)])


@bounded
@given(st.sampled_from(list(STATE_FILES)), st.data())
def test_files_of_terms_on_states(folder, load, data):
    """Damaged files, and whole ones whose tensors have other shapes, types and values."""
    tensors, path = dict(STATE_FILES[load]), folder / "states.safetensors"
    for name in data.draw(st.lists(st.sampled_from([*tensors, "x"]), max_size=2)):
        value = data.draw(st.sampled_from([0.0, 0.5, 1.0, -1.0, np.nan, 1e30]))
        dtype = data.draw(st.sampled_from([np.float32, np.float64, np.float16, np.int32]))
        with np.errstate(invalid="ignore", over="ignore"):
            tensors[name] = np.full(data.draw(shapes), value).astype(dtype)
    content = save(tensors)
    path.write_bytes(damaged(data.draw, content) if data.draw(st.booleans()) else content)
    loaded = result(load, path)
    if isinstance(loaded, DenseProbe):
        assert np.isfinite(loaded.margin(np.ones((2, len(loaded.direction_d))))).all()
    elif loaded is not None:
        assert (loaded.distance(np.zeros((2, len(loaded.mean_d)))) >= 0).all()


names = st.sampled_from(["a.safetensors", "b.safetensors", "../single/model.safetensors", "x.bin"])


@bounded
@given(st.dictionaries(st.sampled_from("abc"), names | values), values, st.data())
def test_indices(folder, weight_map, other, data):
    directory = folder / "sharded"
    directory.mkdir(exist_ok=True)
    for name in ("a", "b"):
        (directory / f"{name}.safetensors").write_bytes(save({name: np.ones(2, np.float32)}))
    content = json.dumps(data.draw(st.sampled_from([{"weight_map": weight_map}, other])))
    (directory / INDEX).write_bytes(damaged(data.draw, content.encode()))
    result(read_all, directory)


SECTION = dict.fromkeys(
    "penalize_features tau_values alpha_values clamp_features clamp_set_values "
    "clamp_min_values clamp_max_values latent_indices".split(),
    "",
)
lists = st.lists(st.integers(-1, 70) | st.floats() | st.just("none"), max_size=3).map(
    lambda entries: ",".join(map(str, entries))
)


FURTHER = {
    "probe": st.sampled_from(["", "x"]),
    "human_states": st.sampled_from(["", "x"]),
    "screen": st.booleans(),
    "bound": st.sampled_from(["", "sigmoid", "x"]),
    **dict.fromkeys(["probe_penalty", "distance_penalty", "length_penalty"], st.floats()),
}


@bounded
@given(
    st.dictionaries(st.sampled_from(sorted(SECTION)), lists),
    st.floats(),
    st.floats(),
    st.sampled_from(["sd", "score", "x"]),
    st.fixed_dictionaries({}, optional=FURTHER),
)
def test_config_values(changes, beta, cap, unit, further):
    section = SECTION | changes | {"beta": beta, "penalty_cap": cap, "unit": unit} | further
    config = result(reward_config, section)
    if config is not None:
        assert len(config.tau_values) == len(config.penalize_features)
        assert len(config.alpha_values) == (0 if config.screen else len(config.tau_values))
        assert config.probe or not (
            config.probe_penalty or (config.screen and not config.tau_values)
        )
        assert config.beta >= 0 and config.penalty_cap > 0
        result(config.check_features, 64)
