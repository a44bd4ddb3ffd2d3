"""The lab in English on one GPU: twelve conditions, ten seeds, longer training, larger pools.

A diff from `configs/smollm2_task.py`. The conditions of a seed share one copy of the models and
sample together; only `ties` has a reward model of its own and is trained alone.

Command: python main.py --config=configs/smollm2_task_gpu.py --stage=all
Hardware: one GPU. Neither memory nor time has been measured.
Expected result: not run. On CPUs, pools of two seeds showed a gain of 0.04 of gold for the penalty
        when general words counted as animals (docs/results/english_general_words.md).
"""

from ml_collections import ConfigDict

from configs import smollm2_task

CONDITIONS = (
    "baseline,kl_0.1,penalty,full,probe,mean_difference,distance,screen,untold,length,oracle,ties"
)


def get_config() -> ConfigDict:
    """Returns the diff from `configs/smollm2_task.py`."""
    config = smollm2_task.get_config()
    config.sarm_batch_size = 64
    config.lab.seeds = "30-39"
    config.lab.conditions = CONDITIONS
    config.lab.conditions_at_once = 12
    config.lab.ranked_conditions = "clamp,random"
    config.lab.pool_prompts = 64
    config.lab.pool_responses = 512
    config.lab.sampling_slots = 1024
    config.ppo.batch_size = 128
    config.ppo.samples_per_prompt = 8
    config.ppo.total_steps = 100
    config.ppo.learning_rate = 3e-4
    config.ppo.eval_every = 10
    config.ppo.eval_batches = 2
    return config
