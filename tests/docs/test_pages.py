"""README and the documentation: what they point at exists."""

import importlib
import re
from functools import reduce

import pytest

from tests.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
GENERATED = ("docs/reference/options.md", "docs/reference/stages.md")  # when the site is built
ROOMS = "benchmarks configs conversion docs pipeline ppo sarm_jax tests".split()
EXAMPLES = ("configs/mine.py", "pipeline/stages/NAME.py")  # files that a reader is to write


def test_readme_is_short_and_has_no_records():
    lines = README.splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120
    assert not re.findall(r"\b20\d\d-\d\d-\d\d\b", README)
    assert not re.findall(r"\bcommit [0-9a-f]{7}\b|`[0-9a-f]{7,}`", README)


def test_results_have_no_hashes():
    for name, text in TEXTS.items():
        if name.startswith("docs/results/"):
            assert not re.findall(r"\bcommit [0-9a-f]{7}\b|`[0-9a-f]{7,40}`", text), name


@pytest.mark.parametrize("page", TEXTS)
def test_files_and_functions_exist(page):
    text = TEXTS[page]
    for path, name in re.findall(r"`([\w/]+)\.py: ([\w.]+)`", text):
        module = importlib.import_module(path.replace("/", "."))
        assert reduce(getattr, name.split("."), module), (path, name)
    for path in set(re.findall(r"`((?:\w+/)+\w+\.(?:py|md|json|jsonl|ipynb|png|toml|yml))`", text)):
        if path.split("/")[0] in ROOMS and path not in (*GENERATED, *EXAMPLES):
            assert (ROOT / path).exists(), path


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page):
    """MkDocs checks the links within docs/; these pages are shown by GitHub."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[page]):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`|\s{4})make ([a-z][a-z0-9-]+)", TEXTS[page], re.MULTILINE):
        if page != "docs/notebook.md":  # which records what was run then
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_licence_is_there():
    assert (ROOT / "LICENSE").exists()
