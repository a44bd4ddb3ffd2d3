"""Writes the TensorBoard events of a run, in the thread that logs them.

The SummaryWriter of tensorboardX writes in a thread of its own. If the disk is full, that thread
dies and the run waits for it forever. Its EventsWriter raises in the calling thread instead.
"""

import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from ppo.tracking.trackers.tracker import Entry


class Board:
    """An events file in `workdir`, which replaces earlier events from `first_step` on."""

    def __init__(self, workdir: Path, first_step: int):
        self._writer = EventsWriter(str(workdir / "events"))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def log(self, entry: Entry) -> None:
        """Writes the metrics of an entry, and flushes them."""
        values = [Summary.Value(tag=name, simple_value=x) for name, x in entry.metrics.items()]
        self._add(Event(step=entry.step, summary=Summary(value=values)))
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        """Flushes and closes the file."""
        self._writer.close()

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
