"""Lowers the programs of a PPO step from shapes alone, without weights or a tokenizer.

`rollout`, `score`, `reference` and the programs of the update are those that a run compiles.
`prefill` and `decode` are the two halves of `rollout`, which the plan also compiles alone, to show
their costs. On some meshes the compiler shards their arrays differently than in `rollout`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

from ppo.config import PPOConfig
from ppo.learner import Learner, TrainState
from ppo.slots import largest_slots
from ppo.update import Updater
from sarm_jax.models.chat import scored_length
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.reward_model import lower_score
from sarm_jax.models.sarm import SARM
from sarm_jax.parallel.sharding import BATCH, Placement
from sarm_jax.sampling import decoding
from sarm_jax.sampling.decoding import KVCache
from sarm_jax.sampling.fused_layers import FusedLayer, FusedLinear, fuse_layers
from sarm_jax.sampling.generate import Sampling, draw_token

REPLICATED = P()


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a PPO step.

    Attributes:
        name: the name in plan.json.
        runs: how often a PPO step runs it, for all runs that are trained at a time; 0 for the
            halves of another program.
        lower: lowers the program.
        varies_with: the fields of a `Layout` on which the program depends.
    """

    name: str
    runs: int
    lower: Callable[[], Lowered]
    varies_with: tuple[str, ...] = ("mesh",)


