"""The files and models that config fields name, as each stage declares them.

The declarations of all stages say what counts for `stages.json`, what is looked for before the
first stage runs, and which stage makes a file that is missing.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterable
from pathlib import Path

from ml_collections import ConfigDict

from conversion.hub import is_repository
from conversion.load import read_policy_config, read_sarm_config
from pipeline.options import field_value, optional_paths
from sarm_jax.evaluation.benchmark_files import named_files
from sarm_jax.io.workdir import named_workdirs


class Kind(enum.Enum):
    """Form of the value of a field that names an input."""

    FILES = "comma-separated files or folders"
    NAMED_FILES = "comma-separated FILE or NAME=FILE"
    POLICY = "a policy: a directory, or a repository id on the hub"
    SARM = "a SARM: a directory, or a repository id on the hub"
    RUNS = "comma-separated DIR or NAME=DIR; if it is empty, the working directory"
    LIST = 'a comma-separated list, parts of which may be read from a file: "@FILE:key[:n]"'


MODELS = {Kind.POLICY: read_policy_config, Kind.SARM: read_sarm_config}


@dataclasses.dataclass(frozen=True)
class Input:
    """One config field that names files.

    `run_files` are patterns of the files that a stage reads of a run's working directory, for
    `Kind.RUNS`. Of any other folder, and of an adapter's own folder, all files count. `read_if`
    says for which configs the files must be there; they count for `stages.json` in any case.
    """

    field: str
    kind: Kind = Kind.FILES
    run_files: tuple[str, ...] = ()
    read_if: Callable[[ConfigDict], bool] = lambda config: True

    def paths(self, config: ConfigDict, workdir: Path) -> list[Path]:
        """Returns the local paths that the field names, whether they exist or not.

        A model that only the hub has, and files behind hf://, are left out.

        Raises:
            InputError: the value is malformed.
        """
        value = field_value(config, self.field)
        if self.kind is Kind.RUNS:
            return list(named_workdirs(value, workdir, self.field).values())
        if not value:
            return []
        if self.kind in MODELS:
            local = is_within(Path(value), workdir) or not is_repository(value)
            return [Path(value)] if local else []
        if self.kind is Kind.LIST:
            return files_of_list(value)
        names: Iterable[str] = optional_paths(value)
        if self.kind is Kind.NAMED_FILES:
            names = [file.path for file in named_files(tuple(names), self.field)]
        return [Path(name) for name in names if not str(name).startswith("hf://")]

    def files(self, config: ConfigDict, workdir: Path) -> list[Path]:
        """Returns the existing files that count as this input's content, folders unfolded."""
        files: list[Path] = []
        for path in self.paths(config, workdir):
            if path.is_file():
                files.append(path)
            elif path.is_dir():
                read = {file for pattern in self.run_files for file in path.glob(pattern)}
                if not read and not (self.run_files and path == workdir):
                    read = set(path.rglob("*"))
                files += sorted(file for file in read if file.is_file())
        return files


def files_of_list(text: str) -> list[Path]:
    """Returns the files of a list such as "3,@FILE:key[:n]"."""
    parts = (part.strip() for part in text.split(","))
    return [Path(part[1:].split(":")[0]) for part in parts if part.startswith("@")]


def is_within(path: Path, folder: Path) -> bool:
    """Returns whether the path is in the folder, or is the folder."""
    return path.absolute().is_relative_to(folder.absolute())
