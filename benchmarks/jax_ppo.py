"""This project's PPO iteration on given prompts and response lengths, without a stop token.

`build` makes the side of `ppo_iteration`. Only attention computes padding, unless `pack_levels` is
0. The reward model is a SARM of the usual shape over the first layers of the policy itself.
"""

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.workload import Workload
from configs import base
from conversion import load_policy
from ppo.config import PPOConfig
from ppo.learner import Learner
from ppo.objectives import Batch
from ppo.run_group import Member
from ppo.slots import SlotPlan
from ppo.update import Updater
from sarm_jax.models.chat import pad_batch
from sarm_jax.models.llama import Llama
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig

PHASES = ("rollout", "score", "update", "total")


class JaxPPO:
    """The learner with its adapters, the reward model, and the prompts.

    Attributes:
        watched: latents that the reward reads.
        state: state of the training.
        seed: seed of the responses.
        member: place in a group of runs, whose responses are sampled together; None: alone.
    """

    def __init__(
        self,
        config: PPOConfig,
        lora: LoRAConfig,
        policy: Llama,
        reward_model: RewardModel,
        work: Workload,
        watched: tuple[int, ...] = (0,),
        seed: int = 0,
    ):
        self.reward_model, self.watched, self.lora = reward_model, watched, lora
        self.seed = seed
        policy.stop_ids = ()
        self.learner, fresh, self.base = Learner.attach(config, lora, policy, pad=0)
        self.state = policy.placement.replicated(fresh)
        rows = work.prompts[: config.prompts_per_batch]
        lengths = np.asarray([len(row) for row in rows])
        self.prompts = pad_batch(rows, lengths.max(), 0, side="left")
        copies = config.samples_per_prompt
        self.tokens, self.mask = (np.repeat(x, copies, axis=0) for x in self.prompts)
        self.lengths = np.asarray(work.lengths)
        self.counted = np.arange(config.max_new_tokens) < self.lengths[:, None]
        self.order = np.tile(np.arange(config.batch_size), (config.ppo_epochs, 1))
        self.plan = SlotPlan(config, [lengths], [self.order], parts=policy.placement.parts)
        self.steps = 0
        self.member: Member | None = None

    def iteration(self) -> dict[str, float]:
        """Runs one PPO iteration; returns the seconds of rollout, score, update and total."""
        clock = [time.perf_counter()]
        key = jax.random.fold_in(jax.random.key(self.seed), self.steps)
        rollout = self.learner.rollout
        if self.member is not None:
            rollout = partial(self.member.rollout, self.learner)
        generation = rollout(
            self.state.params, self.base, *self.prompts, key=key, slots=self.plan.prefill
        )
        responses = np.asarray(generation.tokens_br)
        responses = [row[:length] for row, length in zip(responses, self.lengths, strict=True)]
        clock.append(time.perf_counter())
        prompts = [row[mask] for row, mask in zip(self.tokens, self.mask, strict=True)]
        rows = [np.concatenate(pair) for pair in zip(prompts, responses, strict=True)]
        score_b, _ = self.reward_model.score_tokens(rows, latent_indices=self.watched)
        clock.append(time.perf_counter())
        place = self.learner.placement.rows
        tokens = jnp.concatenate([jnp.asarray(self.tokens), generation.tokens_br], axis=1)
        mask = jnp.concatenate([jnp.asarray(self.mask), jnp.asarray(self.counted)], axis=1)
        tokens, mask, counted = place((tokens, mask, jnp.asarray(self.counted)))
        slots = self.plan.slots_for(self.lengths, self.order)
        reference = self.learner.reference_logp(self.base, tokens, mask, slots=slots)
        reference, reward_b = place((reference, jnp.asarray(score_b)))
        batch = Batch(
            tokens_bt=tokens,
            mask_bt=mask,
            mask_br=counted,
            ref_logp_br=reference,
            reward_b=reward_b,
        )
        self.state, _, metrics = Updater(self.learner).update(
            self.state, self.base, batch, order=self.order, slots=slots
        )
        jax.block_until_ready((self.state, metrics))
        clock.append(time.perf_counter())
        self.steps += 1
        spans = np.diff(clock).tolist()
        return dict(zip(PHASES, [*spans, sum(spans)], strict=True))


def _sarm(policy: Llama) -> SARM:
    """Makes a SARM of the policy's first 15 layers, or all, with a random SAE and head."""
    layers = min(15, policy.config.num_hidden_layers)
    trunk = dataclasses.replace(policy.config, num_hidden_layers=layers)
    config = SARMConfig(trunk, SAEConfig(trunk.hidden_size, latent_size=4608, k=32))
    dtype = policy.embed_tokens.dtype
    sarm = SARM(config, dtype=dtype, rngs=nnx.Rngs(0))
    nnx.update(sarm.trunk.layers, jax.tree.map(lambda x: x[:layers], nnx.state(policy.layers)))
    sarm.trunk.embed_tokens[...] = policy.embed_tokens[...]
    sarm.score[...] = jax.random.normal(jax.random.key(1), sarm.score.shape, sarm.score.dtype)
    return sarm


def build(
    model_dir: str,
    work: Workload,
    dtype: str,
    pack_levels: int,
    score_batch: int,
    algorithm: str = "ppo",
    samples_per_prompt: int = 1,
) -> JaxPPO:
    """Loads the models; `.iteration()` then runs and times one PPO iteration."""
    policy, tokenizer = load_policy(model_dir, dtype)
    options = base.get_config().ppo.to_dict()
    options |= {"batch_size": len(work.prompts), "max_new_tokens": work.new_tokens}
    options |= {"ppo_epochs": work.epochs, "pack_levels": pack_levels}
    options |= {"algorithm": algorithm, "samples_per_prompt": samples_per_prompt}
    reward_model = RewardModel(_sarm(policy), tokenizer, batch_size=score_batch)
    lora = LoRAConfig(rank=16, alpha=32.0)
    return JaxPPO(PPOConfig(**options), lora, policy=policy, reward_model=reward_model, work=work)
