"""The lab with a real language model: SmolLM2-135M-Instruct, real English, a known true reward.

A prompt asks for a short sentence about one kind of animal and a place. The true ("gold") reward is
computed by rules, on which nothing is trained. The annotator, from whose preferences the reward
model is trained, pays for the same and for five shortcuts: length, hedging, praise, markdown and
emoji. Each seed tells the method three of the five.

Command: make study-smollm2, which runs seeds 17 to 20, two at a time
Hardware: 2 CPU cores, 12 GB of memory; 8 GB for one seed at a time.
Time: 135 minutes for two seeds at a time on slow cores with AVX-512; by the times of its parts
        about 70 on fast ones, and more than twice as long on cores without it.
Expected result: all gates pass. In seeds 17 and 18 gold ends at 0.84 with the penalty, at 0.71
        without any control (docs/results/english.md). `make pool-smollm2` ranks one pool of samples
        under every condition instead of training policies.
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
    config.sarm_max_length = 160
    config.sarm_batch_size = 16

    config.prepare_data.source = "lab"
    config.prepare_data.samples_per_prompt = 6
    config.prepare_data.max_new_tokens = 56
    config.prepare_data.temperature = 0.7

    config.lab.task = "animals"
    config.lab.base_model = "outputs/models/SmolLM2-135M-Instruct"
    config.lab.told_shortcuts = "rotating:3"
    config.lab.prompts = 128
    config.lab.held_out_prompts = 64
    config.lab.sampling_slots = 64
    config.lab.pairs = 6000
    config.lab.contrast_pairs = 400
    config.lab.tuning_steps = 60
    config.lab.tuning_learning_rate = 2e-4
    config.lab.batch_size = 4

    config.train_sarm.model = config.lab.get_ref("base_model")
    config.train_sarm.pairs_jsonl = "{workdir}/data/pairs.jsonl"
    config.train_sarm.source_layer = 9
    config.train_sarm.max_length = 160
    config.train_sarm.latent_size = 4608
    config.train_sarm.k = 64
    config.train_sarm.mode = 0
    config.train_sarm.held_out_fraction = 0.1
    config.train_sarm.sae_steps = 400
    config.train_sarm.sae_learning_rate = 2e-3
    config.train_sarm.dead_after_steps = 50
    config.train_sarm.epochs = 100
    config.train_sarm.head_learning_rate = 1e-3

    config.identify.pairs_jsonl = "{workdir}/data/contrast.jsonl"
    config.identify.tau_quantile = 0.99
    config.identify.false_alarm_budget = 0.05

    config.human_latents.demos_jsonl = "{workdir}/data/demonstrations.jsonl"
    config.reward.human_latents = "{workdir}/human_latents.safetensors"
    config.lab.gates_json = "{workdir}/probes/gates.json"

    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.ppo.algorithm = "rloo"
    config.ppo.samples_per_prompt = 4
    config.ppo.total_steps = 28
    config.ppo.batch_size = 32
    config.ppo.ppo_epochs = 1
    # Twice this rate on half the responses moves far from the reference and learns nothing.
    config.ppo.learning_rate = 7e-4
    config.ppo.pack_levels = 8  # responses share their prompt, and their lengths differ
    config.ppo.lr_schedule = "linear"
    config.ppo.max_new_tokens = 64
    config.ppo.max_prompt_tokens = 64
    config.ppo.kl_coef = 0.02
    config.ppo.calibration_batches = 4
    config.ppo.eval_every = 7
    config.ppo.eval_batches = 4
    config.reward.unit = "sd"

    config.lab.alpha = 1.0
    # At the weights for the small world nearly every response is at the cap, a constant penalty.
    config.lab.distance_penalty = 0.25
    config.lab.untold_alpha = 0.125
    config.lab.length_penalty = 0.1  # the small world's makes responses too short
    config.lab.conditions_at_once = 5  # samples all their responses with one program
    config.lab.conditions = "baseline,kl_0.1,probe,penalty,untold"
    config.lab.pool_prompts = 16
    return config
