"""Traces chosen steps with JAX's profiler, and summarises the trace.

The trace is written to `profile/` in the working directory, for XProf or TensorBoard. The summary,
`profile_summary.json`, needs no viewer: it has the seconds of each phase, and the operations with
the largest own time (without the operations inside them) over all threads and devices.
"""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import write_json

LOG = logging.getLogger(__name__)
STEP = "ppo_step"
PHASES = ("rollout", "score", "update")
SHOWN = 20  # operations in the summary
CONTAINERS = ("while", "call", "conditional")  # their time is that of the operations inside


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Options of the trace, the section `profile` of a config.

    `num_steps` steps are traced from `start_step` on; none if `start_step` is −1.

    Raises:
        InputError: an option is invalid; the message names `profile.<field>` and its value.
    """

    start_step: int
    num_steps: int

    def __post_init__(self) -> None:
        if self.start_step < -1:
            raise InputError(
                f"profile.start_step={self.start_step}: must be a step, or -1 for none"
            )
        if self.num_steps < 1:
            raise InputError(f"profile.num_steps={self.num_steps}: must be at least 1")

    def check_steps(self, total_steps: int) -> None:
        """Raises InputError if the trace does not end within the run."""
        if self.start_step >= 0 and self.start_step + self.num_steps > total_steps:
            raise InputError(
                f"profile.start_step={self.start_step} and "
                f"profile.num_steps={self.num_steps} end after ppo.total_steps={total_steps}"
            )


NO_PROFILE = ProfileConfig(start_step=-1, num_steps=1)


class Profiler:
    """Starts and stops the trace of a run in `workdir`."""

    def __init__(self, config: ProfileConfig, workdir: Path):
        self._first, self._last = config.start_step, config.start_step + config.num_steps - 1
        self._workdir = workdir
        self._tracing = False

    def check_start(self, done: int) -> None:
        """Warns if a resumed run has finished the first step of the trace already."""
        if 0 <= self._first < done:
            LOG.warning(
                "no trace: profile.start_step=%d is done already, the run is at step %d",
                self._first, done,
            )  # fmt: skip

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Surrounds step `number`: marks it in the trace, which it may start or stop."""
        if number == self._first and number >= 0:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # without the many calls of Python functions
            jax.profiler.start_trace(self._workdir / "profile", profiler_options=options)
            self._tracing = True
        try:
            with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
                yield
        except BaseException:
            self.stop()
            raise
        if number == self._last:
            self.stop()

    def stop(self) -> None:
        """Stops the trace, if there is one, and writes its summary."""
        if not self._tracing:
            return
        self._tracing = False
        jax.profiler.stop_trace()
        traces = sorted((self._workdir / "profile").rglob("*.xplane.pb"))
        summary = summarise_trace(ProfileData.from_file(str(traces[-1])))
        write_json(self._workdir / "profile_summary.json", summary)
        LOG.info("trace in %s\n%s", self._workdir / "profile", table(summary))


def phase(name: str) -> jax.profiler.TraceAnnotation:
    """Returns a context that marks a phase of a step, one of `PHASES`, in the trace."""
    return jax.profiler.TraceAnnotation(name)


def summarise_trace(data: ProfileData) -> dict[str, Any]:
    """Returns the seconds per step of the steps, their phases and the operations themselves."""
    steps: list[float] = []
    phases: dict[str, float] = defaultdict(float)
    operations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for plane in data.planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if event.name == STEP:
                    steps.append(event.duration_ns * 1e-9)
                elif event.name in PHASES:
                    phases[event.name] += event.duration_ns * 1e-9
                elif "hlo_op" in stats:
                    # A GPU runs many operations as one graph, and names them by their kernels.
                    operation = event.name if on_device else str(stats["hlo_op"])
                    key = (str(stats.get("hlo_module", "")), operation)
                    events.append((event.start_ns, event.duration_ns, key))
            for key, nanoseconds in own_times(events):
                operations[key].append(nanoseconds * 1e-9)
    count = max(len(steps), 1)
    busy = {key: sum(times) for key, times in operations.items()}
    busy = {key: s for key, s in busy.items() if key[1].split(".")[0] not in CONTAINERS}
    total, order = sum(busy.values()), sorted(busy, key=lambda key: -busy[key])
    return {
        "steps": len(steps),
        "step_seconds": sum(steps) / count,
        "phases": {name: phases[name] / count for name in PHASES},
        "operation_seconds": total / count,
        "top_operations": [
            {
                "program": program,
                "operation": operation,
                "seconds": busy[program, operation] / count,
                "share": busy[program, operation] / total,
                "calls": len(operations[program, operation]) / count,
            }
            for program, operation in order[:SHOWN]
        ],
    }


def own_times(events: Sequence[tuple[float, float, Any]]) -> list[tuple[Any, float]]:
    """Returns (key, duration without the events inside it) for each event of a thread.

    An event is inside an earlier one that does not end before it; kernels of a GPU that overlap a
    little are not.

    Args:
        events: (start, duration, key) of each event.
    """
    own: list[tuple[Any, float]] = []
    open_events: list[list] = []  # [end, key, own time], the innermost last

    def close(end: float) -> None:
        while open_events and open_events[-1][0] < end:
            _, key, time = open_events.pop()
            own.append((key, time))

    for start, duration, key in sorted(events, key=lambda event: (event[0], -event[1])):
        close(start + duration)
        if open_events:
            open_events[-1][2] -= duration
        open_events.append([start + duration, key, duration])
    close(float("inf"))
    return own


def table(summary: dict[str, Any]) -> str:
    """Formats the summary as lines of text."""
    lines = [f"{summary['step_seconds']:8.3f} s per step"]
    lines += [f"{seconds:8.3f} s {name}" for name, seconds in summary["phases"].items()]
    lines += ["operations, over all threads:"]
    lines += [
        f"{row['seconds']:8.3f} s {row['share']:6.1%} {row['calls']:6.0f} × {row['operation']} "
        f"({row['program']})"
        for row in summary["top_operations"][:10]
    ]
    return "\n".join(lines)
