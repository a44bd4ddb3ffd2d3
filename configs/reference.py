"""The reference's own study: its data, its six experiments and verbosity control, one command.

Method: nikhilk7153/cpsc4710, README and scripts/run_all.sh: prompts, demonstrations and probes from
the SARM repository's steering folder; features by head weight and by differential activation; the
three most harming ones probed; seven runs of PPO, each a diff in `experiments`; steering before and
after on the four test sets, both benchmarks, all policies compared, and one report.
Before: accept the licence of both models on Hugging Face and log in;
        `git clone https://github.com/schrieffer-z/sarm` for its steering folder.
Command: python main.py --config=configs/reference.py --stage=all; with another steering folder
        --config=configs/reference.py:FOLDER
Hardware: 4×H100 80 GB. On two CPU cores: configs/reference_small.py.
Differences from the reference and their reasons: docs/guides/coming_from_the_reference.md.
"""

from ml_collections import ConfigDict

from configs import full_method

SELECTED = "@{workdir}/probes/selected_features.json"
STEERING = "sarm/steering"
TESTS = {"rb2_safety": "rewardbenchv2", "rmb_safety": "rm_bench"}  # the reference's names of them


def get_config(steering: str = STEERING) -> ConfigDict:
    """A diff from `configs/full_method.py`; `steering` is the SARM repository's folder."""
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
    config.reward.beta = 0.0  # as in all of the six
    config.ppo.gradient_accumulation_steps = 4  # of --batch_size 2
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

    `alpha` and `tau` are those of the full method: 0.1 and 3.0 in the reference, whose ablations
    have half and double the one, and two and four thirds of the other. `verbosity` are the features
    of the last run.
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
