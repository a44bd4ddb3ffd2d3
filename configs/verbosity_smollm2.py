"""Features of verbosity, selected, certified and controlled on a real model.

A diff from `configs/verbosity_smollm2_baseline.py`, whose data and reward model it uses and whose
run without controls it is compared with. Features are selected on pairs of a concise and a longer
version of the same answer, and certified on other versions. While PPO trains the policy, detectors
of detail are penalised, and the twenty features that carry most of the difference in reward are
held close to short human answers.

Command: make verbosity RM_BENCH=chat_filtered.json,code_filtered.json
Hardware: 2 CPU cores, 8 GB of memory.
Time: 57 minutes with the baseline.
Expected result: held-out responses of 34 to 42 tokens, where PPO without controls ends at 92 to 96;
        the policy learns nothing else.
"""

from ml_collections import ConfigDict

from configs import verbosity_smollm2_baseline

BASELINE = "outputs/verbosity_smollm2_baseline"
SELECTED = "@{workdir}/probes/selected_features.json"
RUNS = f"baseline={BASELINE},controlled={{workdir}}"


def get_config() -> ConfigDict:
    """Returns the baseline's config with penalties, latent KL and what they read."""
    config = verbosity_smollm2_baseline.get_config()
    config.sarm_model = f"{BASELINE}/sarm"
    config.prepare_data.source = "demonstrations"
    config.train_sarm.pairs_jsonl = ""

    config.identify.pairs_jsonl = f"{BASELINE}/data/verbosity.jsonl"
    config.identify.top_k = 20
    config.probe.feature = f"{SELECTED}:detectors[:8],{SELECTED}:carriers"
    config.probe.data_jsonl = f"{BASELINE}/data/held_out_verbosity.jsonl"

    config.reward.unit = "sd"
    config.reward.penalize_features = SELECTED + ":detectors[:8]"
    config.reward.tau_values = SELECTED + ":tau_detectors[:8]"
    config.reward.alpha_values = ",".join(["1.0"] * 8)
    config.human_latents.demos_jsonl = "configs/data/brief_demos.jsonl"
    config.reward.human_latents = "{workdir}/human_latents.safetensors"
    config.reward.latent_indices = SELECTED + ":carriers"
    config.reward.beta = 1.0

    config.evaluate.rm_bench = f"{BASELINE}/data/held_out_rm_bench.jsonl"
    config.evaluate.prompts_jsonl = "configs/data/brief_held_out.jsonl"
    config.evaluate.human_jsonl = "configs/data/brief_demos.jsonl"
    config.evaluate.temperature = 1.0
    config.evaluate.samples = 4
    config.evaluate.runs = RUNS
    config.report.runs = RUNS
    return config
