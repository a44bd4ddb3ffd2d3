"""Measure the memory of SAE pretraining on activations in files, and a step against in-memory ones.

    python -m benchmarks.sae_memory --folder=outputs/sae_memory --tokens=10000000

Random states are written to files as the stages write them: 23 GB for ten million of 576 numbers,
removed at the end. An SAE is then pretrained on them, with all that the stages do: the
initialisation, the steps, and the metrics on held-out states. Peak memory is the resident memory
that Linux reports (VmHWM) of a process that does nothing else, with Python, JAX and the SAE.

For the time of a step the same states, `--compared` of them, are read from files and from an array
in turns, each in a process of its own. The first call, which compiles, does not count.
"""

import argparse
import statistics
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks.process_memory import status_bytes
from sarm_jax.io.matrix_files import open_matrix, remove_matrix, writing_matrix
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.training.activations import Activations
from sarm_jax.training.sae_training import STEPS_PER_CALL, SAETraining, pretrain_sae

GIB = 2**30
BLOCK = 1 << 16  # rows that are drawn; every block of the matrix is a multiple of them
TURN = 50  # tokens, the last of which is pooled


def write_states(folder: Path, tokens: int, width: int, seed: int) -> float:
    """Writes random states and returns the seconds that it took."""
    rng, start = np.random.default_rng(seed), time.perf_counter()
    drawn = rng.standard_normal((min(BLOCK, tokens), width), np.float32)
    with writing_matrix(folder, (tokens, width)) as matrix:
        for first in range(0, tokens, len(drawn)):
            block = drawn[: tokens - first] * np.float32(rng.uniform(0.5, 2))
            matrix.write(first, block)
    return time.perf_counter() - start


def pretrain(
    args: argparse.Namespace, folder: Path, *, tokens: int, steps: int, in_memory: bool
) -> dict:
    """Pretrains an SAE.

    Returns:
        `before` and `peak`, resident bytes before and during the training, `step`, the median
        seconds of a step, and `cpu`, the median CPU seconds of all threads.
    """
    before = _resident("VmRSS")
    matrix = open_matrix(folder, (tokens, args.width), None)
    assert matrix is not None
    x_nd: Any = matrix[:] if in_memory else matrix
    states = Activations(x_nd, np.arange(tokens) % TURN == TURN - 1)
    held_out_n = np.arange(tokens) >= tokens - args.held_out
    options = SAETraining(
        steps=steps, batch_tokens=args.batch, learning_rate=1e-3, warmup_fraction=0.03,
        dead_after_steps=100, aux_k=256, aux_weight=1 / 32, seed=args.seed,
    )  # fmt: skip
    sae = SAE(SAEConfig(args.width, args.latents, args.k), rngs=nnx.Rngs(args.seed))
    times: list[tuple[float, float]] = []
    train, held_out = states.select(~held_out_n), states.select(held_out_n)
    clocks = time.perf_counter, time.process_time
    pretrain_sae(
        sae, train, held_out, options, lambda row: times.append((clocks[0](), clocks[1]()))
    )
    step, cpu = (statistics.median(c) for c in np.diff(times, axis=0).T / STEPS_PER_CALL)
    return {"before": before, "peak": _resident("VmHWM"), "step": step, "cpu": cpu}


def in_own_process(*arguments: Any, **options: Any) -> dict:
    """Calls `pretrain` in a new process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(pretrain, arguments, options)


def main() -> None:
    """Prints peak memory on all tokens, and the time of a step from files and from memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--compared", type=int, default=500_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--latents", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compared_steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--held_out", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        write_states(args.folder, args.compared, args.width, args.seed)
        for number in range(args.rounds):
            sides = {}
            for name, in_memory in (("memory", True), ("files", False)):
                sides[name] = in_own_process(
                    args, args.folder, tokens=args.compared, steps=args.compared_steps,
                    in_memory=in_memory,
                )  # fmt: skip
                _print(f"{args.compared} states, {name}", sides[name])
            step, cpu = (sides["files"][c] / sides["memory"][c] for c in ("step", "cpu"))
            print(
                f"round {number + 1}: a step from files takes {step:.3f} times as long, and "
                f"{cpu:.3f} times the CPU time"
            )
        if args.tokens > args.compared:
            seconds = write_states(args.folder, args.tokens, args.width, args.seed)
            size = args.tokens * args.width * 4 / 1e9
            print(f"{args.tokens} states, {size:.1f} GB, written in {seconds:.0f} s")
            result = in_own_process(
                args, args.folder, tokens=args.tokens, steps=args.steps, in_memory=False
            )
            _print(f"{args.tokens} states, files", result)
    finally:
        remove_matrix(args.folder)


def _print(name: str, result: dict) -> None:
    before, peak = result["before"] / GIB, result["peak"] / GIB
    print(
        f"{name}: peak {peak:.2f} GiB ({before:.2f} before the training), "
        f"{1000 * result['step']:.0f} ms a step, {1000 * result['cpu']:.0f} ms of CPU time",
        flush=True,
    )


def _resident(field: str) -> int:
    """Returns the resident memory in bytes: VmRSS is the current value, VmHWM the peak."""
    return status_bytes(Path("/proc/self/status").read_text(), field)


if __name__ == "__main__":
    main()
