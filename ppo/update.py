"""One PPO update: from scored responses to new parameters.

The old log-probabilities and values come from the same function as the new ones. With a single
microbatch they come from the very forward pass of the first gradient step (nothing has changed
yet, so π_old = π and the ratio is exactly 1), which saves one forward pass over the batch;
otherwise they are computed first, because whitening needs the advantages of the whole batch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.stages import Lowered

from ppo.advantages import gae, masked_mean, token_rewards, whiten
from ppo.config import PPOConfig
from ppo.learner import Learner, TrainState
from ppo.losses import kl_k3, log_ratio, policy_loss, response_kl, value_loss
from ppo.slots import Slots


@struct.dataclass
class Batch:
    """A scored rollout: prompt and response `[B, P + R]`, the rest `[B, R]` and `[B]`."""

    tokens_bt: jax.Array
    mask_bt: jax.Array
    response_mask_br: jax.Array
    ref_logp_br: jax.Array
    reward_b: jax.Array


@struct.dataclass
class Targets:
    """What the losses compare with, `[B, R]`; fixed during an update."""

    logp_br: jax.Array
    values_br: jax.Array
    advantages_br: jax.Array
    returns_br: jax.Array


@dataclasses.dataclass(frozen=True)
class Updater:
    """Runs the epochs and minibatches of an update as a few compiled, donated programs."""

    learner: Learner

    @property
    def config(self) -> PPOConfig:
        """The learner's options."""
        return self.learner.config

    def __call__(
        self,
        state: TrainState,
        base: nnx.State,
        batch: Batch,
        permutations: np.ndarray,
        slots: Slots | None = None,
    ) -> tuple[TrainState, Targets, dict[str, jax.Array]]:
        """(new state, the targets used, scalar metrics); `state` is donated.

        `permutations [epochs, B]` orders the rows of each epoch; `slots` hold the tokens of any
        microbatch in that order and in the batch's own, None: padding is computed. An update that
        would make a parameter non-finite is not applied; `skipped_updates` counts them.
        """
        config = self.config
        count = self._count(batch.response_mask_br)
        single = config.pieces == 1
        targets: Any = None if single else self._targets(state.params, base, batch, slots)
        history = []
        for order in permutations:
            for rows in np.split(order, config.num_minibatches):
                if single:
                    state, targets, metrics = self._step(state, base, batch, targets, count, slots)
                else:
                    piece = jax.tree.map(lambda x, rows=rows: x[rows], (batch, targets))
                    piece = self.learner.placement.rows(piece)
                    state, _, metrics = self._step(state, base, *piece, count, slots)
                history.append(metrics)
        return state, targets, _summary(history)

    def lower(
        self, state: TrainState, base: nnx.State, prompt_length: int, slots: Slots | None
    ) -> dict[str, Callable[[], Lowered]]:
        """Lowers the programs of an update of prompts padded to `prompt_length` tokens.

        `targets` where they are computed beforehand, `first_step` where it makes them, `step` for
        all others. Arrays may be abstract.
        """
        config, placement = self.config, self.learner.placement
        responses, abstract = config.max_new_tokens, placement.abstract_rows

        def arrays(rows: int) -> tuple[Any, Any]:
            per_token: Any = abstract((rows, responses), jnp.float32)
            whole = (rows, prompt_length + responses)
            batch = Batch(
                tokens_bt=abstract(whole, jnp.int32),
                mask_bt=abstract(whole, bool),
                response_mask_br=abstract((rows, responses), bool),
                ref_logp_br=per_token,
                reward_b=abstract((rows,), jnp.float32),
            )
            return batch, Targets(per_token, per_token, per_token, per_token)

        batch, targets = arrays(config.batch_size // config.num_minibatches)
        count = placement.abstract_replicated(jax.ShapeDtypeStruct((), jnp.float32))
        programs: dict[str, Callable[[], Lowered]] = {}
        if config.pieces == 1:
            first = self, state, base, batch, None, count, slots
            programs["first_step"] = partial(self._step.lower, *first)
        else:
            whole, _ = arrays(config.batch_size)
            programs["targets"] = partial(
                self._targets.lower, self, state.params, base, whole, slots
            )
        if config.pieces > 1 or config.ppo_epochs > 1:
            later = self, state, base, batch, targets, count, slots
            programs["step"] = partial(self._step.lower, *later)
        return programs

    def _count(self, mask_br):
        """Response tokens per minibatch, what the losses are averaged over."""
        count = mask_br.sum() / self.config.num_minibatches
        return self.learner.placement.replicated(count)

    @partial(jax.jit, static_argnums=(0, 4))
    def _targets(self, params, base, batch, slots):
        def piece(rows):
            tokens_bt, mask_bt = rows
            return self.learner.evaluate(params, base, tokens_bt, mask_bt, slots)

        old = self.learner.in_microbatches(piece, (batch.tokens_bt, batch.mask_bt))
        targets = make_targets(self.config, batch, old.logp_br, old.values_br)
        return self.learner.placement.keep_rows(targets)

    @partial(jax.jit, static_argnums=(0, 6), donate_argnums=1)
    def _step(self, state, base, batch, targets, count, slots):
        """One optimizer step on a minibatch, accumulated over its microbatches."""
        grad_fn = jax.grad(self._loss, has_aux=True)
        pieces = self.config.gradient_accumulation_steps
        if pieces == 1:
            grads, (targets, metrics) = grad_fn(state.params, base, batch, targets, count, slots)
        else:
            cut = jax.tree.map(lambda x: x.reshape(pieces, -1, *x.shape[1:]), (batch, targets))

            def accumulate(total, piece):
                grads, (_, metrics) = grad_fn(state.params, base, *piece, count, slots)
                return jax.tree.map(jnp.add, total, grads), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, stacked = jax.lax.scan(accumulate, zeros, cut)
            deviation = stacked.pop("ratio_max_dev").max()
            metrics = {k: v.sum() for k, v in stacked.items()} | {"ratio_max_dev": deviation}

        grad_norm = optax.global_norm(grads)
        updates, opt_state = self.learner.optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["ppo_loss"])
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        state = self.learner.placement.keep_replicated(state)
        targets = self.learner.placement.keep_rows(targets)
        return state, targets, metrics | {"grad_norm": grad_norm, "finite": finite}

    def _loss(self, params, base, batch, targets, count, slots):
        config, mask_br = self.config, batch.response_mask_br
        now = self.learner.evaluate(params, base, batch.tokens_bt, batch.mask_bt, slots)
        if targets is None:
            old = jax.lax.stop_gradient(now)
            targets = make_targets(config, batch, old.logp_br, old.values_br)
        log_ratio_br = log_ratio(now.logp_br, targets.logp_br, mask_br)
        policy = policy_loss(log_ratio_br, targets.advantages_br, mask_br, config.clip_range, count)
        value = value_loss(
            now.values_br,
            targets.values_br,
            targets.returns_br,
            mask_br,
            config.value_clip_range,
            count,
        )
        loss = policy + config.vf_coef * value
        deviation_br = jnp.abs(jnp.exp(log_ratio_br) - 1)

        def mean(x_br):
            return jnp.where(mask_br, x_br, 0.0).sum() / count

        metrics = {
            "ppo_loss": loss,
            "policy_loss": policy,
            "value_loss": value,
            "entropy": mean(now.entropy_br),
            "approx_kl": mean(kl_k3(-log_ratio_br)),
            "clip_fraction": mean(deviation_br > config.clip_range),
            "ratio_max_dev": deviation_br.max(),
        }
        return loss, (targets, metrics)