def step_programs(
    config: PPOConfig,
    lora: LoRAConfig,
    *,
    policy: Llama,
    sarm: SARM | LinearReward,
    score_batch: int,
    watched: int,
    runs: int = 1,
) -> Iterator[Program]:
    """Yields all programs, for batches in which every prompt and response is at its limit.

    Args:
        config: options of PPO.
        lora: options of the adapter.
        policy: an abstract policy with its placement, which gets an adapter.
        sarm: an abstract SARM.
        score_batch: conversations that are scored at a time.
        watched: number of latents that the reward reads.
        runs: runs that are trained at a time over one base. They share the program of the rollout,
            whose halves are then left out.
    """
    prompt, new, rows = config.max_prompt_tokens, config.max_new_tokens, config.batch_size
    placement = policy.placement
    learner, fresh, frozen = Learner.attach(config, lora, policy=policy, pad=0)
    base, state = _abstract(frozen, placement), placement.abstract_replicated(fresh)
    slots = largest_slots(config, prompt, placement.parts)
    prefill = None
    if config.pack_levels:
        prefill = config.prompts_per_batch // placement.parts * prompt

    rollout = partial(learner.lower_rollout, state.params, base, prompt, prefill)
    if runs > 1 and learner.samples_runs_together:
        together = partial(learner.lower_rollout_of_runs, runs=runs)
        yield Program("rollout", 1, partial(together, state.params, base, prompt, prefill))
    else:
        yield Program("rollout", runs, rollout)
        halves = _Halves(learner=learner, state=state, base=base, prompt=prompt)
        yield Program("prefill", 0, halves.lower_prefill)
        yield Program("decode", 0, halves.lower_decode)
    calls = -(-rows // score_batch)
    graphdef, weights = nnx.split(sarm)
    scoring = partial(
        lower_score,
        graphdef,
        _abstract(weights, placement),
        placement,
        rows=min(rows, score_batch),
        length=scored_length(prompt + new),
        watched=watched,
    )
    yield Program("score", runs * calls, scoring)
    forward = "mesh", "accumulation"
    yield Program("reference", runs, partial(learner.lower_reference, base, prompt, slots), forward)
    steps = config.updates_per_step
    for name, lower in Updater(learner).lower(state, base, prompt, slots).items():
        calls = steps - (config.pieces == 1) if name == "step" else 1
        varies_with = forward if name == "targets" else (*forward, "remat")
        yield Program(name, runs * calls, lower, varies_with)


@dataclasses.dataclass(frozen=True)
class RunState:
    """Bytes on one device of what each run has of its own while all share the base.

    Attributes:
        total: adapter, value head and optimizer state.
        adapter: the adapter, which the program of a shared rollout takes of every run.
    """

    total: int
    adapter: int

    @classmethod
    def of(cls, config: PPOConfig, lora: LoRAConfig, policy: Llama) -> "RunState":
        """Returns the bytes for an abstract policy, which gets an adapter."""
        _, state, _ = Learner.attach(config, lora, policy=policy, pad=0)
        size = partial(jax.tree.reduce, lambda total, x: total + x.size * x.dtype.itemsize)
        return cls(total=size(state, 0), adapter=size(state.params["lora"], 0))

    def beside(self, program: str, runs: int) -> int:
        """Returns the bytes of `runs` runs that are not among the arguments of a program."""
        held = self.total - self.adapter if program == "rollout" else self.total
        return (runs - 1) * held


def weight_bytes(model: Llama | SARM | LinearReward, placement: Placement) -> int:
    """Returns the bytes of a model's weights on one device."""
    total = 0
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        placed = placement.abstract_parameter(name, variable.shape, variable.dtype)
        shape, sharding = placed.shape, placed.sharding
        shard = shape if sharding is None else sharding.shard_shape(shape)
        total += math.prod(shard) * placed.dtype.itemsize
    return total


def _abstract(state: nnx.State, placement: Placement) -> nnx.State:
    """Returns the state with the placement of each parameter, without the arrays."""
    flat = []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        placed = placement.abstract_parameter(name, variable.shape, variable.dtype)
        flat.append((path, variable.replace(placed)))
    return nnx.from_flat_state(flat)


@dataclasses.dataclass(frozen=True)
class _Halves:
    """Lowers prefill and decoding, the two halves of a rollout."""

    learner: Learner
    state: TrainState
    base: nnx.State
    prompt: int

    def _policy(self, params, base) -> Llama:
        return nnx.merge(self.learner.graphdef, params["lora"], base)

    def lower_prefill(self) -> Lowered:
        """Lowers the prefill of a batch of prompts."""
        config, placement = self.learner.config, self.learner.placement
        size = self.prompt + config.max_new_tokens

        def prefill(params, base, tokens_bp, mask_bp):
            policy = self._policy(params, base)
            x_btd, cache = decoding.prefill(policy, tokens_bp, mask_bp, size)
            return policy.logits(x_btd[:, -1:]), cache

        shape = (config.prompts_per_batch, self.prompt)
        tokens, mask = (placement.abstract_rows(shape, dtype) for dtype in (jnp.int32, bool))
        return jax.jit(prefill).lower(self.state.params, self.base, tokens, mask)

    def lower_decode(self) -> Lowered:
        """Lowers the decoding of one token of every response."""
        config, placement = self.learner.config, self.learner.placement
        sampling = Sampling(config.max_new_tokens, config.temperature)

        def decode(params, base, layers, cache, token_b, key):
            policy = self._policy(params, base)
            x_b1d, cache = decoding.decode(policy, token_b, cache, layers)
            logits_bv = decoding.next_logits(policy, x_b1d)
            return draw_token(logits_bv, key, sampling, placement), cache

        params, base = self.state.params, self.base
        layers, cache = self._layers(), self._cache()
        token_b = placement.abstract_rows((config.rollout_rows,), jnp.int32)
        key = placement.abstract_replicated(jax.eval_shape(jax.random.key, 0))
        options = dict(self.learner.decoding_options)
        compiled = jax.jit(decode, donate_argnums=3, compiler_options=options)
        return compiled.lower(params, base, layers, cache, token_b, key)

    def _layers(self) -> tuple[FusedLayer, ...]:
        """Returns the layers of `fuse_layers` for the abstract policy, with the same sharding."""
        abstract = self.learner.placement.abstract

        def put(x, spec=REPLICATED):
            return abstract(x.shape, x.dtype, spec)

        layers = jax.eval_shape(
            lambda params, base: fuse_layers(self._policy(params, base)),
            self.state.params,
            self.base,
        )
        return jax.tree.map(
            lambda x: x.placed(put) if isinstance(x, FusedLinear) else put(x),
            layers,
            is_leaf=lambda x: isinstance(x, FusedLinear),
        )

    def _cache(self) -> KVCache:
        """Returns an abstract KV cache."""
        config, placement = self.learner.config, self.learner.placement
        model = self._policy(self.state.params, self.base).config
        rows, size = config.rollout_rows, self.prompt + config.max_new_tokens
        shape = (rows, model.num_key_value_heads, model.head_dim, size)
        spec = P(BATCH[0], "tensor")
        kv = (placement.abstract(shape, self.base.embed_tokens.dtype, spec),)
        scalar: Any = placement.abstract_replicated(jax.ShapeDtypeStruct((), jnp.int32))
        return KVCache(
            k=kv * model.num_hidden_layers,
            v=kv * model.num_hidden_layers,
            mask_bs=placement.abstract_rows((rows, size), bool),
            column=scalar,
            position_b=placement.abstract_rows((rows,), jnp.int32),
        )
