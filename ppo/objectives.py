"""Objectives: the loss that an optimizer step minimises, of PPO with a critic, RLOO or GRPO.

PPO learns one advantage per token from a value head. RLOO and GRPO have no critic: they compare k
responses to the same prompt. All three learn from the same reward of each response.

    PPO    r_t = −c (log π_old − log π_ref)_t, plus R on the last token; GAE; L_π + vf_coef · L_V
    RLOO   R − c Σ_t (log π_old − log π_ref)_t; one ratio and one clip per response
    GRPO   R; one ratio and one clip per token; c · k3(log π − log π_ref) is added to the loss

c is `ppo.kl_coef`. Sources: Schulman et al. 1707.06347 and Huang et al. 2403.17031 (PPO); Ahmadian
et al. 2402.14740 (RLOO); Shao et al. 2402.03300 (GRPO), with the options of Dr. GRPO (Liu et al.
2503.20783) and DAPO (Yu et al. 2503.14476).
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ppo.advantages import gae, token_rewards, whiten
from ppo.config import PPOConfig
from ppo.group_advantages import group_normalised, has_no_spread, leave_one_out
from ppo.learner import Evaluation
from ppo.losses import (
    average,
    beyond_clip,
    clipped_loss,
    kl_k3,
    log_ratio,
    policy_loss,
    response_log_ratio,
    value_loss,
)


@struct.dataclass
class Batch:
    """A scored rollout. `tokens_bt` and `mask_bt` hold prompt and response, `[B, P + R]`.

    `keep_b` is False for responses that are screened: nothing is learned from them, as if they had
    not been sampled. None: none is.
    """

    tokens_bt: jax.Array
    mask_bt: jax.Array
    mask_br: jax.Array
    ref_logp_br: jax.Array
    reward_b: jax.Array
    keep_b: Any = None

    @property
    def learned_br(self) -> jax.Array:
        """The mask of the response tokens that are learned from."""
        return self.mask_br if self.keep_b is None else self.mask_br & self.keep_b[:, None]


@struct.dataclass
class Targets:
    """The values fixed in an update: log π_old, advantages and, with a critic, values and returns.

    Advantages are `[B, R]` with a critic and `[B, 1]` without one; all others are `[B, R]`.
    """

    logp_br: jax.Array
    advantages_br: jax.Array
    values_br: Any = None
    returns_br: Any = None


@dataclasses.dataclass(frozen=True)
class Objective(ABC):
    """The targets and the loss of an algorithm."""

    config: PPOConfig

    @abstractmethod
    def targets(self, batch: Batch, old: Evaluation) -> Targets:
        """Computes the targets of an update from the whole batch, in its own order.

        Args:
            batch: the scored rollout.
            old: log-probabilities and values before the update.
        """

    @abstractmethod
    def loss(
        self,
        now: Evaluation,
        targets: Targets,
        batch: Batch,
        count: jax.Array,
        responses: Any = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the loss of a microbatch and its parts.

        The sum over the microbatches of a minibatch is the loss of the minibatch.

        Args:
            now: log-probabilities and values of the current parameters.
            targets: the targets of these rows.
            batch: the rows.
            count: mean number of response tokens in a minibatch, without those that are screened.
            responses: mean number of responses in a minibatch that are not screened; None: all.

        Returns:
            The loss, and its parts by the names of their metrics.
        """

    @abstractmethod
    def advantages(self, batch: Batch, targets: Targets) -> jax.Array:
        """Returns the advantages before whitening, `[B, R]` or `[B, 1]`."""

    def metrics(self, _batch: Batch, _targets: Targets) -> dict[str, jax.Array]:
        """Returns further metrics of a rollout."""
        return {}

    def _clipped_tokens(
        self, log_ratio_br: jax.Array, mask_br: jax.Array, count: jax.Array
    ) -> jax.Array:
        """Returns the share of a minibatch's tokens whose ratio is beyond the clip."""
        return jnp.where(mask_br & beyond_clip(log_ratio_br, self.clip), 1.0, 0.0).sum() / count

    @property
    def clip(self) -> tuple[float, float]:
        """The bounds of the ratio below and above 1: (ε, ε_high)."""
        return self.config.clip_range, self.config.clip_range_high or self.config.clip_range


