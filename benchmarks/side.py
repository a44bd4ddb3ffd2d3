"""Run a side of `ppo_iteration` in its own process and, if needed, its own environment.

    python -m benchmarks.side MODULE ITERATIONS

The first line of the input holds the arguments of the module's `build` as JSON. For every further
line, the side runs ITERATIONS iterations and writes the seconds of the last one.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.process_memory import status_bytes
from benchmarks.workload import Workload


class Side:
    """A side as the benchmark sees it. It loads in the background.

    Args:
        python: interpreter of the side's environment.
        module: module with the function `build`.
        iterations: iterations of a turn.
        model_dir: directory of the model.
        work: the workload.
        options: further arguments of `build`.
    """

    def __init__(
        self,
        python: str,
        module: str,
        iterations: int,
        model_dir: str,
        work: Workload,
        options: Mapping[str, Any],
    ) -> None:
        command = [python, "-m", "benchmarks.side", module, str(iterations)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # sides share a GPU
        )
        self._send([str(Path(model_dir).resolve()), vars(work), dict(options)])

    def ready(self) -> None:
        """Waits until the side has loaded its models."""
        self._receive()

    def turn(self) -> dict[str, float]:
        """Runs a turn and returns the seconds of each phase."""
        self._send("go")
        return self._receive()

    def peak_bytes(self) -> int:
        """Returns the largest resident memory of the process so far; 0 if it is not Linux."""
        status = Path(f"/proc/{self.process.pid}/status")
        return status_bytes(status.read_text(), "VmHWM") if status.exists() else 0

    def close(self) -> None:
        """Terminates the process and all its threads."""
        self.process.terminate()
        self.process.wait()

    def _send(self, message: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def _receive(self) -> Any:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args}: ended with exit code {self.process.wait()}")
        return json.loads(answer)


def main() -> None:
    """Runs the side until the input ends."""
    module, iterations = importlib.import_module(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # sends what libraries print to stderr, so that it is not taken for an answer
    model_dir, work, options = json.loads(sys.stdin.readline())
    side = module.build(model_dir, Workload(**work), **options)
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        for _ in range(iterations):
            spans = side.iteration()
        print(json.dumps(spans), file=answers, flush=True)


if __name__ == "__main__":
    main()
