"""The flags of `main.py`, and how they land in the config.

The reference implementation's flags (`reference_flags`) are shorthands for config fields: a flag
that is not given leaves the field alone. "{workdir}" in a string field becomes the working
directory, in `fill_in`.
"""

import difflib
import logging
import runpy
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

from absl import flags
from jax.tree_util import keystr, tree_leaves_with_path
from ml_collections import ConfigDict, config_flags

from pipeline import reference_flags
from pipeline.experiments import changed_fields
from pipeline.reference_flags import BATCH, SHORTHANDS
from sarm_jax.io.errors import InputError, refuse_secrets
from sarm_jax.parallel.processes import Hosts

CONFIG = config_flags.DEFINE_config_file("config", None, "experiment: configs/*.py")
WORKDIR = flags.DEFINE_string("workdir", None, "results; default outputs/<name of the config>")
LEVELS = ("debug", "info", "warning", "error")
LOG_LEVEL = flags.DEFINE_enum("log_level", "info", LEVELS, "the least severe messages shown")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for a mesh over several hosts"
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes run this command")
PROCESS = flags.DEFINE_integer("process_id", None, "which of them this one is, from 0")
STAGE = flags.DEFINE_string("stage", "train", "what to run; README lists the stages")

reference_flags.define()
PLANNED_AS = {"policy_model": "policy_config", "sarm_model": "sarm_config"}


def parse(argv: list[str]) -> tuple[ConfigDict, str, Path]:
    """(config with every flag applied, stage, working directory); InputError for bad flags.

    "{workdir}" is not filled in yet.
    """
    refuse_secrets(argv[1:])
    pairs = [a.partition("=")[::2] for a in argv] + list(pairwise(argv))
    given = [value for name, value in pairs if name == "--config" and value]
    named = given[-1] if given else None
    if named is not None and not Path(named.partition(":")[0]).is_file():
        raise InputError(f"--config={named}: no such file")
    try:
        rest = flags.FLAGS(argv)
    except flags.UnrecognizedFlagError as error:
        instead = reference_flags.replacement(error.flagname)
        if instead is not None:
            raise InputError(f"--{error.flagname} is not taken: {instead}") from None
        if named is not None:
            _refuse_unknown_options(argv, named)
        raise InputError(_one_line(error)) from error
    except Exception as error:  # the file of --config is a program
        if named is not None:
            _refuse_unknown_options(argv, named)
        raise InputError(_place(error, named or "") + _one_line(error)) from error
    if len(rest) > 1:
        raise InputError(f"unexpected argument {rest[1]!r}: options are --name=value")
    if named is None:
        raise InputError("--config is missing: for example --config=configs/smollm2.py")
    _check_kind(CONFIG.value, named)
    path = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    if not path.is_file():
        raise InputError(f"--config={path}: no such file")
    workdir = _workdir(default=Path("outputs") / path.stem)
    config = CONFIG.value
    for flag, (_, field) in SHORTHANDS.items():
        value = flags.FLAGS[flag].value
        if value is None:
            continue
        config.update_from_flattened_dict({field: value})
        if flag in PLANNED_AS:  # the model given takes the place of the config's own architecture
            config.plan[PLANNED_AS[flag]] = ""
    _refuse_what_experiments_set(config)
    reference_flags.set_batch(config, argv)
    values = tree_leaves_with_path(config.to_dict())
    named_values = ((keystr(parts, simple=True, separator="."), value) for parts, value in values)
    refuse_secrets(f"--config.{name}={value}" for name, value in named_values)
    return config, STAGE.value, workdir


def _refuse_what_experiments_set(config: ConfigDict) -> None:
    """Raises InputError for a flag whose field an experiment of the config sets itself."""
    fields = {flag: field for flag, (_, field) in SHORTHANDS.items()}
    fields |= {flag: field for flag, (field, _) in BATCH.items()}
    changed = changed_fields(config)
    for flag, field in fields.items():
        if flags.FLAGS[flag].value is not None and field in changed:
            name = changed[field]
            raise InputError(
                f"--{flag}={flags.FLAGS[flag].value}: experiments of the config set it themselves; "
                f"give --config.experiments.{name}.{field}"
            )


def shorthands() -> dict[str, str]:
    """Flags given for a field of a section, which not every stage reads, by flag: the field."""
    fields = {flag: field for flag, (_, field) in SHORTHANDS.items() if "." in field}
    fields |= {flag: field for flag, (field, _) in BATCH.items()}
    return {f"--{k}": field for k, field in fields.items() if flags.FLAGS[k].value is not None}


def _workdir(default: Path) -> Path:
    """The directory of --workdir, or of --output_dir as the reference calls it."""
    given: dict[str, str] = {}
    for name in ("workdir", "output_dir"):
        value = flags.FLAGS[name].value
        if value == "":
            raise InputError(f"--{name} is empty")
        if value is not None:
            given[name] = value
    if len({Path(value) for value in given.values()}) > 1:
        both = " and ".join(f"--{name}={value}" for name, value in given.items())
        raise InputError(f"{both}: two names of the same option, give one")
    return Path(next(iter(given.values()), default))


def hosts(stage: str) -> Hosts | None:
    """The processes that this one belongs to; None: it is the only one."""
    given = (COORDINATOR, PROCESSES, PROCESS)
    if all(flag.value is None for flag in given):
        return None
    address, count, number = (flag.value for flag in given)
    if address is None or count is None or number is None:
        names = ", ".join(f"--{flag.name}" for flag in given)
        raise InputError(f"{names} go together: one is missing")
    if stage != "train":
        raise InputError(f"--num_processes={count}: --stage={stage} runs in one process")
    return Hosts(str(address), int(count), int(number))


def log_level() -> int:
    """--log_level, as `logging` counts."""
    return logging.getLevelNamesMapping()[LOG_LEVEL.value.upper()]


def usage() -> str:
    """The flags, for --help."""
    return "\n".join(flags.FLAGS.module_help(m) for m in (__name__, reference_flags.__name__))


def fill_in(template: ConfigDict, workdir: Path) -> ConfigDict:
    """A copy in which "{workdir}" is the working directory."""
    config = template.copy_and_resolve_references()
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            config[name] = fill_in(value, workdir)
        elif isinstance(value, str):
            config[name] = value.replace("{workdir}", str(workdir))
    return config


def _refuse_unknown_options(argv: list[str], path: str) -> None:
    """Raises InputError for the first --config.… that names no option of the file at `path`."""
    try:
        file, _, argument = path.partition(":")
        config = runpy.run_path(file)["get_config"](*([argument] if argument else []))
    except Exception:  # of the file itself: the caller has it already
        return
    _check_kind(config, path)
    leaves = tree_leaves_with_path(config.to_dict(), is_leaf=lambda value: value is None)
    known = [keystr(parts, simple=True, separator=".") for parts, _ in leaves]
    for argument in argv:
        name = argument.removeprefix("--config.").partition("=")[0]
        if argument.startswith("--config.") and name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.85)
            hint = f" (did you mean --config.{near[0]}?)" if near else ""
            raise InputError(f"{argument}: no such option{hint}")


def _check_kind(config: Any, path: str) -> None:
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config={path}: its get_config() must return a ConfigDict")


def _place(error: Exception, path: str) -> str:
    """Where in the file of --config it happened, if it did."""
    path = path.partition(":")[0]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if path and Path(frame.filename) == Path(path)]
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"--config={path}: "
    if isinstance(error, SyntaxError) or not lines:
        return ""
    return f"{path}:{lines[-1]}: {type(error).__name__}: "


def _one_line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())
