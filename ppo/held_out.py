"""The policy on prompts that it is not trained on, every so many steps.

The same prompts and the same random keys every time, so that what changes is the policy. Nothing
here is learned from: the discriminator is read as it stands.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Lowered

from ppo.density_ratio import DensityRatio
from ppo.losses import response_kl
from ppo.prompts import PromptDeck
from ppo.reward import RewardConfig, ScoreScale, compound_reward
from ppo.rollout import Rollout, Sampler
from ppo.scoring import Scorer
from ppo.slots import SlotPlan, slot_plans
from sarm_jax.parallel.processes import fetch


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """`batches` batches of `deck`, sampled with keys that follow from `key`."""

    deck: PromptDeck
    batches: int
    key: jax.Array
    sampler: Sampler
    scorer: Scorer
    reward: RewardConfig
    density_ratio: DensityRatio | None

    def programs(self, params: dict) -> Iterator[Callable[[], Lowered]]:
        """Yields the rollout and the reference pass, for every length of prompts and responses."""
        learner, base = self.sampler.learner, self.sampler.base
        for length in sorted({self.deck.padded_length(n) for n in range(self.batches)}):
            plan = self.slot_plans[length]
            yield partial(learner.lower_rollout, params, base, length, plan.prefill)
            for slots in plan.all():
                yield partial(learner.lower_reference, base, length, slots)

    @property
    def prompts(self) -> list[list[str]]:
        """The prompts of each batch."""
        return [self.deck.texts(number) for number in range(self.batches)]

    @cached_property
    def slot_plans(self) -> dict[int, SlotPlan]:
        """The packed sizes of these batches, which are never cut in another order."""
        learner = self.sampler.learner
        order = np.arange(learner.config.batch_size)[None]
        return slot_plans(
            learner.config,
            self.deck,
            range(self.batches),
            lambda number: order,
            learner.placement.parts,
        )

    def __call__(self, steps: int, state: dict[str, Any], scale: ScoreScale) -> list[dict]:
        """A row per response of the policy that has `steps` PPO steps behind it."""
        return [row for n in range(self.batches) for row in self._batch(n, steps, state, scale)]

    def _batch(self, number: int, steps: int, state: dict[str, Any], scale: ScoreScale):
        key = jax.random.fold_in(self.key, number)
        params = state["train"].params
        plan = self.slot_plans[self.deck.padded_length(number)]
        rollout = self.sampler(params, self.deck, number, key, plan.prefill)
        scored = self.scorer(rollout)
        ratio_b = np.zeros_like(scored.score_b)
        if self.density_ratio is not None:
            read = self.density_ratio.read(state["density_ratio"], jnp.asarray(scored.subset_bs))
            ratio_b = np.asarray(read)
        terms = compound_reward(
            self.reward, scored.score_b, scored.penalised_bn, ratio_b, scale.std
        )
        ref_kl_b, ended_b = self._reference_kl(rollout, plan), rollout.ended_b
        features = [str(i) for i in self.reward.penalize_features]
        return [
            {
                "step": steps,
                "prompt": rollout.prompts[b],
                "response": rollout.responses[b],
                "ended": bool(ended_b[b]),
                "ref_kl": float(ref_kl_b[b]),
                "rm_score": float(terms.rm_score_b[b]),
                "penalties": dict(zip(features, terms.penalty_bn[b].tolist(), strict=True)),
                "kl_penalty": float(terms.kl_penalty_b[b]),
                "total_reward": float(terms.total_b[b]),
            }
            for b in range(len(rollout.prompts))
        ]

    def _reference_kl(self, rollout: Rollout, plan: SlotPlan) -> np.ndarray:
        """Nats per response `[B]`, with the sampler's own log π."""
        generation, learner = rollout.generation, self.sampler.learner
        slots = plan.of(rollout.lengths_b)
        ref_logp_br = learner.reference_logp(
            self.sampler.base, rollout.tokens_bt, rollout.mask_bt, slots=slots
        )
        return fetch(response_kl(generation.logp_br, ref_logp_br, generation.mask_br))
