"""Record what the stages of a working directory were made from: stages.json.

A stage is up to date if it finished, its last file is there, and neither its options nor the files
that it reads have changed since. Files count by their content; those above 64 MiB (weights) count
by their size and by pieces spread over them. A model on the hub counts by its name.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pipeline.stage import Stage
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import disk_is_full
from sarm_jax.io.json_files import parse_json, write_json
from sarm_jax.io.workdir import first_difference, has_settings, save_settings

FILE = "stages.json"
# Options that did not exist from the start, with the value that stands for what was done before:
# records that lack them are taken to have it.
DEFAULTS = {"ppo": {"long_prompts": "error"}}
LARGE, PIECE, PIECES = 64 << 20, 1 << 20, 16  # bytes, bytes, and number of pieces of a large file


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The options by field, and the digests of the inputs by path, that a result depends on."""

    options: dict[str, Any]
    inputs: dict[str, str]


def provenance(stage: Stage, config: ConfigDict, workdir: Path) -> Provenance:
    """Returns what a stage's result would depend on now.

    What the stage itself writes is none of its inputs.
    """
    files = [file for item in stage.inputs for file in item.files(config, workdir)]
    files += [file for pattern in stage.own_inputs for file in workdir.glob(pattern)]
    output = stage.output_path(config, workdir).absolute()
    read = [f for f in files if f.is_file() and not f.absolute().is_relative_to(output)]
    return Provenance(stage.recorded_options(config, workdir), digests(read))


def digests(files: Iterable[Path]) -> dict[str, str]:
    """Returns the digest of each file by its path."""
    return {str(file): _digest(file) for file in files}


def change(before: Mapping[str, Any], now: Provenance) -> str | None:
    """Describes what differs from a recorded {options, inputs}; None if nothing does."""
    options = json.loads(json.dumps(now.options))
    changed = first_difference(before["options"], options, defaults=DEFAULTS)
    if changed:
        return changed
    for path in sorted(before["inputs"].keys() | now.inputs.keys()):
        if before["inputs"].get(path) != now.inputs.get(path):
            return f"{path} has changed"
    return None


def check_claim(stage: Stage, config: ConfigDict, workdir: Path) -> None:
    """Raises InputError if config.json says that the working directory has another run."""
    has_settings(workdir, stage.recorded_options(config, workdir), DEFAULTS)


def claim_workdir(stage: Stage, config: ConfigDict, workdir: Path) -> None:
    """Writes config.json, unless this run has claimed the working directory already."""
    save_settings(workdir, stage.recorded_options(config, workdir), DEFAULTS)


class Records:
    """The records of the stages of a working directory, in stages.json."""

    def __init__(self, workdir: Path):
        self.path = workdir / FILE
        self.stages = self._read()

    def _read(self) -> dict[str, dict]:
        try:
            text = self.path.read_text(encoding="utf-8")
            stages = parse_json(text, allow_nan=True, allow_surrogates=True)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(f"{self.path}: not JSON ({error}); delete it") from None
        is_record = isinstance(stages, dict) and all(
            isinstance(s, dict) and {"options", "inputs", "finished"} <= s.keys()
            for s in stages.values()
        )
        if not is_record:
            raise InputError(f"{self.path}: not a record of stages; delete it")
        return stages

    def difference(self, stage: str, made_from: Provenance) -> str | None:
        """Describes what changed since the stage ran; None if nothing did, or if it never ran."""
        if stage not in self.stages:
            return None
        return change(self.stages[stage], made_from)

    def stale(self, stage: str, made_from: Provenance, option: str) -> str | None:
        """Describes how `option` or an input file changed since the stage last ran, or None."""
        if stage not in self.stages:
            return None
        before, read = self.stages[stage]["options"].get(option), self.stages[stage]["inputs"]
        now = made_from.options[option]
        if before != now:
            return f"{option} was {before!r} and is {now!r}"
        for path, digest in sorted(made_from.inputs.items()):
            if read.get(path, digest) != digest:
                return f"{path} has changed"
        return None

    def finished(self, stage: str) -> bool:
        """Returns whether the stage's last call finished."""
        return bool(self.stages.get(stage, {}).get("finished"))

    @contextlib.contextmanager
    def recording(self, stage: str, made_from: Provenance) -> Iterator[None]:
        """Records that the stage runs and then that it finished; nothing if it was refused."""
        before, start = self.stages.get(stage), time.monotonic()
        entry: dict[str, Any] = dataclasses.asdict(made_from) | {"finished": None}
        self._note(stage, entry)
        try:
            yield
        except (InputError, OSError) as error:
            if not disk_is_full(error):  # a full disk may have left half of an output
                self._note(stage, before)
            raise
        entry["seconds"] = round(time.monotonic() - start, 1)
        entry["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._note(stage, entry)

    def _note(self, stage: str, entry: dict[str, Any] | None) -> None:
        """Replaces one stage's entry; keeps those of stages that run at the same time."""
        self.stages = self._read()
        if entry is None:
            self.stages.pop(stage, None)
        else:
            self.stages[stage] = entry
        if not self.stages:
            self.path.unlink(missing_ok=True)
            return
        write_json(self.path, self.stages)


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for piece in range(PIECES):  # the first and the last are among them
            file.seek(piece * (size - PIECE) // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()
