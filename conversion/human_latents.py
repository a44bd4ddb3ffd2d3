"""Converts human latents of the reference implementation, without running code in the file.

    python -m conversion.human_latents --src=FILE.pt --dst=FILE.safetensors

FILE.pt is {"latent_indices": list or None, "z": [N, d]}, written by torch.save; without a list the
features are 0 … d − 1. The option --human_latents takes the new file.
"""

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from safetensors.numpy import save

from conversion import cli
from conversion.torch_zip import read_object
from sarm_jax.features.feature_lists import LARGEST_ID
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_target, replacing

FLAGS = flags.FlagValues()
flags.DEFINE_string("src", None, "File that torch.save wrote.", FLAGS, required=True)
flags.DEFINE_string("dst", None, "New safetensors file to write.", FLAGS, required=True)
FIELDS = ("latent_indices", "z")


def convert(src: str | Path, dst: str | Path) -> str:
    """Writes `dst` and returns a summary line.

    Raises:
        InputError: `src` holds no human latents, or `dst` cannot be written.
    """
    dst = Path(dst)
    if dst.suffix != ".safetensors":
        raise InputError(f"--dst={dst}: the name must end in .safetensors")
    if dst.exists():
        raise InputError(f"{dst}: exists already; name a new file or remove it first")
    check_target(dst)
    content = read_object(src)
    if sorted(content) != sorted(FIELDS):
        keys = ", ".join(repr(key[:60]) for key in sorted(content)[:8]) or "nothing"
        raise InputError(f"{src}: holds {keys}, expected 'latent_indices' and 'z'")
    z_ns = _matrix(src, content["z"])
    indices_s = _indices(src, content["latent_indices"], z_ns.shape[1])
    dst.parent.mkdir(parents=True, exist_ok=True)
    with replacing(dst, "wb") as file:
        file.write(save({"z": z_ns, "latent_indices": indices_s}))
    return f"{dst}: z {list(z_ns.shape)} of features {indices_s.min()} to {indices_s.max()}"


def _matrix(src: str | Path, z: Any) -> np.ndarray:
    """Returns `z [N, S]` as float32, in C order."""
    if not isinstance(z, np.ndarray) or z.ndim != 2 or not z.size:
        found = f"shape {list(z.shape)}" if isinstance(z, np.ndarray) else type(z).__name__
        raise InputError(f"{src}: z must be a matrix [responses, features], found {found}")
    z_ns = np.ascontiguousarray(z, dtype=np.float32)
    if not np.isfinite(z_ns).all():
        raise InputError(f"{src}: z must hold finite numbers")
    return z_ns


def _indices(src: str | Path, listed: Any, count: int) -> np.ndarray:
    """Returns the features `[S]` of the columns as int32."""
    if listed is None:
        return np.arange(count, dtype=np.int32)
    if not isinstance(listed, list):
        found = type(listed).__name__
        raise InputError(f"{src}: latent_indices must be a list or None, found {found}")
    if not all(type(i) is int and 0 <= i <= LARGEST_ID for i in listed):
        raise InputError(f"{src}: latent_indices must be feature ids")
    if len(set(listed)) < len(listed):
        raise InputError(f"{src}: latent_indices names a feature twice")
    if len(listed) != count:
        raise InputError(f"{src}: z has {count} columns for {len(listed)} latent_indices")
    return np.asarray(listed, np.int32)


def main(values: Any) -> str:
    """Runs the command with parsed flags."""
    return convert(values.src, values.dst)


if __name__ == "__main__":
    cli.run(main, FLAGS, __doc__)
