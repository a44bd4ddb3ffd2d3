"""Plan PPO, train_sarm or identify: compile their programs for this or an absent machine."""

import dataclasses
import logging
from pathlib import Path

from ml_collections import ConfigDict

from conversion.checkpoint import is_reward_model
from conversion.keys import abstract_policy, abstract_sarm
from conversion.load import read_policy_config, read_reward_config, read_sarm_config
from pipeline.inputs import Input
from pipeline.models import check_remat, mesh_config
from pipeline.options import required
from pipeline.stage import Stage
from pipeline.study_options import groups_of, trained_conditions
from pipeline.together import check_at_once, check_experiments_at_once
from ppo.config import PPOConfig
from ppo.options import train_config
from ppo.planning.chips import target_devices
from ppo.planning.collect_plan import CollectPlanner, collect_table
from ppo.planning.plan import Layout, Planner, candidates, layouts_for, search, table
from ppo.planning.preference_plan import PreferencePlanner, preference_table
from ppo.prompt_lengths import batch_shares, fitting_lengths, read_lengths
from ppo.train import TrainConfig
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import write_json
from sarm_jax.models.linear_reward import LinearRewardConfig
from sarm_jax.models.sarm import SARMConfig, check_ensemble
from sarm_jax.training.sarm_options import TrainSARMConfig
from sarm_jax.training.train_sae import TrainSAEConfig

LOG = logging.getLogger(__name__)
STAGES = ("train", "train_sarm", "identify")  # that can be planned


def validate(config: ConfigDict) -> None:
    """Validates the options of what is planned."""
    stage = config.plan.stage
    if stage not in STAGES:
        raise InputError(f"plan.stage={stage!r}: expected one of {', '.join(STAGES)}")
    if stage == "train_sarm":
        validate_training(config)
    elif stage == "identify":
        validate_collection(config)
    else:
        validate_ppo(config)


def validate_collection(config: ConfigDict) -> None:
    """Validates the options that a plan of identify reads."""
    if not config.plan.sarm_config:
        required(config, "sarm_model")
    check_pairs(config)


def validate_training(config: ConfigDict) -> TrainSARMConfig:
    """Validates the section train_sarm, except for its files, and returns its options."""
    section = config.train_sarm.to_dict() | {"pairs_jsonl": (), "tie_pairs_jsonl": ()}
    if section.pop("sae_model"):
        LOG.info("train_sarm.sae_model: the plan counts the pretraining of an SAE all the same")
    if not section.pop("model") and not config.plan.policy_config:
        required(config, "policy_model")
    check_remat(config.remat)
    check_pairs(config)
    # Without ties, of which the plan has no files, a weight of ties is refused.
    return TrainSARMConfig(**section | {"tie_weight": 1.0})


def check_pairs(config: ConfigDict) -> None:
    """Raises InputError if there are no pairs."""
    if config.plan.pairs < 1:
        raise InputError(f"plan.pairs={config.plan.pairs}: must be at least 1")


def validate_ppo(config: ConfigDict) -> tuple[TrainConfig, dict[int, float]]:
    """Validates PPO's options, and returns them with the share of batches by prompt length."""
    options = train_config(config)
    check_experiments_at_once(config, options)
    check_at_once("lab.conditions_at_once", config.lab.conditions_at_once, config, options)
    for field, model in (("policy_config", "policy_model"), ("sarm_config", "sarm_model")):
        if not config.plan[field]:
            required(config, model)
    check_remat(config.remat)
    return options, prompt_shares(config.plan.prompt_lengths, options.ppo)


def prompt_shares(path: str, ppo: PPOConfig) -> dict[int, float]:
    """Returns the share of the batches by padded prompt length; empty without a file of counts."""
    if not path:
        return {}
    name = f"plan.prompt_lengths={path}"
    lengths_n = read_lengths(path, name)
    fitting_n = fitting_lengths(lengths_n, ppo.max_prompt_tokens, ppo.long_prompts, name)
    return batch_shares(fitting_n, ppo.prompts_per_batch, ppo.max_new_tokens)


def preference_planner(config: ConfigDict) -> PreferencePlanner:
    """Builds a planner of train_sarm for the config's target and the architecture of its model."""
    src = config.plan.policy_config or config.train_sarm.model or config.policy_model
    policy = read_policy_config(src)
    return PreferencePlanner(
        name=config.plan.target,
        config=validate_training(config),
        policy=lambda: abstract_policy(policy, config.dtype),
        pairs=config.plan.pairs,
    )


