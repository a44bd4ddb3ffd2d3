"""What stands in each part of the page, and the sentence that stands where a part is missing."""

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

Shown = TypeVar("Shown", Table, Picture)
BANDS = 3  # runs whose spread is drawn as well: of more the bands hide each other
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
    """A part of the page: a sentence on what it shows, tables, figures, and what is missing.

    `notes` stand above the tables and figures, `footnotes`, which explain marks in them, below.
    """

    anchor: str
    title: str
    text: str
    pictures: Sequence[Picture | None] = ()
    tables: Sequence[Table | None] = ()
    notes: Sequence[str] = ()
    footnotes: Sequence[str] = ()


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """What metrics.csv and config.json tell."""
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
        "glance",
        "At a glance",
        "Where each run started and where it ended.",
        tables=[
            tables.glance(recorded) if recorded else None,
            tables.guard_warnings(runs),
            tables.options(runs),
        ],
        notes=[*missing, *_not_numbers(recorded), *_incomparable(runs), *_clamped(runs)],
        footnotes=_of_recordings(recorded, tuple(recordings.DIFFERS), whole=True),
    )


def _reward(runs: Sequence[Run]) -> Section:
    return Section(
        "reward",
        "What the reward is made of",
        "R_total = R_SARM − penalties − β · D, means over the responses of a step.",
        curves.reward_terms(runs),
        notes=_of_each(
            [run for run in runs if run.features and run.alphas is None],
            lambda run: (
                _unread(run, "alpha_values", "α") + ", so the penalties are shown together."
            ),
        ),
        footnotes=_of_recordings(runs),
    )


def _distance(runs: Sequence[Run]) -> Section:
    return Section(
        "goodhart",
        "Reward against distance",
        "A reward that climbs while the policy moves far from the reference may be paid for "
        "something that nobody wants: then the curve says nothing of quality any more.",
        [curves.goodhart(runs)],
        notes=[
            *_clamped(runs),
            *_of_each(
                [run for run in runs if run.origin != recordings.OURS],
                lambda run: "the KL to the reference policy is not recorded.",
            ),
        ],
    )


def _features(runs: Sequence[Run]) -> Section:
    no_tau = _of_each(
        [run for run in runs if run.features and run.taus is None],
        lambda run: _unread(run, "tau_values", "τ") + ", so τ is not shown.",
    )
    return Section(
        "features",
        "The penalised features",
        "A penalty works when its feature stops firing.",
        [figure for run in runs for figure in curves.features(run)],
        [tables.features(run) for run in runs],
        no_tau
        if any(run.features for run in runs)
        else ["No step of a run with penalties is there."],
        _of_recordings([run for run in runs if run.features]),
    )


def _length(runs: Sequence[Run]) -> Section:
    mean, spread, title = "response_length_mean", "response_length_std", "Response length, mean"
    if len(runs) <= BANDS:
        title += " and one sd"
    else:
        spread = ""
    return Section(
        "length",
        "Length and end",
        "Tokens up to and including the stop token; the share of responses that ended.",
        [
            curves.over_steps(runs, mean, title, "tokens", spread=spread),
            curves.over_steps(runs, "eos_fraction", "Responses that ended by themselves", "share"),
        ],
        footnotes=_of_recordings(runs),
    )


def _discriminator(runs: Sequence[Run]) -> Section:
    runs = [run for run in runs if run.has("disc_acc")]
    chance, log_2 = (0.5, "chance"), (LOG_2, "log 2")
    return Section(
        "discriminator",
        "The discriminator",
        "It tells human latents from the policy's. At an accuracy of 0.5 and a loss of log 2 "
        "it cannot; its mean logit estimates the latent KL.",
        [
            curves.over_steps(runs, "disc_acc", "Discriminator accuracy", "share", chance),
            curves.over_steps(runs, "disc_loss", "Discriminator loss", "nats", log_2),
            curves.over_steps(runs, "kl_penalty", "Latent KL, β · D", "reward-model units"),
        ],
        notes=[] if runs else ["No step of a run with a latent KL (reward.beta above 0) is there."],
    )


def response_sections(
    runs: Sequence[Run], evaluations: Sequence[Evaluation], pairs: Sequence[Pair], workdir: Path
) -> list[Section]:
    """What the policies write, and how they compare."""
    compared = any(pair.before for pair in pairs)
    names = dict.fromkeys([*(run.name for run in runs), *(pair.run for pair in pairs)])
    places = {name: place for place, name in enumerate(names)}
    nothing = f"No responses before and after: {EVALUATE}{workdir}{PROMPTS} makes them."
    return [
        Section(
            "distributions",
            "Before and after",
            "The same prompts, before and after training.",
            responses.distributions(pairs, places),
            notes=[] if compared else [nothing],
        ),
        Section(
            "latents",
            "Where the latents lie",
            "Human, base and trained responses by their pooled latents.",
            [responses.latent_map(found, places) for found in evaluations],
            notes=_lacking(evaluations, "latent_map", workdir),
        ),
        Section(
            "policy",
            "The policies compared",
            "Their responses to the same prompts.",
            tables=_captioned(evaluations, tables.policy),
            notes=_lacking(evaluations, "policy", workdir),
        ),
    ]


