"""report.html and figures/*.png: from what runs and evaluations left to what a person looks at.

The page needs nothing but itself, and cannot load anything: its Content-Security-Policy allows its
own style and script, by their hashes. Texts that models wrote go in as escaped JSON, and into the
document as text alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from sarm_jax.errors import InputError
from sarm_jax.evaluation.report import curves, responses, tables
from sarm_jax.evaluation.report.curves import LOG_2
from sarm_jax.evaluation.report.evaluations import EVALUATE, Evaluation, read_evaluation
from sarm_jax.evaluation.report.pictures import Picture, file_name
from sarm_jax.evaluation.report.runs import Run, parse_runs, read_run
from sarm_jax.evaluation.report.samples import Pair, browser_rows, pairs_of
from sarm_jax.evaluation.report.tables import Table
from sarm_jax.files import replacing
from sarm_jax.page import HERE as SHARED
from sarm_jax.page import content_policy, environment, json_in_html, picture_uri

HERE = Path(__file__).parent
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
class ReportConfig:
    """`runs` as `parse_runs` reads it; `samples` responses per run in the browser, 0 for all."""

    runs: str
    samples: int

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise InputError(f"report.samples={self.samples}: must not be negative (0: all)")


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page: a sentence on what it shows, figures, tables, and what is missing."""

    anchor: str
    title: str
    text: str
    pictures: Sequence[Picture | None] = ()
    tables: Sequence[Table | None] = ()
    notes: Sequence[str] = ()


def write_report(config: ReportConfig, workdir: Path) -> Path:
    """Reads everything, then writes the figures and, last, the page, whose path it returns."""
    named = parse_runs(config.runs, workdir)
    runs = [read_run(*item, place) for place, item in enumerate(named.items())]
    evaluations = find_evaluations(named, workdir)
    pairs = pairs_of(runs, evaluations)
    sections = [
        *run_sections(runs),
        *response_sections(runs, evaluations, pairs, workdir),
        *benchmark_sections(evaluations, workdir),
    ]
    rows = browser_rows(pairs, config.samples)
    sections = _unique(sections)
    page = render(runs, sections, rows, len(pairs), workdir)
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    for section in sections:
        for picture in filter(None, section.pictures):
            with replacing(folder / f"{picture.name}.png", "wb") as file:
                file.write(picture.light)
    path = workdir / "report.html"
    with replacing(path) as file:
        file.write(page)
    return path


def find_evaluations(named: Mapping[str, Path], workdir: Path) -> list[Evaluation]:
    """Those of the runs, and that of `workdir`, which may compare several."""
    folders = {folder.resolve(): (name, folder) for name, folder in named.items()}
    folders.setdefault(workdir.resolve(), (workdir.resolve().name, workdir))
    return [
        read_evaluation(name, folder)
        for name, folder in folders.values()
        if (folder / "eval").is_dir()
    ]


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """What metrics.csv and config.json tell."""
    missing = [note for run in runs for note in run.missing]
    recorded = [run for run in runs if run.steps]
    no_alpha = [
        f"{run.name}: what reward.alpha_values names cannot be read any more, so the penalties are "
        "shown together."
        for run in recorded
        if run.features and run.alphas is None
    ]
    no_tau = [
        f"{run.name}: what reward.tau_values names cannot be read any more, so τ is not shown."
        for run in recorded
        if run.features and run.taus is None
    ]
    controlled = [run for run in recorded if run.has("disc_acc")]
    return [
        Section(
            "glance",
            "At a glance",
            "Where each run started and where it ended.",
            tables=[tables.glance(recorded) if recorded else None, tables.options(runs)],
            notes=[*missing, *_not_numbers(recorded), *_incomparable(runs)],
        ),
        Section(
            "reward",
            "What the reward is made of",
            "R_total = R_SARM − penalties − β · D, means over the responses of a step.",
            curves.reward_terms(recorded),
            notes=no_alpha,
        ),
        Section(
            "goodhart",
            "Reward against distance",
            "A reward that climbs while the policy moves far from the reference may be paid for "
            "something that nobody wants: then the curve says nothing of quality any more.",
            [curves.goodhart(recorded)],
        ),
        Section(
            "features",
            "The penalised features",
            "A penalty works when its feature stops firing.",
            [figure for run in recorded for figure in curves.features(run)],
            [tables.features(run) for run in recorded],
            no_tau if any(run.features for run in recorded) else ["No run penalises a feature."],
        ),
        Section(
            "length",
            "Length and end",
            "Tokens up to and including the stop token; the share of responses that ended.",
            [
                curves.over_steps(
                    recorded,
                    "response_length_mean",
                    "Response length, mean and one sd",
                    "tokens",
                    spread="response_length_std",
                ),
                curves.over_steps(
                    recorded, "eos_fraction", "Responses that ended by themselves", "share"
                ),
            ],
        ),
        Section(
            "discriminator",
            "The discriminator",
            "It tells human latents from the policy's. At an accuracy of 0.5 and a loss of log 2 "
            "it cannot; its mean logit estimates the latent KL.",
            [
                curves.over_steps(
                    controlled, "disc_acc", "Discriminator accuracy", "share", (0.5, "chance")
                ),
                curves.over_steps(
                    controlled, "disc_loss", "Discriminator loss", "nats", (LOG_2, "log 2")
                ),
                curves.over_steps(
                    controlled, "kl_penalty", "Latent KL, β · D", "reward-model units"
                ),
            ],
            notes=[] if controlled else ["No run has a latent KL (reward.beta is 0)."],
        ),
    ]


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
            "On prompts that none of them was trained on.",
            tables=[table for found in evaluations for table in tables.policy(found)],
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
            [p for e in evaluations for p in responses.steering_pictures(e)]
            if part == "steering"
            else [],
            [table for found in evaluations for table in tables_of[part](found)],
            _lacking(evaluations, part, workdir),
        )
        for part, (title, text) in shown.items()
    ]


