"""Runs of which only the metrics exist, and the meaning of their columns.

The reference implementation records a run as NAME_metrics.csv and, when it has finished,
NAME_summary.json. Some of its columns have the same name as ours and another meaning. The report
marks those that it shows and leaves out those that would mix units; `notes` explains both.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sarm_jax.io.errors import InputError

OURS, REFERENCE, OTHER = "ours", "reference", "other"
OWN_COLUMN, REFERENCE_COLUMN = "ref_kl", "gpu_memory_gb"  # columns that only one program writes
RUN_MARK, CELL_MARK = " †", " ‡"
FIRST_STEP = {REFERENCE: 1}  # number of the first step, if it is not 0
DIFFERS = {  # column that is shown, or row of a table → its meaning in the reference's files
    "response_length_mean": "lengths count padding: they are the width of the generated batch",
    "entropy": "the entropy is over all positions, including the prompt and padding",
    "minutes": "minutes are from the start to the last row",
}
LEFT_OUT = {  # columns → why they are not compared
    ("reward_mean", "reward_std", "reward_min", "reward_max"): "reward_* are in score units, and "
    "not normalised",
    ("approx_kl",): "approx_kl is k1 of per-sequence means",
    ("response_length_std",): "response_length_std is always 0",
}
TIMESTAMP_NOTE = "timestamp counts from the start"


def metrics_file(path: Path) -> Path | None:
    """Returns the CSV file of a run of which only the metrics exist; None for our own runs.

    Raises:
        InputError: the file does not exist, or a directory holds several such files.
    """
    if path.suffix == ".csv" and not path.is_dir():
        if not path.exists():
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
    """Returns the path of the summary that belongs to NAME_metrics.csv."""
    return metrics.with_name(metrics.name.removesuffix("metrics.csv") + "summary.json")


def origin_of(columns: Iterable[str]) -> str:
    """Returns which program wrote a metrics file: `OURS`, `REFERENCE` or `OTHER`."""
    names = set(columns)
    if OWN_COLUMN in names:
        return OURS
    return REFERENCE if REFERENCE_COLUMN in names else OTHER


def is_compared(origin: str, column: str) -> bool:
    """Returns whether the report shows a column: it means the same as ours, or is marked."""
    return origin != REFERENCE or not any(column in names for names in LEFT_OUT)


def differs(origin: str, column: str) -> bool:
    """Returns whether a column that is shown has another meaning than ours."""
    return origin == REFERENCE and column in DIFFERS


def notes(origins: Mapping[str, str], columns: Iterable[str] = ()) -> list[str]:
    """Returns footnotes on the marks of runs and columns.

    Args:
        origins: the program that recorded each run, by name of the run.
        columns: the marked columns that are shown.
    """
    footnotes = []
    reference = [name for name, origin in origins.items() if origin == REFERENCE]
    other = [name for name, origin in origins.items() if origin == OTHER]
    if reference:
        measures = "; ".join(DIFFERS[column] for column in columns)
        footnotes.append(
            f"† {', '.join(reference)}: recorded by the reference implementation. A row covers "
            "the responses of process 0 alone (two, at its default batch size), not all responses "
            "of a step." + (f" ‡ Measured differently: {measures}." if measures else "")
        )
    if other:
        footnotes.append(
            f"† {', '.join(other)}: metrics of another program. The meaning of its columns, the "
            "responses that they average over and the number of its first step are not known."
        )
    return footnotes


def further_notes(unrecorded: Iterable[str]) -> list[str]:
    """Returns further footnotes on the reference's runs.

    Args:
        unrecorded: titles of the measures that the runs do not record.
    """
    absent = "; ".join(unrecorded)
    return [
        "Steps of the reference count from 1 and are shown from 0, as ours. Which reward model "
        "gave its scores is not recorded: they are comparable with others only if it is the same."
        + (f" Not recorded: {absent}." if absent else ""),
        "Columns of the reference that are not shown, because they differ from ours: "
        f"{'; '.join([*LEFT_OUT.values(), TIMESTAMP_NOTE])}.",
    ]
