"""One PPO update: from scored responses to new parameters.

The old log-probabilities and values are computed by the same function as the new ones. If the batch
is a single microbatch, they are taken from the forward pass of the first optimizer step: nothing
has changed yet, so π_old = π and the ratio is exactly 1. This saves one forward pass. Otherwise
they are computed before the first step, because whitening needs the advantages of the whole batch.
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
    """A scored rollout. `tokens_bt` and `mask_bt` hold prompt and response, `[B, P + R]`."""

    tokens_bt: jax.Array
    mask_bt: jax.Array
    mask_br: jax.Array
    ref_logp_br: jax.Array
    reward_b: jax.Array


@struct.dataclass
class Targets:
    """Log π_old, old values, advantages and returns `[B, R]`, which stay fixed in an update."""

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
        """Options of the learner."""
        return self.learner.config

    def update(
        self,
        state: TrainState,
        base: nnx.State,
        batch: Batch,
        *,
        order: np.ndarray,
        slots: Slots | None = None,
    ) -> tuple[TrainState, Targets, dict[str, jax.Array]]:
        """Runs the optimizer steps of all epochs and minibatches on a batch.

        An optimizer step that would make a parameter non-finite is not applied.

        Args:
            state: state before the update; it is donated.
            base: frozen state of the policy.
            batch: the scored rollout.
            order: the rows of the batch in each epoch, `[epochs, B]`.
            slots: slots of a packed microbatch, in the order of any epoch and in the batch's own;
                None: rows are padded.

        Returns:
            The new state, the targets, and the mean of each metric over the optimizer steps.
            `skipped_updates` counts the steps that were not applied.
        """
        config = self.config
        count = self._count(batch.mask_br)
        single = config.pieces == 1
        targets: Any = None if single else self._targets(state.params, base, batch, slots)
        history = []
        for epoch_order in order:
            for rows in np.split(epoch_order, config.num_minibatches):
                if single:
                    state, targets, metrics = self._step(state, base, batch, targets, count, slots)
                else:
                    chosen = jax.tree.map(lambda x, rows=rows: x[rows], (batch, targets))
                    part, part_targets = self.learner.placement.rows(chosen)
                    state, _, metrics = self._step(state, base, part, part_targets, count, slots)
                history.append(metrics)
        return state, targets, _summary(history)

    def lower(
        self, state: TrainState, base: nnx.State, prompt_length: int, slots: Slots | None
    ) -> dict[str, Callable[[], Lowered]]:
        """Returns a function for each program of an update that lowers it.

        It is lowered for prompts padded to `prompt_length` tokens. The programs are `targets`, if
        the targets are computed before the first step; `first_step`, if that step computes them;
        and `step` for all other optimizer steps. Arrays may be abstract.
        """
        config = self.config
        batch, targets = self._abstract(config.batch_size // config.num_minibatches, prompt_length)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        count = self.learner.placement.abstract_replicated(scalar)
        lower_step = partial(self._step.lower, self, state, base, batch)
        programs: dict[str, Callable[[], Lowered]] = {}
        if config.pieces == 1:
            programs["first_step"] = partial(lower_step, None, count, slots)
        else:
            whole_batch, _ = self._abstract(config.batch_size, prompt_length)
            programs["targets"] = partial(
                self._targets.lower, self, state.params, base, whole_batch, slots
            )
        if config.pieces > 1 or config.ppo_epochs > 1:
            programs["step"] = partial(lower_step, targets, count, slots)
        return programs

    def _abstract(self, rows: int, prompt_length: int) -> tuple[Any, Any]:
        """Returns an abstract batch of `rows` rows, and abstract targets."""
        responses, abstract = self.config.max_new_tokens, self.learner.placement.abstract_rows
        per_token: Any = abstract((rows, responses), jnp.float32)
        batch = Batch(
            tokens_bt=abstract((rows, prompt_length + responses), jnp.int32),
            mask_bt=abstract((rows, prompt_length + responses), bool),
            mask_br=abstract((rows, responses), bool),
            ref_logp_br=per_token,
            reward_b=abstract((rows,), jnp.float32),
        )
        targets = Targets(
            logp_br=per_token, values_br=per_token, advantages_br=per_token, returns_br=per_token
        )
        return batch, targets

    def _count(self, mask_br):
        """Returns the mean number of response tokens per minibatch, the N of the losses."""
        count = mask_br.sum() / self.config.num_minibatches
        return self.learner.placement.replicated(count)

    @partial(jax.jit, static_argnums=(0, 4))
    def _targets(self, params, base, batch, slots):
        def evaluate(rows):
            tokens_bt, mask_bt = rows
            return self.learner.evaluate(params, base, tokens_bt, mask_bt, slots=slots)

        old = self.learner.in_microbatches(evaluate, (batch.tokens_bt, batch.mask_bt))
        targets = make_targets(self.config, batch, logp_br=old.logp_br, values_br=old.values_br)
        return self.learner.placement.constrain_rows(targets)

    @partial(jax.jit, static_argnums=(0, 6), donate_argnums=1)
    def _step(self, state, base, batch, targets, count, slots):
        """Takes an optimizer step on a minibatch, with gradients summed over its microbatches."""
        grad_fn = jax.grad(self._loss, has_aux=True)
        pieces = self.config.gradient_accumulation_steps
        if pieces == 1:
            grads, (targets, metrics) = grad_fn(state.params, base, batch, targets, count, slots)
        else:
            microbatches = jax.tree.map(
                lambda x: x.reshape(pieces, -1, *x.shape[1:]), (batch, targets)
            )

            def accumulate(total, microbatch):
                part, part_targets = microbatch
                grads, (_, metrics) = grad_fn(state.params, base, part, part_targets, count, slots)
                return jax.tree.map(jnp.add, total, grads), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, stacked = jax.lax.scan(accumulate, zeros, microbatches)
            deviation = stacked.pop("ratio_max_dev").max()
            metrics = {k: v.sum() for k, v in stacked.items()} | {"ratio_max_dev": deviation}

        grad_norm = optax.global_norm(grads)
        updates, opt_state = self.learner.optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["ppo_loss"])
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        state = self.learner.placement.constrain_replicated(state)
        targets = self.learner.placement.constrain_rows(targets)
        return state, targets, metrics | {"grad_norm": grad_norm, "finite": finite}

    def _loss(self, params, base, batch, targets, count, slots):
        """Returns the loss, and (targets, metrics); without targets, π is π_old."""
        config, mask_br = self.config, batch.mask_br
        now = self.learner.evaluate(params, base, batch.tokens_bt, batch.mask_bt, slots=slots)
        if targets is None:
            old = jax.lax.stop_gradient(now)
            targets = make_targets(config, batch, logp_br=old.logp_br, values_br=old.values_br)
        log_ratio_br = log_ratio(now.logp_br, targets.logp_br, mask_br)
        policy = policy_loss(
            log_ratio_br,
            targets.advantages_br,
            mask_br,
            clip_range=config.clip_range,
            token_count=count,
        )
        value = value_loss(
            now.values_br,
            old_values_br=targets.values_br,
            returns_br=targets.returns_br,
            mask_br=mask_br,
            clip_range=config.value_clip_range,
            token_count=count,
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
    """Returns the metrics of an update from those of its optimizer steps."""
    metrics = {k: jnp.stack([m[k] for m in history]) for k in history[0]}
    first_deviation = metrics.pop("ratio_max_dev")[0]
    skipped = (~metrics.pop("finite")).sum()
    summary = {name: values.mean() for name, values in metrics.items()}
    return summary | {"ratio_0_max_dev": first_deviation, "skipped_updates": skipped}


def make_targets(
    config: PPOConfig, batch: Batch, *, logp_br: jax.Array, values_br: jax.Array
) -> Targets:
    """Computes the targets of an update from log π_old and old values.

    Advantages are whitened if `config.whiten_advantages` is set; returns never are.
    """
    mask_br = batch.mask_br
    kl_br = logp_br - batch.ref_logp_br
    rewards_br = token_rewards(batch.reward_b, kl_br, mask_br, kl_coef=config.kl_coef)
    advantages_br, returns_br = gae(
        rewards_br, values_br, mask_br, gamma=config.gamma, lam=config.gae_lambda
    )
    if config.whiten_advantages:
        advantages_br = whiten(advantages_br, mask_br)
    return Targets(
        logp_br=logp_br,
        values_br=values_br,
        advantages_br=advantages_br,
        returns_br=returns_br,
    )


@jax.jit
def batch_metrics(batch: Batch, targets: Targets, sampler_logp_br: jax.Array) -> dict:
    """Returns the metrics of the rollout.

    `ref_kl` is the KL of π_old to the reference policy in nats per response, averaged over the
    responses. `sampler_drift` is the mean of |log π_sampler − log π_old| over the tokens.
    `advantage_mean` and `advantage_std` are those of returns − values, before whitening.

    They are one compiled program, because dozens of small programs after an update can deadlock on
    virtual devices.
    """
    mask_br = batch.mask_br
    advantages_br = targets.returns_br - targets.values_br
    mean = masked_mean(advantages_br, mask_br)
    return {
        "ref_kl": response_kl(targets.logp_br, batch.ref_logp_br, mask_br).mean(),
        "sampler_drift": masked_mean(jnp.abs(sampler_logp_br - targets.logp_br), mask_br),
        "advantage_mean": mean,
        "advantage_std": jnp.sqrt(masked_mean(jnp.square(advantages_br - mean), mask_br)),
    }
