"""One update: from scored responses to new parameters, by PPO, RLOO or GRPO.

The old log-probabilities and values are computed by the same function as the new ones. If the batch
is a single microbatch, they are taken from the forward pass of the first optimizer step: nothing
has changed yet, so π_old = π and the ratio is exactly 1. This saves one forward pass. Otherwise
they are computed before the first step, because whitening needs the advantages of the whole batch.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.stages import Lowered

from ppo.advantages import masked_mean
from ppo.config import PPOConfig
from ppo.learner import Learner, TrainState
from ppo.losses import kl_k3, log_ratio, response_kl
from ppo.objectives import Batch, Targets, objective
from ppo.slots import Slots


@dataclasses.dataclass(frozen=True)
class Updater:
    """Runs the epochs and minibatches of an update as a few compiled, donated programs.

    `screens` is True if batches say which responses are screened (`Batch.keep_b`).
    """

    learner: Learner
    screens: bool = False

    @cached_property
    def for_programs(self) -> "Updater":
        """The updater that programs are compiled for; see `PPOConfig.for_programs`."""
        return dataclasses.replace(self, learner=self.learner.for_programs)

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

        An optimizer step that would make a parameter non-finite is not applied, and neither is one
        whose responses are all screened.

        Args:
            state: state before the update; it is donated.
            base: frozen state of the policy.
            batch: the scored rollout.
            order: the rows of the batch in each epoch, `[epochs, B]`.
            slots: slots of a packed microbatch, in the order of any epoch and in the batch's own;
                None: rows are padded.

        Returns:
            The new state, the targets, and the mean of each metric over the optimizer steps.
            `skipped_updates` counts the steps that were not finite, and `screened_updates`, if the
            batch has screened responses, those without a response to learn from.
        """
        config, programs = self.config, self.for_programs
        count, responses = self._counts(batch)
        single = config.pieces == 1
        targets: Any = None if single else programs._targets(state.params, base, batch, slots)
        history = []
        for epoch_order in order:
            for rows in np.split(epoch_order, config.num_minibatches):
                if single:
                    state, targets, metrics = programs._step(
                        state, base, batch, targets, count, slots, responses
                    )
                else:
                    chosen = jax.tree.map(lambda x, rows=rows: x[rows], (batch, targets))
                    part, part_targets = self.learner.placement.rows(chosen)
                    state, _, metrics = programs._step(
                        state, base, part, part_targets, count, slots, responses
                    )
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
        responses = count if self.screens else None
        static = self.for_programs
        lower_step = partial(self._step.lower, static, state, base, batch)
        programs: dict[str, Callable[[], Lowered]] = {}
        if config.pieces == 1:
            programs["first_step"] = partial(lower_step, None, count, slots, responses)
        else:
            whole_batch, _ = self._abstract(config.batch_size, prompt_length)
            programs["targets"] = partial(
                self._targets.lower, static, state.params, base, whole_batch, slots
            )
        if config.pieces > 1 or config.ppo_epochs > 1:
            programs["step"] = partial(lower_step, targets, count, slots, responses)
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
            keep_b=abstract((rows,), bool) if self.screens else None,
        )
        if self.config.has_critic:
            return batch, Targets(per_token, per_token, per_token, per_token)
        targets = Targets(per_token, abstract((rows, 1), jnp.float32))
        return batch, targets

    def _counts(self, batch):
        """Returns the means per minibatch of response tokens, the N of the losses, and responses.

        Screened responses do not count; if there is no other, there is nothing to divide, and the
        numbers are those of one token. Without screening the number of responses is None.
        """
        tokens, responses = batch.learned_br.sum(), None
        if batch.keep_b is not None:
            tokens = jnp.maximum(tokens, 1)
            responses = jnp.maximum(batch.keep_b.sum(), 1) / self.config.num_minibatches
            responses = self.learner.placement.replicated(responses)
        count = tokens / self.config.num_minibatches
        return self.learner.placement.replicated(count), responses

    @partial(jax.jit, static_argnums=(0, 4))
    def _targets(self, params, base, batch, slots):
        def evaluate(rows):
            tokens_bt, mask_bt = rows
            return self.learner.evaluate(params, base, tokens_bt, mask_bt, slots=slots)

        old = self.learner.in_microbatches(evaluate, (batch.tokens_bt, batch.mask_bt))
        targets = objective(self.config).targets(batch, old)
        return self.learner.placement.constrain_rows(targets)

    @partial(jax.jit, static_argnums=(0, 6), donate_argnums=1)
    def _step(self, state, base, batch, targets, count, slots, responses=None):
        """Takes an optimizer step on a minibatch, with gradients summed over its microbatches."""
        grad_fn = jax.grad(self._loss, has_aux=True)
        pieces = self.config.gradient_accumulation_steps
        if pieces == 1:
            grads, (targets, metrics) = grad_fn(
                state.params, base, batch, targets, count, slots, responses
            )
        else:
            microbatches = jax.tree.map(
                lambda x: x.reshape(pieces, -1, *x.shape[1:]), (batch, targets)
            )

            def accumulate(total, microbatch):
                part, part_targets = microbatch
                grads, (_, metrics) = grad_fn(
                    state.params, base, part, part_targets, count, slots, responses
                )
                return jax.tree.map(jnp.add, total, grads), metrics

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, stacked = jax.lax.scan(accumulate, zeros, microbatches)
            deviation = stacked.pop("ratio_max_dev").max()
            metrics = {k: v.sum() for k, v in stacked.items()} | {"ratio_max_dev": deviation}
        if "tokens" in metrics:
            metrics["entropy"] /= metrics.pop("tokens")

        grad_norm = optax.global_norm(grads)
        updates, opt_state = self.learner.optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(optax.apply_updates(state.params, updates), opt_state)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["ppo_loss"])
        applied = finite
        if batch.keep_b is not None:  # Adam's momentum would move the parameters without a gradient
            metrics["learns"] = batch.keep_b.any()
            applied = finite & metrics["learns"]
        state = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, state)
        state = self.learner.placement.constrain_replicated(state)
        targets = self.learner.placement.constrain_rows(targets)
        return state, targets, metrics | {"grad_norm": grad_norm, "finite": finite}

    def _loss(self, params, base, batch, targets, count, slots, responses):
        """Returns the loss, and (targets, metrics); without targets, π is π_old."""
        mask_br, algorithm = batch.learned_br, objective(self.config)
        now = self.learner.evaluate(params, base, batch.tokens_bt, batch.mask_bt, slots=slots)
        if targets is None:
            targets = algorithm.targets(batch, jax.lax.stop_gradient(now))
        loss, parts = algorithm.loss(now, targets, batch, count, responses)
        log_ratio_br = log_ratio(now.logp_br, targets.logp_br, mask_br)
        deviation_br = jnp.abs(jnp.exp(log_ratio_br) - 1)

        def mean(x_br):
            return jnp.where(mask_br, x_br, 0.0).sum() / count

        metrics = {
            "ppo_loss": loss,
            **parts,
            **self._entropy(now.entropy_br, batch, mean),
            "approx_kl": mean(kl_k3(-log_ratio_br)),
            "ratio_max_dev": deviation_br.max(),
        }
        return loss, (targets, metrics)

    def _entropy(self, entropy_br, batch, mean):
        """Returns the entropy; of batches that may be screened, its sum and the number of tokens.

        It is a property of all responses, so those that are screened count too.
        """
        if batch.keep_b is None:
            return {"entropy": mean(entropy_br)}
        entropy = jnp.where(batch.mask_br, entropy_br, 0.0).sum()
        return {"entropy": entropy, "tokens": batch.mask_br.sum().astype(jnp.float32)}


