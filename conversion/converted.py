"""Writes converted directories: our orientation, `sarm_jax.json`, and the tokenizer."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from conversion.checkpoint import Checkpoint, open_checkpoint, verified_files, write_description
from conversion.directory import atomic_directory, copy_tokenizer_files
from conversion.model_code import copy_model_code
from conversion.safetensors_io import TensorFiles, TensorWriter
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.sae import SAE


def write_converted(
    checkpoint: Checkpoint,
    files: TensorFiles,
    dst: str | Path,
    *,
    dtype: str | None = None,
    sae: SAE | None = None,
) -> tuple[int, int]:
    """Writes a checkpoint as a converted directory.

    The host holds two shards and one tensor at a time.

    Args:
        checkpoint: the model.
        files: its tensors, from `verified_files`.
        dst: the new directory.
        dtype: the dtype of the weights; by default every tensor keeps its own.
        sae: the SAE of a reward model, in place of any that it has.

    Returns:
        (number of tensors, bytes).

    Raises:
        InputError: `dst` cannot be written.
    """
    config, own = checkpoint.config, {} if sae is None else _tensors(sae, dtype)
    if sae is not None:
        assert isinstance(config, LinearRewardConfig)
        config = dataclasses.replace(config, sae=sae.config)
    size = checkpoint.bytes_stored(files, dtype) + sum(array.nbytes for array in own.values())
    dtypes = {array.dtype.name for array in own.values()}
    with atomic_directory(dst, needed=size) as directory, TensorWriter(directory) as writer:
        for spec in tqdm(checkpoint.specs(), desc=f"writing {dst}", unit="tensor"):
            if sae is not None and spec.path[0] == "sae":
                continue
            array = checkpoint.mapped(files, spec)
            array = array if dtype is None else array.astype(jnp.dtype(dtype))
            dtypes.add(array.dtype.name)
            writer.add(spec.name, array)
            del array  # frees it before the next tensor is converted
        for name, array in own.items():
            writer.add(name, array)
        tensors = writer.close()
        write_description(directory, checkpoint, config, dtype=",".join(sorted(dtypes)))
        copy_tokenizer_files(checkpoint.directory, directory)
        copy_model_code(checkpoint.hf_config.get("auto_map"), checkpoint.directory, directory)
    return tensors, writer.total_bytes


def save_with_sae(src: str | Path, dst: str | Path, sae: SAE) -> None:
    """Writes a reward model with an SAE for it as a converted directory.

    Args:
        src: the reward model, whose tensors are copied.
        dst: the new directory.
        sae: the SAE, which keeps its dtype.

    Raises:
        InputError: `src` is no reward model, or `dst` cannot be written.
    """
    checkpoint = open_checkpoint(src, "reward")
    write_converted(checkpoint, verified_files(checkpoint), dst, sae=sae)


def _tensors(sae: SAE, dtype: str | None) -> dict[str, np.ndarray]:
    """Returns the tensors of an SAE by name, in their own dtype if `dtype` is None."""
    flat = nnx.to_flat_state(nnx.state(sae))
    arrays = {".".join(("sae", *map(str, path))): np.asarray(value[...]) for path, value in flat}
    if dtype is None:
        return arrays
    return {name: array.astype(jnp.dtype(dtype)) for name, array in arrays.items()}
