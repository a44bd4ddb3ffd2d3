"""PPO against a reward model that prefers detail: SmolLM2 and RM-Bench, without controls.

The SARM is trained on RM-Bench's easy pairs alone, whose right answer is also the longer or the
more formatted one. The policy is asked for one short sentence. Its reward is the SARM's score
alone, without a penalty for a response that does not end. `configs/verbosity_smollm2.py` identifies
what the SARM prefers, controls it, and compares.

Command: make verbosity RM_BENCH=chat_filtered.json,code_filtered.json
Hardware: 2 CPU cores, 8 GB of memory.
Time: 57 minutes with the controlled run.
Expected result: held-out responses grow from 34 tokens to 92 or more, of at most 96.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the diff from `configs/base.py`."""
    config = base.get_config()
    config.policy_model = "outputs/models/SmolLM2-135M-Instruct"
    config.sarm_model = "{workdir}/sarm"
    config.prompts_jsonl = "configs/data/brief_demos.jsonl"
    config.sarm_max_length = 512
    config.sarm_batch_size = 4  # enough for two cores, with less padding than 16

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

    config.ppo.total_steps = 20
    config.ppo.batch_size = 16
    config.ppo.ppo_epochs = 2
    config.ppo.learning_rate = 1e-3
    config.ppo.max_new_tokens = 96
    config.ppo.max_prompt_tokens = 96
    config.ppo.kl_coef = 0.05
    config.ppo.missing_eos_penalty = 0.0
    config.ppo.pack_levels = 2  # lengths of prompts and responses differ a lot
    config.ppo.calibration_batches = 4
    return config
