"""Files of a model directory stay in it: no link leads anywhere else.

Who downloads a directory does not look at its links, and what they point to would be read, and
copied into what is written and shared. The hub's own cache is the exception: a snapshot's files are
links to the blobs of the same repository.
"""

from pathlib import Path

from sarm_jax.io.errors import InputError


def contained(directory: Path, name: str) -> Path:
    """The path of a file of `directory`.

    Raises:
      InputError: the name, or a link that it is, leads out of the directory.
    """
    path, root = directory / name, directory.resolve()
    places = [root]
    if root.parent.name == "snapshots":
        places.append(root.parent.parent / "blobs")
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a byte 0
        raise InputError(f"{path}: cannot be followed ({error})") from error
    if not any(real.is_relative_to(place) for place in places):
        raise InputError(
            f"{path}: leads out of its directory, to {real}; copy the file into the directory if "
            "you trust it"
        )
    return path


def require_contained(directory: Path) -> None:
    """Raises InputError if any link in the directory leads out of it."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink():
            contained(directory, path.name)
