"""The conditions of the study, each a set of changes to the options of a run.

Besides the method and its parts there are its rivals, which need no more data than the method: a
stronger KL to the reference, a reward model that is trained with the contrast pairs as ties, the
worst of an ensemble of heads, dense probes, the distance from human responses, a penalty on the
length, a bounded reward, and random features. A penalty with a perfect detector is the ceiling.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sarm_jax.features.dense_probe import LOGISTIC, MEAN_DIFFERENCE, probe_file
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.io.path_lists import escaped
from sarm_jax.lab.names import parse_names
from sarm_jax.rewards.human_states import STATES_FILE

SEEDS = re.compile(r"([0-9]{1,12})(?:-([0-9]{1,12}))?")  # a seed, or a range of seeds
MAX_RANGE = 1000  # seeds in one range
KL_COEFS = {f"kl_{value}": value for value in (0.05, 0.1, 0.2, 0.5, 1.0)}
GRID = {  # condition → (weight of the penalty, ppo.kl_coef)
    f"alpha_{alpha}_kl_{kl}": (alpha, kl)
    for alpha in (0.25, 0.5, 1.0, 2.0)
    for kl in (0.0, 0.02, 0.1)
}
DRAWS = {f"random_{number}": number for number in range(1, 6)}
HEADS = 4  # of the reward model of the condition worst_of_four
UNTOLD_FILE = "untold.json"  # features and thresholds of the condition untold
PROBES = {"probe": LOGISTIC, "mean_difference": MEAN_DIFFERENCE}  # condition → kind
LONGER = 3  # times as many steps in the condition penalty_no_kl
RETRAINED = ("ties", "worst_of_four")  # conditions with a reward model of their own
DESCRIPTIONS = {
    "baseline": "the reward model alone",
    "penalty": "a penalty for each detector that fires",
    "full": "penalty, and the latent KL to the demonstrations",
    "latent_kl": "the latent KL alone",
    "clamp": "the carriers set to 0 before the head reads them",
    "random": "as penalty, with as many random features and thresholds of the same rule",
    "screen": "responses on which a detector fires are left out of the update",
    "probe": "as penalty, with a dense probe (logistic regression) instead of detectors",
    "mean_difference": "as penalty, with a dense probe (difference of means) instead of detectors",
    "distance": "a penalty on the distance of the pooled state from those of the demonstrations",
    "length": "a penalty for each token",
    "bounded": "the sigmoid of the score",
    "penalty_no_kl": f"as penalty, {LONGER} times as many steps and no KL to the reference",
    "ties": "the reward model trained with the contrast pairs as ties; no penalty",
    "worst_of_four": "the least score of four heads, each trained on resampled pairs; no penalty",
    "untold": "a penalty on every feature above a τ that human responses seldom reach; capped",
    "oracle": "as penalty, with the world's own counts of its shortcuts instead of detectors",
    **{name: f"the reward model alone, with ppo.kl_coef={kl}" for name, kl in KL_COEFS.items()},
    **{
        name: f"as penalty, with the weight {alpha:g} and ppo.kl_coef={kl:g}"
        for name, (alpha, kl) in GRID.items()
    },
    **{name: f"as random, another draw of features (draw {n})" for name, n in DRAWS.items()},
}


def reward_options(
    condition: str, selected: Path, section: dict[str, Any], counts: Sequence[int] = ()
) -> dict[str, Any]:
    """Returns the fields of `config.reward` that a condition sets.

    Args:
        condition: name of the condition.
        selected: selected_features.json of the same SARM, or the file of a further random draw.
        section: options of the lab, of which `alpha`, `beta`, `distance_penalty`,
            `length_penalty`, `untold_alpha` and `untold_cap` are read.
        counts: the features that count the world's shortcuts, for the condition oracle.
    """
    lists, file = read_json(selected), f"@{escaped(str(selected))}"
    detecting = ("penalty", "full", "screen", "penalty_no_kl", *GRID)
    penalised_lists = dict.fromkeys(detecting, "detectors")
    penalised_lists |= dict.fromkeys(("random", *DRAWS), "random_control")
    options: dict[str, Any] = {}
    if condition == "worst_of_four":
        options["ensemble"] = "min"
    if condition == "oracle":
        options["penalize_features"] = ",".join(map(str, counts))
        options["tau_values"] = ",".join(["0.0"] * len(counts))
        options["alpha_values"] = ",".join([str(section["alpha"])] * len(counts))
    name = penalised_lists.get(condition)
    if name and lists[name]:  # an empty list, if identify found no detectors, penalises nothing
        options["penalize_features"] = f"{file}:{name}"
        options["tau_values"] = f"{file}:tau_{name}"
        if condition == "screen":
            options["screen"] = True
        else:
            alpha = GRID[condition][0] if condition in GRID else section["alpha"]
            options["alpha_values"] = ",".join([str(alpha)] * len(lists[name]))
    if condition == "untold":
        support = selected.parent / UNTOLD_FILE
        file, features = f"@{escaped(str(support))}", read_json(support)["features"]
        options["penalize_features"], options["tau_values"] = f"{file}:features", f"{file}:tau"
        options["alpha_values"] = ",".join([str(section["untold_alpha"])] * len(features))
        options["penalty_cap"] = section["untold_cap"]
    if condition in PROBES:
        options["probe"] = str(selected.parent / probe_file(PROBES[condition]))
        options["probe_penalty"] = section["alpha"]
    if condition == "distance":
        options["human_states"] = str(selected.parent.parent / STATES_FILE)
        options["distance_penalty"] = section["distance_penalty"]
    if condition == "length":
        options["length_penalty"] = section["length_penalty"]
    if condition == "bounded":
        options["bound"] = "sigmoid"
    if condition in ("full", "latent_kl"):
        options["beta"] = section["beta"]
        options["latent_indices"] = f"{file}:carriers"
    if condition == "clamp" and lists["carriers"]:
        options["clamp_features"] = f"{file}:carriers"
        options["clamp_set_values"] = ",".join(["0.0"] * len(lists["carriers"]))
    return options


def other_options(
    condition: str, folder: Path, section: dict[str, Any], total_steps: int, shared: str
) -> dict[str, Any]:
    """Returns the options outside of `config.reward` that a condition sets, by their full names.

    Args:
        condition: name of the condition.
        folder: the folder of the seed, with its data and the runs of its conditions.
        section: options of the lab, of which `tie_weight` is read.
        total_steps: PPO steps of the other conditions.
        shared: the SARM of the other conditions. A reward model of a condition's own has its SAE.
    """
    options: dict[str, Any] = {}
    if condition in KL_COEFS:
        options["ppo.kl_coef"] = KL_COEFS[condition]
    if condition in GRID:
        options["ppo.kl_coef"] = GRID[condition][1]
    if condition == "penalty_no_kl":
        options |= {"ppo.kl_coef": 0.0, "ppo.total_steps": LONGER * total_steps}
    if condition == "ties":
        options["train_sarm.tie_pairs_jsonl"] = escaped(str(folder / "data" / "contrast.jsonl"))
        options["train_sarm.tie_weight"] = section["tie_weight"]
    if condition == "worst_of_four":
        options["train_sarm.heads"] = HEADS
    if condition in RETRAINED:
        options["sarm_model"] = str(folder / condition / "sarm")
        options["train_sarm.sae_model"] = shared
    if condition == "oracle":
        options["lab.oracle"] = True
    return options


def is_ranked(condition: str) -> bool:
    """Returns whether the reward of a condition can rank a pool, and does so in its own way.

    Another weight of the KL to the reference and a bound on the score change no ranking. A pool is
    ranked under several weights of the penalty anyway. The latent KL has a discriminator that is
    trained along with the policy, so no pool can be ranked by it.
    """
    others = (*KL_COEFS, *GRID, "bounded", "penalty_no_kl", "full", "latent_kl")
    return condition not in others


def parse_conditions(text: str, option: str = "lab.conditions") -> list[str]:
    """Parses comma-separated names of conditions; messages name `option`.

    Raises:
        InputError: a name is unknown or given twice.
    """
    return parse_names(option, text, DESCRIPTIONS)


def parse_seeds(text: str) -> list[int]:
    """Parses comma-separated seeds and ranges such as 10-19, whose ends are both included.

    Raises:
        InputError: an entry is no seed or range, or a seed is too large or given twice.
    """
    option, seeds = f"lab.seeds={text}", dict[int, None]()
    for item in map(str.strip, text.split(",")):
        match = SEEDS.fullmatch(item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last:
            raise InputError(f"{option}: found {item!r}, expected a seed or a range such as 10-19")
        if last >= 2**31 or last - first >= MAX_RANGE:
            raise InputError(
                f"{option}: found {item!r}, expected at most {MAX_RANGE} seeds below 2^31"
            )
        numbers = range(first, last + 1)
        if repeated := seeds.keys() & numbers:
            raise InputError(f"{option}: {min(repeated)} is given twice")
        seeds |= dict.fromkeys(numbers)
    return list(seeds)
