"""Time identify against the forward passes alone, in turns, on the same responses.

    python -m benchmarks.identify_cost --sarm=outputs/smollm2/sarm \\
        --pairs=outputs/smollm2/data/pairs.jsonl --count=1000 --rounds=3

Both run once before they are timed, so that nothing compiles in a timed run. All responses are made
distinct, because identify scores equal responses only once.
"""

import argparse
import time

import numpy as np

from conversion import load_sarm
from sarm_jax.features.identify import IdentifyConfig, identify
from sarm_jax.io.jsonl import read_jsonl


def main() -> None:
    """Prints the seconds of each run and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sarm", required=True)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    fields = {"prompt": str, "chosen": str, "rejected": str}
    rows = read_jsonl(args.pairs, fields)
    pairs = [
        row | {side: f"{row[side]} {i}" for side in ("chosen", "rejected")}
        for i, row in enumerate((rows * (args.count // len(rows) + 1))[: args.count])
    ]
    model = load_sarm(args.sarm, "float32")
    model.max_length = 512
    config = IdentifyConfig(
        top_k=10, method="differential", tau_quantile=0.98, false_alarm_budget=0.05, seed=0
    )
    prompts = [row["prompt"] for row in pairs] * 2
    responses = [row[side] for side in ("chosen", "rejected") for row in pairs]

    def forward() -> None:
        model.score(prompts, responses, latent_indices=[0])

    def full() -> None:
        identify(config, model, pairs)

    forward()
    full()
    seconds: dict[str, list[float]] = {"forward": [], "identify": []}
    for turn in range(args.rounds):
        runs = [("forward", forward), ("identify", full)]
        for name, run in runs if turn % 2 == 0 else reversed(runs):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"{name} {seconds[name][-1]:.2f} s", flush=True)
    ratio = np.median(seconds["identify"]) / np.median(seconds["forward"])
    print(f"{args.count} pairs: identify takes {ratio:.3f} of the forward passes' time")


if __name__ == "__main__":
    main()
