"""Refuses links that lead out of a model directory.

A user who downloads a directory does not look at its links. The files that they point to would be
read, and copied into a directory that may be shared. The hub's own cache is the exception: the
files of a snapshot are links to the blobs of the same repository.
"""

from pathlib import Path

from sarm_jax.io.errors import InputError


def contained(directory: Path, name: str) -> Path:
    """Returns the path of the file `name` in `directory`.

    Raises:
        InputError: the name, or the link of this name, leads out of the directory.
    """
    path, root = directory / name, directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a zero byte
        raise InputError(f"{path}: cannot be followed ({error})") from error
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise InputError(
            f"{path}: leads out of its directory, to {target}; copy the file into the directory if "
            "you trust it"
        )
    return path


def require_contained(directory: Path) -> None:
    """Raises InputError if any link in the directory leads out of it."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink():
            contained(directory, path.name)
