"""Parse the command line: flags and a config file → config, stage and working directory.

The reference implementation's flags (`reference_flags`) are shorthands for config fields: a flag
that is not given leaves its field as it is. `fill_in` replaces "{workdir}" in string fields.
"""

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from absl import flags
from jax.tree_util import keystr, tree_leaves_with_path
from ml_collections import ConfigDict, config_flags

import configs
from pipeline import option_bounds, reference_flags
from pipeline import stage as stages
from pipeline.config_file import (
    ConfigFileError,
    ConfigFileParser,
    describe,
    split_argument,
    text_of,
)
from pipeline.experiments import changed_fields
from pipeline.reference_flags import BATCH, SHORTHANDS
from sarm_jax.io.errors import InputError
from sarm_jax.io.flag_files import check_flag_files
from sarm_jax.io.path_lists import escaped
from sarm_jax.io.secrets import refuse_secrets
from sarm_jax.parallel.processes import Hosts

CONFIG = config_flags.DEFINE_config_file("config", None, "experiment: configs/*.py")
CONFIG_FILE = ConfigFileParser()
flags.FLAGS["config"].parser = CONFIG_FILE  # its own parser puts tracebacks into messages
WORKDIR = flags.DEFINE_string("workdir", None, "results; default outputs/<name of the config>")
LEVELS = ("debug", "info", "warning", "error")
LOG_LEVEL = flags.DEFINE_enum("log_level", "info", LEVELS, "severity from which messages are shown")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0, for a mesh over several hosts"
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "number of processes that run this command")
PROCESS = flags.DEFINE_integer("process_id", None, "number of this process among them, from 0")
STAGE = flags.DEFINE_string(
    "stage", "train", "what to run: all, or one of " + ", ".join(stages.names())
)

reference_flags.define()
PLANNED_AS = {"policy_model": "policy_config", "sarm_model": "sarm_config"}


def parse(argv: list[str]) -> tuple[ConfigDict, str, Path]:
    """Returns (config with every flag applied, stage, working directory).

    "{workdir}" is not filled in yet.

    Raises:
        InputError: a flag is unknown or malformed, or the config file is wrong.
    """
    refuse_secrets(argv[1:])
    check_flag_files(argv[1:])
    named = _named_config(argv)
    if named is not None and not Path(split_argument(named)[0]).is_file():
        raise InputError(f"--config={named}: no such file")
    positional = _parse_flags(argv)
    if len(positional) > 1:
        raise InputError(f"unexpected argument {positional[1]!r}: options are --name=value")
    if named is None:
        raise InputError("--config is missing: for example --config=configs/smollm2.py")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(split_argument(path)[0]).is_file():
        raise InputError(f"--config={path}: no such file")
    workdir = _workdir(default=Path("outputs") / _run_name(path))
    try:
        config = _config_with_flags(argv)
    except InputError:
        raise
    except Exception as error:  # a reference in the file of --config may compute anything
        raise InputError(describe(error, path)) from error
    leaves = tree_leaves_with_path(config.to_dict())
    named_values = ((keystr(parts, simple=True, separator="."), value) for parts, value in leaves)
    refuse_secrets(f"--config.{name}={value}" for name, value in named_values)
    return config, STAGE.value, workdir


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses all flags, loads the file of --config, and returns the arguments that are no flags."""
    CONFIG_FILE.config = None
    try:
        return flags.FLAGS(argv)
    except ConfigFileError as error:
        raise InputError(error) from error
    except Exception as error:  # overrides are applied to a config that may hold anything
        if isinstance(error, flags.UnrecognizedFlagError):
            instead = reference_flags.replacement(error.flagname)
            if instead is not None:
                raise InputError(f"--{error.flagname} is not taken: {instead}") from None
        if CONFIG_FILE.config is not None:
            _refuse_unknown_options(argv, CONFIG_FILE.config)
        raise InputError(text_of(error)) from error


def _config_with_flags(argv: list[str]) -> ConfigDict:
    """Returns the config with the reference's flags applied, checked before and after.

    Values of flags are checked with those of the file, and so is the batch that flags multiply to.
    """
    config = CONFIG.value
    option_bounds.check_names(config)
    _apply_shorthands(config)
    config = option_bounds.checked(config)
    _refuse_what_experiments_set(config)
    reference_flags.set_batch(config, argv)
    return option_bounds.checked(config)


def with_installed_config(argv: list[str]) -> list[str]:
    """Returns the arguments with a config of this project named by its full path.

    `--config=configs/smollm2.py` then works in any directory. A file of that name in the current
    directory comes first.
    """
    named = _named_config(argv)
    path = split_argument(named or "")[0]
    try:
        installed = None if Path(path).is_file() else installed_file(path)
    except OSError:  # no name that a file can have; `parse` refuses it
        return argv
    if named is None or installed is None or not installed.is_file():
        return argv
    full = str(installed) + named[len(path) :]
    changed = {named: full, f"--config={named}": f"--config={full}"}
    return [changed.get(argument, argument) for argument in argv]


def installed_file(path: str) -> Path | None:
    """Returns a file under configs/ as it was installed; None if `path` is no such file."""
    parts = Path(path).parts
    if not parts or parts[0] != "configs":
        return None
    file = Path(configs.__path__[0]).joinpath(*parts[1:])
    return file if file.exists() else None


def _named_config(argv: Sequence[str]) -> str | None:
    """Returns the value of the last --config, or None."""
    pairs = [argument.partition("=")[::2] for argument in argv] + list(pairwise(argv))
    values = [value for name, value in pairs if name == "--config" and value]
    return values[-1] if values else None


def _run_name(path: str) -> str:
    """Returns the name of the config file, with its argument if that is a single word."""
    file, _, argument = split_argument(path)
    word = re.fullmatch(r"[A-Za-z0-9_-]+", argument)
    return f"{Path(file).stem}_{argument}" if word else Path(file).stem


def _apply_shorthands(config: ConfigDict) -> None:
    """Sets the config fields of the reference's flags that were given."""
    for flag, (_, field) in SHORTHANDS.items():
        value = flags.FLAGS[flag].value
        if value is None:
            continue
        config.update_from_flattened_dict({field: value})
        if flag in PLANNED_AS:  # the plan is then for this model, not for the config's architecture
            config.plan[PLANNED_AS[flag]] = ""


