"""The devices that JAX finds, and settings for their memory and precision."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import jax

from sarm_jax.io.errors import InputError

# JAX's share of a GPU's memory; the CUDA context needs the rest. JAX's own default is 0.75.
MEMORY_SHARE = 0.92

# For matrix products in full float32, XLA would generate Triton kernels and time them against
# cuBLAS, which takes minutes of compilation.
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"


def set_memory_share() -> None:
    """Gives JAX `MEMORY_SHARE` of each GPU, unless the environment sets another share.

    Call it before the first array is created.
    """
    # This is the older name of the variable; JAX accepts only one of the two.
    if not os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"):
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))


def exact_float32() -> None:
    """Computes float32 matrix products in float32 on GPUs, unless the environment says otherwise.

    By default JAX rounds their operands to TF32, a mantissa of ten bits, in which a young adapter
    that is added to a kernel is rounded away. With float32 products, `NO_TRITON` is added to
    XLA_FLAGS, unless they set this flag already. Call it before the first array is created.
    """
    if not os.environ.get("JAX_DEFAULT_MATMUL_PRECISION"):
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"  # for spawned processes
        jax.config.update("jax_default_matmul_precision", "float32")
    flags = os.environ.get("XLA_FLAGS", "")
    is_file_name = flags.strip()[:1] not in ("", "-")
    sets_triton = NO_TRITON.split("=")[0] in flags or is_file_name
    exact = os.environ["JAX_DEFAULT_MATMUL_PRECISION"] in ("float32", "highest")
    if exact and not sets_triton and _has_cuda() and _accepts(NO_TRITON):
        os.environ["XLA_FLAGS"] = f"{flags} {NO_TRITON}".strip()


def _has_cuda() -> bool:
    """Returns True if JAX can use NVIDIA GPUs, or compile for them."""
    return any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins"))


def _accepts(flag: str) -> bool:
    """Returns True if this XLA knows the flag; an unknown one ends its process."""
    command = [sys.executable, "-P", "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    return not subprocess.run(command, env=environment, capture_output=True).returncode


def find_devices() -> list[Any]:
    """Returns all devices of the run, over all processes.

    Raises:
        InputError: JAX finds none, such as with JAX_PLATFORMS=cuda on a host without a GPU.
    """
    try:
        return jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # AssertionError: JAX_PLATFORMS=cuda without a GPU
        platforms = os.environ.get("JAX_PLATFORMS")
        setting = f"JAX_PLATFORMS={platforms}: " if platforms else ""
        reason = " ".join(str(error).split()) or "there is none, or no driver for it"
        raise InputError(f"{setting}JAX finds no device: {reason}") from error


def describe_devices(used: int) -> str:
    """Describes the devices of a run, such as "1 of 4 × NVIDIA H100 80GB HBM3"."""
    devices = find_devices()
    count = str(used) if used == len(devices) else f"{used} of {len(devices)}"
    return f"{count} × {devices[0].device_kind}"
