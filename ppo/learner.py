"""The trainable side of PPO: LoRA and value head over one frozen copy of the base weights.

The policy is `merge(graphdef, lora, base)`; the reference policy is the same base merged into
the adapter-free graph; the value head reads the policy's last hidden state where a token is
predicted. The base travels as an argument through every program and is never copied.
"""

import dataclasses
import math
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.stages import Lowered
from jax.typing import ArrayLike

from ppo.config import PPOConfig
from ppo.logprobs import token_logprobs
from ppo.slots import MULTIPLE, Slots
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig, LoRAParam, add_lora, fold_lora
from sarm_jax.models.packing import Packing
from sarm_jax.parallel.sharding import ONE_DEVICE, Placement
from sarm_jax.sampling.decoding import compiler_options
from sarm_jax.sampling.generate import Generation, Sampling, sample


@struct.dataclass
class TrainState:
    """Everything a gradient step changes: `params` = {lora, value_head}, and Adam's moments."""

    params: dict
    opt_state: optax.OptState


@struct.dataclass
class Evaluation:
    """What a policy says of given responses, float32 `[B, R]` each."""

    logp_br: jax.Array
    entropy_br: jax.Array
    values_br: jax.Array


@dataclasses.dataclass(frozen=True)
class Learner:
    """The compiled programs over a policy. Holds no arrays, so equal learners share compilations.

    `graphdef` describes the policy with its adapter, `reference_graph` without; `stops` end a
    response, `pad` fills up after it; programs are made for `platform`. `base` is the frozen state
    in every signature.
    """

    config: PPOConfig
    graphdef: nnx.GraphDef
    reference_graph: nnx.GraphDef
    stops: tuple[int, ...]
    pad: int
    platform: str
    placement: Placement = ONE_DEVICE

    @classmethod
    def attach(
        cls,
        config: PPOConfig,
        lora: LoRAConfig,
        policy: Llama,
        pad: int,
    ) -> tuple["Learner", TrainState, nnx.State]:
        """Gives `policy` a fresh adapter, in place: (learner, initial state, base).

        The state is still to be put where the policy's weights are, `placement.replicated`.
        """
        reference_graph = nnx.graphdef(policy)
        add_lora(policy, lora, nnx.Rngs(config.seed))
        graphdef, adapter, base = nnx.split(policy, LoRAParam, ...)  # type: ignore[misc]
        known = policy.stop_ids, pad, policy.platform, policy.placement
        learner = cls(config, graphdef, reference_graph, *known)
        width = policy.config.hidden_size
        params = {
            "lora": jax.tree.map(jnp.copy, adapter),  # updates donate it
            "value_head": {"kernel": jnp.zeros((width,)), "bias": jnp.zeros(())},
        }
        state = TrainState(params, learner.optimizer.init(params))
        return learner, state, base

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of `config`."""
        return make_optimizer(self.config)

    def rollout(
        self,
        params: dict,
        base: nnx.State,
        tokens_bp: ArrayLike,
        mask_bp: ArrayLike,
        key: jax.Array,
        slots: int | None = None,
    ) -> Generation:
        """Samples responses to left-padded prompts with the current policy.

        `slots` are what the prompts are packed in, of each part of the mesh; None: not packed. Not
        to be called within a `jax.jit`, since the compiler gets options of its own for it.
        """
        return self._compiled_rollout(self, params, base, tokens_bp, mask_bp, key, slots=slots)

    @property
    def decoding_options(self) -> tuple[tuple[str, Any], ...]:
        """What the compiler is told about programs that decode, see `compiler_options`."""
        return compiler_options(self.platform, self.config.batch_size // self.placement.parts)

    @property
    def _compiled_rollout(self):
        return _compile_rollout(self.decoding_options)

    def _rollout(self, params, base, tokens_bp, mask_bp, key, slots):
        sampling = Sampling(self.config.max_new_tokens, self.config.temperature)
        policy = nnx.merge(self.graphdef, params["lora"], base)
        if policy.embed_tokens.dtype == jnp.float32:  # half precision would round it away
            fold_lora(policy)
        tokens_bp, mask_bp = self.placement.keep_rows((tokens_bp, mask_bp))
        packing = None
        if slots is not None:
            packing = Packing.of(mask_bp, slots, self.placement.parts)
        stops, pad = self.stops, self.pad
        generation = sample(policy, tokens_bp, mask_bp, key, sampling, stops, pad, packing)
        return self.placement.keep_rows(generation)

    @partial(jax.jit, static_argnums=0, static_argnames="slots")
    def reference_logp(
        self,
        base: nnx.State,
        tokens_bt: jax.Array,
        mask_bt: jax.Array,
        slots: Slots | None = None,
    ) -> jax.Array:
        """log π_ref of the responses, `[B, R]`, a microbatch at a time."""
        reference = nnx.merge(self.reference_graph, base)

        def piece(rows):
            tokens_bt, mask_bt = rows
            return self._logprobs(reference, tokens_bt, mask_bt, slots)[0]

        return self.placement.keep_rows(self.in_microbatches(piece, (tokens_bt, mask_bt)))

    def lower_rollout(
        self, params: dict, base: nnx.State, prompt_length: int, slots: int | None
    ) -> Lowered:
        """`rollout` of prompts padded to `prompt_length` tokens; arrays may be abstract."""
        tokens_bp, mask_bp = self._abstract_tokens(prompt_length)
        key = self.placement.abstract_replicated(jax.eval_shape(jax.random.key, 0))
        given = self, params, base, tokens_bp, mask_bp, key
        return self._compiled_rollout.lower(*given, slots=slots)

    def lower_reference(self, base: nnx.State, prompt_length: int, slots: Slots | None) -> Lowered:
        """`reference_logp` after prompts padded to `prompt_length` tokens."""
        tokens_bt, mask_bt = self._abstract_tokens(prompt_length + self.config.max_new_tokens)
        return self.reference_logp.lower(self, base, tokens_bt, mask_bt, slots=slots)

    def _abstract_tokens(self, length):
        shape = (self.config.batch_size, length)
        return [self.placement.abstract_rows(shape, dtype) for dtype in (jnp.int32, bool)]

    def evaluate(
        self,
        params: dict,
        base: nnx.State,
        tokens_bt: jax.Array,
        mask_bt: jax.Array,
        slots: Slots | None = None,
    ) -> Evaluation:
        """log π, entropy and V of every response token; traced, differentiable in `params`.

        `tokens_bt` is prompt and response `[B, P + R]`, the response in the last R columns.
        With `slots` no padding is computed, see `sarm_jax.models.packing`; None: rows as they are.
        """
        policy = nnx.merge(self.graphdef, params["lora"], base)
        logp_br, entropy_br, x_brd = self._logprobs(policy, tokens_bt, mask_bt, slots)
        head = params["value_head"]
        values_br = x_brd.astype(jnp.float32) @ head["kernel"] + head["bias"]
        return Evaluation(logp_br, entropy_br, values_br)

    def in_microbatches(self, function, rows):
        """Maps over the rows in `num_minibatches · gradient_accumulation_steps` pieces."""
        pieces = self.config.pieces
        if pieces == 1:
            return function(rows)
        cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), rows)
        mapped = jax.lax.map(function, cut)
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), mapped)

    def _logprobs(self, model, tokens_bt, mask_bt, slots):
        tokens_bt, mask_bt = self.placement.keep_rows((tokens_bt, mask_bt))
        responses, parts = self.config.max_new_tokens, self.placement.parts
        temperature, chunk = self.config.temperature, self.config.logprob_chunk
        targets_br, size = tokens_bt[:, -responses:], model.config.vocab_size
        if slots is None:
            x_brd = model.hidden(tokens_bt, mask_bt)[:, -responses - 1 : -1]
            given = (x_brd, model.vocabulary, targets_br)
            return *token_logprobs(*given, temperature, chunk, size), x_brd
        packing = Packing.of(mask_bt, slots.tokens, parts)
        x_brd = model.hidden(tokens_bt, mask_bt, packing=packing)[:, -responses - 1 : -1]
        packing = Packing.of(mask_bt[:, -responses:], slots.responses, parts)
        packed = packing.pack(x_brd), packing.pack(targets_br)
        rows = parts * math.gcd(len(packed[1]) // parts, MULTIPLE)  # for the cores of a CPU
        x_scd, targets_sc = (y.reshape(rows, -1, *y.shape[1:]) for y in packed)
        chunk = -(-chunk * len(tokens_bt) // rows)
        given = (x_scd, model.vocabulary, targets_sc)
        per_token = token_logprobs(*given, temperature, chunk, size)
        return *(packing.unpack(y.reshape(-1)) for y in per_token), x_brd


@cache
def _compile_rollout(options: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(
        Learner._rollout,
        static_argnums=0,
        static_argnames="slots",
        compiler_options=dict(options),
    )


def make_optimizer(config: PPOConfig) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with ε = 1e-5 (Huang et al. 2403.17031)."""
    updates = config.total_steps * config.updates_per_step
    warmup = config.warmup_steps * config.updates_per_step
    peak = config.learning_rate
    decay = max(updates - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(peak, decay),
    }[config.lr_schedule]
    # The first update must move: a warm-up of n updates uses peak · 1/n, 2/n, …, 1.
    rising = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    schedule = optax.join_schedules([rising, after], [warmup]) if warmup else after
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, eps=1e-5, weight_decay=config.weight_decay),
    )
