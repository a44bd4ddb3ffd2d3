"""The sections of the page, and the sentences in place of what is missing."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.report import curves, recordings, responses, tables
from pipeline.report.curves import LOG_2
from pipeline.report.evaluations import EVALUATE, Evaluation
from pipeline.report.pictures import Picture
from pipeline.report.runs import Run
from pipeline.report.samples import Pair
from pipeline.report.tables import Table
from ppo.tracking.metrics import GROUP_COLUMNS

Shown = TypeVar("Shown", Table, Picture)
MAX_BANDS = 3  # runs with a band; the bands of more runs would hide each other
CHECKED = ("total_reward", "rm_score", "ref_kl", "response_length_mean", "policy_loss")
PROMPTS = " --config.evaluate.prompts_jsonl=FILE --config.evaluate.runs=DIR,DIR"
OPTIONS_OF = {
    "policy": PROMPTS,
    "latent_map": f"{PROMPTS} --config.evaluate.human_jsonl=FILE",
    "rm_bench": " --config.evaluate.rm_bench=FILE",
    "rewardbench2": " --config.evaluate.rewardbench2=FILE",
    "steering": " --config.evaluate.data_jsonl=FILE --config.evaluate.steering_json=FILE",
}


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the page: a sentence on what it shows, tables and figures.

    `notes`, which name what is missing, come above the tables and figures; `footnotes`, which
    explain marks in them, come below.
    """

    anchor: str
    title: str
    text: str
    pictures: Sequence[Picture | None] = ()
    tables: Sequence[Table | None] = ()
    notes: Sequence[str] = ()
    footnotes: Sequence[str] = ()


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """Returns the sections that metrics.csv and config.json fill."""
    recorded = [run for run in runs if run.steps]
    return [
        _glance(runs, recorded),
        _reward(recorded),
        _distance(recorded),
        _features(recorded),
        _length(recorded),
        _discriminator(recorded),
    ]


def _glance(runs: Sequence[Run], recorded: Sequence[Run]) -> Section:
    missing = [note for run in runs for note in run.missing]
    return Section(
        anchor="glance",
        title="At a glance",
        text="The start and the end of each run.",
        tables=[
            tables.glance(recorded) if recorded else None,
            tables.guard_warnings(runs),
            tables.options(runs),
        ],
        notes=[*missing, *_not_finite(recorded), *_incomparable(runs), *_clamped(runs)],
        footnotes=_footnotes(recorded, tuple(recordings.DIFFERS), complete=True),
    )


def _reward(runs: Sequence[Run]) -> Section:
    return Section(
        anchor="reward",
        title="The terms of the reward",
        text="R_total = R_SARM − penalties − β · D, means over the responses of a step.",
        pictures=curves.reward_terms(runs),
        notes=_grouped(
            [run for run in runs if run.features and run.alphas is None and not run.screens],
            lambda run: (
                _unreadable(run, "alpha_values", "α") + ", so the penalties are shown together."
            ),
        ),
        footnotes=_footnotes(runs),
    )


def _distance(runs: Sequence[Run]) -> Section:
    return Section(
        anchor="goodhart",
        title="Reward against distance",
        text="A reward that rises while the policy moves far from the reference may come from "
        "something that nobody wants. The curve is then no longer a measure of quality.",
        pictures=[curves.goodhart(runs)],
        notes=[
            *_clamped(runs),
            *_grouped(
                [run for run in runs if run.origin != recordings.OURS],
                lambda run: "the KL to the reference policy is not recorded.",
            ),
        ],
    )


def _features(runs: Sequence[Run]) -> Section:
    if any(run.features for run in runs):
        notes = _grouped(
            [run for run in runs if run.features and run.taus is None],
            lambda run: _unreadable(run, "tau_values", "τ") + ", so τ is not shown.",
        )
    else:
        notes = ["No run with penalties has a finished step."]
    return Section(
        anchor="features",
        title="The penalised features",
        text="A penalty works if its feature stops exceeding its threshold τ.",
        pictures=[figure for run in runs for figure in curves.features(run)],
        tables=[tables.features(run) for run in runs],
        notes=notes,
        footnotes=_footnotes([run for run in runs if run.features]),
    )