def _refuse_what_experiments_set(config: ConfigDict) -> None:
    """Raises InputError for a flag whose field an experiment of the config sets."""
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
    """Returns the config field of each shorthand flag that was given, if it is in a section.

    The runner names the flags whose field the stage does not read.
    """
    fields = {flag: field for flag, (_, field) in SHORTHANDS.items() if "." in field}
    fields |= {flag: field for flag, (field, _) in BATCH.items()}
    return {f"--{k}": field for k, field in fields.items() if flags.FLAGS[k].value is not None}


def _workdir(default: Path) -> Path:
    """Returns the directory of --workdir, which the reference calls --output_dir."""
    values: dict[str, str] = {}
    for name in ("workdir", "output_dir"):
        value = flags.FLAGS[name].value
        if value == "":
            raise InputError(f"--{name} is empty")
        if value is not None:
            values[name] = value
    if len({Path(value) for value in values.values()}) > 1:
        both = " and ".join(f"--{name}={value}" for name, value in values.items())
        raise InputError(f"{both}: two names of the same option, give one")
    return Path(next(iter(values.values()), default))


def hosts(stage: str) -> Hosts | None:
    """Returns the group of processes that this one belongs to; None if it is the only one."""
    group = (COORDINATOR, PROCESSES, PROCESS)
    if all(flag.value is None for flag in group):
        return None
    address, count, number = (flag.value for flag in group)
    if address is None or count is None or number is None:
        names = ", ".join(f"--{flag.name}" for flag in group)
        raise InputError(f"{names} go together: one is missing")
    if stage != "all" and stages.load(stage).processes != "all":
        raise InputError(f"--num_processes={count}: --stage={stage} runs in one process")
    return Hosts(str(address), int(count), int(number))


def log_level() -> int:
    """Returns --log_level as a number of `logging`."""
    return logging.getLevelNamesMapping()[LOG_LEVEL.value.upper()]


def usage() -> str:
    """Returns the description of all flags, for --help."""
    return "\n".join(flags.FLAGS.module_help(m) for m in (__name__, reference_flags.__name__))


def fill_in(template: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns a copy in which "{workdir}" is the working directory.

    In a list of paths the directory is escaped, so that no character of its name separates anything
    (`sarm_jax.io.path_lists`). Files of configs/ that are not in the current directory are those
    that were installed.
    """
    return _filled(template, str(workdir), escaped(str(workdir)))


def _filled(template: ConfigDict, plain: str, in_lists: str, section: str = "") -> ConfigDict:
    """Fills in a section of the config; `in_lists` is the directory as lists have to name it."""
    config = template.copy_and_resolve_references()
    for name, value in config.items():
        field = f"{section}{name}"
        if isinstance(value, ConfigDict):
            config[name] = _filled(value, plain, in_lists, f"{field}.")
        elif isinstance(value, str):
            in_list = "{workdir}" in value and plain != in_lists and stages.is_list(field)
            value = value.replace("{workdir}", in_lists if in_list else plain)
            if value.startswith("configs/") and not Path(value).exists():
                value = str(installed_file(value) or value)
            config[name] = value
    return config


def _refuse_unknown_options(argv: list[str], config: ConfigDict) -> None:
    """Raises InputError for a --config.… that names no option of the config."""
    option_bounds.check_names(config)
    options = list(option_names(config))
    for argument in argv:
        name = argument.removeprefix("--config.").partition("=")[0]
        if argument.startswith("--config.") and name not in options:
            near = difflib.get_close_matches(name, options, 1, cutoff=0.85)
            hint = f" (did you mean --config.{near[0]}?)" if near else ""
            raise InputError(f"{argument}: no such option{hint}")


def option_names(config: ConfigDict, path: str = "") -> Iterator[str]:
    """Yields the full name of every option, without its value, which may be computed."""
    for name, value in config.iteritems(preserve_field_references=True):
        if isinstance(value, ConfigDict):
            yield from option_names(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"