@jax.jit
def _summary(history: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """The metrics of an update's optimizer steps as those of the update."""
    metrics = {k: jnp.stack([m[k] for m in history]) for k in history[0]}
    first_deviation = metrics.pop("ratio_max_dev")[0]
    skipped = (~metrics.pop("finite")).sum()
    summary = {name: values.mean() for name, values in metrics.items()}
    return summary | {"ratio_0_max_dev": first_deviation, "skipped_updates": skipped}


def make_targets(
    config: PPOConfig, batch: Batch, logp_br: jax.Array, values_br: jax.Array
) -> Targets:
    """Per-token rewards → advantages and returns; the advantages whitened if so configured."""
    mask_br = batch.response_mask_br
    kl_br = logp_br - batch.ref_logp_br
    rewards_br = token_rewards(batch.reward_b, kl_br, mask_br, config.kl_coef)
    advantages_br, returns_br = gae(rewards_br, values_br, mask_br, config.gamma, config.gae_lambda)
    if config.whiten_advantages:
        advantages_br = whiten(advantages_br, mask_br)
    return Targets(logp_br, values_br, advantages_br, returns_br)


@jax.jit
def batch_metrics(batch: Batch, targets: Targets, sampler_logp_br: jax.Array) -> dict:
    """Scalars of the rollout itself.

    `ref_kl`: of π_old, nats per response, averaged over responses;
    `sampler_drift`: mean |log π_sampler − log π_old| per token;
    `advantage_*`: of returns − values, before whitening.
    One program: on virtual devices dozens of small ones behind an update can wait for each other.
    """
    mask_br = batch.response_mask_br
    advantages_br = targets.returns_br - targets.values_br
    mean = masked_mean(advantages_br, mask_br)
    return {
        "ref_kl": response_kl(targets.logp_br, batch.ref_logp_br, mask_br).mean(),
        "sampler_drift": masked_mean(jnp.abs(sampler_logp_br - targets.logp_br), mask_br),
        "advantage_mean": mean,
        "advantage_std": jnp.sqrt(masked_mean(jnp.square(advantages_br - mean), mask_br)),
    }
