"""The stages are found by name, and a command imports no other stage's modules."""

import subprocess
import sys

import pytest

from configs import stages


@pytest.mark.parametrize("name", [*stages.STAGES, "all"])
def test_every_stage_says_what_it_does(name):
    run = stages.load(name).run
    assert run.__module__ == f"configs.stages.{name}"
    assert run.__doc__ and run.__doc__.splitlines()[0].endswith(".")


def test_help_waits_for_no_plots_tests_or_dashboards():
    heavy = "matplotlib scipy.stats tensorboardX torch ppo.train".split()
    program = f"import sys, main; print(*({set(heavy)} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stdout.split()) == (0, [])
