"""Files of data sets on the Hugging Face hub, downloaded with the user's own login.

    hf://datasets/OWNER/NAME[@REVISION]/PATH    one file; with "*" in PATH, all files that match
    hf://datasets/OWNER/NAME[@REVISION]         the files of its training split

The training split is recognised by the names of files, as the library `datasets` does: "train" or
"training" between other characters than letters. Files without the name of any split count as
training data if there are no others. What is left must be one file, or all shards of one.
"""

import contextlib
import dataclasses
import fnmatch
import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from sarm_jax.io.errors import InputError
from sarm_jax.io.libraries import as_input_error

LOG = logging.getLogger(__name__)
ADDRESS = re.compile(
    r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?"
)
DATA = re.compile(r".+\.(parquet|jsonl|ndjson|json)(\.(gz|zst|zstd))?", re.IGNORECASE)
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json")  # no rows
TRAIN = re.compile(r"(?<![a-z])(train|training)(?![a-z])", re.IGNORECASE)
OTHER_SPLIT = re.compile(
    r"(?<![a-z])(test|testing|eval|evaluation|validation|valid|val|dev)(?![a-z])", re.IGNORECASE
)
PARTIAL = re.compile(r"(?<![a-z])partial-", re.IGNORECASE)  # the hub's conversion was cut off
# train-00000-of-00002.parquet, once with a hash before the suffix; 0000.parquet of a folder
SHARD = re.compile(r"(\d{5})-of-(\d{5})(-[0-9a-f]{16})?(?=\.)|(?<=/)\d{4}(?=\.)")
PROBLEM, ADVICE = "cannot be downloaded", "or give a local file"
MAX_NAMED = 8  # files that a message lists


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A file to read, and the name that messages call it by."""

    path: Path
    name: str


def is_on_hub(source: str | Path) -> bool:
    """Returns True for an address on the hub, False for a path."""
    return str(source).startswith("hf://")


def single_files(source: str | Path) -> list[str]:
    """Returns the path, or the addresses of the single files that an address stands for.

    For formats in which the name of a file says what its rows are.

    Raises:
        InputError: as `local_files`.
    """
    if not is_on_hub(source):
        return [str(source)]
    return [file.name for file in local_files(source)]


def local_files(source: str | Path) -> list[LocalFile]:
    """Returns the file of a path, or the local copies of the files at an address on the hub.

    Without a connection, files are taken from the hub's cache on this machine.

    Raises:
        InputError: `source` is another kind of address, stands for no file or not for one set of
            files, or the download fails.
    """
    if "://" not in str(source):
        return [LocalFile(Path(source), str(source))]
    source = str(source)
    match = ADDRESS.fullmatch(source)
    if not match:
        raise InputError(f"{source}: expected a path or hf://datasets/OWNER/NAME[@REVISION]/PATH")
    repository, revision, path = match.groups()
    if path and "*" not in path:
        with as_input_error(f"{source}: {PROBLEM}", ADVICE):
            copy = huggingface_hub.hf_hub_download(
                repository, path, repo_type="dataset", revision=revision
            )
        return [LocalFile(Path(copy), source)]
    with as_input_error(f"{source}: {PROBLEM}", ADVICE):
        names, are_all = _file_names(repository, revision)
        chosen = matching_files(names, path, source) if path else training_files(names, source)
        if not are_all:
            _check_provable(chosen, source)
        folder = huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset",
            revision=revision,
            allow_patterns=[glob.escape(name) for name in chosen],
        )
    if missing := [name for name in chosen if not (Path(folder) / name).is_file()]:
        raise InputError(f"{source}: not downloaded, and not in the cache: {_listed(missing)}")
    LOG.info("%s: reading %s", source, _listed(chosen))
    base = source.removesuffix(f"/{path}") if path is not None else source
    return [LocalFile(Path(folder) / name, f"{base}/{name}") for name in chosen]


def matching_files(names: Sequence[str], pattern: str, source: str) -> list[str]:
    """Returns the files that match a pattern.

    Raises:
        InputError: there are none, or shards of a set are missing.
    """
    chosen = sorted(fnmatch.filter(names, pattern))
    if not chosen:
        raise InputError(f"{source}: no file matches, found {_listed(names)}")
    _check_shards(chosen, source)
    return chosen


def training_files(names: Sequence[str], source: str) -> list[str]:
    """Returns the data files of the training split, if the names leave no doubt.

    Raises:
        InputError: there is none, there are several sets, or shards are missing. The message lists
            the candidates.
    """
    data = [name for name in sorted(names) if _is_data(name)]
    training = [name for name in data if TRAIN.search(name) and not PARTIAL.search(name)]
    unnamed = [n for n in data if not OTHER_SPLIT.search(n) and not PARTIAL.search(n)]
    chosen = training or (unnamed if len(unnamed) == len(data) else [])
    if not data:
        raise InputError(f"{source}: has no Parquet, JSON or JSON Lines file, name one as .../PATH")
    if not chosen:
        raise InputError(f"{source}: has no training split, name one as .../PATH: {_listed(data)}")
    if len({SHARD.sub("", name) for name in chosen}) > 1:
        raise InputError(
            f"{source}: has more than one set of rows, name a file as .../PATH: {_listed(chosen)}"
        )
    _check_shards(chosen, source)
    return chosen


def _file_names(repository: str, revision: str | None) -> tuple[list[str], bool]:
    """Lists the files of a data set, or those in the cache if there is no connection.

    Returns:
        (the names, False if they are only those in the cache).
    """
    try:
        info = huggingface_hub.HfApi().dataset_info(repository, revision=revision)
    except HfHubHTTPError:  # the hub has answered
        raise
    except Exception:
        if cached := _cached_file_names(repository, revision or "main"):
            return cached, False
        raise
    return [file.rfilename for file in info.siblings or ()], True


def _cached_file_names(repository: str, revision: str) -> list[str]:
    with contextlib.suppress(huggingface_hub.CacheNotFound):
        for cached in huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE).repos:
            if (cached.repo_type, cached.repo_id) != ("dataset", repository):
                continue
            for snapshot in cached.revisions:
                if revision == snapshot.commit_hash or revision in snapshot.refs:
                    folder = snapshot.snapshot_path
                    return [f.file_path.relative_to(folder).as_posix() for f in snapshot.files]
    return []


def _is_data(name: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    base = name.rpartition("/")[2]
    return not hidden and base not in DESCRIPTIONS and bool(DATA.fullmatch(base))


def _check_provable(names: Sequence[str], source: str) -> None:
    """Raises InputError unless the names show that the cache holds all files of the set."""
    unnumbered = [name for name in names if not (match := SHARD.search(name)) or not match[2]]
    if unnumbered:
        raise InputError(
            f"{source}: there is no connection, and names such as {unnumbered[0]} do not show "
            "whether the cache holds all files of the set: name a single file as .../PATH"
        )


def _check_shards(names: Sequence[str], source: str) -> None:
    """Raises InputError if a set of shards, named i-of-n, is not complete."""
    shards: dict[tuple[str, int], set[int]] = {}
    for name in names:
        match = SHARD.search(name)
        if match and match[2]:
            key = SHARD.sub("", name), int(match[2])
            shards.setdefault(key, set()).add(int(match[1]))
    for (_, total), numbers in shards.items():
        if numbers != set(range(total)):
            raise InputError(f"{source}: {len(numbers)} of {total} files: {_listed(names)}")


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
