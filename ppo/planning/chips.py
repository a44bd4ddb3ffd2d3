"""The target machines of a plan, which need not be present.

A program for an H100 can be compiled without one: the CUDA extra of JAX has the compiler, and a
description of the chip replaces the device. Descriptions and rates are those that the vendor
publishes.
"""

import dataclasses
import functools
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sarm_jax.io.errors import InputError
from sarm_jax.parallel.devices import MEMORY_SHARE, find_devices

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The rates of one device.

    Attributes:
        name: name of the device, as JAX gives it.
        flops: FLOP/s of matrix products.
        bandwidth: bytes/s of its memory.
        memory: bytes of its memory.
        link: bytes/s to other devices.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    link: float

    def seconds(self, flops: Sequence[float], moved: Sequence[float]) -> float:
        """Returns the roofline time of parts that run one after the other.

        Each part takes the longer of computing its FLOPs and moving its bytes.
        """
        parts = zip(flops, moved, strict=True)
        return sum(max(f / self.flops, size / self.bandwidth) for f, size in parts)


# From NVIDIA's data sheets of the SXM boards, with NVLink in one direction. FLOP/s of products of
# dense matrices by precision; float32 does not use the tensor cores.
FLOPS = {"bfloat16": 989e12, "tensorfloat32": 494e12, "float32": 67e12}
CHIPS = {
    "h100": Chip("NVIDIA H100 80GB HBM3", FLOPS["bfloat16"], 3.35e12, 80 * GIB, 450e9),
    "h200": Chip("NVIDIA H200", FLOPS["bfloat16"], 4.8e12, 141 * 10**9, 450e9),
}
PCIE = 32e9  # bytes/s between GPUs of an unknown kind: PCIe generation 4, 16 lanes
_ABSENT = re.compile(r"(h100|h200)x([1-9]\d?)")
# Compute capability 9.0 with 132 multiprocessors (CUDA C programming guide).
_HOPPER = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""


def target(name: str, devices: int, dtype: Any) -> tuple[Chip, list[Any], str]:
    """Returns (chip, devices to compile for, their backend) of a `plan.target`.

    Args:
        name: `host` for the devices of this machine, or for example `h100x4`.
        devices: number of devices in the mesh.
        dtype: type of the matrix products.

    Raises:
        InputError: an unknown target, too few devices, or no CUDA extra of JAX.
    """
    if name == "host":
        available = find_devices()
        if devices > len(available):
            raise InputError(
                f"plan.target=host: the mesh takes {devices} devices and there are "
                f"{len(available)}; XLA_FLAGS=--xla_force_host_platform_device_count={devices} "
                "makes as many"
            )
        return measure_host(devices, dtype), available[:devices], jax.default_backend()
    chip, count = _parse(name)
    if devices != count:
        raise InputError(f"plan.target={name}: the mesh takes {devices} devices, not {count}")
    return _with_products_of(chip, dtype), _absent_gpus(chip, count), "gpu"


def _with_products_of(chip: Chip, dtype: Any) -> Chip:
    """Returns one of `CHIPS` with the FLOP/s of that dtype at JAX's current precision."""
    precision = "bfloat16"
    if jnp.dtype(dtype).itemsize > 2:
        setting = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
        precision = "float32" if setting in ("float32", "highest") else "tensorfloat32"
    return dataclasses.replace(chip, flops=FLOPS[precision])


def target_devices(name: str) -> int:
    """Returns the number of devices of a target; for `host`, all local devices.

    Raises:
        InputError: an unknown target.
    """
    return len(find_devices()) if name == "host" else _parse(name)[1]


def _parse(name: str) -> tuple[Chip, int]:
    match = _ABSENT.fullmatch(name)
    if match is None:
        raise InputError(f"plan.target={name!r}: expected host, or h100xN or h200xN for N devices")
    return CHIPS[match.group(1)], int(match.group(2))


def _absent_gpus(chip: Chip, count: int) -> list[Any]:
    from jax.experimental import topologies

    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver to check
    description = _HOPPER.format(bandwidth=int(chip.bandwidth), memory=chip.memory, name=chip.name)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description, topology=f"1x1x{count}"
        )
    except Exception as error:  # JAX raises several kinds, depending on what is missing
        reason = " ".join(str(error).split())[:150]
        raise InputError(
            f"plan.target: compiling for {chip.name} without one needs the CUDA extra of JAX "
            f"(pip install 'jax[cuda12]=={jax.__version__}'); JAX says: {reason}"
        ) from None
    return list(topology.devices)


@functools.cache
def measure_host(devices: int, dtype: Any) -> Chip:
    """Returns the rates of one device of this machine.

    The rates of a GPU in `CHIPS` are the published ones. Those of other GPUs, and of a CPU, are
    measured by short runs.

    Args:
        devices: number of devices in the mesh, which share a CPU.
        dtype: type of the matrix products on a GPU.

    Raises:
        InputError: the allocator of the GPU does not report its memory.
    """
    device = find_devices()[0]
    if device.platform == "gpu":
        return _gpu(device, dtype)
    flops, moved = _rates(1024, jnp.float32, 2**25)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = moved / devices
    return Chip("this machine", flops / devices, share, memory // devices, share)


def _gpu(device: Any, dtype: Any) -> Chip:
    statistics = device.memory_stats()
    if not statistics:
        raise InputError(
            "plan.target=host: the allocator of this GPU does not report its memory; unset "
            "XLA_PYTHON_CLIENT_ALLOCATOR"
        )
    # The plan takes `MEMORY_SHARE` of this for JAX, which gives the limit that JAX has here.
    memory = round(statistics["bytes_limit"] / MEMORY_SHARE)
    for chip in CHIPS.values():
        if chip.name == device.device_kind:
            return dataclasses.replace(_with_products_of(chip, dtype), memory=memory)
    return Chip(device.device_kind, *_rates(8192, dtype, 2**28), memory, PCIE)


def _rates(size: int, dtype: Any, length: int) -> tuple[float, float]:
    """Measures (FLOP/s of a product of square matrices, bytes/s of memory)."""
    square, large = jnp.ones((size, size), dtype), jnp.ones((length,))
    flops = 2 * size**3 / _seconds(jax.jit(jnp.matmul), square, square)
    return flops, 2 * large.nbytes / _seconds(jax.jit(lambda x: x + 1), large)


def _seconds(function, *arguments) -> float:
    """Returns the seconds of the fastest of a few runs."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)
