"""The study of the reference implementation: its data, six experiments and verbosity control.

Source: nikhilk7153/cpsc4710, README and scripts/run_all.sh. Prompts, demonstrations and probes come
from the folder steering/ of the SARM repository. Features are selected by head weight and by
differential activation, and the three most harmful ones are probed. PPO runs seven times, each run
a diff in `experiments`. The evaluation scores the four test sets before and after steering and both
benchmarks, compares all policies, and ends in one report.
Before: accept the licences of both models on Hugging Face and log in; for the folder steering/,
        git clone https://github.com/schrieffer-z/sarm
Command: python main.py --config=configs/reference.py --stage=all; with another steering folder
        --config=configs/reference.py:FOLDER
Hardware: 4×H100 80 GB; on two CPU cores, configs/reference_small.py.
Time and expected result: not run with the real models; docs/results/reference.md has a stand-in.
Deviations from the reference and their reasons: docs/guides/coming_from_the_reference.md.
"""

from ml_collections import ConfigDict

from configs import full_method

SELECTED = "@{workdir}/probes/selected_features.json"
STEERING = "sarm/steering"
# Names of the test sets in the reference → folders of the SARM repository.
TESTS = {"rb2_safety": "rewardbenchv2", "rmb_safety": "rm_bench"}


def get_config(steering: str = STEERING) -> ConfigDict:
    """Returns the diff from `configs/full_method.py`.

    Args:
        steering: the folder steering/ of the SARM repository.
    """
    config = full_method.get_config()
    config.prompts_jsonl = "{workdir}/data/prompts.jsonl"

    config.prepare_data.source = "benchmarks"
    config.prepare_data.steering_dir = steering

    config.identify.pairs_jsonl = ",".join(
        f"{steering}/train/{source}/safety.jsonl" for source in ("rewardbenchv2", "rm_bench")
    )
    config.identify.combine = "sources"
    config.identify.top_k = 10
    config.probe.feature = f"{SELECTED}:safety_harming[:3]"
    config.probe.data_jsonl = "{workdir}/data/probes_safety.jsonl"

    config.human_latents.demos_jsonl = "{workdir}/data/demos.jsonl"
    config.reward.penalize_features = f"{SELECTED}:safety_harming[:3]"
    config.reward.latent_indices = f"{SELECTED}:safety_promoting[:5],{SELECTED}:safety_harming[:5]"
    config.reward.beta = 0.0  # as in all six experiments of the reference
    # Microbatches of two responses, which is the --batch_size of the reference.
    config.ppo.gradient_accumulation_steps = 4
    add_experiments(config, alpha=0.1, tau=3.0, verbosity="29733,53553,3402")

    config.evaluate.data_jsonl = ",".join(
        f"{name}={steering}/test/{folder}/safety_{side}.jsonl"
        for name, folder in TESTS.items()
        for side in ("c", "j")
    )
    config.evaluate.num_example = 400
    config.evaluate.steering_json = "{workdir}/probes/steering_config.json"
    config.evaluate.rewardbench2 = (
        "hf://datasets/allenai/reward-bench-2/data/test-00000-of-00001.parquet"
    )
    config.evaluate.rm_bench = "hf://datasets/THU-KEG/RM-Bench/total_dataset.json"
    config.evaluate.prompts_jsonl = "configs/data/everyday_held_out.jsonl"
    config.evaluate.human_jsonl = "{workdir}/data/demos.jsonl"
    return config


def add_experiments(config: ConfigDict, alpha: float, tau: float, verbosity: str) -> None:
    """Adds the runs of the reference's run_experiments.sh, and verbosity control as a seventh.

    Args:
        config: the config to change, with the features to penalise in `reward`.
        alpha: penalty of the full method, 0.1 in the reference; the ablations have half and double.
        tau: threshold of the full method, 3.0 in the reference; the ablations have two and four
            thirds of it.
        verbosity: the features that verbosity control penalises.
    """

    def three(value: float) -> str:
        return ",".join([f"{value:g}"] * 3)

    full = {
        "penalize_features": config.reward.penalize_features,
        "tau_values": three(tau),
        "alpha_values": three(alpha),
    }
    config.reward.update(full)
    changes: dict[str, dict[str, str]] = {
        "baseline": {"penalize_features": "", "tau_values": "", "alpha_values": ""},
        "full_method": {},
        "ablation_alpha_02": {"alpha_values": three(2 * alpha)},
        "ablation_alpha_005": {"alpha_values": three(alpha / 2)},
        "ablation_tau_4": {"tau_values": three(tau * 4 / 3)},
        "ablation_tau_2": {"tau_values": three(tau * 2 / 3)},
        "verbosity_control": {"penalize_features": verbosity},
    }
    with config.unlocked():
        config.experiments = ConfigDict({name: {"reward": full | d} for name, d in changes.items()})
