"""What README points at is there."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path, name", re.findall(r"`([\w/]+)\.py: ([\w.]+)`", TEXT))
def test_functions_of_the_equations_are_where_it_says(path, name):
    module = importlib.import_module(path.replace("/", "."))
    assert callable(reduce(getattr, name.split("."), module))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", TEXT))))
def test_files_are_there(path):
    made = ("data/", "probes/", "eval/", "figures/", "outputs/")  # by runs
    assert path.startswith(made) or (ROOT / path).exists()
