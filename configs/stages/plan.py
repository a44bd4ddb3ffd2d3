"""A PPO step, compiled for a machine that is not there."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from configs.shared import check_remat, mesh_config, required, write_json
from conversion.keys import abstract_policy, abstract_sarm
from conversion.load import read_policy_config, read_sarm_config
from ppo.options import train_config
from ppo.plan import Layout, Planner, candidates, layouts_for, search, table
from sarm_jax.chips import target_devices

LOG = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Architectures and options → memory, traffic and time of a PPO step on a machine."""
    options, section = train_config(config), config.plan
    for part, model in (("policy_config", "policy_model"), ("sarm_config", "sarm_model")):
        if not section[part]:
            required(config, model)
    policy = read_policy_config(section.policy_config or config.policy_model)
    sarm = read_sarm_config(section.sarm_config or config.sarm_model)
    options.reward.check_features(sarm.sae.latent_size)
    planner = Planner(
        name=section.target,
        config=options.ppo,
        lora=options.lora,
        policy=lambda: abstract_policy(policy, config.dtype),
        sarm=lambda: abstract_sarm(sarm, config.dtype),
        score_batch=config.sarm_batch_size,
        watched=len(options.reward.penalize_features) + len(options.reward.latent_indices),
    )
    check_remat(config.remat)
    if section.search:
        found = layouts_for(target_devices(section.target), options.ppo.batch_size)
        plans = search(planner, list(found))
        plan = plans[0] | {"candidates": plans[1:]}
        print(candidates(plans), end="\n\n")
    else:
        accumulation = options.ppo.gradient_accumulation_steps
        plan = planner.plan(Layout(mesh_config(config), config.remat, accumulation))
    write_json(workdir / "plan.json", plan)
    print(table(plan))
    LOG.info("the plan is in %s", workdir / "plan.json")
