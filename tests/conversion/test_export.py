"""Exports: both config dialects, code that can be found, tokenizers for every version."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion import from_hf, load_policy, load_sarm, to_hf
from conversion.directory import atomic_directory
from conversion.load import read_policy_config
from conversion.peft import save_adapter
from sarm_jax.io.errors import InputError
from sarm_jax.models.llama import MODEL_TYPES
from sarm_jax.models.lora import LoRAConfig, add_lora
from sarm_jax.models.sarm import SARM
from tests import oracles

ROPE = oracles.LLAMA3_ROPE | {"rope_theta": 123456.0}
SCALING = {name: value for name, value in ROPE.items() if name != "rope_theta"}
OLD = {"rope_theta": 123456.0, "rope_scaling": SCALING}
DIALECTS = {"old": OLD, "new": {"rope_parameters": ROPE}, "both": {**OLD, "rope_parameters": ROPE}}
ROW = [256, 5, 80, 3, 199, 42, 260]
AUTO = "AutoModelForSequenceClassification"
LOCAL = "modeling_sarm_llama.LlamaSARM"
PUBLISHED = f"Schrieffer/Llama-SARM-4B--{LOCAL}"


def read(path):
    return json.loads(Path(path).read_text())


def edit(path, remove=(), **fields):
    kept = {name: value for name, value in read(path).items() if name not in remove}
    path.write_text(json.dumps(kept | fields))


def set_dialect(directory, dialect):
    edit(directory / "config.json", ("rope_theta", "rope_scaling", "rope_parameters"),
         **DIALECTS[dialect])  # fmt: skip


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ROW])).logits[0].numpy()


@pytest.fixture
def policy_dir(tmp_path):
    tokenizer = oracles.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start_header_id|>"]})
    config = oracles.tiny_llama_config(rope_parameters=ROPE)
    oracles.save_tiny_llama(tmp_path / "policy", config, tokenizer)
    return tmp_path / "policy"


@pytest.fixture
def sarm_dir(tmp_path):
    oracles.save_tiny_sarm(tmp_path / "sarm", oracles.tiny_tokenizer(), rope_parameters=ROPE)
    return tmp_path / "sarm"


def write_run(path, base):
    """Writes a run whose adapter changes nothing, since B is zero."""
    policy, tokenizer = load_policy(base)
    config = LoRAConfig(rank=2, alpha=4.0)
    add_lora(policy, config, nnx.Rngs(0))
    save_adapter(path / "adapter", policy, config, str(base), tokenizer)
    (path / "config.json").write_text(json.dumps({"policy_model": str(base)}))


def converted(kind):
    def write(source, dst):
        from_hf.convert(source, dst.parent / "converted", kind)
        to_hf.export(dst.parent / "converted", dst, kind=kind)

    return write


def merged(source, dst):
    write_run(dst.parent / "run", source)
    to_hf.export(dst.parent / "run", dst, merge=True)


def exported_adapter(source, dst):
    write_run(dst.parent / "run", source)
    to_hf.export(dst.parent / "run", dst)


def trained(source, dst):
    """Saves a SARM whose trunk is from a policy, like the stage train_sarm."""
    sarm = load_sarm(source)
    hf = {**read(source / "config.json"), "architectures": ["LlamaForCausalLM"]}
    hf = {name: value for name, value in hf.items() if name not in ("sarm_param", "auto_map")}
    to_hf.save_sarm(dst, sarm.model, sarm.tokenizer, hf)


POLICIES = {
    "exported": to_hf.export,
    "converted": converted("policy"),
    "merged": merged,
    "saved": lambda source, dst: to_hf.save_policy(dst, *load_policy(source)),
}
SARMS = {
    "exported": lambda source, dst: to_hf.export(source, dst, kind="sarm"),
    "converted": converted("sarm"),
    "trained": trained,
}
ADAPTERS = {
    "adapter": lambda source, dst: write_run(dst.parent, source),
    "exported_adapter": exported_adapter,
}


# ---- the rotary embedding


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("way", POLICIES)
def test_policies_are_written_for_readers_of_either_dialect(tmp_path, policy_dir, way, dialect):
    expected = logits(policy_dir)
    set_dialect(policy_dir, dialect)
    out = tmp_path / "out"
    POLICIES[way](policy_dir, out)
    config = read(out / "config.json")
    assert {name: config[name] for name in DIALECTS["both"]} == DIALECTS["both"]
    assert config["torch_dtype"] == "float32" and "dtype" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert read_policy_config(out).rope_theta == 123456.0
    np.testing.assert_array_equal(logits(out), expected)
    written = (out / "config.json").read_text()
    for missing in (
        ["rope_parameters"],
        ["rope_theta", "rope_scaling"],
    ):  # as if a reader ignored them
        edit(out / "config.json", missing)
        np.testing.assert_array_equal(logits(out), expected)
        (out / "config.json").write_text(written)
    edit(out / "config.json", ["rope_theta", "rope_scaling", "rope_parameters"])
    assert (
        np.abs(logits(out) - expected).max() > 0.1
    )  # otherwise the assertions above would prove nothing


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("way", SARMS)
def test_sarms_are_written_for_the_published_class(tmp_path, sarm_dir, way, dialect):
    expected = load_sarm(sarm_dir).score_tokens([ROW])[0]
    set_dialect(sarm_dir, dialect)
    out = tmp_path / "out"
    SARMS[way](sarm_dir, out)
    config = read(out / "config.json")
    assert {name: config[name] for name in DIALECTS["both"]} == DIALECTS["both"]
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaSARM"])
    assert config["auto_map"] == {AUTO: PUBLISHED}
    assert config["sarm_param"] == {
        "sae_source_layer": 2,
        "sae_latent_size": 64,
        "sae_k": 8,
        "sae_use_sequence_level": False,
        "sarm_use_activation": True,
    }
    assert len(config["id2label"]) == 1 and "num_labels" not in config
    assert (config["pad_token_id"], config["eos_token_id"]) == (261, 260)
    np.testing.assert_array_equal(load_sarm(out).score_tokens([ROW])[0], expected)
    for missing in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        edit(out / "config.json", missing, **{n: config[n] for n in config if n not in missing})
        np.testing.assert_array_equal(load_sarm(out).score_tokens([ROW])[0], expected)


@pytest.mark.parametrize("architecture", oracles.ARCHITECTURES)
def test_a_sarm_is_named_after_its_trunk(tmp_path, architecture):
    changes = oracles.ARCHITECTURES[architecture]
    oracles.save_tiny_sarm(tmp_path / "other", oracles.tiny_tokenizer(), **changes)
    for name, hf in (("bare", None), ("named", read(tmp_path / "other" / "config.json"))):
        sarm = load_sarm(tmp_path / "other")
        to_hf.save_sarm(tmp_path / name, sarm.model, sarm.tokenizer, hf)
        written = read(tmp_path / name / "config.json")
        assert written["model_type"] == architecture
        assert "SARM" in written["architectures"][0]
        # The published code computes a Llama; it would drop the biases and norms of another trunk.
        assert (PUBLISHED in written.get("auto_map", {}).values()) == (architecture == "llama")
        assert load_sarm(tmp_path / name).model.config.trunk == sarm.model.config.trunk
    expected = f"{MODEL_TYPES[architecture]}SARM"
    assert read(tmp_path / "bare" / "config.json")["architectures"] == [expected]


@pytest.fixture
def ensemble_dir(tmp_path, sarm_dir):
    """A SARM with three heads, written as train_sarm writes it."""
    one = load_sarm(sarm_dir)
    config = dataclasses.replace(one.model.config, heads=3)
    sarm = SARM(config, rngs=nnx.Rngs(0))
    sarm.trunk, sarm.sae = one.model.trunk, one.model.sae
    rng = np.random.default_rng(0)
    sarm.score[...] = rng.normal(size=(3, 64)).astype(np.float32)
    sarm.score_bias[...] = np.asarray([1.0, -2.0, 1.0], np.float32)
    to_hf.save_sarm(tmp_path / "ensemble", sarm, one.tokenizer, read(sarm_dir / "config.json"))
    return tmp_path / "ensemble"


@pytest.mark.parametrize("way", ["written", "exported", "converted"])
def test_an_ensemble_keeps_all_heads(tmp_path, ensemble_dir, way):
    source, out = load_sarm(ensemble_dir), tmp_path / "out"
    if way == "written":
        out = ensemble_dir
    else:
        SARMS[way](ensemble_dir, out)
    config = read(out / "config.json")
    assert config["architectures"] == ["LlamaSARMEnsemble"]
    assert config["sarm_param"]["sarm_heads"] == 3 and len(config["id2label"]) == 3
    assert "auto_map" not in config  # no published code combines the heads
    with safe_open(out / "model.safetensors", "np") as file:
        assert file.get_slice("score.weight").get_shape() == [3, 64]
        assert file.get_slice("score.bias").get_shape() == [3]
    loaded = load_sarm(out)
    for name in ("mean", "min"):
        scores = [m.with_ensemble(name).score_tokens([ROW])[0] for m in (source, loaded)]
        np.testing.assert_array_equal(*scores)
    if way == "converted":
        assert read(tmp_path / "converted" / "sarm_jax.json")["config"]["heads"] == 3


def test_one_head_is_described_as_ever(tmp_path, sarm_dir):
    converted("sarm")(sarm_dir, tmp_path / "out")
    assert read(tmp_path / "converted" / "sarm_jax.json")["config"].keys() == {"trunk", "sae"}
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "score.weight" in names and "score.bias" not in names


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (0, "sarm_param.sarm_heads=0: expected a positive integer"),
        ("3", "sarm_param.sarm_heads='3': expected a positive integer"),
        (True, "sarm_param.sarm_heads=True: expected a positive integer"),
        (2, r"score\.weight.*\[3, 64\]|score\.weight.*\(3, 64\)"),
        (1, "score.bias"),
    ],
)
def test_a_wrong_number_of_heads_is_refused(ensemble_dir, heads, message):
    config = read(ensemble_dir / "config.json")
    edit(ensemble_dir / "config.json", sarm_param=config["sarm_param"] | {"sarm_heads": heads})
    with pytest.raises(InputError, match=message):
        load_sarm(ensemble_dir)


@pytest.mark.parametrize("heads", [0, -1, "3", True, 1.0, None])
def test_a_wrong_number_of_heads_in_a_description_is_refused(tmp_path, ensemble_dir, heads):
    from_hf.convert(ensemble_dir, tmp_path / "converted", "sarm")
    description = read(tmp_path / "converted" / "sarm_jax.json")
    config = description["config"] | {"heads": heads}
    edit(tmp_path / "converted" / "sarm_jax.json", config=config)
    with pytest.raises(InputError, match=f"heads={heads!r}: expected a positive whole number"):
        load_sarm(tmp_path / "converted")


def test_unscaled_models_are_written_in_both_dialects(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 37.0}
    config = oracles.tiny_llama_config(rope_parameters=rope)
    oracles.save_tiny_llama(tmp_path / "hf", config, oracles.tiny_tokenizer())
    to_hf.export(tmp_path / "hf", tmp_path / "out")
    written = read(tmp_path / "out" / "config.json")
    assert (written["rope_theta"], written["rope_scaling"]) == (37.0, None)
    assert written["rope_parameters"] == rope
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(tmp_path / "hf"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"rope_scaling": {**SCALING, "type": "llama3", "factor": 8}}, None),
        ({"rope_parameters": SCALING}, None),  # the base is rope_theta of the config
        ({"rope_theta": 10000.0}, "rope_theta=10000.0 contradicts .*rope_theta=123456.0"),
        ({"rope_theta": None}, "rope_theta=10000.0 contradicts .*rope_theta=123456.0"),
        ({"rope_scaling": None}, "rope_scaling=None contradicts rope_parameters={.*'llama3'"),
        ({"rope_scaling": {**SCALING, "factor": 4.0}}, "'factor': 4.0.*contradicts.*'factor': 8.0"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.0}},
            "rope_scaling={.*llama3.*contradicts rope_parameters={.*default",
        ),
    ],
)
def test_a_config_in_both_dialects_is_read_if_they_are_equal(policy_dir, change, message):
    before = read_policy_config(policy_dir)
    edit(policy_dir / "config.json", **{**DIALECTS["both"], **change})
    if message is None:
        assert read_policy_config(policy_dir) == before
    else:
        with pytest.raises(InputError, match=message):
            read_policy_config(policy_dir)


# ---- the code that a SARM's config names


def write_code(directory, tmp_path, imports=""):
    """Writes a module that creates a file if it is imported."""
    (directory / "modeling_sarm_llama.py").write_text(
        f"{imports}\nopen({str(tmp_path / 'ran')!r}, 'w')\nclass LlamaSARM: pass\n"
    )


@pytest.mark.parametrize("way", ["exported", "converted"])
def test_the_code_of_the_source_is_copied_and_never_run(tmp_path, sarm_dir, way):
    write_code(sarm_dir, tmp_path, "from .sae import TopkSAE")
    (sarm_dir / "sae.py").write_text("TopkSAE = None\n")
    (sarm_dir / "unrelated.py").write_text("\n")
    edit(sarm_dir / "config.json", auto_map={AUTO: LOCAL})
    out = tmp_path / "out"
    SARMS[way](sarm_dir, out)
    assert read(out / "config.json")["auto_map"] == {AUTO: LOCAL}
    assert {path.name for path in out.glob("*.py")} == {"modeling_sarm_llama.py", "sae.py"}
    for path in out.glob("*.py"):
        assert path.read_bytes() == (sarm_dir / path.name).read_bytes()
    load_sarm(out)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("auto_map", "imports", "expected"),
    [
        ({AUTO: "another.LlamaSARM"}, "", {AUTO: PUBLISHED}),
        ({AUTO: LOCAL}, "from .missing import X", {AUTO: PUBLISHED}),
        ({AUTO: "someone/model--m.C"}, "", {AUTO: "someone/model--m.C"}),
        ({AUTO: LOCAL, "AutoConfig": "missing.C"}, "", {AUTO: LOCAL}),
        ({AUTO: "../modeling_sarm_llama.LlamaSARM"}, "", {AUTO: PUBLISHED}),
        ({AUTO: [LOCAL, None]}, "", {AUTO: PUBLISHED}),
        ("nonsense", "", {AUTO: PUBLISHED}),
    ],
)
def test_missing_code_is_replaced_by_that_of_the_published_repository(
    tmp_path, sarm_dir, auto_map, imports, expected
):
    write_code(sarm_dir, tmp_path, imports)
    edit(sarm_dir / "config.json", auto_map=auto_map)
    to_hf.export(sarm_dir, tmp_path / "out", kind="sarm")
    assert read(tmp_path / "out" / "config.json")["auto_map"] == expected
    assert len(list((tmp_path / "out").glob("*.py"))) == (LOCAL in expected.values())


def test_code_behind_a_link_out_of_the_directory_is_refused(tmp_path, sarm_dir):
    write_code(tmp_path, tmp_path)
    edit(sarm_dir / "config.json", auto_map={AUTO: LOCAL})
    (sarm_dir / "modeling_sarm_llama.py").symlink_to(tmp_path / "modeling_sarm_llama.py")
    with pytest.raises(InputError, match="leads out of its directory"):
        to_hf.export(sarm_dir, tmp_path / "out", kind="sarm")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["exported", "converted"])
def test_code_of_a_downloaded_sarm_is_that_of_its_repository(tmp_path, sarm_dir, way, monkeypatch):
    edit(sarm_dir / "config.json", auto_map={AUTO: LOCAL})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(sarm_dir))
    SARMS[way]("owner/name", tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["auto_map"] == {AUTO: f"owner/name--{LOCAL}"}


def test_missing_token_ids_and_a_wrong_number_of_labels_are_corrected(tmp_path, sarm_dir):
    names = ("pad_token_id", "bos_token_id", "label2id")
    edit(sarm_dir / "config.json", names, id2label={"0": "a", "1": "b"}, num_labels=2)
    to_hf.export(sarm_dir, tmp_path / "out", kind="sarm")
    config = read(tmp_path / "out" / "config.json")
    assert (config["pad_token_id"], config["bos_token_id"]) == (261, 256)
    assert (config["id2label"], "num_labels" in config) == ({"0": "LABEL_0"}, False)


# ---- tokenizers


@pytest.mark.parametrize("way", [*POLICIES, *ADAPTERS])
def test_every_version_reads_class_template_and_special_tokens(tmp_path, policy_dir, way):
    source = AutoTokenizer.from_pretrained(policy_dir)
    out = tmp_path / "adapter"
    {**POLICIES, **ADAPTERS}[way](policy_dir, out if way == "adapter" else tmp_path / "out")
    out = out if way == "adapter" else tmp_path / "out"
    config = read(out / "tokenizer_config.json")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == source.chat_template
    assert config["additional_special_tokens"] == ["<|start_header_id|>"]
    assert config["clean_up_tokenization_spaces"] is False
    assert (config["bos_token"], config["pad_token"]) == ("<|begin_of_text|>", "[PAD]")
    private = {"backend", "is_local", "local_files_only", "extra_special_tokens", "auto_map"}
    assert not private & config.keys()
    tokenizer = AutoTokenizer.from_pretrained(out)
    turns = [{"role": "user", "content": "héllo  world ."}]
    for loaded in (source, tokenizer):
        ids = loaded.apply_chat_template(turns, date_string="x", return_dict=False)
        assert ids == source.apply_chat_template(turns, date_string="x", return_dict=False)
        assert loaded.decode(ids, skip_special_tokens=True).endswith("héllo  world .")
    assert tokenizer.all_special_ids == source.all_special_ids


def test_a_tokenizer_with_several_templates_and_another_class(tmp_path, policy_dir):
    """The template file takes precedence over the config, as it does on loading."""
    path = policy_dir / "tokenizer_config.json"
    edit(path, auto_map={"AutoTokenizer": [None, "x.Y"]}, tokenizer_class="Y", chat_template="old")
    to_hf.export(policy_dir, tmp_path / "out")
    config = read(tmp_path / "out" / "tokenizer_config.json")
    assert config["chat_template"] == oracles.LLAMA3_TEMPLATE and "auto_map" not in config
    (policy_dir / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    edit(path, chat_template=templates)
    to_hf.export(policy_dir, tmp_path / "again")
    assert read(tmp_path / "again" / "tokenizer_config.json")["chat_template"] == templates


@pytest.mark.parametrize(
    ("merges", "written"),
    [
        ([["h", "e"], ["he", "l"]], ["h e", "he l"]),
        (["h e", "he l"], ["h e", "he l"]),
        ([["h", "e"], [" ", "he"]], [["h", "e"], [" ", "he"]]),  # as a text it would be ambiguous
        (
            [["h", "e"], ["#version", "e"]],
            [["h", "e"], ["#version", "e"]],
        ),  # as a text it would be skipped
    ],
)
def test_merges_are_written_as_older_tokenizers_read_them(tmp_path, policy_dir, merges, written):
    path = policy_dir / "tokenizer.json"
    fields = read(path)
    names = ["h", "e", "l", " ", "he", "hel", " he", "#version", "#versione"]
    fields["model"] |= {"vocab": {name: n for n, name in enumerate(names)}, "merges": merges}
    path.write_text(json.dumps(fields))
    to_hf.export(policy_dir, tmp_path / "out")
    assert read(tmp_path / "out" / "tokenizer.json")["model"]["merges"] == written
    before, after = (AutoTokenizer.from_pretrained(d) for d in (policy_dir, tmp_path / "out"))
    assert after("hel").input_ids == before("hel").input_ids
    length = 1 if merges[-1] in (["he", "l"], "he l") else 2
    assert len(after("hel", add_special_tokens=False).input_ids) == length


# ---- adapters


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_export_of_an_adapter_warns_if_transformers_4_misreads_its_base(
    tmp_path, policy_dir, dialect
):
    set_dialect(policy_dir, dialect)
    write_run(tmp_path / "run", policy_dir)
    line = to_hf.export(tmp_path / "run", tmp_path / "out")
    assert ("transformers 4 ignores the rope_parameters" in line) == (dialect == "new")


@pytest.mark.parametrize("source", ["owner/name", "policy"])
def test_an_exported_adapter_names_the_repository_of_a_converted_base(
    tmp_path, policy_dir, monkeypatch, source
):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(policy_dir))
    base = tmp_path / "converted"
    from_hf.convert(source if "/" in source else policy_dir, base, "policy")
    write_run(tmp_path / "run", base)
    line = to_hf.export(tmp_path / "run", tmp_path / "out")
    named = read(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"]
    assert named == (source if "/" in source else str(base))
    assert ("PEFT needs" in line) == ("/" not in source)


OBSTACLES = {
    "a file": (lambda p: p.touch(), "exists already"),
    "a folder with files": (lambda p: (p / "a").mkdir(parents=True), "exists already"),
    "a link to nothing": (lambda p: p.symlink_to("gone"), "is a link to nothing"),
    "a link to a file": (lambda p: (p.with_name("f").touch(), p.symlink_to("f")), "exists already"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("inside", [False, True], ids=["dst", "parent"])
def test_what_is_in_the_way_of_a_directory_is_found_first(tmp_path, obstacle, inside):
    make, message = OBSTACLES[obstacle]
    make(tmp_path / "out")
    dst, before = tmp_path / "out" / ("model" if inside else ""), sorted(tmp_path.rglob("*"))
    if inside and obstacle == "a folder with files":
        with atomic_directory(dst):
            assert dst.parent.is_dir()
        return
    with pytest.raises(InputError) as error, atomic_directory(dst):
        pytest.fail("the work is done")
    assert str(error.value).startswith(f"{dst}: ")
    assert ("is not a folder" if inside else message) in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dst", ["/", ".", "..", "/proc/a", "/proc/a/b", "/proc"])
def test_directories_that_cannot_be_exchanged(dst, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error, atomic_directory(dst):
        pytest.fail("the work is done")
    assert str(error.value).startswith(f"{dst}: ")


def test_a_link_to_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_directory(tmp_path / "link") as directory:
        (directory / "a").touch()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "a").is_file()


def test_the_second_of_two_at_once_is_refused(tmp_path):
    dst = tmp_path / "out"
    with pytest.raises(InputError, match="out: cannot be written"), atomic_directory(dst) as first:
        (first / "a").touch()
        with atomic_directory(dst) as second:
            (second / "b").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (dst / "b").is_file()
