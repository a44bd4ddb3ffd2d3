"""Output directories that appear complete or not at all, and the tokenizer files in them."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from conversion.json_files import read_json, write_json
from conversion.scratch import OLD, check_space, clear_leftovers
from sarm_jax.errors import InputError
from sarm_jax.files import locked, to_disk
from sarm_jax.signals import cleaning_up

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


@contextlib.contextmanager
def atomic_directory(dst: str | Path, replace: bool = False, needed: int = 0) -> Iterator[Path]:
    """Yields an empty sibling of `dst` that becomes `dst` on success and is removed on failure.

    After a kill, `dst` is what it was before or complete; the next call removes the rest.

    Raises:
      InputError: `dst` exists, is not an empty directory, and `replace` is false (with it, an
        existing directory is exchanged for the new one); its parent cannot be written to; or
        fewer than `needed` bytes are free.
    """
    dst = Path(dst)
    clear_leftovers(dst)
    taken = dst.exists() and not (dst.is_dir() and not any(dst.iterdir()))
    if taken and not (replace and dst.is_dir()):
        raise InputError(f"{dst}: exists already; name a new directory or remove it first")
    check_space(dst, needed)
    temporary = dst.parent / f".{dst.name}.{secrets.token_hex(4)}"
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"{dst}: cannot be written ({error.strerror})") from error
    # Once it has become `dst` there is nothing to remove.
    with locked(temporary), cleaning_up(partial(shutil.rmtree, temporary, ignore_errors=True)):
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # the umask's; safetensors writes private files
        for file in temporary.iterdir():
            file.chmod(mode)
            to_disk(file)
        to_disk(temporary)
        _exchange(temporary, dst)
        to_disk(dst.parent)


def tokenizer_bytes(src: Path) -> int:
    """How much `copy_tokenizer_files` copies."""
    return sum((src / name).stat().st_size for name in TOKENIZER_FILES if (src / name).is_file())


def copy_tokenizer_files(src: Path, dst: Path) -> None:
    """Copies those of `TOKENIZER_FILES` that exist; generation_config.json counts as one."""
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Its files, for every version of transformers: older ones do not know the class's new name."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _exchange(new: Path, dst: Path) -> None:
    if not (dst.exists() and any(dst.iterdir())):
        new.rename(dst)  # POSIX: an empty directory is replaced
        return
    old = new.with_name(new.name + OLD)
    with locked(dst):
        dst.rename(old)
        try:
            new.rename(dst)
        except OSError:
            old.rename(dst)
            raise
        shutil.rmtree(old)
