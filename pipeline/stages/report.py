"""Write one page for a run, or for several side by side."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from pipeline.feature_names import feature_names
from pipeline.inputs import Input, Kind
from pipeline.report.feature_files import CERTIFICATES, FILES
from pipeline.report.page import ReportConfig, write_report
from pipeline.stage import Stage
from sarm_jax.io.path_lists import escaped

LOG = logging.getLogger(__name__)
PROBES = (FILES[0], CERTIFICATES)  # files of other stages beside runs and evaluations


def validate(config: ConfigDict) -> ReportConfig:
    """Validates the section report."""
    feature_names(config)  # raises for a malformed file
    return ReportConfig(**config.report)


def run(config: ConfigDict, workdir: Path) -> None:
    """Write the report; no model is loaded and no network is used."""
    path = write_report(validate(config), workdir, feature_names(config))
    LOG.info("the report is in %s", path)


def records(config: ConfigDict, workdir: Path) -> dict:
    """Names the runs, and the evaluations of the working directory itself."""
    runs = config.report.runs or escaped(str(workdir))
    return {
        "report": config.report.to_dict() | {"runs": runs},
        "evaluations": str(workdir / "eval"),
    }


STAGE = Stage(
    name="report",
    summary="Runs and their evaluations → report.html and figures; no model, no network.",
    validate=validate,
    run=run,
    options=("report", "identify.feature_names"),
    inputs=(
        Input("identify.feature_names"),
        Input(
            "report.runs",
            Kind.RUNS,
            ("*metrics.csv", "*.jsonl", "*summary.json", "config.json", "eval/*.json*", *PROBES),
        ),
    ),
    own_inputs=("eval/*", *PROBES),
    output="report.html",
    makes=("report.html", "figures/"),
    after=("evaluate",),
    wanted=lambda config: bool(config.prompts_jsonl),
    records=records,
    processes="primary",
)
