"""The files and models that config fields name, as each stage declares them.

The declarations of all stages say what counts for `stages.json`, what is looked for before the
first stage runs, and which stage makes a file that is missing.
"""

import dataclasses
import enum
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from conversion.hub import MODEL_FILES, is_repository
from conversion.load import (
    read_policy_config,
    read_reward_config,
    read_sarm_config,
    read_scorer_config,
)
from pipeline.options import field_value
from sarm_jax.evaluation.benchmark_files import named_files
from sarm_jax.io.hub_files import is_on_hub
from sarm_jax.io.path_lists import (
    ListInFile,
    list_entries,
    short_names,
    split_entries,
    split_paths,
)
from sarm_jax.io.workdir import named_workdirs


class Kind(enum.Enum):
    """Form of the value of a field that names an input."""

    FILE = "a file or a folder"
    ROWS = "a file of rows, or a data set on the hub"
    FILES = "comma-separated files or folders"
    NAMED_FILES = "comma-separated FILE or NAME=FILE"
    POLICY = "a policy: a directory, or a repository id on the hub"
    SARM = "a SARM: a directory, or a repository id on the hub"
    SCORER = "a SARM, or a reward model without an SAE: a directory, or a repository id on the hub"
    REWARD = "a reward model: a directory, or a repository id on the hub"
    RUNS = "comma-separated DIR or NAME=DIR; if it is empty, the working directory"
    LIST = 'a comma-separated list, parts of which may be read from a file: "@FILE:key[:n]"'


# Forms in which commas, "=", ":" and brackets have a meaning, see `sarm_jax.io.path_lists`.
LISTS = (Kind.FILES, Kind.NAMED_FILES, Kind.RUNS, Kind.LIST)
MODELS = {
    Kind.POLICY: read_policy_config,
    Kind.SARM: read_sarm_config,
    Kind.SCORER: read_scorer_config,
    Kind.REWARD: read_reward_config,
}
# What is read of a model's directory; a README or a cache beside the weights changes nothing.
MODEL_CONTENT = (*MODEL_FILES, "additional_chat_templates/*")


@dataclasses.dataclass(frozen=True)
class Input:
    """One config field that names files.

    `run_files` are patterns of the files that a stage reads of a run's working directory, for
    `Kind.RUNS`. Of a model, only the files that are read count; of any other folder, and of an
    adapter's own folder, all files count. `read_if` says for which configs the files must be there;
    they count for `stages.json` in any case. `maker` is the command that makes such a file, for the
    message about one that is missing.
    """

    field: str
    kind: Kind = Kind.FILE
    run_files: tuple[str, ...] = ()
    read_if: Callable[[ConfigDict], bool] = lambda config: True
    maker: str = ""

    def paths(self, config: ConfigDict, workdir: Path) -> list[Path]:
        """Returns the local paths that the field names, whether they exist or not.

        A model that only the hub has, and files behind hf://, are left out.

        Raises:
            InputError: the value is malformed.
        """
        entries = self.entries(field_value(config, self.field), workdir)
        paths = [path for _, path in entries if path is not None]
        if self.kind not in MODELS:
            return paths
        return [path for path in paths if is_within(path, workdir) or not is_repository(str(path))]

    def entries(self, value: str, workdir: Path) -> list[tuple[str, Path | None]]:
        """Parses a value of the field: (label, path) for each entry.

        The label is the name that the stage calls the file by, or the key and the count of a list
        in a file. A value that is no file is a label without a path.

        Raises:
            InputError: the value is malformed.
        """
        if self.kind is Kind.RUNS:
            return list(named_workdirs(value, workdir, self.field).items())
        if not value:
            return []
        if self.kind is Kind.LIST:
            return [_list_entry(entry) for entry in list_entries(self.field, value)]
        if self.kind is Kind.NAMED_FILES:
            files = named_files(split_entries(value), self.field)
            return [_file_entry(file.name, file.path) for file in files]
        if self.kind is Kind.FILES:
            paths = split_paths(value)
            names = short_names(paths)
            return [_file_entry(names[path], path) for path in paths]
        if self.kind is Kind.ROWS:
            return [_file_entry("", value)]
        return [("", Path(value))]

    @property
    def content(self) -> tuple[str, ...]:
        """Patterns of the files of a folder that count; if none matches, all files count."""
        return MODEL_CONTENT if self.kind in MODELS else self.run_files

    def files(self, config: ConfigDict, workdir: Path) -> list[Path]:
        """Returns the existing files that count as this input's content, folders unfolded."""
        files: list[Path] = []
        for path in self.paths(config, workdir):
            if path.is_file():
                files.append(path)
            elif path.is_dir():
                read = {file for pattern in self.content for file in path.glob(pattern)}
                if not (read or self.kind in MODELS or (self.run_files and path == workdir)):
                    read = set(path.rglob("*"))
                files += sorted(file for file in read if file.is_file())
        return files


def files_of_list(text: str) -> list[Path]:
    """Returns the files of a list such as "3,@FILE:key[:n]"."""
    entries = list_entries("a list", text)
    return [Path(entry.path) for entry in entries if isinstance(entry, ListInFile)]


def _list_entry(entry: str | ListInFile) -> tuple[str, Path | None]:
    if isinstance(entry, ListInFile):
        return f":{entry.key}[:{entry.count}]", Path(entry.path)
    return entry, None


def _file_entry(name: str, path: str) -> tuple[str, Path | None]:
    """Returns the entry of a file; one on the hub has no local path."""
    return (path, None) if is_on_hub(path) else (name, Path(path))


def is_within(path: Path, folder: Path) -> bool:
    """Returns whether the path is in the folder, or is the folder."""
    return path.absolute().is_relative_to(folder.absolute())
