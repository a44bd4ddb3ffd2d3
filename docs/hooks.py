"""MkDocs hooks: pages that are written when the site is built, and the executed notebook.

Options come from the source of `configs/base.py`. A comment above or behind an option documents it,
a comment above a section documents the section, and a comment with a blank line after it documents
the options below it. Stages come from the `Stage` objects. Neither page is committed.

The notebook is committed without outputs. `make docs` executes a copy of it, which the site shows.
mkdocs-jupyter leaves links in notebooks alone, so links to other pages are resolved here.
"""

import ast
import dataclasses
import io
import posixpath
import re
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import base  # noqa: E402
from pipeline.stage import Stage, load_all  # noqa: E402

# Imported now, because MkDocs takes sys.path back when it has loaded this file.
STAGES = sorted(load_all(), key=lambda stage: stage.output is None)
EXECUTED = ROOT / "outputs"  # copies of docs/notebooks/*.ipynb, with outputs
# The headings of reference/files.md that are not the name of their stage.
SECTIONS = {"train": "working-directory-of-a-run"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and shows notebooks as they were executed."""
    for name, text in (("options", options_page()), ("stages", stages_page())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    for file in files:
        executed = EXECUTED / Path(file.src_uri).name
        if file.src_uri.endswith(".ipynb") and executed.is_file():
            file.abs_src_path = str(executed)
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of a notebook to other pages into addresses on the site."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def address(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[1]))
        target = files.get_file_from_path(path)
        if target is None:
            raise PluginError(f"{page.file.src_uri}: links to {match[1]}, which is not a page")
        return f'href="{target.url_relative_to(page.file)}{match[2] or ""}"'

    return re.sub(r'href="([^":#]+\.(?:md|ipynb))(#[^"]*)?"', address, html)


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of the config, as its source has it."""

    field: str  # "dtype", or "ppo.gamma"
    default: str
    comment: str
    note: str  # on the options from this one on; mostly empty
    opens_section: bool

    @property
    def section(self) -> str:
        """The section that the option is in; empty for options of the top level."""
        return self.field if self.opens_section else self.field.rpartition(".")[0]


def options_page() -> str:
    """Returns the page on all options, section by section."""
    source = (ROOT / "configs" / "base.py").read_text(encoding="utf-8")
    options = read_options(source)
    check_complete(options)
    lines = [
        "# Options",
        "",
        "Every option with its default, from `configs/base.py`. A config is a Python file that",
        "changes some of them, and `--config.SECTION.NAME=VALUE` changes one on the command line.",
        "Flags with the names of the reference implementation are shorthands for options, and win",
        "over them; `--help` lists them. `{workdir}` in a path stands for the working directory.",
        "A value must have the type of its default. Whole numbers must fit int32, and others must",
        "fit float32: 0, or between 1.2e-38 and 3.4e+38 in size.",
        "[Files](files.md#lists-of-features-and-values) says how lists are written.",
        "",
    ]
    for section in dict.fromkeys(option.section for option in options):
        lines += _section(section, [o for o in options if o.section == section])
    return "\n".join(lines) + "\n"


def read_options(source: str) -> list[Option]:
    """Returns the options that a source assigns to `config`, in its order, with their comments."""
    behind, above, free = _comments(source)
    options = []
    pending = sorted(free)
    for node in sorted(_assignments(ast.parse(source)), key=lambda node: node.lineno):
        value = ast.get_source_segment(source, node.value) or ""
        comments = [above.get(node.lineno, ""), behind.get(node.end_lineno or node.lineno, "")]
        notes = [free[line] for line in pending if line < node.lineno]
        pending = [line for line in pending if line >= node.lineno]
        options.append(
            Option(
                field=ast.unparse(node.targets[0]).partition(".")[2],
                default="None" if value.startswith("placeholder(") else value,
                comment=" ".join(filter(None, comments)),
                note=" ".join(notes),
                opens_section=value == "ConfigDict()",
            )
        )
    return options


def check_complete(options: Sequence[Option]) -> None:
    """Raises PluginError unless the options are those of the config itself."""
    config = base.get_config()
    wanted = set(config.keys())
    for section in (name for name in config if hasattr(config[name], "keys")):
        wanted |= {f"{section}.{name}" for name in config[section]}
    difference = wanted ^ {option.field for option in options}
    if difference:
        raise PluginError(f"configs/base.py: cannot read {', '.join(sorted(difference))}")


def stages_page() -> str:
    """Returns the page on all stages, in the order of `--stage=all`."""
    lines = [
        "# Stages",
        "",
        "A stage reads files and writes files into the working directory. `--stage=NAME` runs one;",
        "without it `train` runs. `--stage=all` runs, in this order, every stage whose inputs the",
        "config names, and leaves out what is up to date ([stages.json](files.md#stagesjson)). It",
        "never runs `plan`, which leaves nothing to other stages. For the lab it runs the study:",
        "every seed under every condition.",
        "",
        "| stage | what it does |",
        "|---|---|",
        *(f"| [`{stage.name}`](#{stage.name}) | {escaped(stage.summary)} |" for stage in STAGES),
        "",
    ]
    for stage in STAGES:
        lines += _stage(stage)
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Returns the text so that Markdown shows it as it is; code between backticks stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    plain = (re.sub(r"([\\*_<>\[\]|])", r"\\\1", part) for part in parts[::2])
    code = [part.replace("|", "\\|") for part in parts[1::2]]
    return "".join(text for pair in zip(plain, [*code, ""], strict=True) for text in pair)


def _comments(source: str) -> tuple[dict[int, str], dict[int, str], dict[int, str]]:
    """Returns comments by line: those behind code, blocks above a line of code, and free blocks.

    A block above code is under the line of that code, a free block under its own last line.
    """
    behind: dict[int, str] = {}
    own: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (own if alone else behind)[token.start[0]] = token.string.lstrip("# ").rstrip()
    lines = source.splitlines()
    above: dict[int, str] = {}
    free: dict[int, str] = {}
    block: list[str] = []
    for line in sorted(own):
        block.append(own[line])
        if line + 1 in own:
            continue
        follows = lines[line] if line < len(lines) else ""
        place, key = (above, line + 1) if follows.strip() else (free, line)
        place[key] = " ".join(block)
        block = []
    return behind, above, free


def _assignments(tree: ast.Module) -> list[ast.Assign]:
    """Returns the assignments to attributes of `config`, or to attributes of these."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Attribute)
        and ast.unparse(node.targets[0]).startswith("config.")
    ]


def _section(section: str, options: Sequence[Option]) -> list[str]:
    lines = [f"## {section or 'Top level'}", ""]
    in_table = False
    for option in options:
        if option.note:
            lines += [""] * in_table + [escaped(option.note), ""]
            in_table = False
        if option.opens_section:
            lines += [escaped(option.comment), ""] if option.comment else []
            continue
        if not in_table:
            lines += ["| option | default | meaning |", "|---|---|---|"]
            in_table = True
        lines.append(f"| `{option.field}` | `{option.default}` | {escaped(option.comment)} |")
    return [*lines, ""]


def _stage(stage: Stage) -> list[str]:
    output = stage.output(base.get_config()) if callable(stage.output) else stage.output
    varies = ", or another file if options say so" if callable(stage.output) else ""
    kinds = list(dict.fromkeys(given.kind for given in stage.inputs))
    reads = [
        f"{_codes([x.field for x in stage.inputs if x.kind is kind])} ({escaped(kind.value)})"
        for kind in kinds
    ]
    if stage.own_inputs:
        reads.append(f"{_codes(stage.own_inputs)} (in the working directory)")
    rows = [
        ("reads", "<br>".join(reads)),
        ("options that the result depends on", _codes(stage.options)),
        ("writes", _codes(stage.makes)),
        ("writes last", f"`{output}`{varies}" if output else ""),
        ("runs after", ", ".join(f"[`{name}`](#{name})" for name in stage.after)),
    ]
    more = f"[Files](files.md#{SECTIONS.get(stage.name, stage.name)}) has the content of its files."
    lines = [f"## {stage.name}", "", escaped(stage.summary), "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in rows if text]
    return [*lines, "", more, ""]


def _codes(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
