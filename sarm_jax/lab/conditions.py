"""The conditions of the study, each a set of changes to the options of a run.

Besides the method and its parts there are its rivals, which use what the method uses or less: a
stronger KL to the reference, the contrast pairs as ties of the reward model, the worst of an
ensemble of heads, random features; and the penalty of a perfect detector, as a ceiling.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.io.path_lists import escaped

MAX_RANGE = 1000  # seeds in one range
KL_COEFS = {f"kl_{value}": value for value in (0.05, 0.1, 0.2, 0.5, 1.0)}
DRAWS = {f"random_{number}": number for number in range(1, 6)}
HEADS = 4
RETRAINED = ("ties", "worst_of_four")  # conditions with a reward model of their own
DESCRIPTIONS = {
    "baseline": "the reward model alone",
    "penalty": "a penalty for each detector that fires",
    "full": "penalty, and the latent KL to the demonstrations",
    "latent_kl": "the latent KL alone",
    "clamp": "the carriers set to 0 before the head reads them",
    "random": "as penalty, with as many random features and thresholds of the same rule",
    "ties": "the reward model trained with the contrast pairs as ties; no penalty",
    "worst_of_four": "the least score of four heads, each trained on resampled pairs; no penalty",
    "oracle": "as penalty, with the world's own counts of its shortcuts instead of detectors",
    **{name: f"the reward model alone, with ppo.kl_coef={kl}" for name, kl in KL_COEFS.items()},
    **{name: f"as random, another draw of features (draw {n})" for name, n in DRAWS.items()},
}


def reward_options(
    condition: str, selected: Path, section: dict[str, Any], counts: Sequence[int] = ()
) -> dict[str, Any]:
    """Returns the fields of `config.reward` that a condition sets.

    Args:
        condition: name of the condition.
        selected: selected_features.json of the same SARM, or the file of a further random draw.
        section: options of the lab, of which `alpha` and `beta` are read.
        counts: the features that count the world's shortcuts, for the condition oracle.
    """
    lists, file = read_json(selected), f"@{escaped(str(selected))}"
    penalised_lists = {"penalty": "detectors", "full": "detectors", "random": "random_control"}
    penalised_lists |= dict.fromkeys(DRAWS, "random_control")
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
        options["alpha_values"] = ",".join([str(section["alpha"])] * len(lists[name]))
    if condition in ("full", "latent_kl"):
        options["beta"] = section["beta"]
        options["latent_indices"] = f"{file}:carriers"
    if condition == "clamp" and lists["carriers"]:
        options["clamp_features"] = f"{file}:carriers"
        options["clamp_set_values"] = ",".join(["0.0"] * len(lists["carriers"]))
    return options


def other_options(condition: str, folder: Path, section: dict[str, Any]) -> dict[str, Any]:
    """Returns the options outside of `config.reward` that a condition sets, by their full names.

    Args:
        condition: name of the condition.
        folder: the folder of the seed, with its data and the runs of its conditions.
        section: options of the lab, of which `tie_weight` is read.
    """
    options: dict[str, Any] = {}
    if condition in KL_COEFS:
        options["ppo.kl_coef"] = KL_COEFS[condition]
    if condition == "ties":
        options["train_sarm.tie_pairs_jsonl"] = escaped(str(folder / "data" / "contrast.jsonl"))
        options["train_sarm.tie_weight"] = section["tie_weight"]
    if condition == "worst_of_four":
        options["train_sarm.heads"] = HEADS
    if condition in RETRAINED:
        options["sarm_model"] = str(folder / condition / "sarm")
    if condition == "oracle":
        options["lab.oracle"] = True
    return options


def parse_conditions(text: str) -> list[str]:
    """Parses comma-separated names of conditions.

    Raises:
        InputError: a name is unknown or given twice.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DESCRIPTIONS:
            raise InputError(
                f"lab.conditions: found {name!r}, expected one of {', '.join(DESCRIPTIONS)}"
            )
        if names.count(name) > 1:
            raise InputError(f"lab.conditions: {name} is given twice")
    return names


def parse_seeds(text: str) -> list[int]:
    """Parses comma-separated seeds and ranges such as 10-19.

    Raises:
        InputError: an entry is no seed or range, or a seed is too large or given twice.
    """
    seeds: dict[int, None] = {}
    for item in map(str.strip, text.split(",")):
        first, _, last = item.partition("-")
        try:
            numbers = range(int(first), int(last or first) + 1)
        except ValueError:
            raise InputError(
                f"lab.seeds: found {item!r}, expected a seed or a range such as 10-19"
            ) from None
        if numbers and (numbers[-1] >= 2**31 or numbers[-1] - numbers[0] >= MAX_RANGE):
            raise InputError(
                f"lab.seeds: found {item!r}, expected at most {MAX_RANGE} seeds below 2^31"
            )
        repeated = seeds.keys() & numbers
        if repeated:
            raise InputError(f"lab.seeds: {min(repeated)} is given twice")
        seeds |= dict.fromkeys(numbers)
    if not seeds:
        raise InputError(f"lab.seeds={text}: names no seed")
    return list(seeds)
