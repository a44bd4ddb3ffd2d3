"""Opens a model directory in either layout and checks it before anything is loaded.

A Hugging Face directory has `config.json` and HF tensor names. A converted directory has
`sarm_jax.json` and our own names and orientation, so that loading never transposes; it keeps the
original `config.json` as `hf_config`.
"""

import dataclasses
import logging
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from conversion.classifier_config import classifier_config, hf_classifier_dict, is_classifier
from conversion.directory import tokenizer_bytes, write_hf_json
from conversion.hf_config import (
    QUANTISED,
    facts_in_name,
    hf_llama_dict,
    ignored_fields,
    is_sarm,
    llama_config,
    sarm_config,
)
from conversion.hub import CONFIG_FILES, MODEL_FILES, locate
from conversion.keys import ModelConfig, TensorSpec, specs_of
from conversion.mistaken import describe_directory, describe_workdir, is_run
from conversion.model_code import name_repository
from conversion.problems import report
from conversion.safetensors_io import TensorFiles
from sarm_jax.io.errors import InputError, printable
from sarm_jax.io.json_files import read_json, short
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.llama import LlamaConfig
from sarm_jax.models.rope import SCALINGS, Llama3Scaling
from sarm_jax.models.sae import ACTIVATIONS, SAEConfig
from sarm_jax.models.sarm import SARMConfig

