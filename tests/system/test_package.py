"""The project as a package: what it installs, its names, and its command in any directory."""

import fnmatch
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline import cli
from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_public_names():
    import sarm_jax
    import sarm_jax.sampling.generate

    for name in sarm_jax.__all__:
        assert getattr(sarm_jax, name) is not None
    # The function and the older way to it, in any order of imports.
    from sarm_jax import generate
    from sarm_jax.generate import generate as older

    assert generate is older is sarm_jax.sampling.generate.generate


def test_every_file_of_a_package_is_installed():
    packages = ("sarm_jax", "ppo", "conversion", "configs", "pipeline")
    tracked = subprocess.run(
        ["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    data = PROJECT["tool"]["setuptools"]["package-data"]
    patterns = [f"{name.replace('.', '/')}/{p}" for name in data for p in data[name]]
    for path in tracked:
        if (ROOT / path).exists() and not path.endswith(".py"):
            assert any(fnmatch.fnmatch(path, pattern) for pattern in patterns), path
    for folder in {Path(path).parent for path in tracked if path.endswith(".py")}:
        assert (ROOT / folder / "__init__.py").exists(), folder


def test_runtime_requirements_have_no_test_tools():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {line.split(">")[0].split("=")[0].strip() for line in lines if line[:1].isalpha()}
    assert names and not names & {"torch", "peft", "trl", "pytest"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, code, last_line",
    [
        (["--version"], 0, "sarm-jax "),
        (["--version=true", "--config=configs/demo.py"], 2, "Unknown command line flag 'version'"),
        (["--config=configs/full_method.py:x"], 2, "this config takes no argument"),
        (["--config=configs/ablations.py"], 2, "alpha_005, alpha_02, tau_2, tau_4"),
        (["--config=configs/demo.py", "--stage=identify"], 2, "--stage=prepare_data makes it"),
    ],
)
def test_the_command_in_another_directory(tmp_path, options, code, last_line):
    command = [sys.executable, "-c", "from pipeline.command import run; run()", *options]
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    lines = (done.stdout if code == 0 else done.stderr).splitlines()
    assert (done.returncode, last_line in lines[-1]) == (code, True), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_config_of_the_project_is_found_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    full = str(ROOT / "configs" / "ablations.py")
    for argv in (
        ["x", "--config=configs/ablations.py:tau_2"],
        ["x", "--config", "configs/ablations.py:tau_2"],
    ):
        changed = cli.with_installed_config(argv)
        assert changed[-1].removeprefix("--config=") == f"{full}:tau_2"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ablations.py").write_text("")  # the user's own comes first
    argv = ["x", "--config=configs/ablations.py:tau_2"]
    assert cli.with_installed_config(argv) == argv


@pytest.mark.parametrize("value", ["configs/gone.py", "configs", "configs/data", "x" * 300])
def test_what_is_no_config_of_the_project_stays(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    assert cli.with_installed_config(["x", f"--config={value}"]) == ["x", f"--config={value}"]


@pytest.mark.parametrize(
    "config, folder",
    [
        ("configs/ablations.py:tau_2", "ablations_tau_2"),
        ("configs/reference.py:a/steering", "reference"),
        ("configs/smollm2.py", "smollm2"),
    ],
)
def test_the_default_working_directory(config, folder):
    assert cli._run_name(config) == folder
