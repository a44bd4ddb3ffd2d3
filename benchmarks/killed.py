"""Run `main.py` in a process that sends itself SIGKILL, or another signal, at a given moment.

    python -m benchmarks.killed --place=update --call=3 --delay=0.1 -- --config=configs/demo.py …
    python -m benchmarks.killed --record=calls.json -- --config=configs/demo.py …

The signal is sent `--delay` seconds after the `--call`-th call of a place has begun or, without a
delay, before that call does anything. `--record` writes the seconds of every call of every place,
unless the process is killed before it ends.
"""

import argparse
import functools
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pipeline.policy_evaluation
import pipeline.report.page
import pipeline.runner
import pipeline.sarm_checkpoints
import pipeline.stages.human_latents
import pipeline.stages.identify
import pipeline.stages.probe
import pipeline.stages.train
from pipeline.command import main
from ppo.held_out import HeldOut
from ppo.rollout import Sampler
from ppo.tracking.checkpoint import Checkpoints
from ppo.tracking.manifest import ManifestHandler
from ppo.tracking.metrics import RunLog
from ppo.train import Trainer
from ppo.update import Updater
from sarm_jax.parallel import processes
from sarm_jax.rewards.scoring import Scorer

PLACES: dict[str, tuple[Any, str]] = {
    "stage": (pipeline.runner, "run_stage"),
    "start": (Trainer, "_start"),
    "rollout": (Sampler, "sample"),
    "scoring": (Scorer, "score"),
    "update": (Updater, "update"),
    "log": (RunLog, "write"),
    "evaluation": (HeldOut, "evaluate"),
    "checkpoint": (Checkpoints, "save"),
    "manifest": (ManifestHandler, "finalize"),
    "sarm": (pipeline.sarm_checkpoints.SARMCheckpoints, "keep"),
    "export": (pipeline.stages.train, "save_adapter"),
    # identify: all files are written but the one that ends the stage
    "selection": (pipeline.stages.identify, "write_lab_files"),
    "demonstrations": (pipeline.stages.human_latents, "collect_human_latents"),
    # probe: first certificates.json, after the tables, then the file that ends the stage
    "certificates": (pipeline.stages.probe, "write_json"),
    # evaluate: the files on the policies after responses.jsonl
    "policies": (pipeline.policy_evaluation, "write_json"),
    # report: the figures, then the page
    "page": (pipeline.report.page, "replacing"),
}


def around(place: str, before, after) -> None:
    """Makes every call of a place call `before()` first and `after(seconds)` at its end."""
    owner, name = PLACES[place]
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        before()
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            after(time.perf_counter() - start)

    setattr(owner, name, wrapped)


def signal_at(place: str, call: int, delay: float, name: str) -> None:
    """Arranges for the signal `name` at a call of a place, counted from 1."""
    calls = 0

    def before() -> None:
        nonlocal calls
        calls += 1
        if calls == call and delay:
            threading.Thread(target=send, daemon=True).start()
        elif calls == call:
            send()

    def send() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), getattr(signal, name))

    around(place, before, lambda seconds: None)


def command() -> int:
    """Parses the arguments before "--" and runs main.py with the arguments after it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--place", choices=PLACES)
    parser.add_argument("--call", type=int, default=1)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--signal", default="SIGKILL")
    parser.add_argument("--record")
    separator = sys.argv.index("--")
    args = parser.parse_args(sys.argv[1:separator])
    sys.argv = ["main.py", *sys.argv[separator + 1 :]]
    seconds: dict[str, list[float]] = defaultdict(list)
    if args.place:
        signal_at(args.place, args.call, delay=args.delay, name=args.signal)
    for place in PLACES if args.record else ():
        around(place, lambda: None, seconds[place].append)
    code = main(sys.argv)
    if args.record:
        Path(args.record).write_text(json.dumps(seconds), encoding="utf-8")
    return code


if __name__ == "__main__":
    with processes.exit_without_barrier():
        sys.exit(command())
