"""Writes models and adapters in the layout of the Hugging Face libraries.

    python -m conversion.to_hf --src=WORKDIR_OR_DIR --dst=DIR [--merge]
    python -m conversion.to_hf --kind=sarm|reward|sae --src=DIR --dst=DIR

WORKDIR is the working directory of a PPO run: its adapter is copied in the PEFT layout or, with
--merge, added to the base model (W + α/r · B A in float32, stored in the dtype of the base). DIR is
a converted directory, or a directory that holds an adapter itself. A reward model is written as
the classifier that transformers has, which is without an SAE. With --kind=sae the SAE of a reward
model is written in SAELens' format. A SARM with several heads keeps them all, in the layout of
train_sarm, which no other library combines.
"""

import contextlib
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tqdm import tqdm

from conversion import cli
from conversion.checkpoint import DESCRIPTION, Checkpoint, Kind, open_checkpoint, verified_files
from conversion.directory import (
    atomic_directory,
    copy_tokenizer_files,
    make_portable,
    save_tokenizer,
    write_hf_json,
)
from conversion.hf_config import hf_llama_dict, hf_policy_dict, hf_sarm_dict, with_dtype
from conversion.hub import is_repository
from conversion.keys import TensorSpec, parameters, specs_of
from conversion.load import load_hf_tokenizer
from conversion.model_code import copy_model_code
from conversion.peft import CONFIG as ADAPTER_CONFIG
from conversion.peft import Adapter, read_adapter
from conversion.rope_fields import needs_transformers5, rope_fields
from conversion.saelens import write_sae
from conversion.safetensors_io import TensorWriter
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.lora import merge_lora
from sarm_jax.models.sarm import SARM
from sarm_jax.parallel import processes
from sarm_jax.parallel.processes import fetch

FLAGS = flags.FlagValues()
KINDS = ["policy", "sarm", "reward", "sae"]
flags.DEFINE_enum("kind", "policy", KINDS, "What is written.", FLAGS)
flags.DEFINE_string("src", None, "Working directory or model directory.", FLAGS, required=True)
flags.DEFINE_string("dst", None, "New directory to write.", FLAGS, required=True)
flags.DEFINE_bool("merge", False, "Write base + adapter as one model.", FLAGS)

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export(
    src: str | Path, dst: str | Path, kind: Kind | Literal["sae"] = "policy", merge: bool = False
) -> str:
    """Writes `dst` and returns a summary line.

    Args:
        src: a working directory or a model directory, see the module's docstring.
        dst: the new directory.
        kind: "policy", "sarm", "reward", or "sae" for the SAE of a reward model.
        merge: add the adapter to the base model.

    Raises:
        InputError: `src` holds no such model or adapter, or `dst` cannot be written.
    """
    adapter = _adapter_directory(Path(src)) if kind == "policy" else None
    if adapter is None:
        if merge:
            raise InputError(f"--merge: {src} holds no adapter")
        if kind == "sae":
            return write_sae(src, dst)
        return write_model(open_checkpoint(src, kind), dst)
    checkpoint = open_checkpoint(_base_model(Path(src), adapter), "policy")
    factors = read_adapter(adapter, checkpoint.specs())
    if merge:
        return write_model(checkpoint, dst, factors)
    with atomic_directory(dst) as directory:
        for file in filter(Path.is_file, adapter.iterdir()):
            shutil.copyfile(file, directory / file.name)
        make_portable(directory)
        hint = _name_base(directory / ADAPTER_CONFIG, checkpoint)
    return f"{dst}: a PEFT adapter of rank {factors.config.rank} on {checkpoint.name}{hint}"


