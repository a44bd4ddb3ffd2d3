"""Reads and writes SAEs in SAELens' format: `cfg.json` and `sae_weights.safetensors`.

SAELens computes, of a state x,

    a = W_enc (x − b_dec) + b_enc;   z = activation(a);   x̂ = W_dec z + b_dec

    topk      the k largest a, followed by a ReLU
    jumprelu  a ReLU, and 0 where a is not above `threshold`
    standard  a ReLU

With `apply_b_dec_to_input` false, a = W_enc x + b_enc; W_enc b_dec is then added to b_enc. With
`rescale_acts_by_decoder_norm`, which only topk has, z is that of a ‖W_dec,i‖ and x̂ reads
z / ‖W_dec,i‖; the norms are then moved from the decoder to the encoder. Tensors are rounded to the
`dtype` of cfg.json first, as SAELens does.

`normalize_activations` other than none is refused. With layer_norm and constant_norm_rescale x is
scaled by a number that depends on the state, so no unit of a latent has a fixed share in the
reward. The factor of expected_average_only_in and the matrix of covariance_whitening are fixed, but
they are not in the file; SAELens can fold both into the weights.

The states must be those that the head of a classifier reads, after the final norm. cfg.json may say
which it was trained on, as `hook_name`; otherwise only the width is checked. Format: sae-lens 6.54,
which also reads the names of older versions.
"""

import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from packaging.version import InvalidVersion, Version
from safetensors.numpy import save_file

from conversion.checkpoint import is_reward_model, open_checkpoint, verified_files
from conversion.containment import contained
from conversion.directory import atomic_directory, write_hf_json
from conversion.fields import is_off, positive
from conversion.problems import report
from conversion.safetensors_io import TensorFiles
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json, short
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.parallel.finite import require_finite

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ACTIVATIONS = {"topk": "topk_relu", "jumprelu": "jumprelu", "standard": "relu"}  # of architectures
HOOKS = ("model.norm", "norm")  # the final norm in a classifier and in its decoder
NAMES = {  # SAELens' tensors → ours, in the same orientation
    "W_enc": "encoder",
    "W_dec": "decoder",
    "b_dec": "pre_bias",
    "b_enc": "latent_bias",
    "threshold": "threshold",
}
DTYPES = ("float32", "float16", "bfloat16", "float64")
FIRST_NESTED = Version("6.0.0-rc.0")  # the first version with these names, by SAELens' own rule
VERSION = "6.0.0"  # the oldest sae-lens that reads cfg.json with these names


def read_sae(src: str | Path) -> SAE:
    """Reads an SAE in SAELens' format.

    Returns:
        The SAE in float32, with the same latents and reconstructions.

    Raises:
        InputError: a file is missing or damaged, the SAE is of a kind that is not supported, or it
            was trained on other states than those after the final norm.
    """
    directory = Path(src)
    if not directory.is_dir():
        raise InputError(f"{directory}: expected the directory of an SAE, with {CONFIG}")
    path = contained(directory, CONFIG)
    if not path.exists():
        raise InputError(f"{directory}: no SAE in SAELens' format: {CONFIG} is missing")
    problems: list[str] = []
    fields = _modern(read_json(path), problems)
    config = _sae_config(path, fields, problems)
    tensors = _read_tensors(directory, config, fields.get("dtype") or "float32")
    if fields["architecture"] == "topk" and fields.get("rescale_acts_by_decoder_norm"):
        _move_norms(tensors, directory / WEIGHTS)
    if fields.get("apply_b_dec_to_input") is False:
        product_f = tensors["b_dec"].astype(np.float64) @ tensors["W_enc"]
        tensors["b_enc"] = _float32(tensors["b_enc"] + product_f)
    require_finite(tensors, f"{directory / WEIGHTS}, in float32")
    sae = nnx.eval_shape(lambda: SAE(config, rngs=nnx.Rngs(0)))
    for name, array in tensors.items():
        setattr(sae, NAMES[name], nnx.Param(jnp.asarray(array)))
    return sae


