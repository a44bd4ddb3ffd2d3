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

from pipeline.changes import Provenance, change, input_change
from pipeline.stage import RECORDS, Stage
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import disk_is_full, locked_output, open_file, read_bytes
from sarm_jax.io.json_files import parse_json, write_json
from sarm_jax.io.workdir import VERSION_KEY, read_settings
from sarm_jax.parallel import processes
from sarm_jax.version import VERSION

LARGE, PIECE, PIECES = 64 << 20, 1 << 20, 16  # bytes, bytes, and number of pieces of a large file


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


def check_claim(
    stage: Stage, config: ConfigDict, workdir: Path, recorded: Mapping[str, str] | None = None
) -> None:
    """Checks that config.json says that the working directory has this run, or that it has none.

    Args:
        stage: the stage that makes the run.
        config: its config.
        workdir: the working directory.
        recorded: digests of the files that the run has read, by path; by default those of
            stages.json.

    Raises:
        InputError: the working directory has another run.
    """
    stored = _claim(stage, config, workdir)
    if stored is None:
        return
    if recorded is None:
        recorded = Records(workdir).stages.get(stage.name, {}).get("inputs", {})
    before = {"options": stored, "inputs": recorded}
    now = Provenance(stage.recorded_options(config, workdir), {})
    if stored == json.loads(json.dumps(now.options)):
        return  # whether the files are the same as well is compared with stages.json
    changed = change(stage, before, provenance(stage, config, workdir), continuing=True)
    if changed:
        raise InputError(
            f"--workdir={workdir} holds a run of another configuration: {changed}; "
            "choose another --workdir, or delete it to start again"
        )


def claim_workdir(stage: Stage, config: ConfigDict, workdir: Path) -> None:
    """Writes config.json with the options of this run, which the directory then belongs to.

    The version of this software that started the run stays in it. `check_claim` comes first.
    """
    has_run = _claim(stage, config, workdir) is not None
    stored = (read_settings(workdir) or {}) if has_run else {}
    version = {VERSION_KEY: stored.get(VERSION_KEY, VERSION)}
    settings = version | stage.recorded_options(config, workdir)
    if stored != json.loads(json.dumps(settings)):
        write_json(workdir / "config.json", settings)


def _claim(stage: Stage, config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Returns the options of the run that has the working directory; None if none has it.

    A run that ended before its first step has left nothing to protect, and does not count.
    """
    stored = read_settings(workdir)
    if stored is None:
        return None
    if VERSION_KEY in stored and not stage.has_begun(config, workdir):
        return None
    return {name: value for name, value in stored.items() if name != VERSION_KEY}


def check_same_everywhere(stage: Stage, config: ConfigDict, workdir: Path) -> None:
    """Ends all processes if one refuses its input, or has other options or files than process 0.

    Every process of a run calls it once it has checked its input, before it communicates. A single
    process does nothing.

    Raises:
        InputError: in every process, if one has a problem or differs.
    """
    if not processes.connected():
        return
    with processes.raising_on_all():
        made_from = provenance(stage, config, workdir)
    first = processes.broadcast(dataclasses.asdict(made_from))
    changed = change(stage, first, made_from)
    processes.raise_on_all(f"not what process 0 has: {changed}" if changed else "")


class Records:
    """The records of the stages of a working directory, in stages.json."""

    def __init__(self, workdir: Path):
        self.path = workdir / RECORDS
        self.stages = self._read()

    def _read(self) -> dict[str, dict]:
        if not self.path.exists():
            return {}
        try:
            text = read_bytes(self.path).decode("utf-8")
            stages = parse_json(text, allow_nan=True, allow_surrogates=True)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{self.path}: not JSON ({error}); delete it") from None
        is_record = isinstance(stages, dict) and all(
            isinstance(s, dict) and {"options", "inputs", "finished"} <= s.keys()
            for s in stages.values()
        )
        if not is_record:
            raise InputError(f"{self.path}: not a record of stages; delete it")
        return stages

    def difference(
        self, stage: Stage, made_from: Provenance, continuing: bool = False
    ) -> str | None:
        """Describes what changed since the stage ran; None if nothing did, or if it never ran.

        `continuing` is as in `change`.
        """
        if stage.name not in self.stages:
            return None
        return change(stage, self.stages[stage.name], made_from, continuing)

    def stale(self, stage: Stage, made_from: Provenance, option: str) -> str | None:
        """Describes how the input `option` or a file changed since the stage last ran, or None."""
        if stage.name not in self.stages:
            return None
        return input_change(stage, self.stages[stage.name], made_from, option)

    def finished(self, stage: str) -> bool:
        """Returns whether the stage's last call finished."""
        return bool(self.stages.get(stage, {}).get("finished"))

    @contextlib.contextmanager
    def recording(self, stage: str, made_from: Provenance) -> Iterator[None]:
        """Records that the stage runs and then that it finished; nothing if it was refused."""
        self.stages = self._read()
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
        with locked_output(self.path, wait=True):
            self.stages = self._read()
            if entry is None:
                self.stages.pop(stage, None)
            else:
                self.stages[stage] = entry
            if self.stages:
                write_json(self.path, self.stages)
            else:
                self.path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with open_file(path) as file:
        if size <= LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for piece in range(PIECES):  # the first and the last are among them
            file.seek(piece * (size - PIECE) // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()
