"""The conditions of the study: what each does to the reward, as a diff of the reward options."""

import json
from pathlib import Path
from typing import Any

from sarm_jax.io.errors import InputError

MOST_SEEDS = 1000  # in a range
DESCRIPTIONS = {
    "baseline": "the reward model alone",
    "penalty": "a penalty for each detector that fires",
    "full": "penalty, and the latent KL to the demonstrations",
    "latent_kl": "the latent KL alone",
    "clamp": "the carriers set to 0 before the head reads them",
    "random": "as penalty, with as many random features and thresholds of the same rule",
}


def reward_options(condition: str, selected: Path, section: dict[str, Any]) -> dict[str, Any]:
    """The fields of `config.reward` that make `condition`.

    `selected` is the selected_features.json of the same SARM; `section` the lab's options, of
    which `alpha` and `beta` are read.
    """
    lists = json.loads(selected.read_text(encoding="utf-8"))
    penalised = {"penalty": "detectors", "full": "detectors", "random": "random_control"}
    options = {}
    name = penalised.get(condition)
    if name and lists[name]:  # identify may have found none, and then there is nothing to penalise
        options["penalize_features"] = f"@{selected}:{name}"
        options["tau_values"] = f"@{selected}:tau_{name}"
        options["alpha_values"] = ",".join([str(section["alpha"])] * len(lists[name]))
    if condition in ("full", "latent_kl"):
        options["beta"] = section["beta"]
        options["latent_indices"] = f"@{selected}:carriers"
    if condition == "clamp" and lists["carriers"]:
        options["clamp_features"] = f"@{selected}:carriers"
        options["clamp_set_values"] = ",".join(["0.0"] * len(lists["carriers"]))
    return options


def parse_conditions(text: str) -> list[str]:
    """Comma-separated names."""
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
    """Comma-separated seeds, and ranges such as 10-19."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            found = range(int(first), int(last or first) + 1)
        except ValueError:
            raise InputError(
                f"lab.seeds: found {part.strip()!r}, expected a seed or a range such as 10-19"
            ) from None
        if found and (found[-1] >= 2**31 or found[-1] - found[0] >= MOST_SEEDS):
            raise InputError(
                f"lab.seeds: found {part.strip()!r}, expected at most {MOST_SEEDS} seeds below 2^31"
            )
        repeated = seeds.keys() & found
        if repeated:
            raise InputError(f"lab.seeds: {min(repeated)} is given twice")
        seeds |= dict.fromkeys(found)
    if not seeds:
        raise InputError(f"lab.seeds={text!r}: names no seed")
    return list(seeds)
