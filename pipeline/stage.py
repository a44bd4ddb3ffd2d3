"""A stage: one step from files to files, declared in one object.

A module in `pipeline/stages` ends in `STAGE = Stage(...)`. The runner, the preflight,
`stages.json`, the lab's study and the table of stages in the documentation all read that object, so
adding a stage is adding one file. A module is imported when its stage is needed.
"""

import dataclasses
import fnmatch
import graphlib
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from pipeline.inputs import LISTS, MODELS, Input, Kind
from pipeline.options import field_value, plain
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import check_target
from sarm_jax.io.workdir import require_utf8

PACKAGE = "pipeline.stages"
RECORDS = "stages.json"  # written by `pipeline.provenance`


def never(config: ConfigDict) -> bool:
    """Returns False: `--stage=all` never runs the stage."""
    return False


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the pipeline.

    Attributes:
        name: value of `--stage`, and name of the module.
        summary: one line, "what it reads → what it writes", for the log and the documentation.
        validate: reads the stage's options from the config alone and returns them; raises
            InputError for the first that is out of range.
        run: does the work, given the config and the working directory.
        check_architectures: compares the options with the architectures of the models, which it
            reads from their config files; raises InputError. `run` calls it too. `--stage=all`
            calls it before the first stage runs, if the models are there by then.
        options: the config fields, or whole sections, that the result depends on.
        inputs: the fields that name files.
        own_inputs: patterns of further files in the working directory that are read.
        output: path, in the working directory, of what the stage writes last; a function of the
            config if it depends on an option; None if the stage leaves nothing to other stages.
        makes: patterns of all paths in the working directory that the stage writes and other
            stages may read. A name that ends in "/" is a folder.
        writes: the files and folders that the stage will write, given the config; by default
            `makes`. Before the stage runs, nothing may be in their way.
        after: names of the stages that run before it in `--stage=all`.
        wanted: whether the config asks for the stage.
        costly: whether the result took so long that it is never overwritten.
        per_experiment: whether it runs once for each of `config.experiments`, and each run claims
            its working directory with a config.json.
        begun: whether a run in the working directory has finished a step, for a stage that runs
            per experiment.
        continued: given recorded options and the present ones, returns the recorded ones with
            those replaced whose change a run can continue with.
        unread: given recorded options, the fields among `options` that the stage does not read
            with these, so that they do not count.
        records: more facts that the result depends on, by name, for `stages.json`.
        made_from: names of stages whose results must be those of the present SARM; the log warns
            if they are out of date.
        processes: what several processes do (`sarm_jax.parallel.processes`). "all": they run the
            stage together. "primary": in `--stage=all`, process 0 runs it while the others wait.
            "one": the stage runs in one process only.
    """

    name: str
    summary: str
    validate: Callable[[ConfigDict], Any]
    run: Callable[[ConfigDict, Path], None]
    options: tuple[str, ...]
    inputs: tuple[Input, ...] = ()
    own_inputs: tuple[str, ...] = ()
    check_architectures: Callable[[ConfigDict], Any] = lambda config: None
    output: str | Callable[[ConfigDict], str] | None = None
    makes: tuple[str, ...] = ()
    writes: Callable[[ConfigDict], Sequence[str]] | None = None
    after: tuple[str, ...] = ()
    wanted: Callable[[ConfigDict], bool] = never
    costly: Callable[[ConfigDict], bool] = never
    per_experiment: bool = False
    begun: Callable[[Path], bool] = lambda workdir: False
    continued: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda old, new: old
    unread: Callable[[Mapping[str, Any]], Sequence[str]] = lambda options: ()
    records: Callable[[ConfigDict, Path], dict[str, Any]] | None = None
    made_from: tuple[str, ...] = ()
    processes: Literal["all", "primary", "one"] = "one"

    def has_models(self, config: ConfigDict) -> bool:
        """Returns whether all models that the stage reads with this config are local directories.

        A model that an earlier stage makes may not be there yet, and one on the hub is not read
        before it is needed.
        """
        read = (item for item in self.inputs if item.kind in MODELS and item.read_if(config))
        values = [field_value(config, item.field) for item in read]
        return all(Path(value).is_dir() for value in values if value)

    def output_path(self, config: ConfigDict, workdir: Path) -> Path:
        """Returns the path of what the stage writes last."""
        if self.output is None:
            raise ValueError(f"stage {self.name} leaves nothing to other stages")
        return workdir / (self.output if isinstance(self.output, str) else self.output(config))

    def has_begun(self, config: ConfigDict, workdir: Path) -> bool:
        """Returns whether the working directory has a result, or the steps of a run so far."""
        return self.output_path(config, workdir).exists() or self.begun(workdir)

    def recorded_options(self, config: ConfigDict, workdir: Path) -> dict[str, Any]:
        """Returns the options that the result depends on, by field, as JSON-ready values."""
        values = {field: plain(field_value(config, field)) for field in self.options}
        return values | (self.records(config, workdir) if self.records else {})

    def reads_option(self, field: str) -> bool:
        """Returns whether the result depends on a field such as "ppo.batch_size"."""
        return any(f"{field}.".startswith(f"{option}.") for option in self.options)

    def makes_path(self, path: Path, workdir: Path) -> bool:
        """Returns whether the path is one that the stage writes in the working directory."""
        path, workdir = path.absolute(), workdir.absolute()
        if not path.is_relative_to(workdir):
            return False
        within = path.relative_to(workdir)
        candidates = [str(candidate) for candidate in (within, *within.parents)]
        return any(fnmatch.filter(candidates, pattern.rstrip("/")) for pattern in self.makes)

    def check_outputs(self, config: ConfigDict, workdir: Path) -> None:
        """Raises InputError if something is in the way of what the stage writes."""
        if self.costly(config):
            require_utf8(workdir)
        names = self.makes if self.writes is None else self.writes(config)
        for name in (*names, *([RECORDS] if self.output else [])):
            if "*" in name:  # of the files only the folder is known
                name = f"{name.rpartition('/')[0]}/"
            check_target(workdir / name, folder=name.endswith("/"))
        self._check_inputs_are_kept(config, workdir, names)

    def _check_inputs_are_kept(
        self, config: ConfigDict, workdir: Path, names: Sequence[str]
    ) -> None:
        """Raises InputError if an input is a file that the stage will replace."""
        written = {(workdir / name).resolve() for name in names if "*" not in name}
        files = [i for i in self.inputs if i.kind not in (Kind.RUNS, *MODELS)]
        for item in files:
            for path in item.paths(config, workdir):
                if path.resolve() in written:
                    raise InputError(
                        f"{item.field}={path}: --stage={self.name} writes this file itself; "
                        "give another file, or choose another --workdir"
                    )


def names() -> list[str]:
    """Returns the names of all stages, without importing them."""
    path = importlib.import_module(PACKAGE).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if module.name[0] != "_")


def load(name: str) -> Stage:
    """Imports a stage by name."""
    return importlib.import_module(f"{PACKAGE}.{name}").STAGE


def is_list(field: str) -> bool:
    """Returns whether a field is a list of paths, also if an experiment changes it."""
    name = re.sub(r"^experiments\.[^.]+\.", "", field)
    return any(i.field == name and i.kind in LISTS for s in load_all() for i in s.inputs)


def load_all() -> list[Stage]:
    """Imports all stages and returns them in the order in which `--stage=all` runs them."""
    stages = {name: load(name) for name in names()}
    order = graphlib.TopologicalSorter({name: stage.after for name, stage in stages.items()})
    return [stages[name] for name in order.static_order()]
