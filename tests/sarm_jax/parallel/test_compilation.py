"""Programs that one run has compiled are found by the next one."""

import os
import sys
import tempfile

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sarm_jax.io.signals import exit_after_cleanup
from sarm_jax.parallel.compilation import CACHE_VARIABLE, kept_programs


@pytest.fixture
def cache_hits():
    """Counts the programs that are read from the cache; all are cached, however small."""
    hits = []

    def listen(event: str, **_) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    settings = {
        "jax_compilation_cache_dir": None,  # the tests share one
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield hits
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.monitoring.unregister_event_listener(listen)


def run(x: float) -> float:
    """Traces and runs a function of its own, as every run of PPO does."""
    return float(jax.jit(lambda y: jnp.sin(y) * 3 + 1)(x))


def test_a_second_run_compiles_nothing(cache_hits):
    first = run(0.5)
    run(0.5)
    assert not cache_hits  # without the block nothing is kept
    with kept_programs():
        run(0.5)
        count = len(cache_hits)
        assert run(0.5) == first
        assert len(cache_hits) > count
    assert jax.config.jax_compilation_cache_dir is None
    count = len(cache_hits)
    run(0.5)
    assert len(cache_hits) == count


@pytest.mark.usefixtures("cache_hits")
def test_a_signal_leaves_no_programs(tmp_path, monkeypatch):
    left = []

    def leave(code: int) -> None:
        left.append(list(tmp_path.iterdir()))
        sys.exit(code)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit), kept_programs():
        assert len(list(tmp_path.iterdir())) == 1
        exit_after_cleanup(143)
    assert left == [[]]


@pytest.mark.usefixtures("cache_hits")
@pytest.mark.parametrize("before", [None, "/mine"])
def test_processes_that_are_started_meanwhile_use_the_same_programs(monkeypatch, before):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(CACHE_VARIABLE, before)
    with kept_programs():
        assert os.environ[CACHE_VARIABLE] == jax.config.jax_compilation_cache_dir
    assert os.environ.get(CACHE_VARIABLE) == before


@pytest.mark.usefixtures("cache_hits")
def test_a_cache_of_the_user_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    with kept_programs():
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
