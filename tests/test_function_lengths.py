"""The limit on the length of a function. Ruff counts statements (PLR0915), not lines."""

import ast

import pytest

from tests.paths import ROOT

MOST_LINES = 60
# Not configs, whose functions are lists of options.
FOLDERS = ("sarm_jax", "ppo", "conversion", "pipeline", "benchmarks", "tests")


def lengths(source: str) -> dict[str, int]:
    """Returns the number of lines of each function, by its line and name."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return {f"{f.lineno}: {f.name}": (f.end_lineno or 0) - f.lineno + 1 for f in functions}


@pytest.mark.parametrize("folder", FOLDERS)
def test_functions_are_short(folder: str):
    files = [*(ROOT / folder).rglob("*.py")]
    long = {
        f"{file.relative_to(ROOT)}:{name}": lines
        for file in files
        for name, lines in lengths(file.read_text(encoding="utf-8")).items()
        if lines > MOST_LINES
    }
    assert files and not long


def test_lines_are_counted_from_def_to_the_last_one():
    source = "@decorator\ndef one(\n    x,\n):\n    def two():\n        return x\n\n    return two"
    assert lengths(source) == {"2: one": 7, "5: two": 2}
