"""SAEs in SAELens' format: its arithmetic, round trips, refusals, and sae-lens itself if installed.

The formulas in `oracle` are those of sae-lens 6.54 (`TopKSAE`, `JumpReLUSAE`, `StandardSAE`).
"""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from conversion import from_hf, load_reward_model, load_sarm, to_hf
from conversion.converted import save_with_sae
from conversion.saelens import CONFIG, NAMES, WEIGHTS, read_sae
from sarm_jax.io.errors import InputError
from sarm_jax.models.sae import SAE, SAEConfig
from tests import oracles

D, M, K = 32, 40, 6
BASE = {
    "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
    "normalize_activations": "none", "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": "model.norm"},
}  # fmt: skip
TOPK = {"architecture": "topk", "k": K}
KINDS = {
    "topk": TOPK,
    "topk without b_dec": TOPK | {"apply_b_dec_to_input": False},
    "topk rescaled": TOPK | {"rescale_acts_by_decoder_norm": True},
    "topk rescaled without b_dec": TOPK
    | {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False},
    "topk of half precision": TOPK | {"dtype": "torch.bfloat16"},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu without b_dec": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    "standard": {"architecture": "standard"},
    "standard without b_dec": {"architecture": "standard", "apply_b_dec_to_input": False},
    "topk before version 6": {
        "architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
        "metadata": None, "hook_point": "model.norm", "normalize_activations": False,
        "finetuning_scaling_factor": False,
    },
    "topk with k among the arguments": {
        "architecture": "topk", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K},
        "metadata": None, "hook_point": "model.norm",
    },
    "standard before version 6": {
        "metadata": None, "activation_fn_str": "relu", "activation_fn_kwargs": {},
        "hook_name": "norm", "normalize_activations": None,
    },
}  # fmt: skip
UNCHANGED = ("topk", "jumprelu", "standard")  # nothing is folded
SCALES = {"scaling_factor": np.ones(M, np.float32)}  # older versions wrote this
TEXTS = ["say 5", "why", "name a colour"], ["five", "because it is", "red"]


def fields_of(kind):
    fields = BASE | KINDS[kind]
    return {name: value for name, value in fields.items() if value is not None}


def tensors_of(kind, seed=0):
    """Draws the tensors of an SAE of one kind, with thresholds of either sign."""
    rng = np.random.default_rng(seed)
    tensors = {
        "W_enc": rng.standard_normal((D, M)),
        "W_dec": rng.standard_normal((M, D)) * rng.uniform(0.3, 2, (M, 1)),
        "b_enc": rng.standard_normal(M),
        "b_dec": rng.standard_normal(D),
    }
    if KINDS[kind].get("architecture") == "jumprelu":
        tensors["threshold"] = rng.uniform(-1, 6, M)
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def save(path, kind, tensors=None, **changes):
    """Writes an SAE of one kind; returns its tensors as float64, rounded to its dtype."""
    path.mkdir(exist_ok=True)
    tensors = tensors_of(kind) if tensors is None else tensors
    save_file(tensors | (SCALES if "before" in kind else {}), path / WEIGHTS)
    fields = fields_of(kind) | changes
    (path / CONFIG).write_text(json.dumps(fields))
    if "bfloat16" in fields["dtype"]:
        tensors = {name: array.astype("bfloat16") for name, array in tensors.items()}
    return {name: array.astype(np.float64) for name, array in tensors.items()}


def oracle(kind, t, x_bd):
    """Computes SAELens' z and x̂ in float64."""
    fields = fields_of(kind)
    centred = x_bd - t["b_dec"] * fields["apply_b_dec_to_input"]
    a_bf = centred @ t["W_enc"] + t["b_enc"]
    norm_f = np.ones(M)
    if fields.get("rescale_acts_by_decoder_norm"):
        norm_f = np.linalg.norm(t["W_dec"], axis=1)
    a_bf = a_bf * norm_f
    z_bf = np.maximum(a_bf, 0)
    if "topk" in kind:
        z_bf = np.where(a_bf >= np.sort(a_bf, axis=1)[:, [-K]], z_bf, 0)
    if "threshold" in t:
        z_bf = np.where(a_bf > t["threshold"], z_bf, 0)
    return z_bf, (z_bf / norm_f) @ t["W_dec"] + t["b_dec"]