def write_model(checkpoint: Checkpoint, dst: str | Path, adapter: Adapter | None = None) -> str:
    """Writes a checkpoint in the HF layout, with the adapter added if there is one."""
    start, exported = time.perf_counter(), _exported(checkpoint)
    files = verified_files(checkpoint)
    dtypes: dict[str, int] = {}
    with (
        atomic_directory(dst, needed=checkpoint.bytes_stored(files)) as directory,
        TensorWriter(directory) as writer,
    ):
        for spec in tqdm(exported, desc=f"writing {dst}", unit="tensor"):
            array = checkpoint.mapped(files, spec)
            if adapter is not None and spec in adapter.factors:
                array = _merged(array, adapter, spec)
            dtypes[array.dtype.name] = dtypes.get(array.dtype.name, 0) + array.nbytes
            writer.add(spec.hf_name, spec.to_hf(array))
        tensors = writer.close()
        copy_tokenizer_files(checkpoint.directory, directory)
        make_portable(directory)
        main_dtype = max(dtypes, key=lambda name: dtypes[name])
        hf = with_dtype(_hf_config(checkpoint, directory), main_dtype)
        write_hf_json(directory / "config.json", hf)
    seconds = time.perf_counter() - start
    without = "" if len(exported) == len(checkpoint.specs()) else ", without its SAE"
    return f"{dst}: {tensors} tensors{without}, {writer.total_bytes:,} bytes, {seconds:.1f} s"


def _exported(checkpoint: Checkpoint) -> Sequence[TensorSpec]:
    """Returns the tensors that the HF layout has, which are all but the SAE of a classifier."""
    specs = checkpoint.specs()
    if not isinstance(checkpoint.config, LinearRewardConfig):
        return specs
    return [spec for spec in specs if spec.path[0] != "sae"]


def save_sarm(
    dst: str | Path, model: SARM, tokenizer: Any, hf_config: dict[str, Any] | None = None
) -> None:
    """Writes a SARM that is in memory in the HF layout, in the dtype of its parameters.

    Args:
        dst: the new directory.
        model: the SARM.
        tokenizer: its tokenizer.
        hf_config: the config.json of the SARM or of the model that its trunk was cut from, if
            known.
    """
    hf = with_dtype(hf_sarm_dict(model.config, hf_config), model.score.dtype.name)
    auto_map = (hf_config or {}).get("auto_map")
    _save(dst, model=model, tokenizer=tokenizer, hf=hf, auto_map=auto_map)


def save_policy(dst: str | Path, policy: Llama, tokenizer: Any) -> None:
    """Writes a policy that is in memory in the HF layout, in the dtype of its parameters."""
    hf = with_dtype(hf_llama_dict(policy.config), policy.embed_tokens.dtype.name)
    _save(dst, model=policy, tokenizer=tokenizer, hf=hf)


def _save(
    dst: str | Path, model: Llama | SARM, tokenizer: Any, hf: dict[str, Any], auto_map: Any = None
) -> None:
    """Writes a model; in a run of several processes all call it, and process 0 writes."""
    with processes.raising_on_all(), _on_host(model) as tensors:
        if processes.is_primary():
            _write(dst, tensors, model=model, tokenizer=tokenizer, hf=hf, auto_map=auto_map)


@contextlib.contextmanager
def _on_host(model: Llama | SARM) -> Iterator[Iterator[tuple[TensorSpec, np.ndarray]]]:
    """Yields an iterator of (name and layout, array) of all tensors, without a mesh's padding.

    The processes of a run gather each tensor together. Those that do not write, and the one whose
    disk is full, gather the others at the end of the block.
    """
    weights = parameters(model)

    def gather() -> Iterator[tuple[TensorSpec, np.ndarray]]:
        for spec in specs_of(model.config):
            value = weights[spec.path][...]
            array = np.asarray(fetch(value if spec.layer is None else value[spec.layer]))
            yield spec, array[tuple(map(slice, spec.shape))]

    tensors = gather()
    try:
        yield tensors
    finally:
        for _ in tensors if processes.connected() else ():
            pass


