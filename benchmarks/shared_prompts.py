"""Time updates in which the k responses to a prompt share it, and updates in which they do not.

    python -m benchmarks.shared_prompts --model_dir=outputs/models/SmolLM2-135M-Instruct

RLOO on one minibatch of packed rows: log π_ref of all responses and one optimizer step, as in a
step of training after the rollout. Prompts and responses are random tokens, all of the same length.
Both sides take turns in one process, after a turn that compiles. The table has the tokens that the
policy computes, the seconds (medians) and their ratio, separate / shared.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lab_studies import refusing
from benchmarks.workload import parse_numbers
from configs import base
from conversion import load_policy
from ppo.config import PPOConfig
from ppo.learner import Learner
from ppo.objectives import Batch
from ppo.slots import Slots, largest_slots
from ppo.update import Updater
from sarm_jax.models.lora import LoRAConfig

TITLES = ("k", "prompt", "all tokens", "shared tokens", "separate s", "shared s", "ratio")


def main() -> None:
    """Prints a row for each number of responses to a prompt, and each length of prompts."""
    parser = make_parser()
    with refusing(parser):
        compare(parser.parse_args())


def compare(args: argparse.Namespace) -> None:
    """Times both sides for all sizes; raises InputError for sizes that do not go together."""
    for copies in args.copies:
        make_config(args, copies, max(args.prompt_lengths))
    print(" ".join(f"{title:>13}" for title in TITLES), flush=True)
    for copies in args.copies:
        for prompt in args.prompt_lengths:
            shared = largest_slots(make_config(args, copies, prompt), prompt)
            assert shared is not None
            separate = Slots(args.batch * prompt + shared.responses, shared.responses)
            sides = [make_side(args, copies, prompt, slots) for slots in (separate, shared)]
            seconds = take_turns(sides, args.turns)
            medians = [statistics.median(times) for times in seconds]
            ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
            counts = f"{copies:13} {prompt:13} {separate.tokens:13} {shared.tokens:13}"
            print(counts, *(f"{x:13.2f}" for x in (*medians, ratio)), flush=True)


def make_config(args: argparse.Namespace, copies: int, prompt: int) -> PPOConfig:
    """Returns the options of RLOO with one minibatch and one epoch."""
    options = base.get_config().ppo.to_dict()
    options |= {"algorithm": "rloo", "samples_per_prompt": copies, "batch_size": args.batch}
    options |= {"max_prompt_tokens": prompt, "max_new_tokens": args.new_tokens}
    options |= {"pack_levels": 1, "ppo_epochs": 1, "num_minibatches": 1}
    return PPOConfig(**(options | {"gradient_accumulation_steps": 1}))


def make_side(
    args: argparse.Namespace, copies: int, prompt: int, slots: Slots
) -> Callable[[], None]:
    """Loads the policy; returns a function that computes log π_ref and takes an optimizer step."""
    config = make_config(args, copies, prompt)
    policy, _ = load_policy(args.model_dir, args.dtype)
    learner, state, base_state = Learner.attach(config, LoRAConfig(16, 32.0), policy, pad=0)
    rng = np.random.default_rng(0)
    size = (args.batch // copies, prompt)
    prompts = np.repeat(rng.integers(3, policy.config.vocab_size, size), copies, axis=0)
    responses = rng.integers(3, policy.config.vocab_size, (args.batch, args.new_tokens))
    tokens_bt = jnp.asarray(np.concatenate([prompts, responses], axis=1), jnp.int32)
    mask_bt, counted_br = jnp.ones(tokens_bt.shape, bool), jnp.ones(responses.shape, bool)
    reward_b = jnp.asarray(rng.normal(size=args.batch), jnp.float32)
    order, updater = np.arange(args.batch)[None], Updater(learner)

    def step() -> None:
        nonlocal state
        reference = learner.reference_logp(base_state, tokens_bt, mask_bt, slots=slots)
        batch = Batch(
            tokens_bt=tokens_bt,
            mask_bt=mask_bt,
            mask_br=counted_br,
            ref_logp_br=reference,
            reward_b=reward_b,
        )
        state, *_ = updater.update(state, base_state, batch, order=order, slots=slots)
        jax.block_until_ready(state)

    return step


def take_turns(sides: list[Callable[[], None]], turns: int) -> list[list[float]]:
    """Calls both sides in turns; returns the seconds of each call but the first, which compiles."""
    seconds: list[list[float]] = [[] for _ in sides]
    for turn in range(turns + 1):
        for side, times in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side()
            if turn:
                times.append(time.perf_counter() - start)
    return seconds


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--copies", type=parse_numbers, default=(2, 4, 8))
    parser.add_argument("--prompt_lengths", type=parse_numbers, default=(32, 96))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


if __name__ == "__main__":
    main()