def collect_planner(config: ConfigDict) -> CollectPlanner:
    """Builds a planner of identify for the config's target and the architecture of its SARM."""
    sarm = reward_architecture(config)
    return CollectPlanner(
        name=config.plan.target,
        sarm=lambda: abstract_sarm(sarm, config.dtype),
        pairs=config.plan.pairs,
        batch=config.sarm_batch_size,
        tokens=config.sarm_max_length,
    )


def make_planner(config: ConfigDict) -> Planner:
    """Builds a planner for the config's target and the architectures of its models."""
    (options, shares), section = validate_ppo(config), config.plan
    policy = read_policy_config(section.policy_config or config.policy_model)
    reward = options.reward
    sarm = reward_architecture(config, reward.reads_features or bool(reward.latent_indices))
    reward.check_features(sarm.latent_size)
    check_ensemble(reward.ensemble, sarm)
    return Planner(
        name=section.target,
        config=options.ppo,
        lora=options.lora,
        policy=lambda: abstract_policy(policy, config.dtype),
        sarm=lambda: abstract_sarm(sarm, config.dtype),
        score_batch=config.sarm_batch_size,
        watched=len(reward.penalize_features) + len(reward.latent_indices),
        shares=shares,
        runs=runs_at_once(config),
    )


def runs_at_once(config: ConfigDict) -> int:
    """Returns how many runs are trained at a time: experiments, or conditions of a study."""
    if config.experiments:
        return min(config.experiments_at_once, len(config.experiments))
    if config.prepare_data.source == "lab":
        groups = groups_of(trained_conditions(config), config.lab.conditions_at_once)
        return max(map(len, groups), default=1)
    return 1


def reward_architecture(
    config: ConfigDict, needs_features: bool = True
) -> SARMConfig | LinearRewardConfig:
    """Reads the architecture of the reward model that is planned.

    If features are needed, a classifier without an SAE gets one of the size that `train_sae` would
    give it.
    """
    src = config.plan.sarm_config or config.sarm_model
    if not is_reward_model(src):
        return read_sarm_config(src)
    reward = read_reward_config(src)
    if reward.sae is not None:
        return reward
    if not needs_features:
        LOG.info("%s has no SAE, and the section reward reads no features: planned without", src)
        return reward
    options = TrainSAEConfig(**config.train_sae.to_dict() | {"responses_jsonl": ()})
    LOG.info(
        "%s has no SAE: planned with one of train_sae.latent_size=%d and train_sae.k=%d",
        src, options.latent_size, options.k,
    )  # fmt: skip
    return dataclasses.replace(reward, sae=options.sae_config(reward.trunk.hidden_size))


def layout(config: ConfigDict) -> Layout:
    """Returns the layout of the config itself: mesh, rematerialisation and accumulation."""
    if config.plan.stage == "identify":
        return Layout(mesh_config(config), config.remat, 1)
    section = config.ppo if config.plan.stage == "train" else config.train_sarm
    return Layout(mesh_config(config), config.remat, section.gradient_accumulation_steps)


def run(config: ConfigDict, workdir: Path) -> None:
    """Estimate memory, traffic and time of a step; print a table and write plan.json."""
    validate(config)
    planner: Planner | PreferencePlanner | CollectPlanner
    if config.plan.stage == "train_sarm":
        planner, show = preference_planner(config), preference_table
    elif config.plan.stage == "identify":
        planner, show = collect_planner(config), collect_table
    else:
        planner, show = make_planner(config), table
    if config.plan.search:
        devices = target_devices(planner.name)
        if isinstance(planner, Planner):
            layouts = layouts_for(devices, planner.config.batch_size)
        else:
            layouts = planner.layouts(devices)
        ranked = search(planner, list(layouts))
        plan = ranked[0] | {"candidates": ranked[1:]}
        print(candidates(ranked), end="\n\n")
    else:
        plan = planner.plan(layout(config))
    write_json(workdir / "plan.json", plan)
    print(show(plan))
    LOG.info("the plan is in %s", workdir / "plan.json")


STAGE = Stage(
    name="plan",
    summary="Architectures and options → memory, traffic and time of a step on a machine.",
    validate=validate,
    run=run,
    options=(
        "plan",
        "ppo",
        "lora",
        "reward",
        "mesh",
        "remat",
        "dtype",
        "sarm_batch_size",
        "sarm_max_length",
        "train_sae.latent_size",
        "train_sae.k",
        "train_sae.activation",
        "train_sarm",
        "experiments",
        "experiments_at_once",
        "lab.conditions",
        "lab.conditions_at_once",
    ),
    inputs=(
        Input("plan.policy_config"),
        Input("plan.sarm_config"),
        Input("plan.prompt_lengths"),
    ),
    makes=("plan.json",),
)
