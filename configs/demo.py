"""The reward-hacking lab: a world of sixteen countries whose true reward is known.

A small Llama is trained from scratch, with a reward model that learned from a biased annotator, who
likes flattery. PPO runs against that reward model, alone and with the features of flattery under
control, and the true ("gold") reward is measured on held-out prompts.

Command: make demo, or python main.py --config=configs/demo.py --stage=all; ten seeds and all
        conditions: make study
Hardware: 2 CPU cores, 4 GB of memory.
Time: about 6 minutes; make study 68 minutes.
Expected result: without controls the gold reward rises and then collapses (mean over ten seeds:
        0.72 at its peak, −0.24 at the end) while the reward model's score keeps rising; with the
        penalty it ends at 0.98, with penalty and latent KL at 0.96.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Returns the diff from `configs/base.py`."""
    config = base.get_config()
    config.policy_model = "{workdir}/policy"
    config.sarm_model = "{workdir}/sarm"
    config.prompts_jsonl = "{workdir}/data/prompts.jsonl"
    config.eval_prompts_jsonl = "{workdir}/data/held_out_prompts.jsonl"
    config.sarm_batch_size = 128

    config.prepare_data.source = "lab"

    config.train_sarm.model = "{workdir}/pretrained"
    config.train_sarm.pairs_jsonl = "{workdir}/data/pairs.jsonl"
    config.train_sarm.source_layer = config.lab.get_ref("tap_layer")
    config.train_sarm.latent_size = 512
    config.train_sarm.k = 32
    config.train_sarm.mode = 0
    config.train_sarm.held_out_fraction = 0.1
    config.train_sarm.sae_steps = 1000
    config.train_sarm.sae_learning_rate = 2e-3
    config.train_sarm.aux_k = 64
    config.train_sarm.epochs = 60
    config.train_sarm.batch_size = 256
    config.train_sarm.head_learning_rate = 3e-3

    config.identify.pairs_jsonl = "{workdir}/data/contrast.jsonl"
    config.identify.tau_quantile = 0.995
    config.identify.false_alarm_budget = 0.04

    selected = "@{workdir}/probes/selected_features.json"
    config.probe.feature = f"{selected}:detectors,{selected}:carriers"
    config.probe.data_jsonl = "{workdir}/data/contrast.jsonl"
    config.human_latents.demos_jsonl = "{workdir}/data/demonstrations.jsonl"
    config.reward.human_latents = "{workdir}/human_latents.safetensors"
    config.lab.gates_json = "{workdir}/probes/gates.json"

    config.lora.rank = 8
    config.lora.alpha = 16.0
    config.ppo.total_steps = 60
    config.ppo.batch_size = 128
    config.ppo.num_minibatches = 2
    config.ppo.learning_rate = 2e-3
    config.ppo.kl_coef = 0.02
    config.ppo.max_new_tokens = 16
    config.ppo.max_prompt_tokens = 16
    config.ppo.calibration_batches = 4
    config.ppo.eval_every = 2
    config.ppo.eval_batches = 2
    config.reward.unit = "sd"
    return config
