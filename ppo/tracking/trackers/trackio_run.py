"""Logs a run to Trackio, which keeps all runs in one folder of its own (`TRACKIO_DIR`)."""

import contextlib
import io
import logging
from collections.abc import Mapping
from typing import Any

from ppo.tracking.trackers.tracker import Entry, flat_samples

LOG = logging.getLogger(__name__)


class TrackioRun:
    """A run of Trackio, which is new or, if the project has a run of this name, the same run again.

    Args:
        project: the project.
        name: the name, which no other run of the project has.
        options: all options, as the run's config.
    """

    def __init__(self, *, project: str, name: str, options: Mapping[str, Any]):
        import trackio

        self._trackio = trackio
        with _quiet():
            self._run = trackio.init(
                project=project, name=name, config=dict(options), resume="allow", embed=False
            )
        LOG.info("trackio show --project %s shows the run %s", project, name)

    def log(self, entry: Entry) -> None:
        """Logs an entry; samples are the table `samples`."""
        data: dict[str, Any] = dict(entry.metrics)
        if entry.samples:
            data["samples"] = self._trackio.Table(data=flat_samples(entry.samples))
        self._run.log(data, step=entry.step)

    def finish(self, failed: bool) -> None:
        """Writes what is not written yet."""
        with _quiet():
            self._trackio.finish()  # of the run of this thread


def _quiet() -> contextlib.AbstractContextManager:
    """Keeps Trackio's messages off stdout, on which commands print results."""
    return contextlib.redirect_stdout(io.StringIO())