def _length(runs: Sequence[Run]) -> Section:
    with_bands = len(runs) <= MAX_BANDS
    mean = curves.over_steps(
        runs,
        "response_length_mean",
        title="Response length, mean and one sd" if with_bands else "Response length, mean",
        unit="tokens",
        spread="response_length_std" if with_bands else "",
    )
    ended = curves.over_steps(
        runs, "eos_fraction", title="Responses that ended by themselves", unit="share"
    )
    return Section(
        anchor="length",
        title="Length and end",
        text="Tokens up to and including the stop token; the share of responses that ended.",
        pictures=[mean, ended],
        footnotes=_footnotes(runs),
    )


def _discriminator(runs: Sequence[Run]) -> Section:
    runs = [run for run in runs if run.has("disc_acc")]
    notes = [] if runs else ["No run with a latent KL (reward.beta above 0) has a finished step."]
    accuracy = curves.over_steps(
        runs,
        "disc_acc",
        title="Discriminator accuracy",
        unit="share",
        level=(0.5, "chance"),
    )
    loss = curves.over_steps(
        runs, "disc_loss", title="Discriminator loss", unit="nats", level=(LOG_2, "log 2")
    )
    penalty = curves.over_steps(
        runs, "kl_penalty", title="Latent KL, β · D", unit="reward-model units"
    )
    estimates = [run for run in runs if run.has("latent_kl")]
    estimate = curves.over_steps(estimates, "latent_kl", title="Latent KL, mean D", unit="nats")
    return Section(
        anchor="discriminator",
        title="The discriminator",
        text="It tells human latents from those of the policy. At an accuracy of 0.5 and a loss of "
        "log 2 it cannot tell them apart. Its mean logit estimates the latent KL.",
        pictures=[accuracy, loss, penalty, *([estimate] if estimates else [])],
        notes=notes,
    )


def response_sections(
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    *,
    pairs: Sequence[Pair],
    workdir: Path,
) -> list[Section]:
    """Returns the sections on the responses of the policies and on how the policies compare.

    Args:
        runs: the runs, which come first in the order of colours.
        evaluations: the evaluations.
        pairs: responses before and after training.
        workdir: the working directory of the report, for commands in notes.
    """
    names = dict.fromkeys([*(run.name for run in runs), *(pair.run for pair in pairs)])
    positions = {name: position for position, name in enumerate(names)}
    notes = []
    if not any(pair.before for pair in pairs):
        notes = [f"No responses before and after: {EVALUATE}{workdir}{PROMPTS} makes them."]
    return [
        Section(
            anchor="distributions",
            title="Before and after",
            text="The same prompts, before and after training.",
            pictures=responses.distributions(pairs, positions),
            notes=notes,
        ),
        Section(
            anchor="latents",
            title="Map of the latents",
            text="Human, base and trained responses by their pooled latents.",
            pictures=[responses.latent_map(evaluation, positions) for evaluation in evaluations],
            notes=_missing_part(evaluations, "latent_map", workdir),
        ),
        Section(
            anchor="policy",
            title="The policies compared",
            text="Their responses to the same prompts.",
            tables=_captioned(evaluations, tables.policy),
            notes=_missing_part(evaluations, "policy", workdir),
        ),
    ]


def benchmark_sections(evaluations: Sequence[Evaluation], workdir: Path) -> list[Section]:
    """Returns the sections on the reward model itself, without and with controls."""
    return [
        Section(
            anchor="rm_bench",
            title="RM-Bench",
            text="Is the right answer scored higher, whatever its style?",
            tables=_captioned(evaluations, tables.rm_bench),
            notes=_missing_part(evaluations, "rm_bench", workdir),
        ),
        Section(
            anchor="rewardbench2",
            title="RewardBench 2",
            text="The best of four, by subset.",
            tables=_captioned(evaluations, tables.rewardbench2),
            notes=_missing_part(evaluations, "rewardbench2", workdir),
        ),
        Section(
            anchor="steering",
            title="Steering",
            text="Which responses does a change of features reach?",
            pictures=_captioned(evaluations, responses.steering_pictures),
            tables=_captioned(evaluations, tables.steering),
            notes=_missing_part(evaluations, "steering", workdir),
        ),
    ]


