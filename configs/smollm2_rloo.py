"""RLOO on SmolLM2-135M: four responses to each prompt are compared, without a value head.

A diff from `configs/smollm2.py`, whose reward model, features and human latents it uses. The two
runs differ in the algorithm and in how the time is spent: RLOO updates once per batch, so that 54
steps take about as long as the 32 steps of two epochs under PPO.

Before: make smollm2
Command: python main.py --config=configs/smollm2_rloo.py --stage=all
Hardware: 2 CPU cores, 8 GB of memory.
Time: about that of PPO in `configs/smollm2.py`.
Expected result: a total reward of 1.4 to 1.6 at 12 to 17 nats of KL to the reference, where PPO
        has 1.0 to 1.2 at 12 to 14 (three seeds; docs/results/smollm2.md).
"""

from ml_collections import ConfigDict

from configs import smollm2

PPO = "outputs/smollm2"


def get_config() -> ConfigDict:
    """Returns the config of `configs/smollm2.py` with another algorithm."""
    config = smollm2.get_config()
    config.sarm_model = f"{PPO}/sarm"
    config.prepare_data.demos_jsonl = ""
    config.train_sarm.pairs_jsonl = ""
    config.identify.pairs_jsonl = ""
    config.human_latents.demos_jsonl = ""
    for name, value in config.reward.items():
        if isinstance(value, str):
            config.reward[name] = value.replace("{workdir}", PPO)

    config.ppo.algorithm = "rloo"
    config.ppo.samples_per_prompt = 4
    config.ppo.ppo_epochs = 1
    config.ppo.total_steps = 54
    return config
