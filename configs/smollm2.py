"""The whole method on a real model that fits any machine: SmolLM2-135M-Instruct.

The SARM is made here too, from the policy's own first 15 layers. Everyday prompts with written
answers (configs/data) and the policy's samples become preference pairs, whose rejected side has a
known defect (off topic, truncated, degenerate, shuffled, unfinished, evasive). An SAE is pretrained
on the hidden states of the trunk, and a Bradley–Terry head on its latents. PPO then trains the
policy against that SARM, with a penalty on the three features that are active most often on
rejected answers, and with the latent KL to the written answers.

Command: make smollm2
Hardware: 2 CPU cores, 8 GB of memory.
Time: 23 minutes, of which PPO takes 12.
Expected result: the total reward rises by 1.5 to 1.75 standard deviations and nearly all responses
        end by themselves. The reward is exploited as well: short, wrong answers score high, and
        the guard on the KL to the reference may warn.
"""

from ml_collections import ConfigDict

from configs import base

SELECTED = "@{workdir}/probes/selected_features.json"


def get_config() -> ConfigDict:
    """Returns the diff from `configs/base.py`."""
    config = base.get_config()
    config.policy_model = "outputs/models/SmolLM2-135M-Instruct"
    config.sarm_model = "{workdir}/sarm"
    config.prompts_jsonl = "configs/data/everyday_demos.jsonl"
    config.sarm_max_length = 512
    config.sarm_batch_size = 4  # enough for two cores, with less padding than 16

    config.prepare_data.demos_jsonl = "configs/data/everyday_demos.jsonl"
    config.prepare_data.samples_per_prompt = 2
    config.prepare_data.max_new_tokens = 64
    config.prepare_data.temperature = 0.7

    config.train_sarm.pairs_jsonl = "{workdir}/data/pairs.jsonl"
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

    config.identify.pairs_jsonl = "{workdir}/data/pairs.jsonl"
    config.identify.top_k = 16
    config.human_latents.demos_jsonl = "configs/data/everyday_demos.jsonl"

    config.evaluate.prompts_jsonl = "configs/data/everyday_held_out.jsonl"
    config.evaluate.human_jsonl = "configs/data/everyday_demos.jsonl"

    config.ppo.total_steps = 32
    config.ppo.batch_size = 16
    config.ppo.ppo_epochs = 2
    config.ppo.learning_rate = 1.5e-3
    # With a constant rate, late updates were too large in one of three seeds.
    config.ppo.lr_schedule = "linear"
    config.ppo.max_new_tokens = 48
    config.ppo.max_prompt_tokens = 96
    config.ppo.kl_coef = 0.02
    config.ppo.calibration_batches = 4

    config.reward.unit = "sd"
    config.reward.penalize_features = SELECTED + ":safety_harming[:3]"
    config.reward.tau_values = SELECTED + ":tau_harming[:3]"
    config.reward.alpha_values = "0.5,0.5,0.5"
    config.reward.beta = 0.05
    config.reward.latent_indices = SELECTED + ":safety_promoting"
    config.reward.human_latents = "{workdir}/human_latents.safetensors"
    return config
