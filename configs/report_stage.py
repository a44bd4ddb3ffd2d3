"""The stage report: runs and their evaluations → report.html and figures/*.png."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from sarm_jax.evaluation.report.page import ReportConfig, write_report

LOG = logging.getLogger(__name__)


def run_report(config: ConfigDict, workdir: Path) -> None:
    """Needs no model and no network."""
    path = write_report(ReportConfig(**config.report), workdir)
    LOG.info("the report is in %s", path)
