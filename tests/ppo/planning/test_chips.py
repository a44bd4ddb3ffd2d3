"""GPUs that are not present: the settings that JAX gets for them, and their rates in a plan."""

import os
from types import SimpleNamespace

import jax
import pytest

from ppo.planning import chips
from ppo.planning.chips import CHIPS, measure_host
from sarm_jax.io.errors import InputError
from sarm_jax.parallel import devices
from sarm_jax.parallel.devices import MEMORY_SHARE, describe_devices

NEW, OLD = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
PRECISION = "JAX_DEFAULT_MATMUL_PRECISION"
TRITON = "--xla_gpu_enable_triton_gemm=true"


@pytest.fixture
def environment(monkeypatch):
    """The environment without the variables that the functions set; it is restored afterwards."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (NEW, OLD, PRECISION):
        os.environ.pop(name, None)
    before = jax.config.jax_default_matmul_precision
    yield os.environ
    jax.config.update("jax_default_matmul_precision", before)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [({}, {NEW: str(MEMORY_SHARE)}), ({NEW: ".5"}, {NEW: ".5"}), ({OLD: ".5"}, {OLD: ".5"})],
)
def test_the_environment_decides_on_memory(environment, setting, expected):
    environment.update(setting)
    devices.set_memory_share()
    assert {name: environment[name] for name in (NEW, OLD) if name in environment} == expected


def test_float32_is_float32_unless_the_environment_says_otherwise(environment):
    jax.config.update("jax_default_matmul_precision", None)
    environment[PRECISION] = "tensorfloat32"
    devices.exact_float32()
    assert jax.config.jax_default_matmul_precision is None  # JAX read the variable at its start
    del environment[PRECISION]
    devices.exact_float32()
    assert jax.config.jax_default_matmul_precision == "float32"
    assert environment[PRECISION] == "float32"


@pytest.fixture
def cuda(monkeypatch):
    """Makes JAX find plugins with the given names."""

    def have(*names):
        plugins = [SimpleNamespace(name=name) for name in names]
        monkeypatch.setattr(devices, "entry_points", lambda group: plugins)

    have("xla_cuda13")
    return have


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", devices.NO_TRITON),
        ("--a=1", f"--a=1 {devices.NO_TRITON}"),
        (TRITON, TRITON),
        ("/a/file/of/flags", "/a/file/of/flags"),
    ],
)
def test_float32_goes_without_triton_unless_the_environment_says_otherwise(
    environment, cuda, setting, expected
):
    environment["XLA_FLAGS"] = setting
    devices.exact_float32()
    assert environment["XLA_FLAGS"] == expected


@pytest.mark.parametrize(
    ("precision", "expected"), [("highest", devices.NO_TRITON), ("tensorfloat32", "")]
)
def test_triton_stays_where_products_are_not_float32(environment, cuda, precision, expected):
    environment |= {"XLA_FLAGS": "", PRECISION: precision}
    devices.exact_float32()
    assert environment["XLA_FLAGS"] == expected


def test_a_flag_that_xla_does_not_know_is_left_out(environment, cuda, monkeypatch):
    monkeypatch.setattr(devices, "NO_TRITON", "--xla_gpu_none_such=false")
    environment["XLA_FLAGS"] = ""
    devices.exact_float32()
    assert environment["XLA_FLAGS"] == ""


@pytest.mark.parametrize("plugins", [(), ("xla_metal",)])
def test_without_cuda_no_flag_is_needed(environment, cuda, plugins):
    cuda(*plugins)
    environment["XLA_FLAGS"] = ""
    devices.exact_float32()
    assert environment["XLA_FLAGS"] == ""


def test_parts_that_follow_each_other_do_not_overlap():
    chip = chips.Chip("one", flops=2.0, bandwidth=5.0, memory=1, link=1.0)
    assert chip.seconds([6.0], [5.0]) == 3.0
    assert chip.seconds([6.0, 2.0], [5.0, 20.0]) == 3.0 + 4.0


@pytest.fixture
def gpus(monkeypatch):
    """Makes JAX find GPUs of a kind, whose allocators report `statistics`."""

    def make(kind, statistics, count=1):
        gpu = SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=lambda: statistics)
        monkeypatch.setattr(jax, "devices", lambda: [gpu] * count)

    measure_host.cache_clear()
    yield make
    measure_host.cache_clear()


def test_a_local_gpu_has_its_published_rates_and_the_memory_that_jax_has(gpus):
    gpus("NVIDIA H200", {"bytes_limit": 46 * 2**30}, count=4)
    chip = measure_host(4, "bfloat16")
    assert (chip.flops, chip.bandwidth) == (CHIPS["h200"].flops, CHIPS["h200"].bandwidth)
    assert chip.memory * MEMORY_SHARE == pytest.approx(46 * 2**30)
    assert (
        describe_devices(1) == "1 of 4 × NVIDIA H200" and describe_devices(4) == "4 × NVIDIA H200"
    )


@pytest.mark.parametrize(
    ("dtype", "precision", "teraflops"),
    [
        ("bfloat16", "float32", 989),
        ("float32", "float32", 67),
        ("float32", "highest", 67),
        ("float32", "tensorfloat32", 494),
        ("float32", None, 494),
    ],
)
def test_products_have_the_rate_of_their_precision(gpus, dtype, precision, teraflops):
    gpus("NVIDIA H100 80GB HBM3", {"bytes_limit": 2**30})
    with jax.default_matmul_precision(precision):
        assert measure_host(1, dtype).flops == teraflops * 1e12


def test_an_unknown_gpu_is_measured(gpus, monkeypatch):
    gpus("a new one", {"bytes_limit": 92})
    monkeypatch.setattr(chips, "_rates", lambda size, dtype, length: (1e12, 1e9))
    chip = measure_host(1, "bfloat16")
    assert (chip.name, chip.flops, chip.bandwidth, chip.memory) == ("a new one", 1e12, 1e9, 100)


def test_an_allocator_without_statistics(gpus):
    gpus("NVIDIA H200", None)
    with pytest.raises(InputError, match="unset XLA_PYTHON_CLIENT_ALLOCATOR"):
        measure_host(1, "bfloat16")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize\nbackend")])
def test_an_error_of_jax_that_names_the_platform(monkeypatch, error):
    def missing():
        raise error

    monkeypatch.setattr(jax, "devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(InputError, match=r"^JAX_PLATFORMS=cuda: JAX finds no device: \w.*$"):
        devices.find_devices()


def test_devices_of_a_host_share_it(monkeypatch):
    monkeypatch.setattr(chips, "_rates", lambda *_: (8e9, 4e9))
    chips.measure_host.cache_clear()
    one, four = (chips.measure_host(n, "float32") for n in (1, 4))
    chips.measure_host.cache_clear()
    assert four.flops == one.flops / 4 and four.memory == one.memory // 4
    assert four.bandwidth == one.bandwidth / 4