def assert_close(actual, expected):
    """Asserts equality up to 1e-5 of the largest value; values near 0 are sums that cancel."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_and_reconstructions_are_those_of_saelens(tmp_path, kind):
    tensors = save(tmp_path, kind)
    x_bd = 2 * np.random.default_rng(1).standard_normal((50, D)).astype(np.float32)
    z_bf, x_hat_bd = oracle(kind, tensors, x_bd.astype(np.float64))
    sae = read_sae(tmp_path)
    own_bf = np.asarray(sae.encode(x_bd))
    assert ((own_bf != 0) == (z_bf != 0)).all() and (z_bf != 0).any(axis=0).mean() > 0.5
    assert_close(own_bf, z_bf)
    assert_close(np.asarray(sae.decode(own_bf)), x_hat_bd)


def test_a_kept_latent_that_is_negative_becomes_0(tmp_path):
    save(tmp_path, "topk", k=M)  # all latents are among the k largest
    x_bd = np.random.default_rng(1).standard_normal((9, D)).astype(np.float32)
    sae = read_sae(tmp_path)
    a_bf = np.asarray(sae.pre_activations(x_bd))
    np.testing.assert_array_equal(sae.encode(x_bd), np.maximum(a_bf, 0))
    assert (a_bf < 0).any()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A reward model without an SAE."""
    path = tmp_path_factory.mktemp("classifier")
    oracles.save_tiny_classifier(path, oracles.tiny_llama_config(), oracles.tiny_tokenizer())
    return path


