"""Evaluates the policy on held-out prompts at regular steps.

Every evaluation uses the same prompts and the same random keys, so that only the policy changes.
Nothing is trained: the discriminator is only read.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import jax
import numpy as np
from jax.stages import Lowered

from ppo.losses import response_kl
from ppo.prompts import PromptDeck
from ppo.rollout import Rollout, Sampler
from ppo.run_state import RunState
from ppo.slots import SlotPlan, slot_plans
from sarm_jax.models.conversation import Prompt, to_json
from sarm_jax.parallel.processes import fetch
from sarm_jax.rewards.compound import ScoreScale
from sarm_jax.rewards.density_ratio import DensityRatio
from sarm_jax.rewards.reward_config import RewardConfig
from sarm_jax.rewards.scoring import Scorer, reward_terms


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """An evaluation on the first `batches` batches of `deck`, with keys derived from `key`."""

    deck: PromptDeck
    batches: int
    key: jax.Array
    sampler: Sampler
    scorer: Scorer
    reward: RewardConfig
    density_ratio: DensityRatio | None

    def programs(self, params: dict) -> Iterator[Callable[[], Lowered]]:
        """Yields the programs of an evaluation, for every length of prompts and responses."""
        learner, base = self.sampler.learner, self.sampler.base
        for length in sorted({self.deck.padded_length(n) for n in range(self.batches)}):
            plan = self.slot_plans[length]
            yield from self.sampler.programs(params, length, plan.prefill)
            for slots in plan.all_slots():
                yield partial(learner.lower_reference, base, length, slots)

    @property
    def prompts(self) -> list[list[Prompt]]:
        """Prompts of each batch."""
        return [self.deck.texts(number) for number in range(self.batches)]

    @cached_property
    def slot_plans(self) -> dict[int, SlotPlan]:
        """Plan of the packed sizes for each padded prompt length; rows keep their order."""
        learner = self.sampler.learner
        order = np.arange(learner.config.batch_size)[None]
        return slot_plans(
            learner.config,
            deck=self.deck,
            batches=range(self.batches),
            order_of=lambda number: order,
            parts=learner.placement.parts,
        )

    def evaluate(self, finished: int, state: RunState, scale: ScoreScale) -> list[dict]:
        """Returns the rows of evaluations.jsonl, one per response.

        Args:
            finished: number of finished PPO steps.
            state: state of the run after these steps.
            scale: scale of the scores, for the reward.
        """
        return [
            {"step": finished, **row}
            for number in range(self.batches)
            for row in self._evaluate_batch(number, state, scale)
        ]

    def _evaluate_batch(self, number: int, state: RunState, scale: ScoreScale) -> list[dict]:
        plan = self.slot_plans[self.deck.padded_length(number)]
        rollout = self.sampler.sample(
            state.train.params,
            self.deck,
            batch_number=number,
            key=jax.random.fold_in(self.key, number),
            slots=plan.prefill,
        )
        scored = self.scorer.score(rollout.prompts, rollout.responses)
        d_b = np.zeros_like(scored.score_b)
        if self.density_ratio is not None:
            assert state.density_ratio is not None
            d_b = np.asarray(self.density_ratio.read(state.density_ratio, scored.z_bs))
        terms = reward_terms(self.reward, scored, d_b=d_b, scale=scale, lengths_b=rollout.lengths_b)
        ref_kl_b = self._reference_kl(rollout, plan)
        features = [str(i) for i in self.reward.penalize_features]
        return [
            {
                "prompt": to_json(rollout.prompts[b]),
                "response": rollout.responses[b],
                "ended": bool(rollout.ended_b[b]),
                "ref_kl": float(ref_kl_b[b]),
                "rm_score": float(terms.score_b[b]),
                "penalties": dict(zip(features, terms.penalty_bn[b].tolist(), strict=True)),
                "kl_penalty": float(terms.kl_penalty_b[b]),
                **terms.further_of(b),
                "total_reward": float(terms.total_b[b]),
            }
            for b in range(len(rollout.prompts))
        ]

    def _reference_kl(self, rollout: Rollout, plan: SlotPlan) -> np.ndarray:
        """Returns the KL to the reference policy, in nats `[B]`, from the sampler's own log π."""
        generation, learner = rollout.generation, self.sampler.learner
        slots = plan.slots_for(rollout.lengths_b)
        ref_logp_br = learner.reference_logp(
            self.sampler.base, rollout.tokens_bt, rollout.mask_bt, slots=slots
        )
        return fetch(response_kl(generation.logp_br, ref_logp_br, generation.mask_br))