def _captioned(
    evaluations: Sequence[Evaluation], show: Callable[[Evaluation], Iterable[Shown]]
) -> list[Shown]:
    """Applies `show` to every evaluation; with several, captions begin with their names."""
    several = len(evaluations) > 1
    return [
        dataclasses.replace(item, caption=f"{evaluation.name}: {item.caption}") if several else item
        for evaluation in evaluations
        for item in show(evaluation)
    ]


def _missing_part(evaluations: Sequence[Evaluation], part: str, workdir: Path) -> list[str]:
    """Returns a sentence with the command that makes `part`, if no evaluation has it."""
    if any(part in evaluation.parts for evaluation in evaluations):
        return []
    folder = evaluations[0].folder if evaluations else workdir
    command = f"{EVALUATE}{folder}{OPTIONS_OF.get(part, '')}"
    return [f"There is no eval/{part}.json; {command} makes it."]


def _footnotes(
    runs: Sequence[Run], columns: Iterable[str] = (), complete: bool = False
) -> list[str]:
    """Explains the marks at runs of other programs.

    Args:
        runs: the runs in the section.
        columns: columns in the section whose meaning may differ in the reference's files.
        complete: also explain what is not shown.
    """
    origins = {run.name: run.origin for run in runs}
    reference = [run for run in runs if run.origin == recordings.REFERENCE]
    shown = [c for c in columns if c == "minutes" or any(run.has(c) for run in reference)]
    footnotes = recordings.notes(origins, shown)
    if complete and reference:
        expected = {k: v for k, v in tables.GLANCE.items() if k not in GROUP_COLUMNS}
        absent = [v for k, v in expected.items() if not any(run.has(k) for run in reference)]
        footnotes += recordings.further_notes(absent)
    return footnotes


def _grouped(runs: Sequence[Run], sentence: Callable[[Run], str]) -> list[str]:
    """Returns the sentences of all runs, each once, preceded by the names of its runs."""
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(sentence(run), []).append(run.name)
    return [f"{', '.join(own)}: {text}" for text, own in names.items()]


def _unreadable(run: Run, option: str, symbol: str) -> str:
    """Explains why the values of an option are unknown."""
    if run.origin == recordings.OURS:
        return f"the file that reward.{option} names cannot be read any more"
    return f"{symbol} is not recorded"


def _not_finite(runs: Sequence[Run]) -> list[str]:
    """Returns a sentence for every run and column with values that are not finite."""
    notes = []
    for run in runs:
        for name in filter(run.column_t.__contains__, CHECKED):
            bad_steps = run.column("step")[~np.isfinite(run.column(name))]
            if len(bad_steps):
                first = f"{bad_steps[0]:.0f}" if np.isfinite(bad_steps[0]) else "?"
                notes.append(
                    f"{run.name}: {name} is not a finite number at {len(bad_steps)} of {run.steps} "
                    f"steps, first at step {first}."
                )
    return notes


def _clamped(runs: Sequence[Run]) -> list[str]:
    """Returns a sentence for every run whose score is that of clamped latents."""
    return [
        f"{run.name}: R_SARM is the score of the clamped latents, which the policy learned from. "
        "The reward model's own score of its responses is not recorded at every step."
        for run in runs
        if run.clamps
    ]


def _incomparable(runs: Sequence[Run]) -> list[str]:
    """Returns a sentence if the runs had different reward models."""
    models = {run.options["sarm_model"] for run in runs if "sarm_model" in run.options}
    if len(models) < 2:
        return []
    names = ", ".join(sorted(models))
    return [f"The reward models differ ({names}): their scores are not comparable."]
