"""What the stages of a working directory were made from: stages.json.

A stage is up to date where it finished, its last file is there, and neither its options nor the
files that they name have changed since. Files count by their content, those above 64 MiB (weights)
by size and pieces spread over them. A model on the hub counts by its name.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pipeline.shared import plain
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import disk_is_full, replacing
from sarm_jax.io.strict_json import parse_json
from sarm_jax.io.workdir import first_difference

FILE = "stages.json"
# What was done before an option existed: records without it are taken to have this value.
DEFAULTS = {"ppo": {"long_prompts": "error"}}
ADAPTER = "adapter/adapter_config.json"  # what the stage train writes last
TRAIN_SETTINGS = (
    "policy_model sarm_model prompts_jsonl eval_prompts_jsonl dtype remat sarm_max_length "
    "lora ppo reward discriminator"
).split()
LARGE, PIECE, PIECES = 64 << 20, 1 << 20, 16  # bytes, bytes, and how many of a large file


@dataclasses.dataclass(frozen=True)
class Provenance:
    """`options` by field, `inputs` a digest by path."""

    options: dict[str, Any]
    inputs: dict[str, str]


def provenance(
    options: dict[str, Any], run_files: tuple[str, ...] = (), output: Path | None = None
) -> Provenance:
    """The options with digests of all existing files that they name, folders included.

    Of a folder with a run in it only `run_files` count; what the stage itself writes, `output`,
    is none of its inputs.
    """
    found: dict[str, str] = {}
    for text in _strings(options):
        for path in _paths(text):
            if output and path.absolute().is_relative_to(output.absolute()):
                continue
            files = [path] if path.is_file() else _files_in(path, run_files)
            found |= {str(file): _digest(file) for file in files}
    return Provenance(options, found)


def change(before: Mapping[str, Any], now: Provenance) -> str | None:
    """What differs from a recorded {options, inputs}, in words; None: nothing."""
    options = json.loads(json.dumps(now.options))
    changed = first_difference(before["options"], options, defaults=DEFAULTS)
    if changed:
        return changed
    for path in sorted(before["inputs"].keys() | now.inputs.keys()):
        if before["inputs"].get(path) != now.inputs.get(path):
            return f"{path} has changed"
    return None


def train_settings(config: ConfigDict) -> dict:
    """What a run in a working directory must not differ in."""
    return {name: plain(config[name]) for name in TRAIN_SETTINGS}


class Records:
    """stages.json of a working directory."""

    def __init__(self, workdir: Path):
        self.path = workdir / FILE
        self.stages = self._read()

    def _read(self) -> dict[str, dict]:
        try:
            stages = parse_json(
                self.path.read_text(encoding="utf-8"), constants=True, unicode=False
            )
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise InputError(f"{self.path}: not JSON ({error}); delete it") from None
        whole = isinstance(stages, dict) and all(
            isinstance(s, dict) and {"options", "inputs", "finished"} <= s.keys()
            for s in stages.values()
        )
        if not whole:
            raise InputError(f"{self.path}: not a record of stages; delete it")
        return stages

    def difference(self, stage: str, made_from: Provenance) -> str | None:
        """What changed since the stage ran, in words; None: nothing, or it never ran."""
        if stage not in self.stages:
            return None
        return change(self.stages[stage], made_from)

    def stale(self, stage: str, made_from: Provenance, option: str) -> str | None:
        """What changed of `option` and of files that the stage read and would read, in words."""
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
        """Whether the stage's last call came to its end."""
        return bool(self.stages.get(stage, {}).get("finished"))

    @contextlib.contextmanager
    def recording(self, stage: str, made_from: Provenance) -> Iterator[None]:
        """Notes that the stage is running, then that it finished, or nothing if it was refused."""
        before, start = self.stages.get(stage), time.monotonic()
        entry: dict[str, Any] = dataclasses.asdict(made_from) | {"finished": None}
        self._note(stage, entry)
        try:
            yield
        except (InputError, OSError) as error:
            if not disk_is_full(error):  # which may leave half an output
                self._note(stage, before)
            raise
        entry["seconds"] = round(time.monotonic() - start, 1)
        entry["finished"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._note(stage, entry)

    def _note(self, stage: str, entry: dict[str, Any] | None) -> None:
        """Exchanges one stage's entry; those of stages that run beside it stay as they are now."""
        self.stages = self._read()
        if entry is None:
            self.stages.pop(stage, None)
        else:
            self.stages[stage] = entry
        if not self.stages:
            self.path.unlink(missing_ok=True)
            return
        with replacing(self.path) as file:
            json.dump(self.stages, file, indent=2)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, str):
        yield value


def _paths(text: str) -> Iterator[Path]:
    """Existing paths in PATH, "A,B", NAME=PATH or "@PATH:key[:n]"."""
    for part in text.split(","):
        name = part.strip()
        if not name:
            continue
        if name.startswith("@"):
            name = name[1:].split(":")[0]
        for candidate in (name, *(name[i + 1 :] for i, sign in enumerate(name) if sign == "=")):
            if _is_path(candidate):
                yield Path(candidate)
                break


def _is_path(name: str) -> bool:
    """Whether it exists; a word, which may be an option's value, must be a model or a run."""
    try:
        path = Path(name)
        if "/" in name or "." in name:
            return path.exists()
        return (path / "config.json").is_file() or any(path.glob("*metrics.csv"))
    except (OSError, ValueError):  # no name that a file can have
        return False


def _files_in(folder: Path, run_files: tuple[str, ...]) -> list[Path]:
    metrics = [glob for glob in run_files if glob.endswith("metrics.csv")] or ["metrics.csv"]
    is_run = any(any(folder.glob(glob)) for glob in metrics) or (folder / "adapter").is_dir()
    found = [p for glob in run_files for p in folder.glob(glob)] if is_run else folder.rglob("*")
    return sorted(path for path in found if path.is_file())


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= LARGE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found = hashlib.sha256(str(size).encode())
        for piece in range(PIECES):
            file.seek(piece * (size - PIECE) // (PIECES - 1))  # the first and the last among them
            found.update(file.read(PIECE))
    return found.hexdigest()
