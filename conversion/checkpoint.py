"""A model directory in either layout, opened and checked before anything is loaded.

Hugging Face: `config.json` and HF tensor names. Converted: `sarm_jax.json` and our own names and
orientation, so that loading never transposes; it keeps the original `config.json` as `hf_config`.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from conversion.directory import tokenizer_bytes
from conversion.hf_config import hf_llama_dict, is_sarm, llama_config, sarm_config
from conversion.hub import MODEL_FILES, locate
from conversion.json_files import read_json, write_json
from conversion.keys import TensorSpec, abstract_model, tensor_specs
from conversion.model_code import name_repository
from conversion.problems import report
from conversion.safetensors_io import TensorFiles
from sarm_jax.io.errors import InputError
from sarm_jax.models.llama import LlamaConfig
from sarm_jax.models.rope import Llama3Scaling
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARMConfig

Kind = Literal["policy", "sarm"]
DESCRIPTION, FORMAT = "sarm_jax.json", 1
OVERHEAD = 1 << 20  # bytes of headers, index and description, generously
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """`name` is the directory's own name or the repository id, whichever was given."""

    name: str
    directory: Path
    kind: Kind
    config: LlamaConfig | SARMConfig
    hf_config: dict[str, Any]
    converted: bool

    def specs(self) -> list[TensorSpec]:
        """Every tensor there must be."""
        return tensor_specs(abstract_model(self.config))

    def stored_name(self, spec: TensorSpec) -> str:
        return spec.name if self.converted else spec.hf_name

    def stored_shape(self, spec: TensorSpec) -> tuple[int, ...]:
        return spec.shape if self.converted else spec.hf_shape

    def read(
        self, files: TensorFiles, spec: TensorSpec, region: tuple[slice, ...] | None = None
    ) -> np.ndarray:
        """One tensor, or a region of it, in our orientation, in its stored dtype."""
        if region is not None and not self.converted:
            region = spec.hf_region(region)
        array = files.read(self.stored_name(spec), region)
        return array if self.converted else spec.from_hf(array)

    def mapped(self, files: TensorFiles, spec: TensorSpec) -> np.ndarray:
        """One tensor in our orientation, to be passed on: see `TensorFiles.mapped`."""
        array = files.mapped(self.stored_name(spec))
        return array if self.converted else spec.from_hf(array)

    def bytes_stored(self, files: TensorFiles, dtype: str | None = None) -> int:
        """What a copy of it takes on disk; `dtype` None: every tensor keeps its own."""
        size = tokenizer_bytes(self.directory) + OVERHEAD
        for spec in self.specs():
            own = files.dtype(self.stored_name(spec))
            size += math.prod(spec.shape) * (own if dtype is None else jnp.dtype(dtype)).itemsize
        return size


def open_checkpoint(
    src: str | Path, kind: Kind, patterns: tuple[str, ...] = MODEL_FILES
) -> Checkpoint:
    """Reads the description only.

    Raises:
      InputError: not found, not a model of this kind, or an architecture that is not supported.
    """
    directory = locate(src, patterns)
    name = directory.resolve().name if directory == Path(src) else str(src)
    repository = None if directory == Path(src) else str(src)
    converted = (directory / DESCRIPTION).is_file()
    if converted:
        return _naming_code(_open_converted(name, directory, kind), repository)
    hf = read_json(directory / "config.json")
    if is_sarm(hf) and kind == "policy":
        raise InputError(f"{src}: is a SARM (a reward model), expected a policy (a Llama)")
    try:
        where = repository or str(directory.resolve())
        config = llama_config(hf) if kind == "policy" else sarm_config(hf, where)
    except InputError as error:
        raise InputError(f"{src}: {error}") from error
    return _naming_code(Checkpoint(name, directory, kind, config, hf, converted), repository)


def verified_files(checkpoint: Checkpoint) -> TensorFiles:
    """The checkpoint's tensors, once each is known to be there, in shape and of a float type.

    Raises:
      InputError: any missing, misshaped, unmapped or non-float tensor; all of them at once.
    """
    files = TensorFiles(checkpoint.directory)
    left = set(files.names())
    problems = []
    for spec in checkpoint.specs():
        name, expected = checkpoint.stored_name(spec), checkpoint.stored_shape(spec)
        if name not in left:
            problems.append(f"{name}: missing")
            continue
        left.discard(name)
        if files.shape(name) != expected:
            problems.append(f"{name}: shape {list(files.shape(name))}, expected {list(expected)}")
        if files.dtype(name).name not in ("float16", "bfloat16", "float32", "float64"):
            problems.append(f"{name}: dtype {files.dtype(name)}, expected a 16- to 64-bit float")
    problems += _check_tied_head(checkpoint, files, left)
    problems += [f"{name}: unexpected tensor" for name in sorted(left) if not _BUFFERS.match(name)]
    report(checkpoint.directory, problems)
    return files


def write_description(
    directory: Path, checkpoint: Checkpoint, config: LlamaConfig | SARMConfig, dtype: str
) -> None:
    """Writes the `sarm_jax.json` of a converted directory."""
    write_json(
        directory / DESCRIPTION,
        {
            "format": FORMAT,
            "kind": checkpoint.kind,
            "dtype": dtype,
            "config": dataclasses.asdict(config),
            "source": checkpoint.name,
            "hf_config": checkpoint.hf_config,
        },
    )


def _open_converted(name: str, directory: Path, kind: Kind) -> Checkpoint:
    path = directory / DESCRIPTION
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise InputError(f"{path}: format={found.get('format')!r}, expected {FORMAT}")
    if found.get("kind") != kind:
        raise InputError(f"{path}: kind={found.get('kind')!r}, expected {kind!r}")
    try:
        fields = found["config"]
        config: LlamaConfig | SARMConfig
        if kind == "policy":
            config = _llama_from(fields)
        else:
            config = SARMConfig(_llama_from(fields["trunk"]), SAEConfig(**fields["sae"]))
        # what a converted directory says is held to the same rules as a config.json
        llama_config(hf_llama_dict(config if isinstance(config, LlamaConfig) else config.trunk))
        hf = dict(found["hf_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: config or hf_config is not usable ({error})") from error
    return Checkpoint(name, directory, kind, config, hf, converted=True)


def _naming_code(checkpoint: Checkpoint, repository: str | None) -> Checkpoint:
    """Adds the repository to the code that a downloaded config names: only the model came along."""
    hf = checkpoint.hf_config
    if repository is None or "auto_map" not in hf:
        return checkpoint
    named = hf | {"auto_map": name_repository(hf["auto_map"], repository)}
    return dataclasses.replace(checkpoint, hf_config=named)


def _llama_from(fields: dict[str, Any]) -> LlamaConfig:
    scaling = fields["rope_scaling"]
    return LlamaConfig(**{**fields, "rope_scaling": scaling and Llama3Scaling(**scaling)})


def _check_tied_head(checkpoint: Checkpoint, files: TensorFiles, left: set[str]) -> list[str]:
    """A tied model may store its head too, if it is the embedding itself."""
    tied = isinstance(checkpoint.config, LlamaConfig) and checkpoint.config.tie_word_embeddings
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not tied or checkpoint.converted or head not in left or embedding not in files.names():
        return []
    left.discard(head)
    if np.array_equal(files.read(head), files.read(embedding)):
        return []
    return [f"{head}: differs from {embedding}, but tie_word_embeddings is true"]
