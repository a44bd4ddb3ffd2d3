"""The devices that JAX finds, and how it is to use them."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import jax

from sarm_jax.io.errors import InputError

# Of a GPU's memory, for JAX: what is left beside the CUDA context. Its own default is 0.75.
MEMORY_SHARE = 0.92

# For products in full float32 XLA would write kernels of its own, Triton's, and time them beside
# cuBLAS's: minutes of compiling.
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"


def set_memory_share() -> None:
    """Lets JAX have `MEMORY_SHARE` of each GPU, unless the environment says how much it may have.

    To be called before the first array is made.
    """
    if not os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"):  # the older name; never both
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(MEMORY_SHARE))


def exact_float32() -> None:
    """Makes float32 products float32 on GPUs, unless the environment says what they are to be.

    By itself JAX rounds their operands to TF32, ten bits: a young adapter that is added to a kernel
    would be rounded away. Where they are float32, XLA is told `NO_TRITON`, unless XLA_FLAGS says
    otherwise. To be called before the first array is made.
    """
    if not os.environ.get("JAX_DEFAULT_MATMUL_PRECISION"):
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "float32"  # for processes that this one starts
        jax.config.update("jax_default_matmul_precision", "float32")
    flags = os.environ.get("XLA_FLAGS", "")
    says_otherwise = NO_TRITON.split("=")[0] in flags or flags.strip()[:1] not in (
        "",
        "-",
    )  # a file
    exact = os.environ["JAX_DEFAULT_MATMUL_PRECISION"] in ("float32", "highest")
    if exact and not says_otherwise and _has_cuda() and _accepts(NO_TRITON):
        os.environ["XLA_FLAGS"] = f"{flags} {NO_TRITON}".strip()


def _has_cuda() -> bool:
    """Whether JAX can use, or compile for, NVIDIA GPUs."""
    return any("cuda" in plugin.name for plugin in entry_points(group="jax_plugins"))


def _accepts(flag: str) -> bool:
    """Whether this XLA has the flag; one that it does not know ends the process."""
    command = [sys.executable, "-P", "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    return not subprocess.run(command, env=environment, capture_output=True).returncode


def find_devices() -> list[Any]:
    """All devices of the run; InputError where JAX was told of some that it does not find."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter: JAX_PLATFORMS=cuda, and no GPU
        platforms = os.environ.get("JAX_PLATFORMS")
        asked = f"JAX_PLATFORMS={platforms}: " if platforms else ""
        reason = " ".join(str(error).split()) or "there is none, or no driver for it"
        raise InputError(f"{asked}JAX finds no device: {reason}") from error


def describe_devices(used: int) -> str:
    """Such as "1 of 4 × NVIDIA H100 80GB HBM3"."""
    found = find_devices()
    count = str(used) if used == len(found) else f"{used} of {len(found)}"
    return f"{count} × {found[0].device_kind}"
