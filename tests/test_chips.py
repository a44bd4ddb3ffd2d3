"""GPUs that are not here: what JAX is told of them, and what a plan takes them for."""

import os
from types import SimpleNamespace

import jax
import pytest

from sarm_jax import chips, devices
from sarm_jax.chips import CHIPS, measure_host
from sarm_jax.devices import MEMORY_SHARE, describe_devices
from sarm_jax.errors import InputError

NEW, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
PRECISION = "JAX_DEFAULT_MATMUL_PRECISION"


@pytest.fixture
def environment(monkeypatch):
    """The process's, without what the functions set, and as it was afterwards."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (NEW, OLD, PRECISION):
        os.environ.pop(name, None)
    before = jax.config.jax_default_matmul_precision
    yield os.environ
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, {NEW: str(MEMORY_SHARE)}), ({NEW: ".5"}, {NEW: ".5"}), ({OLD: ".5"}, {OLD: ".5"})],
)
def test_the_environment_decides_on_memory(environment, given, expected):
    environment.update(given)
    devices.set_memory_share()
    assert {name: environment[name] for name in (NEW, OLD) if name in environment} == expected


def test_float32_is_float32_unless_the_environment_says_otherwise(environment):
    jax.config.update("jax_default_matmul_precision", None)
    environment[PRECISION] = "tensorfloat32"
    devices.exact_float32()
    assert jax.config.jax_default_matmul_precision is None  # JAX has read it at its start
    del environment[PRECISION]
    devices.exact_float32()
    assert jax.config.jax_default_matmul_precision == "float32"
    assert environment[PRECISION] == "float32"


@pytest.fixture
def gpus(monkeypatch):
    """Makes JAX find GPUs of a kind, whose allocators say `statistics`."""

    def make(kind, statistics, count=1):
        gpu = SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=lambda: statistics)
        monkeypatch.setattr(jax, "devices", lambda: [gpu] * count)

    measure_host.cache_clear()
    yield make
    measure_host.cache_clear()


def test_a_gpu_here_has_its_published_rates_and_the_memory_that_jax_has(gpus):
    gpus("NVIDIA H200", {"bytes_limit": 46 * 2**30}, count=4)
    chip = measure_host(4)
    assert (chip.flops, chip.bandwidth) == (CHIPS["h200"].flops, CHIPS["h200"].bandwidth)
    assert chip.memory * MEMORY_SHARE == pytest.approx(46 * 2**30)
    assert (
        describe_devices(1) == "1 of 4 × NVIDIA H200" and describe_devices(4) == "4 × NVIDIA H200"
    )


def test_an_unknown_gpu_is_measured(gpus, monkeypatch):
    gpus("a new one", {"bytes_limit": 92})
    monkeypatch.setattr(chips, "_rates", lambda size, dtype, length: (1e12, 1e9))
    chip = measure_host(1)
    assert (chip.name, chip.flops, chip.bandwidth, chip.memory) == ("a new one", 1e12, 1e9, 100)


def test_an_allocator_without_statistics(gpus):
    gpus("NVIDIA H200", None)
    with pytest.raises(InputError, match="unset XLA_PYTHON_CLIENT_ALLOCATOR"):
        measure_host(1)


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize\nbackend")])
def test_devices_that_jax_was_told_of_and_does_not_find(monkeypatch, error):
    def missing():
        raise error

    monkeypatch.setattr(jax, "devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(InputError, match=r"^JAX_PLATFORMS=cuda: JAX finds no device: \w.*$"):
        devices.find_devices()
