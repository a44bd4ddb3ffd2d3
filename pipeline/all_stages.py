"""Run `--stage=all`: every stage whose inputs the config names, or the lab's study."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from pipeline import stage as stages
from pipeline.cli import fill_in
from pipeline.experiments import with_runs
from pipeline.preflight import check
from pipeline.runner import Outcome, run_stages
from pipeline.study import run_study
from sarm_jax.io.errors import InputError
from sarm_jax.parallel import processes


def run(template: ConfigDict, workdir: Path) -> None:
    """Runs the study, or all wanted stages; "{workdir}" is not filled in yet."""
    if template.prepare_data.source == "lab":
        run_study(template, workdir)
    else:
        run_all(fill_in(template, workdir), workdir)


def run_all(config: ConfigDict, workdir: Path) -> None:
    """Runs every stage whose inputs the config names, then prints a table of what was done."""
    config = with_runs(config, workdir)
    wanted = [stage for stage in stages.load_all() if stage.wanted(config)]
    with processes.raising_on_all():
        if not wanted:
            raise InputError(
                "--stage=all: nothing to do; name prompts_jsonl, or another stage's input"
            )
        check(config, workdir, wanted)
    outcomes = run_stages(config, workdir, wanted)
    if processes.is_primary():
        print(summary(outcomes))


def summary(outcomes: Sequence[Outcome]) -> str:
    """Formats a line per stage: what was done, how long it took, where the result is."""
    width = max(len(outcome.stage) for outcome in outcomes)
    lines = []
    for outcome in outcomes:
        seconds = "" if outcome.seconds is None else f"{outcome.seconds:.0f} s"
        lines.append(f"{outcome.stage:{width}}  {seconds:>7}  {outcome.output}  {outcome.action}")
    return "\n".join(lines)
