"""The shell commands of README and the quickstart, with `make` targets as their recipes."""

import re
import shlex
import subprocess

from tests.paths import ROOT

FIRST_PAGES = ("README.md", "docs/quickstart.md")


def lines_of(page: str) -> list[str]:
    """Returns the commands in the shell blocks of a page, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def recipe(target: str, *variables: str) -> list[list[str]]:
    """Returns the words of each command of a `make` target that starts a program of ours."""
    shown = subprocess.run(
        ["make", "--dry-run", *variables, target],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    programs = re.findall(
        r"python (main\.py .*|-m (?:conversion|benchmarks)\..*)", shown.replace("\\\n", " ")
    )
    return [shlex.split(program) for program in programs if "from_gguf" not in program]


def main_options(target: str, *variables: str) -> list[str]:
    """Returns the options of the first `main.py` of a `make` target."""
    return next(words[1:] for words in recipe(target, *variables) if words[0] == "main.py")
