"""The method with an ordinary reward model, which gets its features afterwards.

A diff from `configs/smollm2.py`, whose policy and pairs it has. The reward model is a
classification head on SmolLM2's first 15 layers, trained with Bradley–Terry on those pairs by
`benchmarks.classification_head`; any other sequence classifier with one label may take its place.
An SAE is trained on its states (`train_sae`), features are found with it on the pairs of the
training prompts and tested on the held-out ones, and three of them are penalised while PPO trains
the policy.

Command: make smollm2-classifier
Hardware: 2 CPU cores, 8 GB of memory.
Time: 80 minutes beside much other work; not timed on an idle machine. (train_sae takes 7
        minutes of CPU time.)
Expected result: docs/guides/any_reward_model.md. The error term has 0.31 of the variance of the
        score, and none of the carriers is certified: the reward model does not pay for the defects.
"""

from ml_collections import ConfigDict

from configs import smollm2

SELECTED = smollm2.SELECTED


def get_config() -> ConfigDict:
    """Returns the config of SmolLM2 with another reward model."""
    config = smollm2.get_config()
    config.train_sarm.pairs_jsonl = ""  # no SARM is trained
    config.sarm_model = "{workdir}/reward_model"

    config.train_sae.model = "{workdir}/classifier"
    config.train_sae.responses_jsonl = "{workdir}/data/pairs.jsonl"
    config.train_sae.max_length = 512
    config.train_sae.token_states = 20_000
    config.train_sae.latent_size = 4608
    config.train_sae.k = 32
    config.train_sae.activation = "topk_relu"  # so that SAELens can read it
    config.train_sae.steps = 600
    config.train_sae.learning_rate = 2e-3
    config.train_sae.dead_after_steps = 50

    # The script that trains the head writes these two files.
    config.identify.pairs_jsonl = "{workdir}/data/pairs_train.jsonl"
    config.probe.data_jsonl = "{workdir}/data/pairs_held_out.jsonl"
    config.probe.feature = f"{SELECTED}:carriers,{SELECTED}:safety_harming[:3]"

    config.ppo.total_steps = 12
    config.reward.beta = 0.0
    config.reward.latent_indices = ""
    config.reward.human_latents = ""
    config.human_latents.demos_jsonl = ""
    config.evaluate.human_jsonl = ""
    return config
