"""Runs that are known by their metrics alone, and what their columns mean.

The reference implementation records a run as NAME_metrics.csv and, when it has finished,
NAME_summary.json. Some of its columns have a name of ours and another meaning. Those that the
report shows are marked, and those that would mix units are left out; `notes` say both.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sarm_jax.io.errors import InputError

OURS, REFERENCE, OTHER = "ours", "reference", "other"
OWN_COLUMN, REFERENCE_COLUMN = "ref_kl", "gpu_memory_gb"  # each in the files of one program alone
RUN_MARK, CELL_MARK = " †", " ‡"
FIRST_STEP = {REFERENCE: 1}  # where steps do not count from 0
DIFFERS = {  # column that is shown, or row of a table → what it measures in the reference's files
    "response_length_mean": "lengths count padding: they are the width of the generated batch",
    "entropy": "the entropy is over all positions, those of the prompt and of padding too",
    "minutes": "minutes are from the start to the last row",
}
LEFT_OUT = {  # columns → why they are not compared
    ("reward_mean", "reward_std", "reward_min", "reward_max"): "reward_* are in score units, and "
    "not normalised",
    ("approx_kl",): "approx_kl is k1 of per-sequence means",
    ("response_length_std",): "response_length_std is 0 whatever the lengths",
}
ALSO = "timestamp counts from the start"


def metrics_file(path: Path) -> Path | None:
    """Returns the CSV file of a run that is known by its metrics alone; None for our own runs.

    Raises InputError if a directory holds several such files.
    """
    if path.suffix == ".csv" and not path.is_dir():
        if not path.is_file():
            raise InputError(f"report.runs: {path}: no such file")
        return path
    if not path.is_dir() or (path / "metrics.csv").exists():
        return None
    files = sorted(path.glob("*_metrics.csv"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise InputError(
            f"report.runs: {path} holds the metrics of several runs ({names}): "
            f"give them one by one, as NAME={files[0]}"
        )
    return files[0] if files else None


def summary_file(metrics: Path) -> Path:
    """Returns where the summary lies that belongs to NAME_metrics.csv."""
    return metrics.with_name(metrics.name.removesuffix("metrics.csv") + "summary.json")


def origin_of(columns: Iterable[str]) -> str:
    """Returns which program wrote a metrics file: `OURS`, `REFERENCE` or `OTHER`."""
    names = set(columns)
    if OWN_COLUMN in names:
        return OURS
    return REFERENCE if REFERENCE_COLUMN in names else OTHER


def is_compared(origin: str, column: str) -> bool:
    """Returns whether a column may stand beside ours."""
    return origin != REFERENCE or not any(column in names for names in LEFT_OUT)


def differs(origin: str, column: str) -> bool:
    """Returns whether a column that is shown measures something else than ours."""
    return origin == REFERENCE and column in DIFFERS


def notes(origins: Mapping[str, str], columns: Iterable[str] = ()) -> list[str]:
    """Returns what the marks at runs, by name, and at `columns` that are shown mean, in short."""
    found = []
    reference, other = ([n for n, o in origins.items() if o == of] for of in (REFERENCE, OTHER))
    if reference:
        measures = "; ".join(DIFFERS[column] for column in columns)
        found.append(
            f"† {', '.join(reference)}: recorded by the reference implementation. A row is of the "
            "responses of process 0 alone (two, at its default batch size), not of all responses "
            "of a step." + (f" ‡ Measured differently: {measures}." if measures else "")
        )
    if other:
        found.append(
            f"† {', '.join(other)}: metrics of another program. What its columns mean, over which "
            "responses they are means and where its steps start is not known here."
        )
    return found


def further_notes(unrecorded: Iterable[str]) -> list[str]:
    """Returns what else a reader of the reference's runs has to know; `unrecorded` are titles."""
    absent = "; ".join(unrecorded)
    return [
        "Steps of the reference count from 1 and are shown from 0, as ours. Which reward model "
        "gave its scores is not recorded: they compare with others only if it is the same."
        + (f" Not recorded: {absent}." if absent else ""),
        "Columns of the reference that are not shown, because they differ from ours: "
        f"{'; '.join([*LEFT_OUT.values(), ALSO])}.",
    ]
