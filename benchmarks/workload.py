"""The workload of a timed PPO iteration: prompts, and the length of each response.

Sides without this project's requirements import this module as well.
"""

import argparse
import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np

PROMPTS = Path("configs/data/everyday_demos.jsonl")
TOKENS = 32_000  # limit of random token ids; no vocabulary of the Llama family is smaller


@dataclasses.dataclass(frozen=True)
class Workload:
    """The work of one iteration.

    Attributes:
        prompts: token ids of each prompt.
        lengths: number of tokens of each response.
        epochs: epochs of the update.
    """

    prompts: list[list[int]]
    lengths: list[int]
    epochs: int

    @property
    def new_tokens(self) -> int:
        """The number of tokens of the longest response, at which a rollout ends."""
        return max(self.lengths)

    def __str__(self) -> str:
        prompts = [len(row) for row in self.prompts]
        return f"prompts {prompts}, responses {self.lengths}, {self.epochs} epochs"


def equal(args: argparse.Namespace) -> Workload:
    """Makes random prompts, and responses of `new_tokens` tokens or of the lengths `lengths`.

    The prompts have between half of `prompt_len` and `prompt_len` tokens.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(args.prompt_len // 2, args.prompt_len + 1, args.batch)
    lengths[0] = args.prompt_len
    prompts = [rng.integers(3, TOKENS, length).tolist() for length in lengths]
    return Workload(
        prompts, list(args.lengths or [args.new_tokens] * args.batch), epochs=args.epochs
    )


def real(args: argparse.Namespace) -> Workload:
    """Takes everyday prompts, and the lengths of the responses that the model samples to them."""
    from conversion import load_policy
    from ppo.comparison.responses import ResponseConfig, respond
    from ppo.prompts import encode_prompts
    from sarm_jax.models.conversation_rows import read_prompts
    from sarm_jax.sampling.generate import Sampling

    policy, tokenizer = load_policy(args.model_dir)
    prompts = list(islice(read_prompts(str(PROMPTS)), args.batch))
    encoded = encode_prompts(prompts, tokenizer, max_tokens=args.prompt_len, source=str(PROMPTS))
    options = ResponseConfig(Sampling(args.new_tokens, temperature=1.0), batch_size=args.batch)
    responses = respond(
        options, base=policy, policy=policy, tokenizer=tokenizer, prompts=encoded.rows
    )
    return Workload(encoded.rows, responses.length_n.tolist(), epochs=args.epochs)


def parse_numbers(text: str) -> tuple[int, ...]:
    """Parses comma-separated whole numbers."""
    return tuple(map(int, text.split(",")))
