"""Reads small safetensors files of floats whose tensors are known by name and rank."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_file
from sarm_jax.io.libraries import as_input_error


def read_float_tensors(
    path: str | Path, ranks: Mapping[str, int], *, place: str, maker: str
) -> dict[str, np.ndarray]:
    """Reads exactly the tensors of `ranks`, all of them floats and finite.

    Args:
        path: the file.
        ranks: the number of axes of each tensor by name.
        place: what messages call the file, with the option that names it.
        maker: the command that writes such a file, for the message if there is none.

    Raises:
        InputError: the file is not there or not safetensors, or a tensor is missing, unknown, of
            another rank, empty, no float, or not finite.
    """
    if not Path(path).exists():
        raise InputError(f"{place}: no such file; make it with {maker}")
    check_file(path, place)
    with (
        as_input_error(f"{place}: not a safetensors file"),
        safe_open(path, framework="np") as file,
    ):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if tensors.keys() != ranks.keys():
        raise InputError(f"{place}: holds {sorted(tensors)}, expected {sorted(ranks)}")
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating):
            raise InputError(f"{place}: {name} must hold floats, found {tensor.dtype}")
        if tensor.ndim != ranks[name] or not tensor.size:
            raise InputError(
                f"{place}: {name} has the shape {tensor.shape}, expected {ranks[name]} axes"
            )
        if not np.isfinite(tensor).all():
            raise InputError(f"{place}: {name} holds numbers that are not finite")
    return tensors
