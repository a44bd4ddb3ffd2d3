"""One PPO iteration on SmolLM2-135M, or any Llama: this project, PyTorch and Tunix, alternately.

All do the same work on the same prompts, in float32 unless `--dtype` says otherwise: a rollout up
to the longest response, scoring through a 15-layer trunk, reference log-probabilities, and `epochs`
full-batch epochs on LoRA (r 16 on q, k, v, o) and a value head; `jax_ppo`, `torch_ppo` and
`tunix_ppo` say how. Each side has a process to itself, as in use, and waits while another works.
Turns alternate, so that a machine whose speed drifts slows all; the ratio is taken turn by turn. A
turn is two iterations of which the last counts: the first finds the caches, and on some machines
its very memory, cold after the wait.

    python -m benchmarks.ppo_iteration --model_dir=outputs/models/SmolLM2-135M-Instruct

`--workload=real` takes everyday prompts, and as lengths those of the responses that the model
samples to them, at most `--new_tokens`; the sides then sample on to the longest, whatever the
tokens, and what is beyond a response's length does not count. `--torch_without_cache` makes the
PyTorch side compute all positions at every token, as loops without a KV cache do.
`--tunix_python=ENV/bin/python` adds Tunix, from an environment of its own (`pip install
google-tunix`): it asks for an older safetensors than this project.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from typing import Any

from benchmarks import workload
from benchmarks.side import Side

PHASES = ("rollout", "score", "update", "total")
WORKLOADS = {"equal": workload.equal, "real": workload.real}


def main() -> None:
    """Prints a row per phase: median seconds of either side, and the median pairwise ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt_len", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--lengths", type=_numbers, help="of the responses, instead of new_tokens")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workload", choices=WORKLOADS, default="equal")
    parser.add_argument("--iterations", type=int, default=2, help="of a turn; the last counts")
    parser.add_argument("--pack_levels", type=int, default=4)
    parser.add_argument("--score_batch", type=int, default=4)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--torch_without_cache", action="store_true")
    parser.add_argument("--tunix_python", help="the Python of an environment with google-tunix")
    args = parser.parse_args()
    if args.tunix_python and args.dtype != "float32":
        parser.error(f"--dtype={args.dtype}: Tunix's side is float32")
    if args.lengths and args.workload == "real":
        parser.error("--lengths: --workload=real has lengths of its own")
    if args.lengths and len(args.lengths) != args.batch:
        parser.error(f"--lengths: {len(args.lengths)} of them, and --batch={args.batch}")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        work = pool.apply(WORKLOADS[args.workload], (args,))
    print(work, flush=True)
    options: dict[str, tuple[Any, ...]] = {
        "jax": (args.dtype, args.pack_levels, args.score_batch),
        "torch": (args.dtype, not args.torch_without_cache),
        "tunix": (),
    }
    pythons = {"jax": sys.executable, "torch": sys.executable, "tunix": args.tunix_python}
    sides = {
        name: Side(
            python,
            f"benchmarks.{name}_ppo",
            args.iterations,
            args.model_dir,
            work,
            *options[name],
        )
        for name, python in pythons.items()
        if python
    }
    for side in sides.values():
        side.ready()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(args.turns):
        for name, side in sides.items():
            times[name].append(side.turn())
            print(json.dumps({"side": name, "turn": turn, **times[name][-1]}), flush=True)
    for side in sides.values():
        side.close()
    others = list(sides)[1:]
    titles = [f"{name} s" for name in sides] + [f"{name}/jax" for name in others]
    print(f"\n{'phase':8} " + " ".join(f"{title:>10}" for title in titles))
    for phase in PHASES:
        column = {name: [turn[phase] for turn in times[name]] for name in sides}
        figures = [statistics.median(column[name]) for name in sides]
        for name in others:
            pairs = zip(column["jax"], column[name], strict=True)
            figures.append(statistics.median(theirs / ours for ours, theirs in pairs))
        print(f"{phase:8} " + " ".join(f"{figure:10.2f}" for figure in figures))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
