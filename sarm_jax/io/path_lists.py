r"""Lists of paths in options: entries between commas, some of them NAME=DIR or @FILE:key[:n].

A backslash takes the comma, "=", ":", "@", bracket, blank or backslash behind it as part of a path:
`runs/lr\=0.1` is a folder with "=" in its name. Before any other character a backslash is a
character like all others. `escaped` writes a path like this, so a path that the program puts into a
list comes out as it was, whatever its name.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from sarm_jax.io.errors import InputError

SIGNS = r",=:@\[\]\\\s"
# While a text is split, an escaped sign is a character of a private use area of Unicode.
PRIVATE = 0x100000
SEVERAL = re.compile(r"@(.+):([^:\[\]]+?)(?:\[:(\d+)\])?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ListInFile:
    """An entry "@FILE:key" or "@FILE:key[:n]": the list under a key, or its first n entries.

    `count` is the text of n, which may be no number that fits anywhere; None: all entries.
    """

    path: str
    key: str
    count: str | None

    def __str__(self) -> str:
        count = "" if self.count is None else f"[:{self.count}]"
        return f"@{escaped(self.path)}:{self.key}{count}"


def escaped(path: str) -> str:
    """Writes a path, or a part of one, so that every list takes it as it is."""
    return re.sub(r"[,=:@\[\]\\]|^\s+|\s+$", lambda m: "".join("\\" + c for c in m[0]), path)


def split_entries(text: str) -> list[str]:
    """Splits a list at its commas; the entries keep their escapes. An empty text has none."""
    hidden = _hide(text)
    if not hidden.strip():
        return []
    return [_escape_again(entry.strip()) for entry in hidden.split(",")]


def unescaped(entry: str) -> str:
    """Returns the path that an entry without a name stands for."""
    return _show(_hide(entry))


def split_paths(text: str) -> tuple[str, ...]:
    """Splits comma-separated paths.

    Raises:
        InputError: one of them is empty.
    """
    paths = tuple(unescaped(entry) for entry in split_entries(text) or [""])
    if not all(paths):
        raise InputError(f"found {text!r}, expected file names with commas between them")
    return paths


def split_name(entry: str) -> tuple[str, str]:
    """Splits PATH or NAME=PATH into (name or "", path).

    A path may contain "=" without an escape, too: the first split whose path exists is taken, or
    else the last one whose name has no slash.
    """
    hidden = _hide(entry)
    signs = [i for i, character in enumerate(hidden) if character == "="]
    named = [(hidden[:i].strip(), hidden[i + 1 :].strip()) for i in signs]
    splits = [(_show(name), _show(path)) for name, path in [("", hidden), *named]]
    for name, path in splits:
        if path and Path(path).exists():
            return name, path
    return [split for split in splits if "/" not in split[0]][-1]


def named_paths(text: str, option: str, what: str) -> list[tuple[str, str]]:
    """Splits a list of PATH or NAME=PATH into (name or "", path).

    Args:
        text: the list.
        option: the option's name, for messages.
        what: DIR or FILE, for messages.

    Raises:
        InputError: an entry has no path, or an empty name.
    """
    return [named_path(entry, option, what) for entry in split_entries(text)]


def named_path(entry: str, option: str, what: str) -> tuple[str, str]:
    """Splits one entry, as `named_paths` does."""
    name, path = split_name(entry)
    if not path or (not name and entry.startswith("=")):
        raise InputError(f"{option}: found {entry!r}, expected {what} or NAME={what}")
    return name, path


def list_entries(option: str, text: str) -> list[str | ListInFile]:
    """Splits a list of values, some of which are lists in files.

    Raises:
        InputError: an entry begins with "@" and is not of the form "@FILE:key[:n]".
    """
    return [_list_entry(option, entry) for entry in split_entries(text)]


def relocated(text: str, locate: Callable[[str], str]) -> str:
    """Returns a list of values with `locate(path)` for the path of each list in a file."""
    entries = [
        dataclasses.replace(entry, path=locate(entry.path))
        if isinstance(entry, ListInFile)
        else entry
        for entry in list_entries("", text)
    ]
    return ",".join(map(str, entries))


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Names each file by its stem, with as many folders as tell it from the others."""
    bare = {path: Path(path).with_suffix("") for path in paths}
    depth = max((len(path.parts) for path in bare.values()), default=0)
    for count in range(1, depth + 1):
        names = {path: "/".join(short.parts[-count:]) for path, short in bare.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: path for path in paths}


def _list_entry(option: str, entry: str) -> str | ListInFile:
    hidden = _hide(entry)
    if not hidden.startswith("@"):
        return _show(hidden)
    match = SEVERAL.fullmatch(hidden)
    if not match:
        raise InputError(f"{option}={entry}: expected @FILE:key or @FILE:key[:n]")
    return ListInFile(_show(match[1]), _show(match[2]), match[3])


def _hide(text: str) -> str:
    return re.sub(rf"\\([{SIGNS}])", lambda match: chr(PRIVATE + ord(match[1])), text)


def _show(hidden: str) -> str:
    return _private(hidden, "")


def _escape_again(hidden: str) -> str:
    return _private(hidden, "\\")


def _private(hidden: str, before: str) -> str:
    """Returns the text with `before` and the sign for each private character."""
    limit = PRIVATE + 0x3001  # behind the last blank of Unicode
    return "".join(
        before + chr(ord(c) - PRIVATE) if PRIVATE <= ord(c) < limit else c for c in hidden
    )
