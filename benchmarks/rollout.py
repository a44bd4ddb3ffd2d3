"""Measure rollouts whose lengths have a long tail: refilled slots against rows in lock-step.

    python -m benchmarks.rollout --model_dir=DIR [--responses=256] [--slots=32] [--rounds=3]
                                 [--growth=64,256,1024] [--growth_slots=8] [--dtype=float32]
                                 [--torch=eager,static,continuous] [--torch_compile_level=0]

The lengths of the responses are drawn from a log-normal distribution with the median 60 and the
95th percentile 400, and cut at the limit of 512 tokens. They are imposed: a response gets its end
token when it has its length, so that both sides do the same useful work.

Both sides run the same program with equally many rows and the same cache. In lock-step it waits
until all rows have ended before it takes the next prompts; refilled, it takes the next prompts as
soon as one slot in eight is free. They take turns, and medians are reported. `--growth` measures
refilled rollouts of several numbers of responses with the same few slots.

`--torch` adds PyTorch with the same prompts, lengths and rows (`torch_rollout` describes its three
ways to sample), each in a process of its own, and the ratio to the fastest of them. A way that does
not work on this machine is reported and left out.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.side import Side
from benchmarks.workload import Workload
from conversion import load_policy
from conversion.load import DTYPES, load_hf_tokenizer
from ppo.prompts import encode_prompts
from sarm_jax.models.chat import pad_batch
from sarm_jax.models.conversation_rows import read_prompts
from sarm_jax.sampling.generate import Generation, Sampling
from sarm_jax.sampling.refilling import RefillingLoop

PROMPTS = "configs/data/everyday_demos.jsonl"
MEDIAN, PERCENTILE_95, LIMIT = 60, 400, 512
MAX_PROMPT_TOKENS, PAD = 96, 0
SIDES = ("lock-step", "refilled")
TORCH_MODES = ("eager", "static", "continuous")


class GivenLengths(RefillingLoop):
    """A loop whose responses end at given lengths."""

    def __init__(self, *arguments, lengths_b: jax.Array, lock_step: bool):
        super().__init__(*arguments)
        self.lengths_b = lengths_b
        if lock_step:
            self.at_once = self.slots // self.copies

    def _draw(self, x_n1d, response_n, length_n):
        token_n, logp_n = super()._draw(x_n1d, response_n, length_n)
        end = self.stops[0]
        token_n = jnp.where(token_n == end, end + 1, token_n)
        return jnp.where(length_n + 1 >= self.lengths_b[response_n], end, token_n), logp_n


def draw_lengths(count: int) -> np.ndarray:
    """Returns the lengths of `count` responses: evenly spaced quantiles in random order."""
    rng = np.random.default_rng(0)
    sigma = np.log(PERCENTILE_95 / MEDIAN) / 1.6449
    normal_n = np.sort(rng.standard_normal(100_000))
    quantile_n = normal_n[((np.arange(count) + 0.5) / count * len(normal_n)).astype(int)]
    lengths_n = np.round(MEDIAN * np.exp(sigma * quantile_n))
    return rng.permutation(np.clip(lengths_n, 1, LIMIT).astype(np.int32))


def encoded_prompts(tokenizer, responses: int) -> list[list[int]]:
    """Returns the tokens of as many everyday prompts, again from the first after the last."""
    texts = read_prompts(PROMPTS)
    texts = (texts * -(-responses // len(texts)))[:responses]
    return encode_prompts(texts, tokenizer, MAX_PROMPT_TOKENS, long_prompts="truncate").rows


def rollouts(
    model_dir: str, dtype: str, responses: int, slots: int, names: Sequence[str] = SIDES
) -> dict[str, Callable]:
    """Compiles the sides and returns functions without arguments; each returns a `Generation`."""
    policy, tokenizer = load_policy(model_dir, dtype)
    rows = encoded_prompts(tokenizer, responses)
    tokens_bt, mask_bt = map(jnp.asarray, pad_batch(rows, MAX_PROMPT_TOKENS, PAD, side="left"))
    lengths_b = jnp.asarray(draw_lengths(responses))
    graphdef, state = nnx.split(policy)
    stops = policy.stop_ids[:1]

    @partial(jax.jit, static_argnames="lock_step")
    def run(state, key, lock_step):
        loop = GivenLengths(
            nnx.merge(graphdef, state), tokens_bt, mask_bt, key, Sampling(LIMIT), stops, PAD,
            slots, 1, lengths_b=lengths_b, lock_step=lock_step,
        )  # fmt: skip
        end = jax.lax.while_loop(loop.is_unfinished, loop.step, loop.start())
        return end.tokens_br, end.logp_br

    def side(lock_step: bool) -> Callable[[], Generation]:
        start, key = time.perf_counter(), jax.random.key(0)
        compiled = run.lower(state, key, lock_step=lock_step).compile()
        print(f"# compiled in {time.perf_counter() - start:.0f} s", flush=True)
        return lambda: jax.block_until_ready(compiled(state, key))

    return {name: side(name == "lock-step") for name in names}


def measure(sides: Mapping[str, Callable], rounds: int) -> dict[str, float]:
    """Returns the seconds of each side, the median over rounds in turns.

    The sides of JAX are compiled already; a side of PyTorch has a first call that does not count,
    and is left out if its process ends in that call.
    """
    sides = dict(sides)
    for name in [name for name in sides if name.startswith("torch")]:
        start = time.perf_counter()
        try:
            sides[name]()
        except SystemExit as error:
            print(f"# {name}: left out, {error}", flush=True)
            del sides[name]
            continue
        print(f"# {name}: first call {time.perf_counter() - start:.0f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"# {name}: {seconds[name][-1]:.1f} s", flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}


def torch_sides(args: argparse.Namespace, lengths: np.ndarray) -> dict[str, Callable]:
    """Starts the sides of PyTorch; a call of one samples all responses."""
    if not args.torch:
        return {}
    prompts = encoded_prompts(load_hf_tokenizer(args.model_dir), args.responses)
    work = Workload(prompts, lengths.tolist(), epochs=0)
    sides: dict[str, Callable] = {}
    for mode in args.torch:
        options = {
            "dtype": args.dtype,
            "mode": mode,
            "slots": args.slots,
            "compile_level": args.torch_compile_level,
        }
        side = Side(
            sys.executable,
            "benchmarks.torch_rollout",
            iterations=1,
            model_dir=args.model_dir,
            work=work,
            options=options,
        )
        side.ready()
        sides[f"torch {mode}"] = side.turn
    return sides


def parse_arguments() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description="Refilled slots against rows in lock-step.")
    parser.add_argument("--model_dir", default="outputs/models/SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="0: only --growth")
    parser.add_argument("--growth", default="", help="numbers of responses, comma-separated")
    parser.add_argument("--growth_slots", type=int, default=8)
    parser.add_argument(
        "--torch", default="", help=f"PyTorch's ways to sample, of {','.join(TORCH_MODES)}"
    )
    parser.add_argument(
        "--torch_compile_level", type=int, choices=range(4), default=0,
        help="of continuous batching; 0: not compiled",
    )  # fmt: skip
    args = parser.parse_args()
    args.torch = list(filter(None, args.torch.split(",")))
    for mode in args.torch:
        if mode not in TORCH_MODES:
            parser.error(f"--torch: found {mode!r}, expected some of {','.join(TORCH_MODES)}")
    return args


def print_speeds(speeds: dict[str, float]) -> None:
    """Prints the speed of each side, and the ratios."""
    for name, speed in speeds.items():
        print(f"{name}: {speed:.0f} useful tokens/s")
    print(f"ratio: {speeds['refilled'] / speeds['lock-step']:.2f}")
    others = [name for name in speeds if name.startswith("torch ")]
    if others:
        best = max(others, key=lambda name: speeds[name])
        print(f"ratio to {best}, PyTorch's fastest: {speeds['refilled'] / speeds[best]:.2f}")


def main() -> None:
    """Prints the comparison, and how the cost per useful token grows."""
    args = parse_arguments()
    if args.torch:  # the sides share a GPU
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    lengths = draw_lengths(args.responses)
    q50, q95 = np.quantile(lengths, (0.5, 0.95))
    print(
        f"{args.responses} responses, {lengths.sum()} tokens (median {q50:.0f}, 95th percentile "
        f"{q95:.0f}, longest {lengths.max()}), {args.slots} rows"
    )
    if args.rounds:
        sides = rollouts(args.model_dir, args.dtype, args.responses, args.slots)
        sides |= torch_sides(args, lengths)
        seconds = measure(sides, args.rounds)
        print_speeds({name: lengths.sum() / seconds_ for name, seconds_ in seconds.items()})
    growing = {
        str(count): rollouts(args.model_dir, args.dtype, count, args.growth_slots, SIDES[1:])[
            "refilled"
        ]
        for count in map(int, filter(None, args.growth.split(",")))
    }
    for count, time_s in measure(growing, max(args.rounds, 1)).items():
        tokens = draw_lengths(int(count)).sum()
        print(f"{count} responses: {1e3 * time_s / tokens:.3f} ms per useful token", flush=True)


if __name__ == "__main__":
    main()
