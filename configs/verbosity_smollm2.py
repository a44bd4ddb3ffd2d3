"""Verbosity on a real model, from data that anyone can read: SmolLM2-135M-Instruct and RM-Bench.

The reward model is taught a taste for detail: it is trained on RM-Bench's easy pairs, whose right
answer is also the longer or the more formatted one. Features of verbosity are then found between
concise and longer versions of the same answers, certified on versions that they were not found on,
and penalised while PPO trains the policy. `configs/verbosity_smollm2_baseline.py` is the same run
without the penalty.

Command: make verbosity RM_BENCH=chat.json,code.json
Hardware: 2 CPU cores, 8 GB of memory.
Time and result: README, "Verbosity".
"""

from ml_collections import ConfigDict

from configs import base

SELECTED = "@{workdir}/probes/selected_features.json"


def get_config() -> ConfigDict:
    """A diff from `configs/base.py`."""
    config = base.get_config()
    config.policy_model = "outputs/models/SmolLM2-135M-Instruct"
    config.sarm_model = "{workdir}/sarm"
    config.prompts_jsonl = "configs/data/everyday_demos.jsonl"
    config.sarm_max_length = 512

    config.prepare_data.source = "benchmarks"
    config.prepare_data.held_out_fraction = 0.3

    config.train_sarm.pairs_jsonl = "{workdir}/data/easy.jsonl"
    config.train_sarm.max_length = 512
    config.train_sarm.source_layer = 15
    config.train_sarm.latent_size = 4608
    config.train_sarm.k = 32
    config.train_sarm.mode = 0
    config.train_sarm.sae_steps = 600
    config.train_sarm.sae_learning_rate = 2e-3
    config.train_sarm.dead_after_steps = 50
    config.train_sarm.epochs = 60
    config.train_sarm.head_learning_rate = 1e-3

    config.identify.pairs_jsonl = "{workdir}/data/verbosity.jsonl"
    config.probe.feature = SELECTED + ":detectors[:8]"
    config.probe.data_jsonl = "{workdir}/data/held_out_verbosity.jsonl"

    config.ppo.total_steps = 20
    config.ppo.batch_size = 16
    config.ppo.ppo_epochs = 2
    config.ppo.learning_rate = 1.5e-3
    config.ppo.max_new_tokens = 96
    config.ppo.max_prompt_tokens = 96
    config.ppo.kl_coef = 0.02
    config.ppo.calibration_batches = 4

    config.reward.unit = "sd"
    config.reward.penalize_features = SELECTED + ":detectors[:8]"
    config.reward.tau_values = SELECTED + ":tau_detectors[:8]"
    config.reward.alpha_values = ",".join(["1.0"] * 8)

    config.evaluate.rm_bench = "{workdir}/data/held_out_rm_bench.jsonl"
    config.evaluate.prompts_jsonl = "configs/data/everyday_held_out.jsonl"
    return config