LOG = logging.getLogger(__name__)
Kind = Literal["policy", "sarm", "reward"]
DESCRIPTION, FORMAT = "sarm_jax.json", 1
OVERHEAD = 1 << 20  # bytes; an upper bound for headers, index and description
_QUANTISED = re.compile(  # tensors of bitsandbytes, GPTQ, AWQ and compressed-tensors
    r".*\.(qweight|qzeros|scales|g_idx|(nested_)?(absmax|quant_map)|quant_state\..*|SCB"
    r"|(weight|input)_(format|scale|scale_inv|packed|shape|zero_point|g_idx))"
)
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_ADVICE = {  # (kind of a converted directory, kind that was expected) → what to do
    ("policy", "sarm"): (
        "; --stage=train_sarm makes a SARM from a policy, or is it the model of the other option?"
    ),
    ("policy", "reward"): "; a policy has no head that scores: name a classifier with one label",
    ("sarm", "policy"): "; is it the model of the other option?",
    ("sarm", "reward"): "; a SARM has an SAE already: name it as sarm_model, or as --kind=sarm",
    ("reward", "policy"): "; is it the model of the other option?",
    ("reward", "sarm"): "; convert it with --kind=reward",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model directory whose description has been read.

    `name` is the name of the directory or the repository id, depending on what was given.
    """

    name: str
    directory: Path
    kind: Kind
    config: ModelConfig
    hf_config: dict[str, Any]
    converted: bool

    def specs(self) -> tuple[TensorSpec, ...]:
        """Returns the spec of every tensor that the model must have."""
        return specs_of(self.config)

    def stored_name(self, spec: TensorSpec) -> str:
        """Returns the tensor's name in the files of this layout."""
        return spec.name if self.converted else spec.hf_name

    def stored_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """Returns the tensor's shape in the files of this layout."""
        return spec.shape if self.converted else spec.hf_shape

    def read(
        self, files: TensorFiles, spec: TensorSpec, region: tuple[slice, ...] | None = None
    ) -> np.ndarray:
        """Reads one tensor, or a region of it, in our orientation and its stored dtype."""
        if region is not None and not self.converted:
            region = spec.hf_region(region)
        array = files.read(self.stored_name(spec), region)
        return array if self.converted else spec.from_hf(array)

    def mapped(self, files: TensorFiles, spec: TensorSpec) -> np.ndarray:
        """Maps one tensor, in our orientation, to be passed on; see `TensorFiles.mapped`."""
        array = files.mapped(self.stored_name(spec))
        return array if self.converted else spec.from_hf(array)

    def bytes_stored(self, files: TensorFiles, dtype: str | None = None) -> int:
        """Estimates the bytes of a copy on disk; with `dtype` None every tensor keeps its own."""
        size = tokenizer_bytes(self.directory) + OVERHEAD
        for spec in self.specs():
            own = files.dtype(self.stored_name(spec))
            size += math.prod(spec.shape) * (own if dtype is None else jnp.dtype(dtype)).itemsize
        return size


def open_checkpoint(
    src: str | Path, kind: Kind, patterns: tuple[str, ...] = MODEL_FILES
) -> Checkpoint:
    """Opens a model by its description alone, without reading weights.

    Args:
        src: a directory or a repository id.
        kind: "policy", "sarm" or "reward".
        patterns: the files to download if `src` is a repository.

    Raises:
        InputError: there is no such model, it is of another kind, or its architecture is not
            supported.
    """
    directory = locate(src, patterns)
    name = directory.resolve().name if directory == Path(src) else str(src)
    repository = None if directory == Path(src) else str(src)
    if (directory / DESCRIPTION).is_file():
        return _with_repository(_open_converted(name, directory, kind), repository)
    hf = _read_hf_config(src, directory)
    if is_sarm(hf) and kind == "policy":
        raise InputError(
            f"{src}: is a SARM (a reward model), expected a policy; is it the model of the other "
            "option?"
        )
    try:
        full_name = repository or str(directory.resolve())
        config: ModelConfig
        if kind == "policy":
            config = llama_config(hf)
        else:
            config = classifier_config(hf) if kind == "reward" else sarm_config(hf, full_name)
    except InputError as error:
        raise InputError(f"{src}: {error}") from error
    _warn_of_ignored(str(src), ", ".join(f"{k}={short(v)}" for k, v in ignored_fields(hf).items()))
    checkpoint = Checkpoint(
        name=name, directory=directory, kind=kind, config=config, hf_config=hf, converted=False
    )
    return _with_repository(checkpoint, repository)


def is_reward_model(src: str | Path, patterns: tuple[str, ...] = CONFIG_FILES) -> bool:
    """Returns True if a model is of kind "reward": a classifier, with or without an SAE.

    Raises:
        InputError: there is no model, or its description cannot be read.
    """
    directory = locate(src, patterns)
    if (directory / DESCRIPTION).is_file():
        return read_json(directory / DESCRIPTION).get("kind") == "reward"
    hf = _read_hf_config(src, directory)
    # An older SARM says that it is a classifier, and has its sizes in its name.
    full_name = str(directory.resolve()) if directory == Path(src) else str(src)
    return is_classifier(hf) and not (is_sarm(hf) or facts_in_name(full_name))


def verified_files(checkpoint: Checkpoint) -> TensorFiles:
    """Opens the checkpoint's tensors after checking the name, shape and dtype of each.

    Raises:
        InputError: a tensor is missing, has another shape, is unknown or is not a float; the
            message lists all such tensors.
    """
    files = TensorFiles(checkpoint.directory)
    unmatched = set(files.names())
    problems = []
    for spec in checkpoint.specs():
        name, expected = checkpoint.stored_name(spec), checkpoint.stored_shape(spec)
        if name not in unmatched:
            problems.append(f"{name}: missing")
            continue
        unmatched.discard(name)
        if files.shape(name) != expected:
            problems.append(f"{name}: shape {list(files.shape(name))}, expected {list(expected)}")
        if files.dtype(name).name not in ("float16", "bfloat16", "float32", "float64"):
            problems.append(f"{name}: dtype {files.dtype(name)}, expected a 16- to 64-bit float")
    quantised = next(filter(_QUANTISED.fullmatch, sorted(unmatched)), None)
    if quantised is not None:
        report(checkpoint.directory, [f"{quantised}: {QUANTISED}"])
    problems += _check_tied_head(checkpoint, files, unmatched)
    unexpected = [name for name in sorted(unmatched) if not _BUFFERS.match(name)]
    problems += [f"{name}: unexpected tensor" for name in unexpected]
    report(checkpoint.directory, problems)
    return files


def write_description(
    directory: Path, checkpoint: Checkpoint, config: ModelConfig, dtype: str
) -> None:
    """Writes the `sarm_jax.json` of a converted directory."""
    write_hf_json(
        directory / DESCRIPTION,
        {
            "format": FORMAT,
            "kind": checkpoint.kind,
            "dtype": dtype,
            "config": _described(config),
            "source": checkpoint.name,
            "hf_config": checkpoint.hf_config,
        },
    )


def _read_hf_config(src: str | Path, directory: Path) -> dict[str, Any]:
    """Reads config.json; if that is no model's, the error says what the directory is instead."""
    path = directory / "config.json"
    if not path.exists() and (description := describe_directory(directory)):
        raise InputError(f"{src}: {description}")
    hf = read_json(path)
    if is_run(hf):
        raise InputError(f"{src}: {describe_workdir(directory)}")
    return hf


@cache
def _warn_of_ignored(name: str, fields: str) -> None:
    """Warns once of the fields of a config.json that change nothing; a run opens a model often."""
    if fields:
        LOG.warning(
            "%s", printable(f"{name}: config.json: ignored, since no such model has them: {fields}")
        )


def _open_converted(name: str, directory: Path, kind: Kind) -> Checkpoint:
    path = directory / DESCRIPTION
    description = read_json(path)
    if description.get("format") != FORMAT:
        raise InputError(f"{path}: format={description.get('format')!r}, expected {FORMAT}")
    if description.get("kind") != kind:
        found = description.get("kind")
        advice = _ADVICE.get((str(found), kind), "")  # another kind has no advice
        raise InputError(f"{path}: kind={found!r}, expected {kind!r}{advice}")
    try:
        fields = description["config"]
        config: ModelConfig
        if kind == "policy":
            config = _llama_from(fields)
        elif kind == "sarm":
            config = _sarm_from(fields)
        else:
            config = _linear_reward_from(fields)
        # The description of a converted directory has to pass the checks of a config.json.
        own = hf_llama_dict(config if isinstance(config, LlamaConfig) else config.trunk)
        if isinstance(config, LinearRewardConfig):
            classifier_config(hf_classifier_dict(own, config))
        else:
            llama_config(own)
        hf = dict(description["hf_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: config or hf_config is not usable ({error})") from error
    return Checkpoint(
        name=name, directory=directory, kind=kind, config=config, hf_config=hf, converted=True
    )


def _with_repository(checkpoint: Checkpoint, repository: str | None) -> Checkpoint:
    """Adds the repository to the code that a downloaded config names; only the model was loaded."""
    hf = checkpoint.hf_config
    if repository is None or "auto_map" not in hf:
        return checkpoint
    named = hf | {"auto_map": name_repository(hf["auto_map"], repository)}
    return dataclasses.replace(checkpoint, hf_config=named)


def _described(config: LlamaConfig | SARMConfig | LinearRewardConfig) -> dict[str, Any]:
    """Returns the fields of a config, from which `_llama_from` makes it again."""
    fields = dataclasses.asdict(config)
    if isinstance(config, SARMConfig) and config.heads == 1:
        del fields["heads"]
    trunk = config if isinstance(config, LlamaConfig) else config.trunk
    if trunk.rope_scaling is not None and not isinstance(trunk.rope_scaling, Llama3Scaling):
        own = fields if isinstance(config, LlamaConfig) else fields["trunk"]
        own["rope_scaling"]["rope_type"] = trunk.rope_scaling.rope_type
    return fields


def _heads_from(fields: dict[str, Any]) -> int:
    """Reads the number of heads of a SARM; only an ensemble has this field."""
    heads = fields.get("heads", 1)
    if type(heads) is not int or heads < 1:
        raise ValueError(f"heads={heads!r}: expected a positive whole number")
    return heads


def _linear_reward_from(fields: dict[str, Any]) -> LinearRewardConfig:
    trunk, sae = _llama_from(fields["trunk"]), fields["sae"]
    own = None if sae is None else _sae_from(sae, trunk)
    return LinearRewardConfig(trunk, fields["pad_token_id"], own)


def _sarm_from(fields: dict[str, Any]) -> SARMConfig:
    trunk = _llama_from(fields["trunk"])
    return SARMConfig(trunk, _sae_from(fields["sae"], trunk), _heads_from(fields))


def _sae_from(fields: dict[str, Any], trunk: LlamaConfig) -> SAEConfig:
    """Reads the config of an SAE; raises ValueError if it does not fit the trunk's states."""
    fields = dict(fields)
    if "activation" not in fields:  # once there were two activations
        use_topk = fields.pop("use_topk")
        if type(use_topk) is not bool:
            raise ValueError(f"sae.use_topk={use_topk!r}: expected true or false")
        fields["activation"] = "topk" if use_topk else "identity"
    config = SAEConfig(**fields)
    for name in ("hidden_size", "latent_size", "k"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"sae.{name}={value!r}: expected a positive whole number")
    if config.activation not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ValueError(f"sae.activation={config.activation!r}: expected one of {expected}")
    if config.hidden_size != trunk.hidden_size:
        raise ValueError(
            f"sae.hidden_size={config.hidden_size}: the states have {trunk.hidden_size} dimensions"
        )
    if config.k > config.latent_size:
        raise ValueError(f"sae.k={config.k}: exceeds latent_size={config.latent_size}")
    return config


def _llama_from(fields: dict[str, Any]) -> LlamaConfig:
    scaling = fields["rope_scaling"]
    if scaling is not None:
        kind = scaling.get("rope_type", Llama3Scaling.rope_type)  # once the only kind
        values = {name: value for name, value in scaling.items() if name != "rope_type"}
        scaling = SCALINGS[kind](**values)
    return LlamaConfig(**{**fields, "rope_scaling": scaling})


def _check_tied_head(checkpoint: Checkpoint, files: TensorFiles, unmatched: set[str]) -> list[str]:
    """Removes a tied model's stored head from `unmatched`; it must equal the embedding."""
    tied = isinstance(checkpoint.config, LlamaConfig) and checkpoint.config.tie_word_embeddings
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not tied or checkpoint.converted or head not in unmatched or embedding not in files.names():
        return []
    unmatched.discard(head)
    if np.array_equal(files.read(head), files.read(embedding)):
        return []
    return [f"{head}: differs from {embedding}, but tie_word_embeddings is true"]
