"""Finds models, and downloads them from the hub with the user's own login.

A model is named by a directory or a repository id.
"""

import re
from pathlib import Path

import huggingface_hub

from conversion.containment import require_contained
from conversion.mistaken import describe_file
from sarm_jax.io.errors import InputError

CONFIG_FILES = ("config.json", "sarm_jax.json")
TOKENIZER_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)


def locate(src: str | Path, patterns: tuple[str, ...] = MODEL_FILES) -> Path:
    """Returns the directory itself, or the local snapshot of a repository.

    Args:
        src: a directory or a repository id.
        patterns: the files of the repository to download.

    Raises:
        InputError: `src` is neither, or the download fails. The message explains how to get the
            model by hand.
    """
    path, name = Path(src), str(src)
    if not name:
        raise InputError("no model is named: give a directory or a repository id")
    if path.is_dir():
        require_contained(path)
        return path
    if path.exists():
        raise InputError(f"{src}: {describe_file(path)}")
    if not is_repository(name):
        raise InputError(f"{src}: no such directory, and not a repository id (owner/name)")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=list(patterns), ignore_patterns=["*/*"]
            )
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{src}: no such directory, and the repository cannot be downloaded ({reason}); on a "
            f"machine with access run `hf auth login` and `hf download {src} --local-dir DIR`, "
            "then name DIR, or first convert it: "
            "python -m conversion.from_hf --kind=policy|sarm --src=DIR --dst=CONVERTED"
        ) from error


def is_repository(name: str) -> bool:
    """Returns True if a name can be a repository id, owner/name, and is not a local path."""
    pattern = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
    return not Path(name).exists() and bool(re.fullmatch(pattern, name))