def add(sae, src, dst):
    return from_hf.convert(src, dst, "reward", sae=sae)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_is_exact(tmp_path, classifier, kind):
    """SAELens' format → a reward model → SAELens' format → a reward model, bit for bit."""
    save(tmp_path / "a", kind)
    assert f"with {M} features" in add(tmp_path / "a", classifier, tmp_path / "rm")
    to_hf.export(tmp_path / "rm", tmp_path / "b", "sae")
    add(tmp_path / "b", tmp_path / "rm", tmp_path / "again")  # replaces the SAE
    to_hf.export(tmp_path / "again", tmp_path / "c", "sae")
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "c" / WEIGHTS).read_bytes()
    files = [tmp_path / name / "model.safetensors" for name in ("rm", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_sarm(tmp_path / "again").latent_size == M
    if kind in UNCHANGED:
        written = load_file(tmp_path / "b" / WEIGHTS)
        assert written.keys() == tensors_of(kind).keys()
        for name, array in tensors_of(kind).items():
            np.testing.assert_array_equal(array, written[name])
        fields = json.loads((tmp_path / "b" / CONFIG).read_text())
        metadata, own = fields.pop("metadata"), fields_of(kind)
        del own["metadata"]
        assert fields.items() >= own.items()
        assert metadata["hook_name"] == "model.norm"


@pytest.mark.parametrize("kind", UNCHANGED)
def test_scores_and_stored_latents(tmp_path, classifier, kind):
    """An imported SAE leaves the scores, and its latents are those of the states."""
    save(tmp_path / "a", kind)
    add(tmp_path / "a", classifier, tmp_path / "rm")
    rm = load_sarm(tmp_path / "rm")
    score_b, z_bf = rm.score(*TEXTS)
    np.testing.assert_array_equal(score_b, load_reward_model(classifier).score(*TEXTS)[0])
    assert z_bf.shape == (3, M) and (z_bf > 0).any() and (z_bf >= 0).all()
    stored_b, latents = rm.store(*TEXTS)
    np.testing.assert_array_equal(stored_b, score_b)
    assert_close(latents.columns(range(M)), z_bf)
    fired = int(z_bf[0].argmax())
    clamped_b, _ = rm.score(*TEXTS, clamp={fired: 0.0})
    assert_close(score_b - clamped_b, z_bf[:, fired] * rm.feature_weights()[fired])
    assert load_sarm(tmp_path / "rm", dtype="bfloat16").score(*TEXTS)[1].shape == (3, M)


def test_the_dtype_of_the_copy_is_also_that_of_the_sae(tmp_path, classifier):
    save(tmp_path / "a", "jumprelu")
    from_hf.convert(classifier, tmp_path / "rm", "reward", dtype="bfloat16", sae=tmp_path / "a")
    tensors = load_file(tmp_path / "rm" / "model.safetensors")
    assert {array.dtype.name for array in tensors.values()} == {"bfloat16"}
    np.testing.assert_array_equal(
        tensors["sae.threshold"], tensors_of("jumprelu")["threshold"].astype("bfloat16")
    )


BAD = {
    "gated": ({"architecture": "gated"}, 'architecture="gated": expected one of topk, jumprelu'),
    "no text": ({"architecture": ["topk"]}, 'architecture=["topk"]: expected one of topk'),
    "layer norm": ({"normalize_activations": "layer_norm"}, 'normalize_activations="layer_norm"'),
    "norm": ({"normalize_activations": "constant_norm_rescale"}, "depends on the state"),
    "an average": ({"normalize_activations": True}, "fold it with SAELens'"),
    "heads": ({"reshape_activations": "hook_z"}, 'reshape_activations="hook_z"'),
    "tanh": ({"activation_fn": "tanh-relu"}, 'activation_fn="tanh-relu": expected relu or topk'),
    "no k in an old file": (
        {"architecture": "standard", "activation_fn_str": "topk", "k": None, "metadata": {}},
        "k=None",
    ),
    "k": ({"k": 41}, "k=41: exceeds d_sae=40"),
    "no k": ({"k": None}, "k=None: expected a positive integer"),
    "a width": ({"d_in": 31}, "W_enc: shape [32, 40], expected [31, 40]"),
    "latents": ({"d_sae": 39}, "b_enc: shape [40], expected [39]"),
    "a text": ({"apply_b_dec_to_input": "no"}, 'apply_b_dec_to_input="no": expected true or'),
    "no threshold": ({"architecture": "jumprelu"}, "threshold: missing"),
    "a hook": ({"metadata": {"hook_name": "blocks.1.hook_resid_post"}}, "after the final norm"),
    "an old hook": ({"metadata": {}, "hook_point": "blocks.1.mlp"}, 'hook_name="blocks.1.mlp"'),
    "a dtype": ({"dtype": "float8"}, 'dtype="float8": expected one of float32'),
    "a scaling": ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
}


VERSIONS = {  # of cfg.json → whether SAELens reads it as a file from before version 6
    None: True, "3.2.1": True, "5.11.0": True, "6.0.0.dev1": True, "6.0.0a2": True, "odd": True,
    "6.0.0-rc.0": False, "6.0.0rc1": False, "6.0.0": False, "6.54.12": False, "10.1.0": False,
}  # fmt: skip


@pytest.mark.parametrize("place", ["beside", "nested", "both"])
@pytest.mark.parametrize("version", VERSIONS)
def test_k_is_that_of_the_version(tmp_path, version, place):
    """Before version 6, k was one of `activation_fn_kwargs`; SAELens ignores them since."""
    fields = {"sae_lens_version": version, "metadata": {"hook_name": "model.norm"}}
    if place == "nested":
        fields = {"metadata": {"hook_name": "model.norm", "sae_lens_version": version}}
    if place == "both":  # the one beside counts
        fields["metadata"]["sae_lens_version"] = "5.0.0" if version == "6.54.12" else version
    old = {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}}
    is_older = VERSIONS[version]
    save(tmp_path, "topk", k=K + 3, **fields, **old)
    assert read_sae(tmp_path).config.k == (K if is_older else K + 3)
    save(tmp_path, "standard", **fields, **old)
    if is_older:
        config = read_sae(tmp_path).config
        assert (config.activation, config.k) == ("topk_relu", K)
    else:
        message = 'activation_fn="topk" contradicts architecture="standard"'
        with pytest.raises(InputError, match=message):
            read_sae(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "values"),
    [
        ("activation_fn_str", "activation_fn", ("relu", "topk")),
        ("hook_point", "hook_name", ("norm", "blocks.1.hook_resid_post")),
    ],
)
def test_two_names_of_a_field_say_the_same(tmp_path, old, new, values):
    for a, b in (values, values[::-1], (values[0], values[0])):
        save(tmp_path, "standard before version 6", **{old: a, new: b})
        if a == b:
            read_sae(tmp_path)
            continue
        with pytest.raises(InputError) as error:
            read_sae(tmp_path)
        assert f'{old}="{a}" contradicts {new}="{b}"' in str(error.value)


