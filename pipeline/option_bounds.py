"""The type and the bounds of every option, checked once, before a stage reads or writes anything.

Types are those of the defaults in `configs/base.py`. A whole number must fit int32, and a number
must fit float32, in which models compute. Memory is allocated for the options of `LARGEST`, whose
bounds no machine exceeds. What an option means is not known here: the dataclass that a stage makes
of its section has the stricter rules, such as "must be positive".
"""

import difflib
from typing import Any

from ml_collections import ConfigDict

from configs import base
from pipeline.config_file import text_of
from sarm_jax.io.errors import InputError
from sarm_jax.io.float32 import RANGE, fits_float32

OPTIONS = base.get_config()  # for names, types and None as a default; never changed
INT32 = 2**31 - 1
ROWS = 2**20  # rows, widths or draws that are held in memory at a time
LARGEST = dict.fromkeys(
    (
        "sarm_batch_size mesh.data mesh.fsdp mesh.tensor lora.rank ppo.batch_size "
        "ppo.samples_per_prompt ppo.rollout_slots ppo.num_minibatches "
        "ppo.gradient_accumulation_steps ppo.ppo_epochs ppo.max_new_tokens "
        "ppo.max_prompt_tokens ppo.calibration_batches ppo.pack_levels ppo.eval_batches "
        "discriminator.hidden_size discriminator.steps discriminator.batch_size "
        "discriminator.folds "
        "prepare_data.samples_per_prompt prepare_data.max_new_tokens train_sarm.max_length "
        "train_sarm.latent_size train_sarm.k train_sarm.aux_k train_sarm.sae_batch_tokens "
        "train_sarm.epochs train_sarm.batch_size train_sarm.heads "
        "train_sarm.gradient_accumulation_steps train_sae.max_length "
        "train_sae.latent_size train_sae.k train_sae.aux_k train_sae.batch_states "
        "identify.resamples probe.controls evaluate.resamples evaluate.samples "
        "evaluate.batch_size lab.batch_size lab.processes lab.conditions_at_once "
        "lab.sampling_slots "
        "experiments_at_once"
    ).split(),
    ROWS,
)
# Rows that the lab makes and keeps, all at once.
LARGEST |= dict.fromkeys(
    (
        "lab.corpus_rows lab.demonstrations lab.pairs lab.contrast_pairs lab.prompts "
        "lab.held_out_prompts"
    ).split(),
    2**24,
)
TEMPERATURES = [f"{section}.temperature" for section in ("ppo", "prepare_data", "evaluate")]
LEAST_TEMPERATURE = 1e-6  # logits that are divided by less may leave float32
# Options that inf switches off; every other number is finite.
MAY_BE_INFINITE = ("reward.penalty_cap", "guards.")
EXPERIMENTS = "experiments"  # each of its entries changes some of the options


def checked(config: ConfigDict) -> ConfigDict:
    """Returns a copy of a config whose options all have their types and are within their bounds.

    References are replaced by their values, and whole numbers by floats if the option is one.

    Raises:
        InputError: an option is missing, unknown, of another type, or out of its bounds.
    """
    check_names(config)
    options = base.get_config()
    _set_values(options, config)
    with options.unlocked():
        for name in names(config[EXPERIMENTS], EXPERIMENTS):
            experiment = f"{EXPERIMENTS}.{name}"
            given = _section(config[EXPERIMENTS], name, experiment)
            changes = _changes(OPTIONS, given, experiment=experiment, path="")
            options[EXPERIMENTS][name] = changes
    return options


def check_names(config: ConfigDict) -> None:
    """Checks that a config has every option of `configs/base.py` and no other, whatever its value.

    Raises:
        InputError: an option or a section is missing or unknown, or is one in place of the other.
    """
    _check_names(OPTIONS, config)


def names(section: ConfigDict, path: str = "") -> list[str]:
    """Returns the names in a section, whose own name is `path`.

    Raises:
        InputError: one of them is no text.
    """
    try:
        found: list = list(section)
    except TypeError:  # the names of a section are sorted, and these cannot be
        found = [None]
    if not all(isinstance(name, str) for name in found):
        raise InputError(f"{path or 'the config'}: the name of an option must be a text")
    return found


