"""A side of `ppo_iteration`, in a process and, if need be, an environment of its own.

    python -m benchmarks.side MODULE ITERATIONS

The first line it reads holds the arguments of the module's `build` as JSON; to every other line it
answers with the seconds of the last of ITERATIONS iterations.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.workload import Workload


class Side:
    """Loads in the background; `ready` waits for it, `turn` runs it."""

    def __init__(
        self, python: str, module: str, iterations: int, model_dir: str, work: Workload, *rest: Any
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
        self._say([str(Path(model_dir).resolve()), vars(work), *rest])

    def ready(self) -> None:
        """Returns when it is loaded."""
        self._hear()

    def turn(self) -> dict[str, float]:
        """Seconds by phase."""
        self._say("go")
        return self._hear()

    def close(self) -> None:
        """Ends the process, whatever threads it has."""
        self.process.terminate()
        self.process.wait()

    def _say(self, line: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(line), file=self.process.stdin, flush=True)

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args}: ended with {self.process.wait()}")
        return json.loads(answer)


def main() -> None:
    """Serves whoever started it until there are no more lines."""
    module, iterations = importlib.import_module(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    model_dir, work, *rest = json.loads(sys.stdin.readline())
    side = module.build(model_dir, Workload(**work), *rest)
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        for _ in range(iterations):
            spans = side.iteration()
        print(json.dumps(spans), file=answers, flush=True)


if __name__ == "__main__":
    main()
