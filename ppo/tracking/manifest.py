"""What a checkpoint must consist of: the SHA-256 of its files, as one more Orbax item.

Orbax makes a checkpoint appear whole or not at all, and some of its files carry checksums. The
manifest covers every file of every item. It is written when the other items are complete and
before Orbax renames the checkpoint to its final name, so there is no checkpoint without one. Only
Orbax's own records of a step (times, names of handlers) are outside: nothing is restored from them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from sarm_jax.io.files import to_disk

ITEM = "manifest"
NAME = "sha256.json"


class DamagedCheckpointError(Exception):
    """A checkpoint is not what was written; the message names the file and what is wrong."""


class ManifestHandler(ocp.CheckpointHandler):
    """Brings the items beside its own to disk, and writes their hashes."""

    def save(self, directory: Any, args: Any) -> None:
        """Nothing: the other items are not complete yet."""

    def restore(self, directory: Any, args: Any = None) -> dict[str, str]:
        """{path: hash}."""
        return json.loads((Path(directory) / NAME).read_text(encoding="utf-8"))

    def finalize(self, directory: Any) -> None:
        """Called by Orbax for one item after the other, for this one last."""
        own, step = Path(directory), Path(directory).parent
        unfinished = [p.name for p in step.iterdir() if "-tmp" in p.name and p != own]
        if unfinished:
            raise RuntimeError(f"{unfinished[0]} is to be complete before the manifest is")
        files = [path for path in sorted(step.glob("*/**/*")) if own not in path.parents]
        hashes = {str(p.relative_to(step)): _hash(p) for p in files if p.is_file()}
        with (own / NAME).open("w", encoding="utf-8") as file:
            json.dump(hashes, file, indent=1)
        for path in (*files, own / NAME, own, step):
            to_disk(path)


@ocp.args.register_with_handler(ManifestHandler, for_save=True, for_restore=True)
class ManifestArgs(ocp.args.CheckpointArgs):
    """The manifest takes no arguments."""


def check_manifest(step: Path) -> None:
    """Raises DamagedCheckpointError unless the files of `step` are those that were written."""
    path = step / ITEM / NAME
    try:
        hashes = json.loads(path.read_bytes())
        items = sorted(hashes.items())
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{ITEM}/{NAME} is missing") from None
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{ITEM}/{NAME} cannot be read ({error})") from None
    for name, expected in items:
        try:
            found = _hash(step / name)
        except OSError as error:
            raise DamagedCheckpointError(f"{name} cannot be read ({error.strerror})") from None
        if found != expected:
            raise DamagedCheckpointError(f"{name} has another SHA-256 than when it was written")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
