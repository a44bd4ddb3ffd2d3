"""One PPO iteration on SmolLM2-135M, this project against PyTorch, alternately.

Both do the same work on the same prompts in float32: a rollout up to the longest response, scoring
through a 15-layer trunk with a TopK SAE (M 4608, k 32), reference log-probabilities, and `epochs`
full-batch epochs on LoRA (r 16 on q, k, v, o) and a value head. Here padding is left out of all but
attention (`--pack_levels=0` computes it); the PyTorch side computes it. Either side has a process
to itself, as in use, and waits while the other works. Turns alternate, so that a machine whose
speed drifts slows both; the ratio is taken pair by pair. A turn is two iterations of which the last
counts: the first finds the caches, and on some machines its very memory, cold after the wait.

    python -m benchmarks.ppo_iteration --model_dir=outputs/models/SmolLM2-135M-Instruct

`--workload=real` takes everyday prompts, and as lengths those of the responses that the model
samples to them, at most `--new_tokens`; both sides then sample on to the longest, whatever the
tokens, and what is beyond a response's length does not count. `--torch_without_cache` makes the
PyTorch side compute all positions at every token, as loops without a KV cache do.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import torch_ppo, workload
from benchmarks.workload import Workload
from configs import base
from conversion import load_policy
from ppo.config import PPOConfig
from ppo.learner import Learner
from ppo.slots import SlotPlan
from ppo.update import Batch, Updater
from sarm_jax.chat import pad_batch
from sarm_jax.lora import LoRAConfig
from sarm_jax.reward_model import RewardModel
from sarm_jax.sae import SAEConfig
from sarm_jax.sarm import SARM, SARMConfig

PHASES = ("rollout", "score", "update", "total")
WORKLOADS = {"equal": workload.equal, "real": workload.real}


class JaxPPO:
    """The project's own programs, with no stop token."""

    def __init__(self, model_dir: str, work: Workload, pack_levels: int, score_batch: int):
        policy, tokenizer = load_policy(model_dir)
        batch, new_tokens, epochs = len(work.prompts), work.new_tokens, work.epochs
        options = base.get_config().ppo.to_dict()
        options |= {"batch_size": batch, "max_new_tokens": new_tokens, "ppo_epochs": epochs}
        options["pack_levels"] = pack_levels
        self.config = PPOConfig(**options)
        self.reward_model = RewardModel(_sarm(policy), tokenizer, batch_size=score_batch)
        policy.stop_ids = ()
        lora = LoRAConfig(rank=16, alpha=32.0)
        self.learner, self.state, self.base = Learner.attach(self.config, lora, policy, pad=0)
        lengths = np.asarray([len(row) for row in work.prompts])
        self.tokens, self.mask = pad_batch(work.prompts, lengths.max(), 0, side="left")
        self.lengths = np.asarray(work.lengths)
        self.counted = np.arange(new_tokens) < self.lengths[:, None]
        self.order = np.tile(np.arange(batch), (epochs, 1))
        self.plan = SlotPlan(self.config, [lengths], [self.order])
        self.steps = 0

    def iteration(self) -> dict[str, float]:
        """Runs one PPO iteration; the seconds of rollout, score, update and total."""
        clock = [time.perf_counter()]
        key = jax.random.fold_in(jax.random.key(0), self.steps)
        generation = self.learner.rollout(
            self.state.params, self.base, self.tokens, self.mask, key, slots=self.plan.prefill
        )
        responses = np.asarray(generation.tokens_br)
        responses = [row[:length] for row, length in zip(responses, self.lengths, strict=True)]
        clock.append(time.perf_counter())
        prompts = [row[mask] for row, mask in zip(self.tokens, self.mask, strict=True)]
        rows = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
        score_b, _ = self.reward_model.score_tokens(rows, latent_indices=(0,))
        clock.append(time.perf_counter())
        tokens = jnp.concatenate([jnp.asarray(self.tokens), generation.tokens_br], axis=1)
        mask = jnp.concatenate([jnp.asarray(self.mask), jnp.asarray(self.counted)], axis=1)
        slots = self.plan.of(self.lengths, self.order)
        reference = self.learner.reference_logp(self.base, tokens, mask, slots=slots)
        counted = jnp.asarray(self.counted)
        batch = Batch(tokens, mask, counted, reference, jnp.asarray(score_b))
        self.state, _, metrics = Updater(self.learner)(
            self.state, self.base, batch, self.order, slots
        )
        jax.block_until_ready((self.state, metrics))
        clock.append(time.perf_counter())
        self.steps += 1
        spans = np.diff(clock).tolist()
        return dict(zip(PHASES, [*spans, sum(spans)], strict=True))


def _sarm(policy) -> SARM:
    """A SARM of the usual shape: the policy's first 15 layers, a random SAE and head."""
    trunk = dataclasses.replace(policy.config, num_hidden_layers=15)
    config = SARMConfig(trunk, SAEConfig(trunk.hidden_size, latent_size=4608, k=32))
    sarm = SARM(config, rngs=nnx.Rngs(0))
    nnx.update(sarm.trunk.layers, jax.tree.map(lambda x: x[:15], nnx.state(policy.layers)))
    sarm.trunk.embed_tokens[...] = policy.embed_tokens[...]
    sarm.score[...] = jax.random.normal(jax.random.key(1), sarm.score.shape)
    return sarm


def serve(connection, build, iterations: int) -> None:
    """Runs in a process of its own: a turn of one side whenever asked to."""
    side = build()
    connection.send("ready")
    while connection.recv():
        for _ in range(iterations):
            spans = side.iteration()
        connection.send(spans)


def start(context, iterations: int, build):
    """A loaded side: the connection to its process."""
    connection, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, build, iterations), daemon=True).start()
    connection.recv()
    return connection


def main() -> None:
    """Prints a row per phase: median seconds of either side, and the median pairwise ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt_len", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workload", choices=WORKLOADS, default="equal")
    parser.add_argument("--iterations", type=int, default=2, help="of a turn; the last counts")
    parser.add_argument("--pack_levels", type=int, default=4)
    parser.add_argument("--score_batch", type=int, default=4)
    parser.add_argument("--torch_without_cache", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        work = pool.apply(WORKLOADS[args.workload], (args,))
    print(work, flush=True)
    packing, cache = (args.pack_levels, args.score_batch), not args.torch_without_cache
    builds = {
        "jax": functools.partial(JaxPPO, args.model_dir, work, *packing),
        "torch": functools.partial(torch_ppo.build, args.model_dir, work, cache),
    }
    sides = {name: start(context, args.iterations, build) for name, build in builds.items()}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(args.turns):
        for name, side in sides.items():
            side.send("go")
            times[name].append(side.recv())
            print(json.dumps({"side": name, "turn": turn, **times[name][-1]}), flush=True)
    for side in sides.values():
        side.send("")  # the end
    print(f"\n{'phase':8} {'jax s':>8} {'torch s':>8} {'torch/jax':>10}")
    for phase in PHASES:
        columns = [[t[phase] for t in times[name]] for name in ("jax", "torch")]
        ratio = statistics.median(b / a for a, b in zip(*columns, strict=True))
        jax_s, torch_s = map(statistics.median, columns)
        print(f"{phase:8} {jax_s:8.2f} {torch_s:8.2f} {ratio:10.2f}")


if __name__ == "__main__":
    main()
