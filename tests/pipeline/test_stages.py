"""The stages are found by name, and a command imports no other stage's modules."""

import subprocess
import sys

import pytest

from pipeline import stages
from tests.paths import ROOT


@pytest.mark.parametrize("name", [*stages.STAGES, "all"])
def test_every_stage_says_what_it_does(name):
    run = stages.load(name).run
    assert run.__module__ == f"pipeline.stages.{name}"
    assert run.__doc__ and run.__doc__.splitlines()[0].endswith(".")


def test_help_waits_for_no_plots_tests_or_dashboards():
    heavy = "matplotlib scipy.stats tensorboardX torch ppo.train".split()
    program = f"import sys, main; print(*({set(heavy)} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stdout.split()) == (0, [])


@pytest.mark.parametrize(
    "content, says",
    [
        ("def get_config():\n    return 1 / 0\n", "bad.py:2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    pass\n", "bad.py: its get_config() must return a ConfigDict"),
        ("x = 1\n", "has no attribute 'get_config'"),
    ],
)
def test_a_config_that_is_none_is_named(tmp_path, content, says):
    (tmp_path / "bad.py").write_text(content)
    command = [sys.executable, "main.py", f"--config={tmp_path}/bad.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and says in done.stderr