class PPO(Objective):
    """The clipped objective with a value head and advantages from GAE.

    Advantages are whitened if `whiten_advantages` is set; returns never are.
    """

    def targets(self, batch: Batch, old: Evaluation) -> Targets:
        """Computes advantages and returns by GAE."""
        config, mask_br = self.config, batch.learned_br
        kl_br = old.logp_br - batch.ref_logp_br
        rewards_br = token_rewards(batch.reward_b, kl_br, mask_br, kl_coef=config.kl_coef)
        advantages_br, returns_br = gae(
            rewards_br, old.values_br, mask_br, gamma=config.gamma, lam=config.gae_lambda
        )
        if config.whiten_advantages:
            advantages_br = whiten(advantages_br, mask_br)
        return Targets(old.logp_br, advantages_br, old.values_br, returns_br)

    def loss(
        self,
        now: Evaluation,
        targets: Targets,
        batch: Batch,
        count: jax.Array,
        _responses: Any = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes L_π + vf_coef · L_V."""
        config, mask_br = self.config, batch.learned_br
        log_ratio_br = log_ratio(now.logp_br, targets.logp_br, mask_br)
        policy = policy_loss(
            log_ratio_br,
            targets.advantages_br,
            mask_br,
            clip=self.clip,
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
        clipped = self._clipped_tokens(log_ratio_br, mask_br, count)
        return loss, {"policy_loss": policy, "value_loss": value, "clip_fraction": clipped}

    def advantages(self, _batch: Batch, targets: Targets) -> jax.Array:
        """Returns returns − values."""
        return targets.returns_br - targets.values_br


class GroupObjective(Objective):
    """An objective without a critic, which compares the k responses to a prompt."""

    @abstractmethod
    def group_reward(self, batch: Batch, logp_br: jax.Array) -> jax.Array:
        """Returns the reward of each response that its group compares, `[B]`."""

    def advantages(self, _batch: Batch, targets: Targets) -> jax.Array:
        """Returns the advantages themselves, which are never whitened."""
        return targets.advantages_br

    def metrics(self, batch: Batch, targets: Targets) -> dict[str, jax.Array]:
        """Counts the groups whose rewards are all equal, so that nothing is learned from them."""
        reward_b = self.group_reward(batch, targets.logp_br)
        keep_gk = None if batch.keep_b is None else self._groups(batch.keep_b)
        return {"zero_spread_groups": has_no_spread(self._groups(reward_b), keep_gk).sum()}

    def _groups(self, reward_b: jax.Array) -> jax.Array:
        return reward_b.reshape(-1, self.config.samples_per_prompt)

    def _rows(self, responses: Any) -> Any:
        """Returns the number of responses in a minibatch, of those that are not screened."""
        if responses is not None:
            return responses
        return self.config.batch_size // self.config.num_minibatches


class RLOO(GroupObjective):
    """REINFORCE with the other responses as baseline; the response is one action."""

    def group_reward(self, batch: Batch, logp_br: jax.Array) -> jax.Array:
        """Returns R minus the KL of the whole response to the reference."""
        kl_br = jnp.where(batch.mask_br, logp_br - batch.ref_logp_br, 0.0)
        return batch.reward_b - self.config.kl_coef * kl_br.sum(axis=1)

    def targets(self, batch: Batch, old: Evaluation) -> Targets:
        """Computes the advantages against the mean of the other responses."""
        reward_b = self.group_reward(batch, old.logp_br)
        advantages_b = leave_one_out(reward_b, self.config.samples_per_prompt, batch.keep_b)
        return Targets(old.logp_br, advantages_b[:, None])

    def loss(
        self,
        now: Evaluation,
        targets: Targets,
        batch: Batch,
        _count: jax.Array,
        responses: Any = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the mean over responses of the clipped loss with one ratio per response."""
        # A screened response has the ratio 1 and the advantage 0, and so no loss.
        log_ratio_b = response_log_ratio(now.logp_br, targets.logp_br, batch.learned_br)
        loss_b = clipped_loss(log_ratio_b, targets.advantages_br[:, 0], self.clip)
        rows = self._rows(responses)
        policy = loss_b.sum() / rows
        clipped = beyond_clip(log_ratio_b, self.clip).sum() / rows
        return policy, {"policy_loss": policy, "clip_fraction": clipped}


class GRPO(GroupObjective):
    """The clipped objective with advantages relative to the group, and the KL in the loss."""

    def group_reward(self, batch: Batch, _logp_br: jax.Array) -> jax.Array:
        """Returns R; the KL is in the loss."""
        return batch.reward_b

    def targets(self, batch: Batch, old: Evaluation) -> Targets:
        """Computes the advantages relative to the group."""
        config = self.config
        advantages_b = group_normalised(
            batch.reward_b,
            config.samples_per_prompt,
            scale=config.scale_advantages,
            keep_b=batch.keep_b,
        )
        return Targets(old.logp_br, advantages_b[:, None])

    def loss(
        self,
        now: Evaluation,
        targets: Targets,
        batch: Batch,
        count: jax.Array,
        responses: Any = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the average of the clipped loss and of c · k3 over the tokens."""
        config, mask_br = self.config, batch.learned_br
        # A screened response has the ratio 1, the advantage 0 and no KL, and so no loss; its tokens
        # are counted, so that its own mean is not 0 / 0.

        def mean(loss_br):
            return average(
                loss_br,
                batch.mask_br,
                over=config.loss_average,
                rows=self._rows(responses),
                tokens=count,
                max_tokens=config.max_new_tokens,
            )

        log_ratio_br = log_ratio(now.logp_br, targets.logp_br, mask_br)
        policy = mean(clipped_loss(log_ratio_br, targets.advantages_br, self.clip))
        kl = mean(kl_k3(log_ratio(now.logp_br, batch.ref_logp_br, mask_br)))
        clipped = self._clipped_tokens(log_ratio_br, mask_br, count)
        return policy + config.kl_coef * kl, {"policy_loss": policy, "clip_fraction": clipped}


OBJECTIVES: dict[str, type[Objective]] = {"ppo": PPO, "rloo": RLOO, "grpo": GRPO}


def objective(config: PPOConfig) -> Objective:
    """Returns the objective of `ppo.algorithm`."""
    return OBJECTIVES[config.algorithm](config)
