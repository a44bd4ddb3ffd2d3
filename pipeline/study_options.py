"""Checks of the options of a study, and the conditions that they name."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from pipeline.option_bounds import OPTIONS
from sarm_jax.io.errors import InputError
from sarm_jax.lab.conditions import RETRAINED, is_ranked, parse_conditions

SEEDED = ("lab", "train_sarm", "identify", "ppo")  # sections whose seed the study sets
# Options of the reward that may be the same for all conditions; the conditions set the others.
COMMON = ("unit", "penalty_cap", "human_latents")
# Options outside of the reward that conditions set; a study has to leave them at these values.
SET_BY_CONDITIONS = {
    "train_sarm.tie_pairs_jsonl": "",
    "train_sarm.tie_weight": 1.0,
    "train_sarm.heads": 1,
    "train_sarm.sae_model": "",
    "lab.oracle": False,
}


def check_study(template: ConfigDict) -> None:
    """Raises InputError for options out of range, and for options that the study sets itself."""
    if template.experiments:
        raise InputError(
            f"experiments={','.join(template.experiments)}: the study trains under lab.conditions, "
            "and has no experiments"
        )
    if template.lab.processes < 1:
        raise InputError(f"lab.processes={template.lab.processes}: must be at least 1")
    if not 0 < template.lab.tie_weight < float("inf"):
        raise InputError(f"lab.tie_weight={template.lab.tie_weight}: must be positive and finite")
    for name in ("alpha", "beta"):
        if not 0 <= template.lab[name] < float("inf"):
            raise InputError(f"lab.{name}={template.lab[name]}: must be 0 or positive, and finite")
    retrained = [name for name in all_conditions(template) if name in RETRAINED]
    if retrained and template.train_sarm.mode != 0:
        raise InputError(
            f"train_sarm.mode={template.train_sarm.mode}: the condition {retrained[0]} trains a "
            "head on the same trunk and SAE, which needs train_sarm.mode=0"
        )
    options = template.to_dict()
    set_in_reward = {
        f"reward.{name}": OPTIONS.reward[name] for name in OPTIONS.reward if name not in COMMON
    }
    for field, default in (set_in_reward | SET_BY_CONDITIONS).items():
        section, name = field.split(".")
        if options[section][name] != default:
            raise InputError(
                f"{field}={options[section][name]}: the conditions of the study set it, with "
                "lab.alpha, lab.beta and other options of lab"
            )
    for section in SEEDED:
        if template[section].seed:
            raise InputError(
                f"{section}.seed={template[section].seed}: the study takes its seeds from lab.seeds"
            )


def check_pool(template: ConfigDict) -> None:
    """Raises InputError for options of the ranked pool that are out of range."""
    section = template.lab
    for name, least in (("pool_responses", 0), ("pool_prompts", 1)):
        if section[name] < least:
            raise InputError(f"lab.{name}={section[name]}: must be at least {least}")
    if section.sampling_slots < 0:
        raise InputError(
            f"lab.sampling_slots={section.sampling_slots}: must be 0 (none is refilled) or positive"
        )
    if section.pool_responses == 1:
        raise InputError("lab.pool_responses=1: must be 0 (no pool) or at least 2")
    for name in ("distance_penalty", "length_penalty", "untold_alpha", "untold_cap"):
        if not 0 < section[name] < float("inf"):
            raise InputError(f"lab.{name}={section[name]}: must be positive and finite")
    if not section.ranked_conditions:
        return
    if not section.pool_responses:
        raise InputError(
            f"lab.ranked_conditions={section.ranked_conditions}: needs a pool, "
            "lab.pool_responses ≥ 2"
        )
    option, trained = (
        f"lab.ranked_conditions={section.ranked_conditions}",
        trained_conditions(template),
    )
    for name in ranked_conditions(template):
        if name in trained:
            raise InputError(f"{option}: {name} is one of lab.conditions already")
        if not is_ranked(name):
            raise InputError(
                f"{option}: {name} ranks a pool as another condition does, or cannot rank one; "
                "name it in lab.conditions"
            )


def trained_conditions(config: ConfigDict) -> list[str]:
    """Returns the conditions that the policy is trained under; none if a pool is only ranked."""
    names = config.lab.conditions
    return [] if not names and config.lab.ranked_conditions else parse_conditions(names)


def ranked_conditions(config: ConfigDict) -> list[str]:
    """Returns the conditions that rank the pool and are not trained."""
    names = config.lab.ranked_conditions
    return parse_conditions(names, "lab.ranked_conditions") if names else []


def all_conditions(config: ConfigDict) -> list[str]:
    """Returns the conditions that are trained, then those that only rank the pool."""
    return [*trained_conditions(config), *ranked_conditions(config)]


def groups_of(conditions: Sequence[str], at_once: int) -> list[list[str]]:
    """Splits the conditions, in their order, into groups of at most `at_once` that train together.

    A condition with a reward model of its own shares no models and is trained alone.
    """
    shared = [name for name in conditions if name not in RETRAINED]
    first = {shared[n]: shared[n : n + at_once] for n in range(0, len(shared), at_once)}
    own = {name: [name] for name in conditions if name in RETRAINED}
    return [(first | own)[name] for name in conditions if name in first | own]