def write_sae(src: str | Path, dst: str | Path) -> str:
    """Writes the SAE of a reward model in SAELens' format, in float32; returns a summary line.

    Args:
        src: the reward model, of which only the tensors of the SAE are read.
        dst: the new directory.

    Raises:
        InputError: `src` has no SAE, or one that SAELens has no architecture for; or `dst` cannot
            be written.
    """
    start = time.perf_counter()
    if not is_reward_model(src):
        raise InputError(
            f"{src}: not a classifier with an SAE (the SAE of a SARM reads standardised states and "
            "may keep negative latents, for which SAELens has no architecture)"
        )
    checkpoint = open_checkpoint(src, "reward")
    assert isinstance(checkpoint.config, LinearRewardConfig)
    sae = checkpoint.config.sae
    if sae is None:
        raise InputError(f"{src}: a classifier without an SAE; --stage=train_sae trains one for it")
    architecture = next((name for name, own in ACTIVATIONS.items() if own == sae.activation), None)
    if architecture is None:
        raise InputError(
            f"{src}: the activation of its SAE is {sae.activation}, so latents may be negative, "
            "which SAELens has no architecture for; train it with "
            "--config.train_sae.activation=topk_relu"
        )
    files = verified_files(checkpoint)
    tensors = {
        name: np.ascontiguousarray(files.read(f"sae.{own}"), np.float32)
        for name, own in NAMES.items()
        if own != "threshold" or architecture == "jumprelu"
    }
    require_finite(tensors, f"{src}: the SAE")
    with atomic_directory(dst, needed=sum(a.nbytes for a in tensors.values())) as directory:
        save_file(tensors, directory / WEIGHTS)
        write_hf_json(directory / CONFIG, _fields(architecture, sae, checkpoint.name))
    seconds = time.perf_counter() - start
    return (
        f"{dst}: {architecture} SAE of {sae.latent_size} latents of states of {sae.hidden_size} "
        f"dimensions, {seconds:.1f} s"
    )


def _fields(architecture: str, sae: SAEConfig, model_name: str) -> dict[str, Any]:
    """Returns the content of cfg.json."""
    return {
        "architecture": architecture,
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}),
        "d_in": sae.hidden_size,
        "d_sae": sae.latent_size,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "model_name": model_name,
            "hook_name": HOOKS[0],
            "hook_head_index": None,
        },
    }


