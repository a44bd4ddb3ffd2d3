"""A tiny run on any device mesh, for the tests that compare it with the run on one device."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx
from transformers import PreTrainedTokenizerBase

from ppo.config import PPOConfig
from ppo.prompts import PromptDeck
from ppo.tracking.checkpoint import CheckpointConfig
from ppo.train import TrainConfig, Trainer
from sarm_jax.models import chat
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.lora import LoRAConfig
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig
from sarm_jax.parallel.sharding import Placement
from sarm_jax.rewards.human_latents import collect_human_latents
from sarm_jax.rewards.reward_config import RewardConfig
from sarm_jax.rewards.state_controls import state_controls
from tests.tiny_models import DISCRIMINATOR, PROMPTS, REWARD, guard_options, scale_matrices

# Columns of metrics.csv that must be the same on every mesh.
COMPARED_COLUMNS = (
    "total_reward rm_score indicator_penalty kl_penalty ref_kl response_length_mean eos_fraction "
    "policy_loss value_loss entropy approx_kl advantage_std grad_norm disc_loss disc_acc"
).split()
ACTIVE = (8, 18, 21, 29, 38, 39)  # features with z > 0


def divisible_llama_config(
    tokenizer: PreTrainedTokenizerBase, layers: int = 3, model_type: str = "llama"
) -> LlamaConfig:
    """Returns a config with 8 heads over 4 key/value heads, which four devices can share."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=4,
        model_type=model_type,
    )


def place_parameters(model: nnx.Module, placement: Placement) -> nnx.Module:
    """Returns the model with every parameter sharded as the table of `sharding` says."""
    graphdef, state = nnx.split(model)
    placed = [
        (path, variable.replace(placement.parameter(".".join(map(str, path)), variable[...])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(placed))


def train_on_mesh(
    tokenizer: PreTrainedTokenizerBase,
    ppo_config: Callable[..., PPOConfig],
    placement: Placement,
    workdir: Path,
    reward: RewardConfig = REWARD,
    **changes,
) -> Trainer:
    """Trains ten steps with penalties and latent KL, with models and data on the mesh.

    Args:
        ppo_config: makes a PPOConfig with the given fields changed, as the fixture does.
        reward: options of the reward.
        changes: further changed fields of the PPOConfig.
    """
    workdir.mkdir(exist_ok=True)
    config = divisible_llama_config(tokenizer)
    policy = scale_matrices(Llama(config, rngs=nnx.Rngs(0), stop_ids=chat.stop_ids(tokenizer)))
    trunk = dataclasses.replace(config, num_hidden_layers=2)
    sarm = SARM(SARMConfig(trunk, SAEConfig(32, latent_size=64, k=8)), rngs=nnx.Rngs(1))
    scale_matrices(sarm.trunk)
    sarm.score[...] = jax.random.normal(jax.random.key(2), (64,))
    policy.placement = sarm.trunk.placement = placement
    model = RewardModel(place_parameters(sarm, placement), tokenizer, max_length=512, batch_size=8)
    ppo = ppo_config(**{"batch_size": 8, "total_steps": 10, "learning_rate": 1e-3, **changes})
    demos = [{"prompt": p, "response": f"well, {p}"} for p in PROMPTS]
    options = TrainConfig(
        ppo=ppo,
        lora=LoRAConfig(rank=4),
        reward=reward,
        discriminator=DISCRIMINATOR,
        guards=guard_options(),
        checkpoint=CheckpointConfig(keep_every=0),
    )
    trainer = Trainer(
        config=options,
        policy=place_parameters(policy, placement),
        tokenizer=tokenizer,
        reward_model=model,
        deck=PromptDeck(PROMPTS, tokenizer, ppo),
        human=collect_human_latents(model, demos, ACTIVE) if reward.beta else None,
        states=state_controls(reward, model.state_size),
        workdir=workdir,
    )
    trainer.run()
    return trainer
