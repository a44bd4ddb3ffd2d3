"""Measure how the cost of a PPO step grows with context, batch, tokens, depth and features.

    python -m benchmarks.growth [--rounds=5] [--tables=decode,update,compile]
                                [--architecture=DIR --dtype=bfloat16 --tensor=4 --layers=8]

The models have random weights in the shape of SmolLM2-135M, float32. For the table of decoding,
`--architecture` names a directory with another config.json, `--tensor` reduces the shapes to those
of one of so many devices of `mesh.tensor`, and `--layers` keeps the first layers. Sizes take turns,
so that a machine whose speed drifts slows all of them, and medians are reported. A decoded token
has to read the weights and the keys and values before it; "predicted" is the growth of these bytes.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.random_weights import random_weights
from benchmarks.workload import parse_numbers
from configs import base
from conversion.keys import abstract_policy
from conversion.load import read_policy_config
from ppo.config import PPOConfig
from ppo.learner import Learner
from ppo.objectives import Batch
from ppo.planning.costs import layer_weights
from ppo.update import Updater
from sarm_jax.io.errors import InputError
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.reward_model import lower_score
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.parallel.sharding import ONE_DEVICE, MeshConfig
from sarm_jax.sampling.decoding import KVCache, compiler_options, decode, next_logits
from sarm_jax.sampling.fused_layers import fuse_layers

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)
TABLES = ("decode", "update", "compile")
TOKENS = 16  # number of tokens that one timed call decodes
Run = Callable[[], Any]


def measure(runs: dict[Any, Run], rounds: int) -> dict[Any, float]:
    """Times functions in turns, after one call of each; returns the median seconds of each."""
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def decode_run(policy: Llama, batch: int, context: int) -> Run:
    """Returns a function that decodes `TOKENS` tokens after `context` tokens."""
    graphdef, state = nnx.split(policy)
    config, dtype = policy.config, policy.embed_tokens.dtype
    size = context + TOKENS
    shape = (batch, config.num_key_value_heads, config.head_dim, size)

    @partial(jax.jit, compiler_options=dict(compiler_options(policy.platform, batch)))
    def run(state, layers):
        policy = nnx.merge(graphdef, state)
        kv = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))
        mask_bs = jnp.broadcast_to(jnp.arange(size) < context, (batch, size))
        cache = KVCache(
            k=kv,
            v=kv,
            mask_bs=mask_bs,
            column=jnp.int32(context),
            position_b=jnp.full((batch,), context),
        )

        def step(_, carry):
            token_b, cache = carry
            x_b1d, cache = decode(policy, token_b, cache=cache, layers=layers)
            return next_logits(policy, x_b1d).argmax(axis=-1).astype(jnp.int32), cache

        token_b = jnp.ones((batch,), jnp.int32)
        return jax.lax.fori_loop(0, TOKENS, step, (token_b, cache))[0]

    layers = jax.jit(lambda state: fuse_layers(nnx.merge(graphdef, state)))(state)
    return lambda: run(state, layers)


def shard(config: LlamaConfig, tensor: int, layers: int) -> LlamaConfig:
    """Returns the shapes on one of `tensor` devices of the first layers of a model."""
    MeshConfig(tensor=tensor).check_model(config)
    if config.intermediate_size % tensor:
        raise InputError(
            f"--tensor={tensor} does not divide intermediate_size={config.intermediate_size}"
        )
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        num_attention_heads=config.num_attention_heads // tensor,
        num_key_value_heads=config.num_key_value_heads // tensor,
        intermediate_size=config.intermediate_size // tensor,
        vocab_size=-(-config.vocab_size // tensor),
    )


def decode_growth(args: argparse.Namespace) -> None:
    """Prints the seconds per token by context, and the tokens per second by batch size."""
    config, batch, rounds = SMOLLM2, 8, args.rounds
    if args.architecture:
        config = read_policy_config(args.architecture)
    layers = config.num_hidden_layers if args.layers is None else args.layers
    if not 1 <= layers <= config.num_hidden_layers:
        raise InputError(f"--layers={layers}: the model has {config.num_hidden_layers} layers")
    config = shard(config, args.tensor, layers)
    policy = random_weights(abstract_policy(config, args.dtype), ONE_DEVICE)
    weights = layer_weights(config) * config.num_hidden_layers
    weights += config.vocab_size * config.hidden_size
    per_token = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    contexts = args.contexts
    seconds = measure({n: decode_run(policy, batch, n) for n in contexts}, rounds)
    read = {n: weights + batch * (n + TOKENS / 2) * per_token for n in contexts}
    first = contexts[0]
    rows = [
        (
            n,
            f"{1e3 * seconds[n] / TOKENS:.2f}",
            f"{seconds[n] / seconds[first]:.2f}",
            f"{read[n] / read[first]:.2f}",
        )
        for n in contexts
    ]
    columns = "context", "ms a token", "grows by", "predicted"
    show(f"Decoding, batch {batch}", columns, rows)
    batches = args.batches
    seconds = measure({n: decode_run(policy, n, 128) for n in batches}, rounds)
    first = batches[0]
    rows = [
        (n, f"{n * TOKENS / seconds[n]:.0f}", f"{seconds[n] / seconds[first]:.2f}") for n in batches
    ]
    show("Decoding after 128 tokens", ("batch", "tokens/s", "time grows by"), rows)


def learner_of(layers: int, batch: int, new_tokens: int) -> tuple[Learner, Any, Any]:
    """Makes a learner with random weights: (learner, its state, the base)."""
    options = base.get_config().ppo.to_dict()
    options |= {"batch_size": batch, "max_new_tokens": new_tokens, "ppo_epochs": 1}
    config = dataclasses.replace(SMOLLM2, num_hidden_layers=layers)
    policy = Llama(config, rngs=nnx.Rngs(0))
    return Learner.attach(PPOConfig(**options), LoRAConfig(rank=16), policy, pad=0)


def update_growth(rounds: int) -> None:
    """Prints the seconds of an update, and the compiler's temporaries, by number of tokens."""
    prompt, new = 64, 64
    runs, memory = {}, {}
    for batch in (4, 8, 16, 32):
        learner, state, frozen = learner_of(SMOLLM2.num_hidden_layers, batch, new)
        rng = np.random.default_rng(0)
        tokens = jnp.asarray(rng.integers(3, 49152, (batch, prompt + new)), jnp.int32)
        logp_br, reward_b = jnp.full((batch, new), -5.0), jnp.zeros((batch,))
        whole = jnp.ones(tokens.shape, bool)
        data = Batch(
            tokens_bt=tokens,
            mask_bt=whole,
            mask_br=whole[:, :new],
            ref_logp_br=logp_br,
            reward_b=reward_b,
        )
        order, updater = np.arange(batch)[None], Updater(learner)

        def run(updater=updater, state=state, frozen=frozen, data=data, order=order):
            fresh = jax.tree.map(jnp.copy, state)  # because the update donates its state
            return updater.update(fresh, frozen, data, order=order)[2]

        runs[batch * (prompt + new)] = run
        programs = updater.lower(state, frozen, prompt_length=prompt, slots=None)
        compiled = programs["first_step"]().compile()
        analysis: Any = compiled.memory_analysis()
        memory[batch * (prompt + new)] = analysis.temp_size_in_bytes / 2**20
    seconds = measure(runs, rounds)
    first = min(seconds)
    rows = [
        (
            n,
            f"{seconds[n]:.2f}",
            f"{seconds[n] / seconds[first] / (n / first):.2f}",
            f"{memory[n]:.0f}",
        )
        for n in seconds
    ]
    columns = "tokens", "s", "s a token, × the first", "temporaries, MiB"
    show("A gradient step on all tokens of a batch", columns, rows)