def _modern(fields: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Returns the fields under the names of version 6, as SAELens itself reads older files."""
    fields, is_older = dict(fields), _is_older(fields)
    for old, new in (("activation_fn_str", "activation_fn"), ("hook_point", "hook_name")):
        value = fields.pop(old, None)
        if value is not None and fields.setdefault(new, value) != value:
            problems.append(f"{old}={short(value)} contradicts {new}={short(fields[new])}")
    fields.setdefault("architecture", "standard")
    architecture, activation = fields["architecture"], fields.get("activation_fn")
    if "topk" in (architecture, activation) and is_older:
        arguments = fields.get("activation_fn_kwargs")
        k = arguments.get("k") if isinstance(arguments, dict) else None
        fields |= {"architecture": "topk", "k": fields.get("k") if k is None else k}
    elif activation == "topk" != architecture:  # SAELens ignores it since version 6
        problems.append(
            f'activation_fn="topk" contradicts architecture={short(architecture)} in a file of '
            "version 6 or newer"
        )
    if isinstance(fields.get("normalize_activations"), bool):
        on = fields["normalize_activations"]
        fields["normalize_activations"] = "expected_average_only_in" if on else "none"
    if isinstance(fields.get("dtype"), str):
        fields["dtype"] = fields["dtype"].removeprefix("torch.")
    return fields


def _is_older(fields: dict[str, Any]) -> bool:
    """Returns whether a file is of a version before 6, which had k among other arguments."""
    metadata = fields.get("metadata")
    nested = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    version = fields.get("sae_lens_version") or nested  # in the order of SAELens
    try:
        return not version or Version(str(version)) < FIRST_NESTED
    except InvalidVersion:
        return True


def _sae_config(path: Path, fields: dict[str, Any], problems: list[str]) -> SAEConfig:
    """Reads what cfg.json says about the computation; the error lists what is not supported."""
    architecture = fields["architecture"]
    if not isinstance(architecture, str) or architecture not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        problems.append(f"architecture={short(architecture)}: expected one of {expected}")
        architecture = "standard"
    if fields.get("activation_fn") not in (None, "relu", "topk"):
        problems.append(f"activation_fn={short(fields['activation_fn'])}: expected relu or topk")
    problems += _normalisation_problems(fields)
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if name in fields and not isinstance(fields[name], bool):
            problems.append(f"{name}={short(fields[name])}: expected true or false")
    if fields.get("dtype") not in (None, *DTYPES):
        problems.append(f"dtype={short(fields['dtype'])}: expected one of {', '.join(DTYPES)}")
    problems += _hook_problems(fields)
    width, latents = (positive(fields, name, problems) for name in ("d_in", "d_sae"))
    k = positive(fields, "k", problems) if architecture == "topk" else latents
    if k > latents > 1:
        problems.append(f"k={k}: exceeds d_sae={latents}")
    report(path, problems)
    return SAEConfig(width, latents, k, activation=ACTIVATIONS[architecture])


def _normalisation_problems(fields: dict[str, Any]) -> list[str]:
    """Describes a scaling of x or z that no weights can do."""
    problems = []
    normalisation = fields.get("normalize_activations")
    if normalisation == "expected_average_only_in":
        problems.append(
            'normalize_activations="expected_average_only_in": the factor is not in the file; fold '
            "it with SAELens' fold_activation_norm_scaling_factor, and save the SAE again"
        )
    elif normalisation == "covariance_whitening":
        problems.append(
            'normalize_activations="covariance_whitening": fold it with SAELens\' '
            "fold_activation_whitening, and save the SAE again"
        )
    elif normalisation not in (None, "none"):
        problems.append(
            f"normalize_activations={short(normalisation)}: only none is supported, since the "
            "scale of a latent then depends on the state"
        )
    if fields.get("reshape_activations") not in (None, "none"):
        problems.append(
            f"reshape_activations={short(fields['reshape_activations'])}: only none is supported"
        )
    if not is_off(fields.get("finetuning_scaling_factor")):
        problems.append("finetuning_scaling_factor: is not supported")
    return problems


def _hook_problems(fields: dict[str, Any]) -> list[str]:
    """Describes the states of an SAE that was trained on others than those that the head reads."""
    metadata = fields.get("metadata")
    own = metadata.get("hook_name") if isinstance(metadata, dict) else None
    hook = fields.get("hook_name") if own is None else own  # before version 6 it was not nested
    if hook is None or hook in HOOKS:
        return []
    return [
        f"hook_name={short(hook)}: a classifier's head reads the states after the final norm, "
        f"whose hook is {' or '.join(HOOKS)}"
    ]


def _move_norms(tensors: dict[str, np.ndarray], source: Path) -> None:
    """Gives the rows of the decoder length 1, and the encoder their lengths."""
    norm_f = np.linalg.norm(tensors["W_dec"].astype(np.float64), axis=1)
    if not norm_f.all():
        raise InputError(f"{source}: W_dec: row {norm_f.argmin()} is 0, and its length divides")
    for name in ("W_enc", "b_enc"):
        tensors[name] = _float32(tensors[name] * norm_f)
    tensors["W_dec"] = _float32(tensors["W_dec"] / norm_f[:, None])


def _float32(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # infinity is reported
        return array.astype(np.float32)


def _read_tensors(directory: Path, config: SAEConfig, dtype: str) -> dict[str, np.ndarray]:
    """Reads all tensors, rounded to `dtype`, in float32."""
    files = TensorFiles(directory, WEIGHTS)
    d, m = config.hidden_size, config.latent_size
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,), "b_enc": (m,)
    }  # fmt: skip
    if config.activation == "jumprelu":
        shapes["threshold"] = (m,)
    scaling = "scaling_factor"  # of older versions, which wrote it as ones
    unknown = sorted({*files.names()} - {*shapes, scaling})
    problems = [f"{name}: unexpected tensor" for name in unknown]
    for name, shape in shapes.items():
        if name not in files.names():
            problems.append(f"{name}: missing")
        elif files.shape(name) != shape:
            problems.append(f"{name}: shape {list(files.shape(name))}, expected {list(shape)}")
        elif files.dtype(name).name not in DTYPES:
            problems.append(f"{name}: dtype {files.dtype(name)}, expected a 16- to 64-bit float")
    if scaling in files.names() and not np.allclose(files.read(scaling).astype(np.float32), 1):
        problems.append(f"{scaling}: scales latents after training, which is not supported")
    report(directory / WEIGHTS, problems)
    stored = {name: files.read(name) for name in shapes}
    require_finite(stored, directory / WEIGHTS)
    with np.errstate(over="ignore"):
        rounded = {name: array.astype(jnp.dtype(dtype)) for name, array in stored.items()}
    return {name: _float32(array) for name, array in rounded.items()}
