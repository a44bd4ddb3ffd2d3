"""Writes the TensorBoard events of a run, in the thread that logs them.

The SummaryWriter of tensorboardX writes in a thread of its own. If the disk is full, that thread
dies and the run waits for it forever. Its EventsWriter raises in the calling thread instead.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

from ppo.tracking.trackers.tracker import Entry


class Board:
    """An events file in `workdir`, which replaces earlier events from `first_step` on.

    `descriptions` say what some metrics mean; their charts show it.
    """

    def __init__(
        self, workdir: Path, first_step: int, descriptions: Mapping[str, str] | None = None
    ):
        self._undescribed = dict(descriptions or {})  # those that no event has yet
        self._writer = EventsWriter(str(workdir / "events"))
        self._add(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def log(self, entry: Entry) -> None:
        """Writes the metrics of an entry, and flushes them."""
        values = [self._value(name, x) for name, x in entry.metrics.items()]
        self._add(Event(step=entry.step, summary=Summary(value=values)))
        self._writer.flush()

    def finish(self, failed: bool) -> None:
        """Flushes and closes the file."""
        self._writer.close()

    def _value(self, name: str, x: float) -> Summary.Value:
        """Returns a metric; its first event has the description, which TensorBoard then keeps."""
        description = self._undescribed.pop(name, None)
        if description is None:
            return Summary.Value(tag=name, simple_value=x)
        metadata = SummaryMetadata(summary_description=description)
        return Summary.Value(tag=name, simple_value=x, metadata=metadata)

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
