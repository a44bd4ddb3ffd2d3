"""Time PPO steps of R runs in one process, over one copy of the models, against separate processes.

    python -m benchmarks.many_runs --model_dir=outputs/models/SmolLM2-135M-Instruct
    python -m benchmarks.many_runs --model_dir=outputs/demo/seed_0/policy --batch=128 \\
      --prompt_len=8 --new_tokens=16 --pack_levels=0 --score_batch=128

For every R the two sides take turns: R runs in a group (`ppo.run_group`), and one run in each of
`--processes` processes at the same time. A turn has two iterations, of which the last counts.
The table has run-steps a second, CPU seconds a run-step, which other work on the machine changes
less, and peak memory. R separate processes would take R times the memory of one.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.side import Side
from benchmarks.workload import Workload, parse_numbers
from conversion.load import read_policy_config

# Run-steps a second, their ratio, CPU seconds a run-step, and peak memory of each process.
TITLES = (
    "R",
    "group /s",
    "separate /s",
    "ratio",
    "group cpu s",
    "one cpu s",
    "group GiB",
    "one GiB",
)


def main() -> None:
    """Prints a row for each number of runs."""
    args = parse_arguments()
    work = make_work(args)
    print(" ".join(f"{title:>14}" for title in TITLES), flush=True)
    for runs in args.runs:
        group, separate = [], []
        together = start(args, work, runs)
        alone = [start(args, work, 1) for _ in range(args.processes)]
        for side in (together, *alone):
            side.ready()
        for _ in range(args.turns):
            group.append(together.turn())
            with ThreadPoolExecutor(args.processes) as pool:
                separate.append(list(pool.map(Side.turn, alone)))
        figures = summarise(runs, group, separate)
        figures += [side.peak_bytes() / 2**30 for side in (together, alone[0])]
        for side in (together, *alone):
            side.close()
        print(json.dumps({"runs": runs, "group": group, "separate": separate}), file=sys.stderr)
        print(f"{runs:14} " + " ".join(f"{figure:14.3f}" for figure in figures), flush=True)


def summarise(
    runs: int, group: list[dict[str, float]], separate: list[list[dict[str, float]]]
) -> list[float]:
    """Returns medians over turns: run-steps/s of both sides, their ratio, CPU seconds of both."""
    group_rate = [runs / turn["total"] for turn in group]
    separate_rate = [sum(1 / side["total"] for side in turn) for turn in separate]
    ratios = [ours / theirs for ours, theirs in zip(group_rate, separate_rate, strict=True)]
    columns = [
        group_rate,
        separate_rate,
        ratios,
        [turn["cpu"] / runs for turn in group],
        [statistics.mean(side["cpu"] for side in turn) for turn in separate],
    ]
    return [statistics.median(column) for column in columns]


def start(args: argparse.Namespace, work: Workload, runs: int) -> Side:
    """Starts a process with `runs` runs."""
    options: dict[str, Any] = {
        "runs": runs,
        "dtype": args.dtype,
        "pack_levels": args.pack_levels,
        "score_batch": args.score_batch,
    }
    return Side(
        sys.executable,
        "benchmarks.group_ppo",
        iterations=2,
        model_dir=args.model_dir,
        work=work,
        options=options,
    )


def make_work(args: argparse.Namespace) -> Workload:
    """Makes random prompts of `prompt_len` tokens of the model's vocabulary."""
    size = read_policy_config(args.model_dir).vocab_size
    tokens = np.random.default_rng(0).integers(3, size, (args.batch, args.prompt_len))
    return Workload(tokens.tolist(), [args.new_tokens] * args.batch, epochs=args.epochs)


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--runs", type=parse_numbers, default=(1, 2, 4, 8, 16))
    parser.add_argument("--processes", type=int, default=2, help="of the other side")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt_len", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--pack_levels", type=int, default=4)
    parser.add_argument("--score_batch", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser.parse_args()


if __name__ == "__main__":
    main()
