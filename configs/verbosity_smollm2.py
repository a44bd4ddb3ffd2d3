"""Verbosity found, certified and penalised on a real model, against the run without a penalty.

A diff from `configs/verbosity_smollm2_baseline.py`, whose data and reward model it uses. Features
are found between concise and longer versions of the same answers, certified on versions that they
were not found on, and penalised while PPO trains the policy.

Command: make verbosity RM_BENCH=chat.json,code.json
"""

from ml_collections import ConfigDict

from configs import verbosity_smollm2_baseline

BASELINE = "outputs/verbosity_smollm2_baseline"
SELECTED = "@{workdir}/probes/selected_features.json"
RUNS = f"baseline={BASELINE},penalised={{workdir}}"


def get_config() -> ConfigDict:
    """Penalties, and what they take."""
    config = verbosity_smollm2_baseline.get_config()
    config.sarm_model = f"{BASELINE}/sarm"
    config.prepare_data.source = "demonstrations"
    config.train_sarm.pairs_jsonl = ""

    config.identify.pairs_jsonl = f"{BASELINE}/data/verbosity.jsonl"
    config.probe.feature = SELECTED + ":detectors[:8]"
    config.probe.data_jsonl = f"{BASELINE}/data/held_out_verbosity.jsonl"

    config.reward.unit = "sd"
    config.reward.penalize_features = SELECTED + ":detectors[:8]"
    config.reward.tau_values = SELECTED + ":tau_detectors[:8]"
    config.reward.alpha_values = ",".join(["1.0"] * 8)

    config.evaluate.rm_bench = f"{BASELINE}/data/held_out_rm_bench.jsonl"
    config.evaluate.prompts_jsonl = "configs/data/everyday_held_out.jsonl"
    config.evaluate.runs = RUNS
    config.report.runs = RUNS
    return config
