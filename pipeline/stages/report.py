"""One page for a run, or several side by side."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from pipeline.report.page import ReportConfig, write_report

LOG = logging.getLogger(__name__)


def options(config: ConfigDict) -> ReportConfig:
    """The section report."""
    return ReportConfig(**config.report)


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs and their evaluations → report.html and figures; no model, no network."""
    path = write_report(options(config), workdir)
    LOG.info("the report is in %s", path)
