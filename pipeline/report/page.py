"""Writes report.html and figures/*.png from the files of runs and evaluations.

The page is self-contained and cannot load anything: its Content-Security-Policy allows only its own
style and script, by their hashes. Texts by models are embedded as escaped JSON and enter the
document as text only.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from pipeline.report.evaluations import EVALUATE, Evaluation, read_evaluation
from pipeline.report.feature_pages import FeaturePages, read_feature_pages
from pipeline.report.invisible import visible
from pipeline.report.numbers import number
from pipeline.report.pictures import file_name
from pipeline.report.runs import Run, read_run
from pipeline.report.samples import browser_rows, features_of, pairs_of
from pipeline.report.sections import (
    PROMPTS,
    Section,
    benchmark_sections,
    response_sections,
    run_sections,
)
from sarm_jax.features.feature_names import NO_NAMES, FeatureNames
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing
from sarm_jax.io.secrets import redact
from sarm_jax.io.workdir import named_workdirs
from sarm_jax.reporting.page import (
    SHARED,
    content_policy,
    environment,
    json_in_html,
    picture_uri,
)

HERE = Path(__file__).parent
IDENTIFY = "python main.py --config=CONFIG --stage=identify --workdir="


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Options of the report: `runs` as in `named_workdirs`, `samples` per run (0: all)."""

    runs: str
    samples: int

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise InputError(f"report.samples={self.samples}: must not be negative (0: all)")


def write_report(config: ReportConfig, workdir: Path, names: FeatureNames = NO_NAMES) -> Path:
    """Writes the figures and, last, the page.

    Args:
        config: the options.
        workdir: the working directory of the report.
        names: names of features, which stand behind their numbers.

    Returns:
        The path of the page.

    Raises:
        InputError: a run or an evaluation is missing or malformed; nothing is written.
    """
    named = named_workdirs(config.runs, workdir, "report.runs")
    runs = [
        dataclasses.replace(read_run(name, path, position), names=names)
        for position, (name, path) in enumerate(named.items())
    ]
    evaluations = [
        dataclasses.replace(evaluation, names=names)
        for evaluation in find_evaluations(named, workdir)
    ]
    pairs = pairs_of(runs, evaluations)
    sections = [
        *run_sections(runs),
        *response_sections(runs, evaluations, pairs=pairs, workdir=workdir),
        *benchmark_sections(evaluations, workdir),
    ]
    sections = _with_unique_names(sections)
    features = read_feature_pages(folders_of(named, workdir), runs, names)
    rows = browser_rows(pairs, config.samples)
    page = render(
        runs,
        sections,
        features=features,
        rows=rows,
        pairs=len(pairs),
        workdir=workdir,
        names=names,
    )
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    for section in sections:
        for picture in filter(None, section.pictures):
            with replacing(folder / f"{picture.name}.png", "wb") as file:
                file.write(picture.light)
    path = workdir / "report.html"
    with replacing(path) as file:
        file.write(redact(page))
    return path


def find_evaluations(named: Mapping[str, Path], workdir: Path) -> list[Evaluation]:
    """Reads the evaluations of the runs and of `workdir`, which may compare several runs."""
    return [
        read_evaluation(name, folder)
        for name, folder in folders_of(named, workdir).items()
        if (folder / "eval").is_dir()
    ]


def folders_of(named: Mapping[str, Path], workdir: Path) -> dict[str, Path]:
    """Returns the working directories of the runs, and `workdir` itself, each once."""
    places = {folder.resolve() for folder in named.values()}
    own = {} if workdir.resolve() in places else {workdir.resolve().name: workdir}
    return dict(named) | own


def render(
    runs: Sequence[Run],
    sections: Sequence[Section],
    *,
    features: Sequence[FeaturePages] = (),
    rows: Sequence[dict],
    pairs: int,
    workdir: Path,
    names: FeatureNames = NO_NAMES,
) -> str:
    """Renders the page.

    Args:
        runs: the runs.
        sections: the sections in their order.
        features: the pages on features, by working directory.
        rows: the rows of the browser of responses.
        pairs: the number of pairs that the rows were selected from.
        workdir: the working directory of the report, for commands in notes.
        names: names of features.
    """
    unexplained = dict.fromkeys(row["run"] for row in rows if row["after"]["terms"] is None)
    notes = []
    if unexplained:
        command = f"{EVALUATE}{workdir}{PROMPTS}"
        notes = [
            f"The scores of {', '.join(unexplained)} have no explanation; {command} makes one."
        ]
    style = (SHARED / "page.css").read_text("utf-8") + (HERE / "page.css").read_text("utf-8")
    script = (HERE / "page.js").read_text("utf-8")
    templates = environment(HERE)
    templates.filters |= {"visible": visible, "number": number}
    return templates.get_template("page.html").render(
        names=[run.name for run in runs],
        sections=sections,
        features=features,
        feature_names=names,
        identify=f"{IDENTIFY}{workdir}",
        picture_uri=picture_uri,
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
        data=json_in_html({"rows": rows, "names": names.of(features_of(rows))}),
        shown=len(rows),
        explained=any(row["after"]["terms"] for row in rows),
        sample_notes=notes,
        pairs=pairs,
    )


def _with_unique_names(sections: Sequence[Section]) -> list[Section]:
    """Drops empty figures and tables, and gives every figure a file name of its own."""
    taken: set[str] = set()
    result = []
    for section in sections:
        pictures = []
        for picture in filter(None, section.pictures):
            name, number = picture.name, 2
            while name in taken:
                name, number = file_name(f"{picture.name}-{number}"), number + 1
            taken.add(name)
            pictures.append(dataclasses.replace(picture, name=name))
        kept = [table for table in section.tables if table]
        result.append(dataclasses.replace(section, pictures=pictures, tables=kept))
    return result
