"""The verbosity runs with two more seeds, without and with controls, and all six compared.

A diff from `configs/verbosity_smollm2.py`, whose features, human latents and reward model it uses.

Before: make verbosity RM_BENCH=chat_filtered.json,code_filtered.json
Command: make verbosity-seeds
Hardware: 2 CPU cores, 8 GB of memory.
Time: four runs of PPO and the evaluation of six policies; not timed.
Expected result: docs/results/verbosity.md, which has the runs of three seeds.
"""

from ml_collections import ConfigDict

from configs import verbosity_smollm2
from configs.verbosity_smollm2 import BASELINE

CONTROLLED = "outputs/verbosity_smollm2"
SEEDS = (1, 2)
NO_CONTROLS = {
    "reward": {
        "penalize_features": "",
        "tau_values": "",
        "alpha_values": "",
        "beta": 0.0,
        "latent_indices": "",
    }
}


def get_config() -> ConfigDict:
    """Returns the controlled run's config with two experiments per seed."""
    config = verbosity_smollm2.get_config()
    config.identify.pairs_jsonl = ""
    config.probe.data_jsonl = ""
    config.human_latents.demos_jsonl = ""
    for name, value in config.reward.items():
        if isinstance(value, str):
            config.reward[name] = value.replace("{workdir}", CONTROLLED)

    runs = [("without_0", BASELINE), ("with_0", CONTROLLED)]
    with config.unlocked():
        for seed in SEEDS:
            config.experiments[f"without_{seed}"] = {"ppo": {"seed": seed}} | NO_CONTROLS
            config.experiments[f"with_{seed}"] = {"ppo": {"seed": seed}}
    runs += [(name, f"{{workdir}}/experiments/{name}") for name in config.experiments]
    config.evaluate.runs = ",".join(f"{name}={folder}" for name, folder in sorted(runs))
    config.report.runs = config.evaluate.runs
    config.evaluate.rm_bench = ""
    return config