@jax.jit
def _summary(history: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Returns the metrics of an update from those of its optimizer steps."""
    metrics = {k: jnp.stack([m[k] for m in history]) for k in history[0]}
    first_deviation = metrics.pop("ratio_max_dev")[0]
    counts = {"skipped_updates": (~metrics.pop("finite")).sum()}
    if "learns" in metrics:
        counts["screened_updates"] = (~metrics.pop("learns")).sum()
    summary = {name: values.mean() for name, values in metrics.items()}
    return summary | {"ratio_0_max_dev": first_deviation} | counts


@partial(jax.jit, static_argnums=0)
def batch_metrics(
    config: PPOConfig, batch: Batch, targets: Targets, sampler_logp_br: jax.Array
) -> dict[str, jax.Array]:
    """Returns the metrics of the rollout.

    `ref_kl` is the KL of π_old to the reference policy in nats per response, averaged over the
    responses. `sampler_drift` is the mean of |log π_sampler − log π_old| over the tokens.
    `advantage_mean` and `advantage_std` are over tokens and before whitening, without screened
    responses, which count in the others.

    They are one compiled program, because dozens of small programs after an update can deadlock on
    virtual devices.
    """
    mask_br, algorithm = batch.mask_br, objective(config)
    advantages_br = algorithm.advantages(batch, targets)
    mean = _mean_learned(advantages_br, batch)
    return algorithm.metrics(batch, targets) | {
        "ref_kl": response_kl(targets.logp_br, batch.ref_logp_br, mask_br).mean(),
        "sampler_drift": masked_mean(jnp.abs(sampler_logp_br - targets.logp_br), mask_br),
        "advantage_mean": mean,
        "advantage_std": jnp.sqrt(_mean_learned(jnp.square(advantages_br - mean), batch)),
    }


def _mean_learned(x_br: jax.Array, batch: Batch) -> jax.Array:
    """Returns the mean of x over the tokens that are learned from; 0 if all are screened."""
    mean = masked_mean(x_br, batch.learned_br)
    return mean if batch.keep_b is None else jnp.where(batch.keep_b.any(), mean, 0.0)