def _check_names(options: ConfigDict, given: ConfigDict, path: str = "") -> None:
    _refuse_unknown(options, given, path)
    for name in options:
        full = _join(path, name)
        if name not in given:
            raise InputError(f"{full} is missing: a config has every option of configs/base.py")
        if isinstance(options[name], ConfigDict):
            section = _section(given, name, full)
            if full != EXPERIMENTS:
                _check_names(options[name], section, full)


def _refuse_unknown(options: ConfigDict, given: ConfigDict, path: str) -> None:
    for name in names(given, path):
        if name not in options:
            near = difflib.get_close_matches(name, list(options), 1, cutoff=0.75)
            hint = f" (did you mean {_join(path, near[0])}?)" if near else ""
            raise InputError(f"{_join(path, name)}: no such option{hint}")


def _set_values(options: ConfigDict, given: ConfigDict, path: str = "") -> None:
    """Sets the options to the values of a config that has the same names."""
    for name in options:
        full = _join(path, name)
        if not isinstance(options[name], ConfigDict):
            options[name] = value_of_type(full, _resolved(given, name, full))
        elif full != EXPERIMENTS:
            _set_values(options[name], given[name], full)


def _changes(options: ConfigDict, given: ConfigDict, *, experiment: str, path: str) -> ConfigDict:
    """Returns the changes of an experiment, which has some of the options of the section `path`."""
    place = _join(experiment, path)
    _refuse_unknown(options, given, place)
    changes = ConfigDict()
    for name in given:
        full = _join(place, name)
        if isinstance(options[name], ConfigDict):
            section = _section(given, name, full)
            changes[name] = _changes(
                options[name], section, experiment=experiment, path=_join(path, name)
            )
        else:
            changes[name] = value_of_type(_join(path, name), _resolved(given, name, full), full)
    return changes


def _section(given: ConfigDict, name: str, full: str) -> ConfigDict:
    """Returns a section of a config; raises InputError if there is a value in its place."""
    if not isinstance(given[name], ConfigDict):
        raise InputError(f"{full}={shown(given[name])}: expected options and their values")
    return given[name]


def _resolved(given: ConfigDict, name: str, full: str) -> Any:
    """Returns the value of an option, which a reference may compute from others."""
    try:
        return given[name]
    except Exception as error:
        kind = type(error).__name__
        raise InputError(f"{full}: has no value ({kind}: {text_of(error)})") from error


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)


def value_of_type(field: str, value: Any, place: str = "") -> Any:
    """Returns the value of one option in the option's type.

    Args:
        field: the option, such as "ppo.seed".
        value: anything.
        place: what messages call the option, if that is not its name.

    Raises:
        InputError: the value is of another type, or out of the option's bounds.
    """
    section, _, name = field.rpartition(".")
    options = OPTIONS[section] if section else OPTIONS
    if value is None and options[name] is None:
        return None
    kind, told = options.get_type(name), f"{place or field}={shown(value)}"
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{told}: expected {kind.__name__}")
    try:
        value = kind(value)
    except OverflowError:  # a whole number that no float can be
        raise InputError(f"{told}: must be {RANGE}") from None
    if rule := _rule(field, value):
        raise InputError(f"{told}: must be {rule}")
    return value


def _rule(field: str, value: Any) -> str | None:
    """Returns the rule that a value of the right type breaks, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, int):
        largest = LARGEST.get(field, INT32)
        if value > largest:
            return f"at most {largest}"
        return None if value >= -INT32 else f"at least {-INT32}"
    if abs(value) == float("inf") and field.startswith(MAY_BE_INFINITE):
        return None
    if value != value or abs(value) == float("inf"):
        return "a finite number"
    if not fits_float32(value):
        return RANGE
    if field in TEMPERATURES and 0 < value < LEAST_TEMPERATURE:
        return (
            f"0 or at least {LEAST_TEMPERATURE:g}"
            if field.startswith("evaluate")
            else (f"at least {LEAST_TEMPERATURE:g}")
        )
    return None


def shown(value: Any) -> str:
    """Formats a value for a message, whatever it is."""
    try:
        return repr(value)
    except KeyboardInterrupt:
        raise
    except BaseException:  # its class may come from a config file; long numbers raise, too
        size = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"<{type(value).__name__}{size}>"