def compile_seconds(lower: Callable[[], Any]) -> float:
    """Returns the seconds of tracing, lowering and compiling with empty caches."""
    jax.clear_caches()
    start = time.perf_counter()
    lower().compile()
    return time.perf_counter() - start


def compile_growth() -> None:
    """Prints the compile times by depth, and by the number of features that the reward reads."""
    rows = []
    for layers in (2, 8, 30):
        learner, state, frozen = learner_of(layers, 8, 64)
        update = Updater(learner).lower(state, frozen, prompt_length=64, slots=None)["first_step"]
        rollout = partial(learner.lower_rollout, state.params, frozen, prompt_length=64, slots=None)
        rows.append((layers, *(f"{compile_seconds(lower):.1f}" for lower in (update, rollout))))
    show("Compiling", ("layers", "update, s", "rollout (every layer in the loop), s"), rows)
    trunk = dataclasses.replace(SMOLLM2, num_hidden_layers=15)
    sarm = SARM(SARMConfig(trunk, SAEConfig(576, latent_size=4608, k=32)), rngs=nnx.Rngs(0))
    graphdef, sarm_state = nnx.split(sarm)
    score = partial(lower_score, graphdef, sarm_state, placement=ONE_DEVICE, rows=8, length=128)
    rows = [(n, f"{compile_seconds(partial(score, watched=n)):.1f}") for n in (1, 10, 100, 1000)]
    show("Compiling the score", ("features read", "s"), rows)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each size")
    parser.add_argument("--tables", type=_names, default=TABLES)
    parser.add_argument("--architecture", help="decode table: a directory with config.json")
    parser.add_argument("--dtype", default="float32", help="decode table: dtype of the weights")
    parser.add_argument("--tensor", type=int, default=1, help="decode table: devices of the model")
    parser.add_argument("--layers", type=int, help="decode table: number of layers")
    parser.add_argument("--contexts", type=parse_numbers, default=(64, 128, 256, 512, 1024))
    parser.add_argument("--batches", type=parse_numbers, default=(1, 4, 16, 64))
    args = parser.parse_args()
    if unknown := set(args.tables) - set(TABLES):
        parser.error(
            f"--tables: found {', '.join(sorted(unknown))}, expected some of {', '.join(TABLES)}"
        )
    decoding = ("architecture", "dtype", "tensor", "layers", "contexts", "batches")
    changed = [name for name in decoding if getattr(args, name) != parser.get_default(name)]
    if changed and "decode" not in args.tables:
        parser.error(f"--{changed[0]}: is for the table decode, which --tables leaves out")
    if "decode" in args.tables:
        try:
            decode_growth(args)
        except InputError as error:
            parser.error(str(error))
    if "update" in args.tables:
        update_growth(args.rounds)
    if "compile" in args.tables:
        compile_growth()


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
