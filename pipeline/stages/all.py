"""--stage=all: every stage whose inputs the config names, or the lab's study."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from pipeline.cli import fill_in
from pipeline.experiments import with_runs
from pipeline.preflight import check
from pipeline.runner import Outcome, recipes, run_stages
from pipeline.study import run_study
from sarm_jax.io.errors import InputError


def run(template: ConfigDict, workdir: Path) -> None:
    """The study, or one stage after the other; "{workdir}" is still to be filled in."""
    if template.prepare_data.source == "lab":
        run_study(template, workdir)
    else:
        run_all(fill_in(template, workdir), workdir)


def run_all(config: ConfigDict, workdir: Path) -> None:
    """Runs every stage whose inputs the config names, then prints what was done as a table."""
    config = with_runs(config, workdir)
    wanted = [name for name, recipe in recipes(config, workdir).items() if recipe.wanted]
    if not wanted:
        raise InputError("--stage=all: nothing to do; name prompts_jsonl, or another stage's input")
    check(config, workdir, wanted)
    outcomes = run_stages(config, workdir, wanted)
    print(summary(outcomes))


def summary(outcomes: Sequence[Outcome]) -> str:
    """A line per stage: what was done, how long it took, where the result is."""
    width = max(len(found.stage) for found in outcomes)
    lines = []
    for found in outcomes:
        took = "" if found.seconds is None else f"{found.seconds:.0f} s"
        lines.append(f"{found.stage:{width}}  {took:>7}  {found.output}  {found.what}")
    return "\n".join(lines)