def benchmark_sections(evaluations: Sequence[Evaluation], workdir: Path) -> list[Section]:
    """The reward model itself, without and with controls."""
    shown = {
        "rm_bench": ("RM-Bench", "Is the right answer scored higher, whatever its style?"),
        "rewardbench2": ("RewardBench 2", "The best of four, by subset."),
        "steering": ("Steering", "Which responses does a change of features reach?"),
    }
    tables_of = {
        "rm_bench": tables.rm_bench,
        "rewardbench2": tables.rewardbench2,
        "steering": tables.steering,
    }
    return [
        Section(
            part,
            title,
            text,
            _captioned(evaluations, responses.steering_pictures) if part == "steering" else [],
            _captioned(evaluations, tables_of[part]),
            _lacking(evaluations, part, workdir),
        )
        for part, (title, text) in shown.items()
    ]


def _captioned(
    evaluations: Sequence[Evaluation], show: Callable[[Evaluation], Iterable[Shown]]
) -> list[Shown]:
    """What `show` makes of every evaluation; of several each caption says which it is of."""
    several = len(evaluations) > 1
    return [
        dataclasses.replace(one, caption=f"{found.name}: {one.caption}") if several else one
        for found in evaluations
        for one in show(found)
    ]


def _lacking(evaluations: Sequence[Evaluation], part: str, workdir: Path) -> list[str]:
    """A sentence where no evaluation has `part`."""
    if any(part in found.parts for found in evaluations):
        return []
    folder = evaluations[0].folder if evaluations else workdir
    command = f"{EVALUATE}{folder}{OPTIONS_OF.get(part, '')}"
    return [f"There is no eval/{part}.json; {command} makes it."]


def _of_recordings(
    runs: Sequence[Run], columns: Iterable[str] = (), whole: bool = False
) -> list[str]:
    """Explains the marks at runs of other programs.

    `columns` are those shown that may measure something else; `whole`: also what is not shown.
    """
    origins = {run.name: run.origin for run in runs}
    reference = [run for run in runs if run.origin == recordings.REFERENCE]
    shown = [c for c in columns if c == "minutes" or any(run.has(c) for run in reference)]
    found = recordings.notes(origins, shown)
    if whole and reference:
        titles = tables.GLANCE.items()
        absent = [title for name, title in titles if not any(run.has(name) for run in reference)]
        found += recordings.further_notes(absent)
    return found


def _of_each(runs: Sequence[Run], sentence: Callable[[Run], str]) -> list[str]:
    """The sentences that the runs have, each once, with the names of its runs."""
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(sentence(run), []).append(run.name)
    return [f"{', '.join(of)}: {text}" for text, of in names.items()]


def _unread(run: Run, option: str, symbol: str) -> str:
    """Says why the values of an option are not known."""
    if run.origin == recordings.OURS:
        return f"what reward.{option} names cannot be read any more"
    return f"{symbol} is not recorded"


def _not_numbers(runs: Sequence[Run]) -> list[str]:
    """A sentence per run and column with values that are not finite."""
    notes = []
    for run in runs:
        for name in filter(run.column_t.__contains__, CHECKED):
            bad = run.column("step")[~np.isfinite(run.column(name))]
            if len(bad):
                first = f"{bad[0]:.0f}" if np.isfinite(bad[0]) else "?"
                notes.append(
                    f"{run.name}: {name} is not a finite number at {len(bad)} of {run.steps} "
                    f"steps, first at step {first}."
                )
    return notes


def _clamped(runs: Sequence[Run]) -> list[str]:
    """A sentence on every run whose score is not the reward model's own."""
    return [
        f"{run.name}: R_SARM is of the clamped latents, which the policy learned from; what the "
        "reward model itself says of its responses is not recorded at every step."
        for run in runs
        if run.clamps
    ]


def _incomparable(runs: Sequence[Run]) -> list[str]:
    """A sentence where the runs were not judged by the same reward model."""
    models = {run.options["sarm_model"] for run in runs if "sarm_model" in run.options}
    if len(models) < 2:
        return []
    return [f"The reward models differ ({', '.join(sorted(models))}): their scores do not compare."]
