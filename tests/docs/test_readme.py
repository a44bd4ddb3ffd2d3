"""What README points at is there."""

import importlib
import re
from functools import reduce

import pytest

from tests.paths import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RECORD = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
SOURCES = (".py", ".html", ".css", ".js")


@pytest.mark.parametrize("path, name", re.findall(r"`([\w/]+)\.py: ([\w.]+)`", TEXT))
def test_functions_of_the_equations_are_where_it_says(path, name):
    module = importlib.import_module(path.replace("/", "."))
    assert callable(reduce(getattr, name.split("."), module))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", TEXT + RECORD))))
def test_files_are_there(path):
    made = ("data/", "probes/", "eval/", "figures/", "outputs/")  # by runs
    assert path.startswith(made) or (ROOT / path).exists()


def test_the_tree_has_a_line_for_every_source_file():
    tree = TEXT.split("## The tree")[1].split("```")[1]
    lines = [line.split()[0] for line in tree.splitlines() if line and not line.startswith(" ")]
    found = [name for name in lines if name.endswith(SOURCES)]
    there = {"main.py"} | {
        str(path.relative_to(ROOT))
        for part in ("configs", "sarm_jax", "ppo", "conversion", "benchmarks")
        for path in (ROOT / part).rglob("*")
        if path.suffix in SOURCES and path.name != "__init__.py"
    }
    assert sorted(found) == sorted(there)


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("here, text", [("README.md", TEXT), ("benchmarks/README.md", RECORD)])
def test_links_within_the_project_lead_somewhere(here, text):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (ROOT / here).parent / path if path else ROOT / here
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target
