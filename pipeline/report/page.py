"""report.html and figures/*.png: from what runs and evaluations left to what a person looks at.

The page needs nothing but itself, and cannot load anything: its Content-Security-Policy allows its
own style and script, by their hashes. Texts that models wrote go in as escaped JSON, and into the
document as text alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from pipeline.report.evaluations import EVALUATE, Evaluation, read_evaluation
from pipeline.report.pictures import file_name
from pipeline.report.runs import Run, read_run
from pipeline.report.samples import browser_rows, pairs_of
from pipeline.report.sections import (
    PROMPTS,
    Section,
    benchmark_sections,
    response_sections,
    run_sections,
)
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing
from sarm_jax.io.secrets import secrets, without_secrets
from sarm_jax.io.workdir import named_workdirs
from sarm_jax.reporting.page import HERE as SHARED
from sarm_jax.reporting.page import content_policy, environment, json_in_html, picture_uri

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """`runs` as `named_workdirs` reads them; `samples` per run in the browser, 0 for all."""

    runs: str
    samples: int

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise InputError(f"report.samples={self.samples}: must not be negative (0: all)")


def write_report(config: ReportConfig, workdir: Path) -> Path:
    """Reads everything, then writes the figures and, last, the page, whose path it returns."""
    named = named_workdirs(config.runs, workdir, "report.runs")
    runs = [read_run(*item, place) for place, item in enumerate(named.items())]
    evaluations = find_evaluations(named, workdir)
    pairs = pairs_of(runs, evaluations)
    sections = [
        *run_sections(runs),
        *response_sections(runs, evaluations, pairs, workdir),
        *benchmark_sections(evaluations, workdir),
    ]
    rows = browser_rows(pairs, config.samples)
    sections = _unique(sections)
    page = render(runs, sections, rows, len(pairs), workdir)
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    for section in sections:
        for picture in filter(None, section.pictures):
            with replacing(folder / f"{picture.name}.png", "wb") as file:
                file.write(picture.light)
    path = workdir / "report.html"
    with replacing(path) as file:
        file.write(without_secrets(page, secrets()))
    return path


def find_evaluations(named: Mapping[str, Path], workdir: Path) -> list[Evaluation]:
    """Those of the runs, and that of `workdir`, which may compare several."""
    folders = {folder.resolve(): (name, folder) for name, folder in named.items()}
    folders.setdefault(workdir.resolve(), (workdir.resolve().name, workdir))
    return [
        read_evaluation(name, folder)
        for name, folder in folders.values()
        if (folder / "eval").is_dir()
    ]


def render(
    runs: Sequence[Run],
    sections: Sequence[Section],
    rows: Sequence[dict],
    pairs: int,
    workdir: Path,
) -> str:
    """The page; `rows` are shown in its browser, of `pairs` that there are."""
    plain = list(dict.fromkeys(row["run"] for row in rows if row["after"]["terms"] is None))
    explain = f"{EVALUATE}{workdir}{PROMPTS} does."
    notes = [f"Nothing explains the scores of {', '.join(plain)} here; {explain}"] if plain else []
    style = (SHARED / "page.css").read_text("utf-8") + (HERE / "page.css").read_text("utf-8")
    script = (HERE / "page.js").read_text("utf-8")
    return (
        environment(HERE)
        .get_template("page.html")
        .render(
            names=[run.name for run in runs],
            sections=sections,
            picture_uri=picture_uri,
            style=Markup(style),
            script=Markup(script),
            policy=content_policy(style, script),
            data=json_in_html({"rows": rows}),
            shown=len(rows),
            explained=any(row["after"]["terms"] for row in rows),
            sample_notes=notes,
            pairs=pairs,
        )
    )


def _unique(sections: Sequence[Section]) -> list[Section]:
    """The same without empty figures and tables, and with a file name for each figure alone."""
    taken: set[str] = set()
    found = []
    for section in sections:
        pictures = []
        for picture in filter(None, section.pictures):
            name, number = picture.name, 2
            while name in taken:
                name, number = file_name(f"{picture.name}-{number}"), number + 1
            taken.add(name)
            pictures.append(dataclasses.replace(picture, name=name))
        kept = [table for table in section.tables if table]
        found.append(dataclasses.replace(section, pictures=pictures, tables=kept))
    return found
