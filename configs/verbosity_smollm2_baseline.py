"""The run of `configs/verbosity_smollm2.py` on its reward model, without its penalties.

Command: make verbosity RM_BENCH=chat.json,code.json
"""

from ml_collections import ConfigDict

from configs import verbosity_smollm2


def get_config() -> ConfigDict:
    """PPO alone, on the SARM of the other run."""
    config = verbosity_smollm2.get_config()
    config.sarm_model = "outputs/verbosity_smollm2/sarm"
    for section in ("train_sarm", "identify"):
        config[section].pairs_jsonl = ""
    config.prepare_data.source = "demonstrations"
    config.probe.data_jsonl = ""
    for name in ("penalize_features", "tau_values", "alpha_values"):
        config.reward[name] = ""
    config.evaluate.rm_bench = ""
    config.evaluate.prompts_jsonl = ""
    return config
