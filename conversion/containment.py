"""Refuses links that lead out of a model directory, and pipes and devices in it.

A user who downloads a directory does not look at its links. The files that they point to would be
read, and copied into a directory that may be shared. The hub's own cache is the exception: the
files of a snapshot are links to the blobs of the same repository.

The libraries that read a model open its files by their paths, and would wait at a pipe for ever.
"""

from pathlib import Path

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_file

FILES = (".json", ".jinja", ".safetensors", ".model", ".txt")  # suffixes of what is read by path
TEMPLATES = "additional_chat_templates"  # the only folder in which the tokenizer's files may lie


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
    """Checks the entries of a model directory before any of them is opened.

    Raises:
        InputError: a link leads out of the directory, or what has the name of a file is none.
    """
    for name in sorted(_names(directory)):
        path = contained(directory, name) if (directory / name).is_symlink() else directory / name
        if path.suffix in FILES and path.is_symlink() and not path.exists():
            raise InputError(f"{path}: is a link to nothing")
        if path.suffix in FILES and path.exists():
            check_file(path)


def _names(directory: Path) -> list[str]:
    """Lists the entries of the directory and of its folder of templates."""
    names = [path.name for path in directory.iterdir()]
    if TEMPLATES in names and (directory / TEMPLATES).is_dir():
        names += [f"{TEMPLATES}/{path.name}" for path in (directory / TEMPLATES).iterdir()]
    return names
