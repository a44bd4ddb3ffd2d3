"""Time one PPO iteration on SmolLM2-135M, or any Llama: this project, PyTorch and Tunix in turns.

All sides do the same work on the same prompts, in float32 unless `--dtype` names another dtype: a
rollout up to the longest response, scoring through a 15-layer trunk, reference log-probabilities,
and `epochs` full-batch epochs on LoRA (r 16 on q, k, v, o) and a value head. `jax_ppo`, `torch_ppo`
and `tunix_ppo` describe the details. Each side has its own process, as in use, and waits while
another one works. Turns alternate, so that a machine whose speed drifts slows all sides, and the
ratio is computed turn by turn. A turn has two iterations, of which the last counts: in the first
one caches are cold after the wait, on some machines even the memory.

    python -m benchmarks.ppo_iteration --model_dir=outputs/models/SmolLM2-135M-Instruct

`--workload=real` takes everyday prompts and, as lengths, those of the responses that the model
samples to them, at most `--new_tokens`. All sides then sample up to the longest length, whatever
the tokens are, and tokens beyond the length of a response do not count. `--torch_without_cache`
makes the PyTorch side compute all positions for every token, as loops without a KV cache do.
`--torch_generate` says how the PyTorch side samples: in one of the ways of `torch_rollout`, or in
the fastest of them ("best"). It compiles before the first turn or in its first iteration.
`--algorithms=ppo,rloo,grpo` compares the algorithms of this project instead, and adds the peak
memory of each process.
`--tunix_python=ENV/bin/python` adds Tunix from its own environment (`pip install google-tunix`),
since it needs an older safetensors than this project.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import workload
from benchmarks.side import Side
from benchmarks.workload import Workload

PHASES = ("rollout", "score", "update", "total")
WORKLOADS = {"equal": workload.equal, "real": workload.real}
TORCH_GENERATE = ("eager", "static", "continuous", "best")
Times = Mapping[str, Sequence[Mapping[str, float]]]  # side → seconds by phase of each turn


def main() -> None:
    """Prints a row per phase: the median seconds of each side, and the median pairwise ratio."""
    args = parse_arguments()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        work = pool.apply(WORKLOADS[args.workload], (args,))
    print(work, flush=True)
    sides = start_sides(args, work)
    for side in sides.values():
        side.ready()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(args.turns):
        for name, side in sides.items():
            times[name].append(side.turn())
            print(json.dumps({"side": name, "turn": turn, **times[name][-1]}), flush=True)
    for name, side in sides.items():
        print(f"# {name}: peak memory {side.peak_bytes() / 2**30:.2f} GiB", flush=True)
        side.close()
    print_table(times)


def parse_arguments() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt_len", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument(
        "--lengths", type=workload.parse_numbers, help="of the responses, instead of --new_tokens"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workload", choices=WORKLOADS, default="equal")
    parser.add_argument("--iterations", type=int, default=2, help="of a turn; the last counts")
    parser.add_argument("--pack_levels", type=int, default=4)
    parser.add_argument("--score_batch", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--torch_without_cache", action="store_true")
    parser.add_argument("--torch_generate", choices=TORCH_GENERATE, default="eager")
    parser.add_argument(
        "--algorithms",
        type=lambda text: text.split(","),
        default=[],
        help="compare these algorithms of this project, such as ppo,rloo,grpo, and nothing else",
    )
    parser.add_argument("--samples_per_prompt", type=int, default=4, help="of rloo and grpo")
    parser.add_argument("--tunix_python", help="interpreter of an environment with google-tunix")
    args = parser.parse_args()
    if args.tunix_python and args.dtype != "float32":
        parser.error(f"--dtype={args.dtype}: --tunix_python needs float32")
    if args.torch_without_cache and args.torch_generate != "eager":
        parser.error(f"--torch_generate={args.torch_generate}: needs the cache")
    if args.lengths and args.workload == "real":
        parser.error("--lengths: --workload=real samples the lengths")
    if args.lengths and len(args.lengths) != args.batch:
        parser.error(f"--lengths: names {len(args.lengths)} lengths, but --batch={args.batch}")
    return args


def start_sides(args: argparse.Namespace, work: Workload) -> dict[str, Side]:
    """Starts the process of each side; this project's side comes first."""
    own = {"dtype": args.dtype, "pack_levels": args.pack_levels, "score_batch": args.score_batch}
    sides: dict[str, tuple[str, str, dict[str, Any]]] = {}  # interpreter, module, options
    for name in args.algorithms:
        groups = {} if name == "ppo" else {"samples_per_prompt": args.samples_per_prompt}
        sides[name] = sys.executable, "jax_ppo", own | {"algorithm": name} | groups
    if not args.algorithms:
        torch = {"dtype": args.dtype, "cache": not args.torch_without_cache}
        torch |= {"generate": args.torch_generate}
        sides["jax"] = sys.executable, "jax_ppo", own
        sides["torch"] = sys.executable, "torch_ppo", torch
        if args.tunix_python:
            sides["tunix"] = args.tunix_python, "tunix_ppo", {}
    return {
        name: Side(
            python,
            f"benchmarks.{module}",
            iterations=args.iterations,
            model_dir=args.model_dir,
            work=work,
            options=options,
        )
        for name, (python, module, options) in sides.items()
    }


def print_table(times: Times) -> None:
    """Prints median seconds, and the median over turns of each side's ratio to the first one."""
    first, *others = times
    titles = [f"{name} s" for name in times] + [f"{name}/{first}" for name in others]
    print(f"\n{'phase':8} " + " ".join(f"{title:>10}" for title in titles))
    for phase in PHASES:
        column = {name: [turn[phase] for turn in times[name]] for name in times}
        figures = [statistics.median(column[name]) for name in times]
        for name in others:
            pairs = zip(column[first], column[name], strict=True)
            figures.append(statistics.median(theirs / ours for ours, theirs in pairs))
        print(f"{phase:8} " + " ".join(f"{figure:10.2f}" for figure in figures))


if __name__ == "__main__":
    main()