@pytest.mark.parametrize("case", BAD)
def test_other_saes_are_refused(tmp_path, classifier, case):
    changes, message = BAD[case]
    save(tmp_path / "a", "topk", **changes)
    with pytest.raises(InputError) as error:
        add(tmp_path / "a", classifier, tmp_path / "rm")
    assert message in str(error.value) and str(tmp_path / "a") in str(error.value)
    assert not (tmp_path / "rm").exists()


BAD_TENSORS = {
    "W_enc: holds NaN": lambda t: t.update(W_enc=np.full((D, M), np.nan, np.float32)),
    "W_dec: row 3 is 0": lambda t: t["W_dec"][3].fill(0),
    "extra: unexpected tensor": lambda t: t.update(extra=np.ones(2, np.float32)),
    "threshold: unexpected tensor": lambda t: t.update(threshold=np.ones(M, np.float32)),
    "scaling_factor: scales latents": lambda t: t.update(scaling_factor=np.full(M, 2, np.float32)),
    "b_enc: dtype int32": lambda t: t.update(b_enc=np.ones(M, np.int32)),
    "W_enc: holds infinity": lambda t: t.update(W_enc=np.full((D, M), 1e300)),
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_other_tensors_are_refused(tmp_path, message):
    tensors = tensors_of("topk")
    BAD_TENSORS[message](tensors)
    save(tmp_path, "topk rescaled", tensors)
    with pytest.raises(InputError) as error:
        read_sae(tmp_path)
    assert message in str(error.value) and str(tmp_path / WEIGHTS) in str(error.value)


def test_what_has_no_sae_to_write(tmp_path, classifier):
    """A classifier without an SAE, a SARM, a policy, and a TopK that keeps negative latents."""
    oracles.save_tiny_sarm(tmp_path / "sarm", oracles.tiny_tokenizer())
    oracles.save_tiny_llama(tmp_path / "p", oracles.tiny_llama_config(), oracles.tiny_tokenizer())
    from_hf.convert(tmp_path / "sarm", tmp_path / "ours", "sarm")
    for activation in ("topk", "identity"):
        sae = SAE(SAEConfig(D, M, K, activation=activation), rngs=nnx.Rngs(0))
        save_with_sae(classifier, tmp_path / activation, sae)
    cases = {
        classifier: "a classifier without an SAE; --stage=train_sae",
        tmp_path / "sarm": "the SAE of a SARM reads standardised states",
        tmp_path / "ours": "the SAE of a SARM reads standardised states",
        tmp_path / "p": "not a classifier",
        tmp_path / "topk": "is topk, so latents may be negative",
        tmp_path / "identity": "is identity, so latents may be negative",
    }
    for src, message in cases.items():
        with pytest.raises(InputError) as error:
            to_hf.export(src, tmp_path / "b", "sae")
        assert message in str(error.value) and str(src) in str(error.value)
    assert not (tmp_path / "b").exists()


def test_saes_that_do_not_fit(tmp_path, classifier):
    """An SAE of another width, for a SARM or for a policy, and a folder without one."""
    shapes = {"W_enc": (48, 8), "W_dec": (8, 48), "b_enc": (8,), "b_dec": (48,)}
    wide = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    save(tmp_path / "wide", "topk", wide, d_in=48, d_sae=8)
    save(tmp_path / "a", "topk")
    oracles.save_tiny_sarm(tmp_path / "sarm", oracles.tiny_tokenizer())
    (tmp_path / "file").write_text("")
    cases = [
        (tmp_path / "wide", classifier, "wide: the SAE reads states of 48 dimensions, but .* 32"),
        (tmp_path / "a", tmp_path / "sarm", "a SARM, whose kind is sarm"),
        (classifier, classifier, "no SAE in SAELens' format: cfg.json is missing"),
        (tmp_path / "file", classifier, "expected the directory of an SAE"),
        (tmp_path / "none", classifier, "expected the directory of an SAE"),
    ]
    for sae, src, message in cases:
        with pytest.raises(InputError, match=message):
            add(sae, src, tmp_path / "rm")
    with pytest.raises(InputError, match=r"--sae=.*/a: a model of --kind=sarm takes none"):
        from_hf.convert(tmp_path / "sarm", tmp_path / "rm", "sarm", sae=tmp_path / "a")
    assert not (tmp_path / "rm").exists()


@pytest.mark.parametrize("activation", ["topk_relu", "jumprelu", "relu"])
def test_sae_lens_itself_reads_what_is_written(tmp_path, classifier, activation):
    """Latents and reconstructions in sae-lens, and what sae-lens saves again."""
    sae_lens, torch = pytest.importorskip("sae_lens"), pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    sae = SAE(SAEConfig(D, M, K, activation=activation), rngs=nnx.Rngs(0))
    sae.pre_bias[...] = rng.standard_normal(D).astype(np.float32)
    sae.latent_bias[...] = rng.standard_normal(M).astype(np.float32)
    if activation == "jumprelu":
        sae.threshold[...] = rng.uniform(-1, 2, M).astype(np.float32)
    save_with_sae(classifier, tmp_path / "rm", sae)
    to_hf.export(tmp_path / "rm", tmp_path / "a", "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "a")
    x_bd = rng.standard_normal((50, D)).astype(np.float32)
    with torch.no_grad():
        z_bf = theirs.encode(torch.tensor(x_bd))
        x_hat_bd = theirs.decode(z_bf).numpy()
    own_bf = np.asarray(sae.encode(x_bd))
    np.testing.assert_array_equal(own_bf != 0, z_bf.numpy() != 0)
    assert_close(own_bf, z_bf.numpy())
    assert_close(np.asarray(sae.decode(own_bf)), x_hat_bd)
    theirs.save_model(tmp_path / "b")
    again = read_sae(tmp_path / "b")
    for name in {*NAMES.values()} - ({"threshold"} if activation != "jumprelu" else set()):
        np.testing.assert_array_equal(getattr(again, name)[...], getattr(sae, name)[...])


@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas_are_those_of_sae_lens(tmp_path, kind):
    sae_lens, torch = pytest.importorskip("sae_lens"), pytest.importorskip("torch")
    if "half" in kind:
        pytest.skip("sae-lens computes in half precision")
    tensors = save(tmp_path, kind)
    x_bd = 2 * np.random.default_rng(1).standard_normal((50, D)).astype(np.float32)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        z_bf = theirs.encode(torch.tensor(x_bd))
        x_hat_bd = theirs.decode(z_bf).numpy()
    expected_bf, expected_bd = oracle(kind, tensors, x_bd.astype(np.float64))
    assert_close(z_bf.numpy(), expected_bf)
    assert_close(x_hat_bd, expected_bd)
