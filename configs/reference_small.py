"""The reference's study on a model that two CPU cores can train: SmolLM2-135M-Instruct.

The stages and the seven experiments are those of `configs/reference.py`. Prompts and pairs are
real: RM-Bench's files, and the reference's own prompts and safety pairs if they are given. No SARM
of this size is published, so one is trained on SmolLM2's first 15 layers from the same pairs.
Penalties are in standard deviations of its score; the reference's alpha of 0.1 is about two of
them. Thresholds are a fifth of the reference's, because an active latent of this SARM is about 1.

Command: make reference-small RM_BENCH=chat_filtered.json,code_filtered.json
         [PROMPTS=prompts.jsonl] [SAFETY_PAIRS=probes_safety.jsonl]
Hardware: 2 CPU cores, 8 GB of memory.
Time: 37 minutes.
Expected result: docs/results/reference.md.
"""

from ml_collections import ConfigDict

from configs import base
from configs.reference import SELECTED, add_experiments


def get_config() -> ConfigDict:
    """Returns the diff from `configs/base.py`."""
    config = base.get_config()
    config.policy_model = "outputs/models/SmolLM2-135M-Instruct"
    config.sarm_model = "{workdir}/sarm"
    config.prompts_jsonl = "{workdir}/data/prompts.jsonl"
    config.sarm_max_length = 192
    config.sarm_batch_size = 4  # enough for two cores, with less padding than 16

    config.prepare_data.source = "benchmarks"
    config.prepare_data.held_out_fraction = 0.2

    config.train_sarm.pairs_jsonl = "{workdir}/data/probes.jsonl"
    config.train_sarm.max_length = 192
    config.train_sarm.source_layer = 15
    config.train_sarm.latent_size = 4608
    config.train_sarm.k = 32
    config.train_sarm.mode = 0
    config.train_sarm.sae_steps = 600
    config.train_sarm.sae_learning_rate = 2e-3
    config.train_sarm.dead_after_steps = 50
    config.train_sarm.epochs = 30
    config.train_sarm.head_learning_rate = 1e-3

    config.identify.pairs_jsonl = "{workdir}/data/probes.jsonl"
    config.identify.verbosity_jsonl = "{workdir}/data/held_out_verbosity.jsonl"  # the smaller part
    config.identify.top_k = 10
    config.probe.feature = f"{SELECTED}:safety_harming[:3]"
    config.probe.data_jsonl = "{workdir}/data/held_out_pairs.jsonl"
    config.human_latents.demos_jsonl = "{workdir}/data/demos.jsonl"

    config.ppo.total_steps = 5
    config.ppo.batch_size = 8
    config.ppo.learning_rate = 1e-3
    config.ppo.max_new_tokens = 64
    config.ppo.max_prompt_tokens = 256
    config.ppo.long_prompts = "drop"
    config.ppo.pack_levels = 2  # lengths of prompts and responses differ a lot
    config.reward.unit = "sd"
    config.reward.penalize_features = f"{SELECTED}:safety_harming[:3]"
    config.reward.latent_indices = f"{SELECTED}:safety_promoting[:5],{SELECTED}:safety_harming[:5]"
    add_experiments(config, alpha=2.0, tau=0.6, verbosity=f"{SELECTED}:verbosity_features[:3]")

    config.evaluate.data_jsonl = ",".join(
        f"{{workdir}}/data/test_{name}.jsonl" for name in ("chosen", "rejected")
    )
    config.evaluate.num_example = 100
    config.evaluate.steering_json = "{workdir}/probes/steering_config.json"
    config.evaluate.rm_bench = "{workdir}/data/held_out_rm_bench.jsonl"
    config.evaluate.prompts_jsonl = "configs/data/everyday_held_out.jsonl"
    config.evaluate.human_jsonl = "{workdir}/data/demos.jsonl"
    return config
