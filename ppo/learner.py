"""The policy: a LoRA adapter and, for PPO, a value head over one frozen copy of the base weights.

The policy is `merge(graphdef, lora, base)`. The reference policy is the same base, merged into the
graph without the adapter. The value head reads the policy's last hidden state at the position that
predicts a token. The base is an argument of every program and is never copied.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import cache, cached_property, partial
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
from sarm_jax.sampling.refilling import sample_refilling


@struct.dataclass
class TrainState:
    """Everything that an optimizer step changes: parameters and Adam's moments.

    `params` are {lora, value_head}, or {lora} without a critic.
    """

    params: dict
    opt_state: optax.OptState


@struct.dataclass
class Evaluation:
    """Log-probability, entropy and value of each response token, float32 `[B, R]`.

    Without a critic `values_br` is None.
    """

    logp_br: jax.Array
    entropy_br: jax.Array
    values_br: Any


@struct.dataclass
class RunPrompts:
    """The adapter of a run, and the left-padded prompts `[N, P]` and the key of its rollout."""

    lora: Any
    tokens_bp: ArrayLike
    mask_bp: ArrayLike
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Learner:
    """The compiled programs over a policy. It has no arrays, so equal learners share compilations.

    In every method `params` are the parameters of adapter and value head, and `base` is the frozen
    state of the policy.

    Attributes:
        config: options of PPO.
        graphdef: structure of the policy with its adapter.
        reference_graph: structure of the policy without it.
        stops: tokens that end a response.
        pad: the token that fills a row after the end.
        platform: the platform that programs are compiled for.
        placement: where arrays are on the device mesh.
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
        """Adds a fresh adapter to `policy`, in place; returns (learner, initial state, base).

        The caller puts the state on the mesh of the policy's weights (`placement.replicated`).
        """
        reference_graph = nnx.graphdef(policy)
        add_lora(policy, lora, nnx.Rngs(config.seed))
        graphdef, adapter, base = nnx.split(policy, LoRAParam, ...)  # type: ignore[misc]
        learner = cls(
            config=config,
            graphdef=graphdef,
            reference_graph=reference_graph,
            stops=policy.stop_ids,
            pad=pad,
            platform=policy.platform,
            placement=policy.placement,
        )
        width = policy.config.hidden_size
        # A copy of the adapter, since updates donate the state.
        params: dict[str, Any] = {"lora": jax.tree.map(jnp.copy, adapter)}
        if config.has_critic:
            params["value_head"] = {"kernel": jnp.zeros((width,)), "bias": jnp.zeros(())}
        state = TrainState(params, learner.optimizer.init(params))
        return learner, state, base

    @cached_property
    def for_programs(self) -> "Learner":
        """The learner that programs are compiled for; see `PPOConfig.for_programs`."""
        return dataclasses.replace(self, config=self.config.for_programs)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Optimizer of the policy's parameters."""
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
        """Samples `ppo.samples_per_prompt` responses to each left-padded prompt with the policy.

        It cannot be called within `jax.jit`, since it is compiled with options of its own.

        Args:
            params: parameters of the policy.
            base: frozen state of the policy.
            tokens_bp: prompts.
            mask_bp: False for padding.
            key: random key.
            slots: slots of the packed prompts in each part of the mesh; None: prompts are padded.
        """
        return self._compiled_rollout(
            self.for_programs, params, base, tokens_bp, mask_bp, key, slots=slots
        )

    def rollout_of_runs(
        self, prompts_of_runs: Sequence[RunPrompts], base: nnx.State, slots: int | None = None
    ) -> list[Generation]:
        """Samples like `rollout` for several runs over one base, in one program.

        The weights are read once for the tokens of all runs. Adapters are not folded into the
        weights, so that responses equal those of `rollout` up to rounding.

        Args:
            prompts_of_runs: adapter, prompts and random key of each run, all of the same shapes.
            base: frozen state of the policy.
            slots: as in `rollout`, enough for the prompts of each run.
        """
        assert self.samples_runs_together
        compiled = self._compiled_rollout_of_runs(len(prompts_of_runs))
        return compiled(self.for_programs, tuple(prompts_of_runs), base, slots=slots)

    @property
    def samples_runs_together(self) -> bool:
        """True if `rollout_of_runs` can be called: no slot of a run is refilled on its own."""
        return not self.config.rollout_slots

    @property
    def decoding_options(self) -> tuple[tuple[str, Any], ...]:
        """Compiler options of programs that decode, from `compiler_options`."""
        return compiler_options(self.platform, self.config.rollout_rows // self.placement.parts)

    @property
    def _compiled_rollout(self):
        return _compile_rollout(self.decoding_options)

    def _compiled_rollout_of_runs(self, runs: int):
        rows = runs * self.config.rollout_rows // self.placement.parts
        return _compile_rollout_of_runs(compiler_options(self.platform, rows))

    def _rollout_of_runs(self, prompts_of_runs, base, slots):
        def sample_run(run: RunPrompts) -> Generation:
            return self._rollout(
                {"lora": run.lora}, base, run.tokens_bp, run.mask_bp, run.key, slots, runs="runs"
            )

        stacked = jax.tree.map(lambda *x: jnp.stack(x), *prompts_of_runs)
        generations = jax.vmap(sample_run, axis_name="runs")(stacked)
        return [
            self.placement.constrain_rows(jax.tree.map(lambda x, n=n: x[n], generations))
            for n in range(len(prompts_of_runs))
        ]

    def _rollout(self, params, base, tokens_bp, mask_bp, key, slots, runs=None):
        sampling = Sampling(self.config.max_new_tokens, self.config.temperature)
        policy = nnx.merge(self.graphdef, params["lora"], base)
        # Half precision would round the adapter away, and several runs share the weights.
        if policy.embed_tokens.dtype == jnp.float32 and runs is None:
            fold_lora(policy)
        tokens_bp, mask_bp = self.placement.constrain_rows((tokens_bp, mask_bp))
        sample_with = partial(sample_refilling, slots=self.config.rollout_slots)
        if not self.config.rollout_slots:
            packing = None
            if slots is not None:
                packing = Packing.from_mask(mask_bp, slots, self.placement.parts)
            sample_with = partial(sample, packing=packing, runs=runs)
        generation = sample_with(
            policy,
            tokens_bp,
            mask_bp,
            key,
            sampling=sampling,
            stops=self.stops,
            pad=self.pad,
            copies=self.config.samples_per_prompt,
        )
        return self.placement.constrain_rows(generation)

    def reference_logp(
        self,
        base: nnx.State,
        tokens_bt: jax.Array,
        mask_bt: jax.Array,
        slots: Slots | None = None,
    ) -> jax.Array:
        """Returns log π_ref of the response tokens, `[B, R]`, one microbatch at a time.

        `slots` are those of a microbatch, see `evaluate`.
        """
        return self.for_programs._reference_logp(base, tokens_bt, mask_bt, slots=slots)

    @partial(jax.jit, static_argnums=0, static_argnames="slots")
    def _reference_logp(self, base, tokens_bt, mask_bt, slots):
        reference = nnx.merge(self.reference_graph, base)

        def microbatch_logp(rows):
            tokens_bt, mask_bt = rows
            return self._logprobs(reference, tokens_bt, mask_bt, slots=slots)[0]

        logp_br = self.in_microbatches(microbatch_logp, (tokens_bt, mask_bt))
        return self.placement.constrain_rows(logp_br)

    def lower_rollout(
        self, params: dict, base: nnx.State, prompt_length: int, slots: int | None
    ) -> Lowered:
        """Lowers `rollout` for prompts padded to `prompt_length` tokens; arrays may be abstract."""
        tokens_bp, mask_bp = self._abstract_tokens(self.config.prompts_per_batch, prompt_length)
        key = self.placement.abstract_replicated(jax.eval_shape(jax.random.key, 0))
        return self._compiled_rollout.lower(
            self.for_programs, params, base, tokens_bp, mask_bp, key, slots=slots
        )

    def lower_rollout_of_runs(
        self, params: dict, base: nnx.State, prompt_length: int, slots: int | None, *, runs: int
    ) -> Lowered:
        """Lowers `rollout_of_runs` for a number of runs whose prompts have the same length."""
        tokens_bp, mask_bp = self._abstract_tokens(self.config.prompts_per_batch, prompt_length)
        key = self.placement.abstract_replicated(jax.eval_shape(jax.random.key, 0))
        run = RunPrompts(params["lora"], tokens_bp, mask_bp, key)
        return self._compiled_rollout_of_runs(runs).lower(
            self.for_programs, (run,) * runs, base, slots=slots
        )

    def lower_reference(self, base: nnx.State, prompt_length: int, slots: Slots | None) -> Lowered:
        """Lowers `reference_logp` for prompts padded to `prompt_length` tokens."""
        length = prompt_length + self.config.max_new_tokens
        tokens_bt, mask_bt = self._abstract_tokens(self.config.batch_size, length)
        return self._reference_logp.lower(self.for_programs, base, tokens_bt, mask_bt, slots=slots)

    def _abstract_tokens(self, rows, length):
        return [self.placement.abstract_rows((rows, length), dtype) for dtype in (jnp.int32, bool)]

    def evaluate(
        self,
        params: dict,
        base: nnx.State,
        tokens_bt: jax.Array,
        mask_bt: jax.Array,
        slots: Slots | None = None,
    ) -> Evaluation:
        """Computes log π, entropy and V of every response token; differentiable in `params`.

        Args:
            params: parameters of the policy.
            base: frozen state of the policy.
            tokens_bt: prompt and response `[B, P + R]`, with the response in the last R columns.
            mask_bt: False for padding.
            slots: slots of the packed rows, so that padding is not computed; None: rows are padded.
                Every `slots.copies` consecutive rows must have the same prompt.
        """
        policy = nnx.merge(self.graphdef, params["lora"], base)
        logp_br, entropy_br, x_brd = self._logprobs(policy, tokens_bt, mask_bt, slots=slots)
        values_br = None
        if self.config.has_critic:
            head = params["value_head"]
            values_br = x_brd.astype(jnp.float32) @ head["kernel"] + head["bias"]
        return Evaluation(logp_br, entropy_br, values_br)

    def in_microbatches(self, function, rows):
        """Maps `function` over the microbatches of `rows`, and joins the results."""
        pieces = self.config.pieces
        if pieces == 1:
            return function(rows)
        microbatches = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), rows)
        mapped = jax.lax.map(function, microbatches)
        return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), mapped)

    def _logprobs(self, model, tokens_bt, mask_bt, slots):
        """Returns log π, entropy and hidden state of every response token."""
        tokens_bt, mask_bt = self.placement.constrain_rows((tokens_bt, mask_bt))
        responses, parts = self.config.max_new_tokens, self.placement.parts
        temperature, chunk = self.config.temperature, self.config.logprob_chunk
        targets_br, size = tokens_bt[:, -responses:], model.config.vocab_size
        if slots is None:
            x_brd = model.hidden(tokens_bt, mask_bt)[:, -responses - 1 : -1]
            logp_br, entropy_br = token_logprobs(
                x_brd,
                model.vocabulary,
                targets_br,
                temperature=temperature,
                chunk=chunk,
                vocab_size=size,
            )
            return logp_br, entropy_br, x_brd
        packing = Packing.from_mask(
            mask_bt,
            slots.tokens,
            parts,
            copies=slots.copies,
            prefix=mask_bt.shape[1] - responses,
        )
        x_brd = model.hidden(tokens_bt, mask_bt, packing=packing)[:, -responses - 1 : -1]
        packing = Packing.from_mask(mask_bt[:, -responses:], slots.responses, parts)
        packed = packing.pack(x_brd), packing.pack(targets_br)
        # Several rows of slots, which the cores of a CPU share.
        rows = parts * math.gcd(len(packed[1]) // parts, MULTIPLE)
        x_scd, targets_sc = (y.reshape(rows, -1, *y.shape[1:]) for y in packed)
        logp_sc, entropy_sc = token_logprobs(
            x_scd,
            model.vocabulary,
            targets_sc,
            temperature=temperature,
            chunk=-(-chunk * len(tokens_bt) // rows),
            vocab_size=size,
        )
        logp_br = packing.unpack(logp_sc.reshape(-1))
        return logp_br, packing.unpack(entropy_sc.reshape(-1)), x_brd


@cache
def _compile_rollout(options: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(
        Learner._rollout,
        static_argnums=0,
        static_argnames="slots",
        compiler_options=dict(options),
    )


@cache
def _compile_rollout_of_runs(options: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(
        Learner._rollout_of_runs,
        static_argnums=0,
        static_argnames="slots",
        compiler_options=dict(options),
    )


def make_optimizer(config: PPOConfig) -> optax.GradientTransformation:
    """Returns AdamW with ε = 1e-5 (Huang et al. 2403.17031) after clipping the global norm."""
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