def _write(
    dst: str | Path,
    tensors: Iterable[tuple[TensorSpec, np.ndarray]],
    *,
    model: Llama | SARM,
    tokenizer: Any,
    hf: dict[str, Any],
    auto_map: Any,
) -> None:
    with atomic_directory(dst) as directory, TensorWriter(directory) as writer:
        for spec, array in tensors:
            writer.add(spec.hf_name, spec.to_hf(array))
        writer.close()
        if isinstance(model, SARM) and model.config.heads == 1:
            model_type = model.config.trunk.model_type
            code = copy_model_code(auto_map, None, directory, model_type)
            hf |= {"auto_map": code} if code else {}
        write_hf_json(directory / "config.json", _with_token_ids(hf, tokenizer))
        save_tokenizer(tokenizer, directory)


def _with_token_ids(hf: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Adds missing token ids from the tokenizer; the reference pools by `pad_token_id`."""
    missing = [name for name in TOKEN_IDS if hf.get(name) is None]
    return hf | {name: getattr(tokenizer, name) for name in missing}


def _hf_config(checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """Builds the config.json of `directory`, and copies a SARM's code there.

    The tokenizer must be in `directory` already.
    """
    if isinstance(checkpoint.config, LinearRewardConfig):
        return checkpoint.hf_config | rope_fields(checkpoint.config.trunk)
    if isinstance(checkpoint.config, LlamaConfig):
        return hf_policy_dict(checkpoint.config, checkpoint.hf_config)
    hf = hf_sarm_dict(checkpoint.config, checkpoint.hf_config)
    if checkpoint.config.heads == 1:  # the code of a SARM computes one head
        code = checkpoint.hf_config.get("auto_map")
        model_type = checkpoint.config.trunk.model_type
        copied = copy_model_code(code, checkpoint.directory, directory, model_type)
        hf |= {"auto_map": copied} if copied else {}
    if (directory / "tokenizer.json").is_file() and any(hf.get(n) is None for n in TOKEN_IDS):
        hf = _with_token_ids(hf, load_hf_tokenizer(directory))
    return hf


def _merged(kernel: np.ndarray, adapter: Adapter, spec: TensorSpec) -> np.ndarray:
    """Adds the adapter of one kernel to it."""
    a, b = map(jnp.asarray, adapter.factors[spec])
    scale = adapter.config.alpha / adapter.config.rank
    with jax.default_matmul_precision("highest"):
        return np.asarray(merge_lora(jnp.asarray(kernel), a, b, scale))


def _adapter_directory(src: Path) -> Path | None:
    """Returns the directory of a run's adapter, or `src` if it holds one; else None."""
    return next((d for d in (src / "adapter", src) if (d / ADAPTER_CONFIG).is_file()), None)


def _name_base(adapter_config: Path, checkpoint: Checkpoint) -> str:
    """Writes the base model into adapter_config.json under a name that PEFT can load.

    For a converted base, that is the repository it was converted from.

    Returns:
        A hint for the user if PEFT or transformers 4 cannot use the base, else "".
    """
    if not checkpoint.converted:
        assert isinstance(checkpoint.config, LlamaConfig)
        if needs_transformers5(checkpoint.hf_config, checkpoint.config):
            return "; transformers 4 ignores the rope_parameters of this base: use --merge for it"
        return ""
    source = read_json(checkpoint.directory / DESCRIPTION).get("source")
    if not isinstance(source, str) or not is_repository(source):
        return "; PEFT needs the Hugging Face directory that this base was converted from"
    fields = read_json(adapter_config) | {"base_model_name_or_path": source}
    write_hf_json(adapter_config, fields)
    return ""


def _base_model(src: Path, adapter: Path) -> str:
    """Reads the name of the base model from the config of the run, or else of the adapter."""
    if adapter == src:
        path, key = adapter / ADAPTER_CONFIG, "base_model_name_or_path"
    else:
        path, key = src / "config.json", "policy_model"
    base = read_json(path).get(key)
    if not isinstance(base, str) or not base:
        raise InputError(f"{path}: {key}={base!r}, expected the base model's directory or id")
    return base


def main(values: Any) -> str:
    """Runs the command with parsed flags."""
    return export(values.src, values.dst, kind=values.kind, merge=values.merge)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
