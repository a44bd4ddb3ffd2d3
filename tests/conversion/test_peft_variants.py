"""Every kind of LoRA that can be represented: PEFT's own model is the oracle for the logits."""

import copy
import json

import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from conversion import load_policy, to_hf
from conversion.checkpoint import open_checkpoint
from conversion.peft import load_adapter, read_adapter, save_adapter
from conversion.peft_config import read_peft_config
from sarm_jax.io.errors import InputError
from tests import oracles

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ROW = [256, 5, 80, 3, 199, 42, 260]
BLOCK = "model.layers.{}.self_attn.{}_proj"

VARIANTS = {
    "plain": {"r": 3, "lora_alpha": 7},
    "rsLoRA": {"r": 3, "lora_alpha": 7, "use_rslora": True},
    "rsLoRA of rank 1": {"r": 1, "lora_alpha": 0.5, "use_rslora": True},
    "regular expression": {"target_modules": r".*\.(q_proj|down_proj)"},
    "expression for some layers": {"target_modules": r"model\.layers\.[12]\.self_attn\.[qv]_proj"},
    "expression with options": {"target_modules": r"(?i).*LAYERS\.\d+\.(?:mlp)\.(up|gate)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "full names": {"target_modules": [BLOCK.format(0, "q"), BLOCK.format(2, "v")]},
    "full and short names": {"target_modules": [BLOCK.format(1, "k"), "o_proj"]},
    "ends of names": {"target_modules": ["1.mlp.up_proj", "self_attn.q_proj", "mlp.gate_proj"]},
    "names that match nothing": {"target_modules": ["q_proj", "qkv_proj"]},
    "ranks": {"rank_pattern": {"q_proj": 5, "1.self_attn.v_proj": 1}},
    "alphas": {"alpha_pattern": {"q_proj": 32, "0.self_attn.v_proj": 0.25}},
    "ranks and alphas": {
        "rank_pattern": {r"model\.layers\.\d\.self_attn\.q_proj": 4},
        "alpha_pattern": {"q_proj": 8, "k_proj": 3},
    },
    "patterns with rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"o_proj": 6},
        "alpha_pattern": {"^model.layers.2.self_attn.k_proj": 5.5},
    },
    "first of two patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 5}},
    "patterns of one scale": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}},
    "some layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded names": {"exclude_modules": ["q_proj", BLOCK.format(0, "v")]},
    "excluded by an expression": {"exclude_modules": r".*layers\.0\..*"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no initialisation": {"init_lora_weights": False},
    "dropout": {"lora_dropout": 0.1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny policy: its directory, transformers' model and ours."""
    path = tmp_path_factory.mktemp("base")
    model = oracles.save_tiny_llama(path, oracles.tiny_llama_config(), oracles.tiny_tokenizer())
    return path, model, load_policy(path)[0]


@torch.no_grad()
def write_adapter(path, model, **fields) -> np.ndarray:
    """Writes a random adapter and returns the logits `[T, V]` of the model with it.

    They are those of the adapter that PEFT reads again, since its file is what we read.
    """
    config = LoraConfig(
        **{"r": 2, "lora_alpha": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | fields
    )
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.normal_(0.0, 0.2)
    adapted.save_pretrained(path)
    return peft_logits(model, path)


@torch.no_grad()
def peft_logits(model, path) -> np.ndarray:
    """Returns the logits `[T, V]` of a copy of the model with the adapter of a directory."""
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), path).eval()
    return adapted(torch.tensor([ROW])).logits[0].numpy()


def our_logits(policy) -> np.ndarray:
    tokens_bt = np.asarray([ROW])
    return np.asarray(policy(tokens_bt, np.ones_like(tokens_bt, bool)))[0]


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_an_adapter_computes_what_it_does_in_peft(base, tmp_path, name):
    path, model, policy = base
    expected = write_adapter(tmp_path / "adapter", model, **VARIANTS[name])
    with_adapter = nnx.merge(*nnx.split(policy))
    config = load_adapter(tmp_path / "adapter", with_adapter)
    assert np.abs(expected - our_logits(policy)).max() > 0.1
    assert_close(our_logits(with_adapter), expected)
    save_adapter(tmp_path / "again", with_adapter, config, str(path))
    assert_close(peft_logits(model, tmp_path / "again"), expected)


@pytest.mark.parametrize("name", ["rsLoRA", "expression for some layers", "patterns with rsLoRA"])
def test_a_merged_model_computes_the_same(base, tmp_path, name):
    path, model, _ = base
    expected = write_adapter(tmp_path / "adapter", model, **VARIANTS[name])
    edit(tmp_path / "adapter", base_model_name_or_path=str(path))
    to_hf.export(tmp_path / "adapter", tmp_path / "merged", merge=True)
    assert_close(our_logits(load_policy(tmp_path / "merged")[0]), expected)
    to_hf.export(tmp_path / "adapter", tmp_path / "copy")
    assert_close(peft_logits(model, tmp_path / "copy"), expected)


def edit(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_plain_adapter_is_read_to_the_bit(base, tmp_path):
    path, model, policy = base
    write_adapter(tmp_path, model, r=3, lora_alpha=7)
    config = load_adapter(tmp_path, plain := nnx.merge(*nnx.split(policy)))
    assert (config.rank, config.alpha) == (3, 7.0)
    assert set(config.target_modules) == set(ATTENTION)
    save_adapter(tmp_path / "again", plain, config, str(path))
    before, after = (
        load_file(d / "adapter_model.safetensors") for d in (tmp_path, tmp_path / "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def read(directory, model_directory):
    return read_adapter(directory, open_checkpoint(model_directory, "policy").specs())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": "(a+)+$|(?=q)"}, "target_modules: the expression '(a+)+$|(?=q)'"),
        ({"target_modules": r"(.*)\1"}, "target_modules: the expression"),
        ({"target_modules": "["}, "target_modules: the expression '['"),
        ({"target_modules": "a)|(.*q_proj"}, "target_modules: the expression"),
        ({"target_modules": "x{,3}"}, "target_modules: the expression"),
        ({"target_modules": "[[:alpha:]]*"}, "target_modules: the expression"),
        ({"target_modules": "q" * 5000}, "target_modules: the expression"),
        ({"target_modules": "nothing"}, "target_modules=nothing: chooses no layer"),
        ({"target_modules": ["nothing"]}, "target_modules=nothing: chooses no layer"),
        ({"target_modules": ".*(q_proj|lm_head)"}, "chooses lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "chooses model.embed_tokens"),
        ({"target_modules": None}, "target_modules=None: expected a list of names or"),
        ({"target_modules": [1]}, "target_modules=[1]: expected a list of names or"),
        ({"target_modules": {}}, "target_modules={}: expected"),
        ({"exclude_modules": 3}, "exclude_modules=3: expected"),
        ({"exclude_modules": "("}, "exclude_modules: the expression '('"),
        ({"exclude_modules": ".*"}, "chooses no layer"),
        ({"layers_to_transform": "1"}, "layers_to_transform='1': expected layer numbers"),
        ({"layers_to_transform": [True]}, "layers_to_transform=[True]: expected layer numbers"),
        ({"layers_to_transform": [7]}, "chooses no layer"),
        ({"layers_pattern": "h", "layers_to_transform": [0]}, "layers_pattern='h': only 'layers'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj=0: expected a whole number"),
        ({"rank_pattern": {"q_proj": 2.0}}, "rank_pattern.q_proj=2.0: expected a whole number"),
        ({"rank_pattern": {"q_proj": 10**12}}, "q_proj.lora_A.weight: shape [2, 32], expected"),
        ({"rank_pattern": [1]}, "rank_pattern=[1]: expected an object"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: the expression '('"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.q_proj=0: expected a positive number"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "expected a positive number"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern.q_proj='4': expected a positive"),
        ({"use_rslora": "yes"}, "use_rslora='yes': expected true or false"),
        ({"r": "2"}, "r='2': expected a whole number"),
        ({"r": True}, "r=True: expected a whole number"),
        ({"lora_alpha": None}, "adapter_config.json: "),
        ({"lora_alpha": 10**400}, "adapter_config.json: "),
        ({"use_dora": True}, "use_dora=True: only False"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True: not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']: not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]: not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication=[[0, 1]]: not supported"),
        ({"target_parameters": ["x"]}, "target_parameters=['x']: not supported"),
        ({"use_qalora": True}, "use_qalora=True: not supported"),
        *(({"init_lora_weights": name}, "changes the base's weights too")
          for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica")),
    ],
)  # fmt: skip
def test_other_adapters_are_refused(base, tmp_path, fields, message):
    path, model, _ = base
    write_adapter(tmp_path, model)
    edit(tmp_path, **fields)
    with pytest.raises(InputError) as refused:
        read(tmp_path, path)
    assert message in str(refused.value) and "adapter" in str(refused.value)


def test_an_expression_that_backtracks_takes_no_time(tmp_path):
    path = tmp_path / "adapter_config.json"
    fields = {"r": 2, "lora_alpha": 4, "target_modules": "(([a-z0-9_.]+)+)+X"}
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="chooses no layer"):
        read_peft_config(path, [BLOCK.format(n, "q") for n in range(80)])


def test_eva_leaves_the_base_as_it_is(base, tmp_path):
    _, model, policy = base
    expected = write_adapter(tmp_path, model)
    edit(tmp_path, init_lora_weights="eva", eva_config={"rho": 2.0})
    load_adapter(tmp_path, with_adapter := nnx.merge(*nnx.split(policy)))
    assert_close(our_logits(with_adapter), expected)
