"""The matrix of shortcuts, from the files that studies write."""

import sys

import pytest

from benchmarks import shortcut_matrix
from configs import demo
from pipeline.study_records import SeedOutcome, study_options, write_record
from sarm_jax.io.json_files import write_json


def run(seed: int, **last: float) -> dict:
    """Returns what lab.json has of a run, as far as the matrix reads it."""
    return {"seed": seed, "gold_final": 0.1 * seed, "curve": [{"step": 0}, {"step": 4, **last}]}


def write_study(folder, told: str, conditions: dict, gains: dict) -> str:
    """Writes the files of a study that has ended."""
    config = demo.get_config()
    config.lab.told_shortcuts = told
    for result in conditions["penalty"]:
        path = folder / f"seed_{result['seed']}"
        path.mkdir(parents=True)
        write_record(path, study_options(config.to_dict()), SeedOutcome(["penalty"]))
    write_json(folder / "lab.json", {"conditions": conditions, "evading_gain": gains})
    return str(folder)


def printed(capsys, monkeypatch, *studies: str) -> list[list[str]]:
    """Returns the cells of all rows that the script prints."""
    monkeypatch.setattr(sys, "argv", ["shortcut_matrix", *studies])
    shortcut_matrix.main()
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line]


def test_the_matrix_by_hand(tmp_path, capsys, monkeypatch):
    first = {
        "baseline": [run(1, rate_echo=0.9, rate_praise=0.2)],
        "penalty": [  # the baseline of seed 2 has stopped
            run(1, rate_echo=0.1, rate_praise=0.7, told_undetected=0.04),
            run(2, rate_echo=0.3, rate_praise=0.9, told_undetected=0.5),
        ],
    }
    again = {
        "baseline": [run(3, rate_echo=0.5, rate_praise=0.5)],
        "penalty": [run(3, rate_echo=0.5, rate_praise=0.25, told_undetected=0.0)],
    }
    studies = [
        write_study(tmp_path / "first", "echo", first, {"1": -1.5, "2": None}),
        write_study(tmp_path / "again", "echo", again, {}),
    ]
    rows = printed(capsys, monkeypatch, *studies)
    assert rows[0] == ["told", "seeds", "final gold", "echo", "praise"]
    assert rows[2][:2] == ["echo", "2"] and rows[3][:2] == ["echo", "1"]
    assert rows[2][3].startswith("0.10: -0.80") and rows[2][4].startswith("0.70: +0.50")
    assert rows[3][3].startswith("0.50: +0.00") and rows[3][4].startswith("0.25: -0.25")
    assert rows[6:] == [
        ["echo", "1", "-1.50", "0.040"],
        ["echo", "2", "no pool, or none in it", "0.500"],
        ["echo", "3", "no pool, or none in it", "0.000"],
    ]


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ({}, "penalty has no rate, expected rate_echo"),
        ({"rate_praise": 0.1}, "penalty has rate_praise, expected rate_echo"),
    ],
)
def test_studies_of_other_shortcuts_are_refused(tmp_path, capsys, monkeypatch, rates, found):
    studies = [
        write_study(
            tmp_path / name, name, {"penalty": [run(1, told_undetected=0.0, **own)]}, {"1": 0.0}
        )
        for name, own in (("echo", {"rate_echo": 0.1}), ("praise", rates))
    ]
    with pytest.raises(SystemExit, match="2"):
        printed(capsys, monkeypatch, *studies)
    assert f"the study told of praise: {found}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        printed(capsys, monkeypatch, str(tmp_path / "none"))
    assert f"{tmp_path}/none: has no seed_*/study.json" in capsys.readouterr().err