def render(
    runs: Sequence[Run],
    sections: Sequence[Section],
    rows: Sequence[dict],
    pairs: int,
    workdir: Path,
) -> str:
    """The page; `rows` are shown in its browser, of `pairs` that there are."""
    plain = list(dict.fromkeys(row["run"] for row in rows if row["after"]["terms"] is None))
    explain = f"{EVALUATE}{workdir}{PROMPTS} does."
    notes = [f"Nothing explains the scores of {', '.join(plain)} here; {explain}"] if plain else []
    style = (SHARED / "page.css").read_text("utf-8") + (HERE / "page.css").read_text("utf-8")
    script = (HERE / "page.js").read_text("utf-8")
    return (
        environment(HERE)
        .get_template("page.html")
        .render(
            names=[run.name for run in runs],
            sections=sections,
            picture_uri=picture_uri,
            style=Markup(style),
            script=Markup(script),
            policy=content_policy(style, script),
            data=json_in_html({"rows": rows}),
            shown=len(rows),
            explained=any(row["after"]["terms"] for row in rows),
            sample_notes=notes,
            pairs=pairs,
        )
    )


def _lacking(evaluations: Sequence[Evaluation], part: str, workdir: Path) -> list[str]:
    """A sentence where no evaluation has `part`."""
    if any(part in found.parts for found in evaluations):
        return []
    folder = evaluations[0].folder if evaluations else workdir
    command = f"{EVALUATE}{folder}{OPTIONS_OF.get(part, '')}"
    return [f"There is no eval/{part}.json; {command} makes it."]


def _not_numbers(runs: Sequence[Run]) -> list[str]:
    """A sentence per run and column with values that are not finite."""
    notes = []
    for run in runs:
        for name in CHECKED:
            bad = run.column("step")[~np.isfinite(run.column(name))]
            if len(bad):
                first = f"{bad[0]:.0f}" if np.isfinite(bad[0]) else "?"
                notes.append(
                    f"{run.name}: {name} is not a finite number at {len(bad)} of {run.steps} "
                    f"steps, first at step {first}."
                )
    return notes


def _incomparable(runs: Sequence[Run]) -> list[str]:
    """A sentence where the runs were not judged by the same reward model."""
    models = {run.options["sarm_model"] for run in runs if "sarm_model" in run.options}
    if len(models) < 2:
        return []
    return [f"The reward models differ ({', '.join(sorted(models))}): their scores do not compare."]


def _unique(sections: Sequence[Section]) -> list[Section]:
    """The same without empty figures and tables, and with a file name for each figure alone."""
    taken: set[str] = set()
    found = []
    for section in sections:
        pictures = []
        for picture in filter(None, section.pictures):
            name, number = picture.name, 2
            while name in taken:
                name, number = file_name(f"{picture.name}-{number}"), number + 1
            taken.add(name)
            pictures.append(dataclasses.replace(picture, name=name))
        kept = [table for table in section.tables if table]
        found.append(dataclasses.replace(section, pictures=pictures, tables=kept))
    return found
