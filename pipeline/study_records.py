"""Records of what the seeds of a study have finished, in seed_{n}/study.json.

Several commands may run seeds of one study in the same directory at the same time, on one machine
or on many. Each of them draws the page from the records of all seeds with its own options.
"""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.changes import DEFAULTS
from pipeline.provenance import Records
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import locked_output
from sarm_jax.io.json_files import read_json, write_json
from sarm_jax.io.secrets import redact
from sarm_jax.io.workdir import first_difference

LOG = logging.getLogger(__name__)
FILE = "study.json"
POOL = "pool"  # name of a seed's ranked pool among its results
SEED_NAME = re.compile(r"seed_(0|[1-9][0-9]{0,11})")  # of the folder of a seed
# Options, and whole sections, that do not affect the results of a seed.
WITHOUT_EFFECT = (
    "lab.seeds lab.processes lab.conditions_at_once mesh checkpoint profile plan report track "
    "track_project"
).split()


@dataclasses.dataclass(frozen=True)
class SeedOutcome:
    """The conditions that a seed has finished and, if it stopped, the reason.

    `pooled` is True if its conditions have ranked a pool.
    """

    finished: list[str]
    stopped: str = ""
    in_training: bool = False
    pooled: bool = False

    @property
    def refused(self) -> bool:
        """True if the seed stopped for a bad option or file, and not in training."""
        return bool(self.stopped) and not self.in_training


@dataclasses.dataclass(frozen=True)
class EarlierRecord:
    """The record of an earlier call for a seed, and the stages that had run in its folder."""

    options: dict[str, Any]
    outcome: SeedOutcome
    stages: dict[str, dict]


def seed_folder(workdir: Path, seed: int) -> Path:
    """Returns the folder of a seed's world and runs."""
    return workdir / f"seed_{seed}"


@contextlib.contextmanager
def locked_seed(workdir: Path, seed: int) -> Iterator[None]:
    """Lets one process at a time run a seed; raises InputError if another one runs it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked_output(seed_folder(workdir, seed)))
        except BlockingIOError:
            raise InputError(f"--workdir={workdir}: another process runs seed {seed}") from None
        yield


def study_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a study that the results of a seed depend on, as JSON values."""
    options = json.loads(json.dumps(dict(settings)))
    for field in WITHOUT_EFFECT:
        *sections, name = field.split(".")
        holder = options
        for section in sections:
            holder = holder[section]
        del holder[name]
    return options


def write_record(folder: Path, options: Mapping[str, Any], outcome: SeedOutcome) -> None:
    """Records what a seed has finished under the options of `study_options`, without secrets."""
    outcome = dataclasses.replace(outcome, stopped=redact(outcome.stopped))
    write_json(folder / FILE, {"options": options, **dataclasses.asdict(outcome)})


def remove_record(folder: Path) -> EarlierRecord | None:
    """Removes the record of a seed that is about to run again, and returns what it said.

    Raises:
        InputError: the records of the stages in the folder cannot be read. Nothing is removed.
    """
    stages = Records(folder).stages
    earlier = None
    with contextlib.suppress(InputError):
        earlier = EarlierRecord(*read_record(folder), stages)
    (folder / FILE).unlink(missing_ok=True)
    return earlier


def replace_record(
    folder: Path,
    options: Mapping[str, Any],
    outcome: SeedOutcome,
    earlier: EarlierRecord | None,
) -> None:
    """Records what a seed has finished, or puts the earlier record back.

    If a call with other options was refused, and no stage of the seed's preparation has run since,
    the earlier record is kept, because the folder still holds its results. Conditions that the
    refused call has trained are not in it; a later call finds them up to date.

    Args:
        folder: the folder of the seed.
        options: those of `study_options` with which the seed has run.
        outcome: what has come of it.
        earlier: what `remove_record` returned before it ran.
    """
    if (
        earlier
        and outcome.refused
        and Records(folder).stages == earlier.stages
        and first_difference(earlier.options, dict(options), defaults=DEFAULTS)
    ):
        options, outcome = earlier.options, earlier.outcome
    write_record(folder, options, outcome)


def read_records(
    workdir: Path, options: Mapping[str, Any], without: Collection[int] = ()
) -> dict[int, SeedOutcome]:
    """Returns the records of all seeds with these options, in the order of the seeds.

    A seed with other options, or whose record cannot be read, is named in the log and left out.
    The seeds in `without` are not read.
    """
    outcomes = {}
    for seed, folder in seed_folders(workdir).items():
        if seed in without or not (folder / FILE).exists():  # it has not ended, or is run again
            continue
        try:
            stored, outcome = read_record(folder)
        except InputError as error:
            LOG.warning("the page leaves out seed %d: %s", seed, error)
            continue
        difference = first_difference(stored, dict(options), defaults=DEFAULTS)
        if difference:
            LOG.warning("the page leaves out seed %d of other options: %s", seed, difference)
        else:
            outcomes[seed] = outcome
    return outcomes


def results_of(outcomes: Mapping[int, SeedOutcome]) -> set[tuple[int, str]]:
    """Returns the results of seeds: each with a condition, or with `POOL` for its ranked pool."""
    return {
        (seed, name)
        for seed, outcome in outcomes.items()
        for name in [*outcome.finished, *([POOL] if outcome.pooled else [])]
    }


def drawn_results(workdir: Path) -> set[tuple[int, str]]:
    """Returns the results on the page of a study, from lab.json; none if it cannot be read."""
    try:
        content = read_json(workdir / "lab.json", expected="the numbers of a study")
        results = content["conditions"].items()
        runs = {(run["seed"], name) for name, of_name in results for run in of_name}
        return runs | {(seed, POOL) for seed in content["best_of_n"]["seeds"]}
    except (InputError, AttributeError, KeyError, TypeError):
        return set()


def seed_folders(workdir: Path) -> dict[int, Path]:
    """Returns the folders of all seeds of a study that have begun, by seed and in their order."""
    folders = [path for path in workdir.glob("seed_*") if SEED_NAME.fullmatch(path.name)]
    return dict(sorted((int(path.name.removeprefix("seed_")), path) for path in folders))


def read_record(folder: Path) -> tuple[dict[str, Any], SeedOutcome]:
    """Reads the record in the folder of a seed; raises InputError if there is none.

    Returns:
        (the options that the results depend on, the outcome).
    """
    path = folder / FILE
    content = read_json(path, expected="the record of a seed")
    options = content.pop("options", None)
    names = {field.name for field in dataclasses.fields(SeedOutcome)}
    is_record = isinstance(options, dict) and content.keys() == names
    if is_record:
        outcome = SeedOutcome(**content)
        texts = [outcome.stopped, *outcome.finished] if isinstance(outcome.finished, list) else []
        flags = (outcome.in_training, outcome.pooled)
        is_record = bool(texts) and all(isinstance(text, str) for text in texts)
        is_record = is_record and all(isinstance(flag, bool) for flag in flags)
    if not is_record:
        raise InputError(f"{path}: not the record of a seed; run the seed again")
    return options, outcome
