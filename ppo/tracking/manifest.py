"""The manifest of a checkpoint: an Orbax item with the SHA-256 of all its files.

Orbax writes a checkpoint completely or not at all, but only some of its files have checksums. The
manifest covers every file of every item. It is written after the other items are complete and
before Orbax renames the checkpoint to its final name, so every checkpoint has one. It does not
cover Orbax's own records of a step (times, names of handlers), from which nothing is restored.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import open_file, read_bytes, sync_to_disk

ITEM = "manifest"
NAME = "sha256.json"


class DamagedCheckpointError(Exception):
    """A checkpoint differs from what was written; the message names the file and the damage."""


class ManifestHandler(ocp.CheckpointHandler):
    """Writes the hashes of the other items, and syncs everything to disk."""

    def save(self, directory: Any, args: Any) -> None:
        """Does nothing, since the other items are not complete yet."""

    def restore(self, directory: Any, args: Any = None) -> dict[str, str]:
        """Returns {path: SHA-256}."""
        return json.loads((Path(directory) / NAME).read_text(encoding="utf-8"))

    def finalize(self, directory: Any) -> None:
        """Writes the manifest; Orbax finalizes one item after the other, this one last."""
        own, step = Path(directory), Path(directory).parent
        unfinished = [p.name for p in step.iterdir() if "-tmp" in p.name and p != own]
        if unfinished:
            raise RuntimeError(f"{unfinished[0]} must be complete before the manifest is written")
        files = [path for path in sorted(step.glob("*/**/*")) if own not in path.parents]
        hashes = {str(p.relative_to(step)): _hash(p) for p in files if p.is_file()}
        with (own / NAME).open("w", encoding="utf-8") as file:
            json.dump(hashes, file, indent=1)
        for path in (*files, own / NAME, own, step):
            sync_to_disk(path)


@ocp.args.register_with_handler(ManifestHandler, for_save=True, for_restore=True)
class ManifestArgs(ocp.args.CheckpointArgs):
    """Arguments of the manifest, which has none."""


def check_manifest(step: Path) -> None:
    """Raises DamagedCheckpointError unless the files of `step` are those that were written."""
    path = step / ITEM / NAME
    if not path.exists():
        raise DamagedCheckpointError(f"{ITEM}/{NAME} is missing")
    try:
        hashes = json.loads(read_bytes(path))
        items = sorted(hashes.items())
    except (ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{ITEM}/{NAME} cannot be read ({error})") from None
    for name, expected in items:
        try:
            actual = _hash(step / name)
        except (InputError, OSError) as error:
            raise DamagedCheckpointError(str(error)) from None
        if actual != expected:
            raise DamagedCheckpointError(f"{name} has another SHA-256 than when it was written")


def _hash(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
