"""Output directories that appear complete or not at all, and the tokenizer files in them."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from conversion.scratch import OLD, check_space, clear_leftovers
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_target, locked, sync_to_disk
from sarm_jax.io.json_files import read_json
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
    """Yields an empty directory beside `dst` that becomes `dst` on success.

    On failure it is removed. If the process is killed, `dst` is as before or complete, and the next
    call removes what is left over.

    Args:
        dst: the directory to write.
        replace: exchange an existing directory for the new one.
        needed: bytes that must be free on the disk.

    Raises:
        InputError: `dst` is a file, or a directory that is not empty while `replace` is false; it
            cannot be written; or fewer than `needed` bytes are free.
    """
    dst = Path(dst)
    if dst.is_symlink() and dst.is_dir():
        dst = dst.resolve()  # the directory itself is exchanged
    check_directory(dst)
    clear_leftovers(dst)
    taken = dst.exists() and not (dst.is_dir() and not any(dst.iterdir()))
    if taken and not (replace and dst.is_dir()):
        raise InputError(f"{dst}: exists already; name a new directory or remove it first")
    check_space(dst, needed)
    temporary = dst.parent / f".{dst.name}.{secrets.token_hex(4)}"
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{dst}: cannot be written ({reason})") from error
    # After the rename to `dst` the cleanup finds nothing to remove.
    with locked(temporary), cleaning_up(partial(shutil.rmtree, temporary, ignore_errors=True)):
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # of the umask; safetensors writes private files
        for file in temporary.iterdir():
            file.chmod(mode)
            sync_to_disk(file)
        sync_to_disk(temporary)
        _exchange(temporary, dst, replace)
        sync_to_disk(dst.parent)


def check_directory(dst: Path) -> None:
    """Raises InputError if no directory can be renamed to `dst`, whether it is there or not."""
    if not dst.name or dst.name == "..":
        raise InputError(f"{dst}: name a new directory, such as {dst / 'model'}")
    if dst.is_mount():
        raise InputError(f"{dst}: a mount point cannot be exchanged; name a new directory in it")
    if not dst.is_file():  # the message on a file says that it exists
        check_target(dst, folder=True)


def tokenizer_bytes(src: Path) -> int:
    """Returns the number of bytes that `copy_tokenizer_files` copies."""
    return sum((src / name).stat().st_size for name in TOKENIZER_FILES if (src / name).is_file())


def copy_tokenizer_files(src: Path, dst: Path) -> None:
    """Copies the `TOKENIZER_FILES` that exist, which include generation_config.json."""
    for name in TOKENIZER_FILES:
        if (src / name).is_file():
            shutil.copyfile(src / name, dst / name)


def write_hf_json(path: Path, fields: dict[str, Any]) -> None:
    """Writes a JSON file as the Hugging Face libraries do: UTF-8 text that ends in a newline.

    The file belongs in a directory that is not complete yet, see `atomic_directory`.
    """
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Writes a tokenizer's files for transformers 4 and 5."""
    tokenizer.save_pretrained(directory)
    make_portable(directory)


def make_portable(directory: Path) -> None:
    """Rewrites a directory's tokenizer files so that transformers 4 and 5 build our tokenizer.

    Our tokenizer is tokenizer.json as it is. The template of chat_template.jinja, which
    transformers 4.46 does not read, is copied into tokenizer_config.json. The class and the fields
    that only transformers 5 knows are renamed.
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
    write_hf_json(path, fields | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_merges_as_texts(path: Path) -> None:
    """Writes the merges of tokenizer.json as "a b", since tokenizers before 0.20 reads no pairs."""
    fields = read_json(path)
    model = fields.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        return
    for pair in model["merges"]:
        if not (isinstance(pair, list) and len(pair) == 2):
            return  # it is a text already
        if any(not isinstance(token, str) or " " in token for token in pair):
            return  # in a text, the end of the first token would be ambiguous
        if pair[0].startswith("#version"):
            return  # a reader skips a text that starts like this
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    write_hf_json(path, fields)


def _exchange(new: Path, dst: Path, replace: bool) -> None:
    """Renames `new` to `dst`; with `replace`, removes the directory that was there.

    Raises:
        InputError: another process has written `dst` meanwhile.
    """
    if not (replace and dst.exists() and any(dst.iterdir())):
        try:
            new.rename(dst)  # POSIX replaces an empty directory
        except OSError as error:
            raise InputError(f"{dst}: cannot be written ({error.strerror})") from error
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
