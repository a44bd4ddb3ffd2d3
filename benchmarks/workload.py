"""What a PPO iteration is timed on: prompts, and how long each response to them is.

Read by sides that have none of this project's requirements, too.
"""

import argparse
import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np

PROMPTS = Path("configs/data/everyday_demos.jsonl")
TOKENS = 32_000  # random ones lie below: every vocabulary of Llama's family has as many


@dataclasses.dataclass(frozen=True)
class Workload:
    """Token ids of the prompts `[B][P_b]`, tokens of the responses `[B]`, epochs of the update."""

    prompts: list[list[int]]
    lengths: list[int]
    epochs: int

    @property
    def new_tokens(self) -> int:
        """Those of the longest response, at which a rollout ends."""
        return max(self.lengths)

    def __str__(self) -> str:
        prompts = [len(row) for row in self.prompts]
        return f"prompts {prompts}, responses {self.lengths}, {self.epochs} epochs"


def equal(args: argparse.Namespace) -> Workload:
    """Random prompts of half to all of `prompt_len`, responses of `new_tokens`, or `lengths`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(args.prompt_len // 2, args.prompt_len + 1, args.batch)
    lengths[0] = args.prompt_len
    prompts = [rng.integers(3, TOKENS, length).tolist() for length in lengths]
    return Workload(prompts, args.lengths or [args.new_tokens] * args.batch, args.epochs)


def real(args: argparse.Namespace) -> Workload:
    """Everyday prompts, and the lengths of the responses that the model itself samples to them."""
    from conversion import load_policy
    from ppo.comparison.responses import ResponseConfig, respond
    from ppo.prompts import encode_prompts, read_prompts
    from sarm_jax.sampling.generate import Sampling

    policy, tokenizer = load_policy(args.model_dir)
    prompts = list(islice(read_prompts(str(PROMPTS)), args.batch))
    rows = encode_prompts(prompts, tokenizer, args.prompt_len, str(PROMPTS)).rows
    options = ResponseConfig(Sampling(args.new_tokens, temperature=1.0), batch_size=args.batch)
    found = respond(options, policy, policy, tokenizer, rows)
    return Workload(rows, found.length_n.tolist(), args.epochs)
