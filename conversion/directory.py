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
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import locked, to_disk
from sarm_jax.io.signals import cleaning_up

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
    """Writes a tokenizer's files, for transformers 4 and 5."""
    tokenizer.save_pretrained(directory)
    make_portable(directory)


def make_portable(directory: Path) -> None:
    """Rewrites a directory's tokenizer files so that transformers 4 and 5 build our tokenizer.

    That is tokenizer.json as it is, with the template of chat_template.jinja, which transformers
    4.46 does not read. The class and the fields that only transformers 5 knows are renamed.
    """
    path, template = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    if not (directory / "tokenizer.json").is_file():
        return
    _write_merges_as_texts(directory / "tokenizer.json")
    fields = read_json(path) if path.is_file() else {}
    for name in ("backend", "is_local", "local_files_only", "auto_map"):
        fields.pop(name, None)
    if isinstance(fields.get("extra_special_tokens"), list):
        tokens = fields.pop("extra_special_tokens")
        if not fields.get("additional_special_tokens"):
            fields["additional_special_tokens"] = tokens
    if template.is_file():
        fields["chat_template"] = template.read_text(encoding="utf-8")
    fields.setdefault("clean_up_tokenization_spaces", False)
    write_json(path, fields | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_merges_as_texts(path: Path) -> None:
    """Writes the merges of a tokenizer.json as "a b": tokenizers before 0.20 reads no pairs."""
    fields = read_json(path)
    model = fields.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        return
    for pair in model["merges"]:
        if not (isinstance(pair, list) and len(pair) == 2):
            return  # a text already
        if any(not isinstance(part, str) or " " in part for part in pair):
            return  # a text would not say where the first part ends
        if pair[0].startswith("#version"):
            return  # a text that starts like this is skipped
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    write_json(path, fields)


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
