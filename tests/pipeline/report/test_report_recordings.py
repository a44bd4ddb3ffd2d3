"""Runs of other programs in a report beside our own."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from configs import base
from pipeline.report import curves, tables
from pipeline.report.page import ReportConfig, write_report
from pipeline.report.recordings import DIFFERS
from pipeline.report.runs import read_run
from pipeline.report.sections import run_sections
from pipeline.runner import run_stages
from pipeline.stage import load
from sarm_jax.io.errors import InputError
from sarm_jax.io.workdir import named_workdirs
from tests.report_runs import write_recording, write_run

TWO_RESPONSES = "A row covers the responses of process 0 alone (two, at its default batch size)"


@pytest.fixture
def runs(tmp_path):
    """Two runs of the reference, the second without penalties, and one of our own."""
    write_recording(tmp_path / "full", "full")
    write_recording(tmp_path / "base", "base", features=())
    folders = {name: tmp_path / name for name in ("full", "base")} | {
        "own": write_run(tmp_path / "own")
    }
    return [
        read_run(name, folder, position) for position, (name, folder) in enumerate(folders.items())
    ]


def sections(runs):
    """Returns all sections by their anchors; drawing them takes seconds."""
    return {part.anchor: part for part in run_sections(runs)}


def column_of(table, title: str) -> dict[str, str]:
    """Returns the cells of a column by the names of the rows."""
    column = list(table.header).index(title)
    return {row[0]: row[column] for row in table.rows}


@pytest.mark.parametrize("given", ["full", "full/full_metrics.csv"])
def test_a_recorded_run_is_read_with_steps_from_0(tmp_path, given):
    path = write_recording(tmp_path / "full", "full", steps=20)
    run = read_run("full", tmp_path / given)
    assert run.steps == 20 and run.column("step").tolist() == list(range(20))
    lines = [line.split(",") for line in path.read_text().splitlines()]
    for name in ("total_reward", "indicator_penalty", "feat_48_above_tau", "feat_28_activation"):
        recorded = [float(line[lines[0].index(name)]) for line in lines[1:]]
        np.testing.assert_array_equal(run.column(name), recorded)
    assert run.features == (48, 28) and run.alphas is None and run.title == "full †"
    assert run.seconds == 240.0 and not run.missing


def test_columns_with_another_meaning_are_left_out(runs):
    full, _, own = runs
    for name in ("reward_mean", "reward_std", "reward_min", "reward_max", "approx_kl"):
        assert not full.has(name) and own.has(name)
    assert not full.has("response_length_std")  # it is always 0 and would look like a band


def test_missing_measures_are_dashes_and_different_ones_are_marked(runs):
    table = tables.glance(runs)
    assert list(table.header) == ["", "full †", "base †", "own"]
    cells, own = column_of(table, "full †"), column_of(table, "own")
    for title in ("KL to the reference, nats", "share that ended", "discriminator accuracy"):
        assert cells[title] == "–" and own[title] != "–"
    assert cells["R_SARM"] == "−0.100 → −0.100" and cells["latent KL, β · D"] == "0 → 0"
    assert cells["length, tokens"] == "256 → 256 ‡" and cells["minutes"] == "4.00 ‡"
    marked = {title for title, cell in cells.items() if "‡" in cell}
    assert marked == {tables.GLANCE.get(name, name) for name in DIFFERS}
    assert not any("‡" in cell or "†" in cell for cell in own.values())


def test_a_run_without_times_has_no_minutes(tmp_path):
    (tmp_path / "x_metrics.csv").write_text("step,total_reward,rm_score\n10,-0.1,-0.1\n11,0,0\n")
    run = read_run("x", tmp_path)
    assert np.isnan(run.seconds)
    assert column_of(tables.glance([run]), "x †")["minutes"] == "–"


def test_our_own_runs_look_the_same_beside_recorded_ones(runs):
    own = runs[-1]
    parts = sections([own])
    for anchor in ("glance", "reward", "goodhart", "features", "length"):
        alone = parts[anchor]
        assert not alone.footnotes and not any("†" in picture.caption for picture in alone.pictures)
    alone = column_of(tables.glance([own]), "own")
    assert column_of(tables.glance(runs), "own") == alone
    assert tables.options(runs) == tables.options([own])
    assert tables.options(runs[:2]) is None


def test_the_notes_name_what_is_not_comparable(runs):
    parts = sections(runs)
    glance = parts["glance"]
    text = " ".join(glance.footnotes)
    for part in (
        "† full, base: recorded by the reference implementation",
        TWO_RESPONSES,
        "Steps of the reference count from 1 and are shown from 0",
        "Which reward model gave its scores is not recorded",
        "lengths count padding",
        "the entropy is over all positions",
        "Not recorded: KL to the reference, nats; share that ended; discriminator accuracy.",
        "reward_* are in score units, and not normalised",
        "approx_kl is k1 of per-sequence means",
        "timestamp counts from the start",
    ):
        assert text.count(part) == 1, part
    assert not glance.notes
    for anchor in ("reward", "features", "length"):
        assert TWO_RESPONSES in " ".join(parts[anchor].footnotes)
    assert "full: α is not recorded, so the penalties" in " ".join(parts["reward"].notes)
    assert "full: τ is not recorded" in " ".join(parts["features"].notes)
    (note,) = parts["goodhart"].notes
    assert note == "full, base: the KL to the reference policy is not recorded."


def test_the_terms_of_a_recorded_reward_add_up(runs):
    full, base, own = runs
    assert list(curves.terms(full)) == ["R_total", "R_SARM", "− penalties"]
    assert list(curves.terms(base)) == ["R_total", "R_SARM"]
    for run in (full, base):
        terms = curves.terms(run)
        np.testing.assert_allclose(sum(terms.values()), 2 * terms["R_total"], atol=1e-12)
    assert "− β · D" in curves.terms(own)


def test_rewards_of_different_programs_have_separate_scales(runs, monkeypatch):
    limits = []
    monkeypatch.setattr(curves, "by_step", lambda axes, **options: limits.append(options["ylim"]))
    curves.reward_terms(runs)
    full, base, own = limits[::2]  # each is drawn twice, light and dark
    assert full == base != own


def test_lengths_with_padding_have_no_band_and_a_note(runs, monkeypatch):
    bands = []
    monkeypatch.setattr(Axes, "fill_between", lambda *_, **__: bands.append(1))
    picture = sections(runs)["length"].pictures[0]
    assert len(bands) == 2  # of our run, light and dark
    assert picture.caption.endswith("† measured differently: lengths count padding: they are the "
                                    "width of the generated batch")  # fmt: skip
    assert "full † 256 → 256" in picture.alt


def test_a_page_of_only_recorded_runs(tmp_path):
    path = write_recording(tmp_path / "full", "full")
    out = tmp_path / "out"
    out.mkdir()
    write_report(ReportConfig(f"{tmp_path / 'full'},again={path}", samples=5), out)
    page = html.unescape((out / "report.html").read_text(encoding="utf-8"))
    notes = re.findall(r'<p class="missing">(.*?)</p>', page)
    # No note offers a command for a run that is not ours.
    assert not any(f"--workdir={tmp_path / 'full'}" in note for note in notes)
    assert not any("finite" in note for note in notes)
    assert page.count(TWO_RESPONSES) == 4 and "full †: penalised features" in page
    names = {path.stem for path in (out / "figures").iterdir()}
    assert {"reward_full", "reward_again", "above_tau_full", "response_length_mean"} <= names
    assert not {"goodhart", "eos_fraction", "disc_acc"} & names


def test_an_unfinished_recording_has_a_note(tmp_path):
    path = write_recording(tmp_path, "cut", steps=7)
    summary = tmp_path / "cut_summary.json"
    content = json.loads(summary.read_text())
    summary.write_text(json.dumps(content | {"total_steps": 50}))
    assert read_run("cut", tmp_path).missing == ("cut: 7 of 50 steps are recorded.",)
    summary.unlink()
    (note,) = read_run("cut", tmp_path).missing
    assert note == "cut: no cut_summary.json, so the run may not have finished."
    with path.open("a") as file:
        file.write("8,96.0,-0.1")  # an incomplete row
    assert read_run("cut", tmp_path).steps == 7
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert f"{path} has no finished step." in read_run("cut", path).missing


def test_metrics_of_an_unknown_program_have_a_note(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,total_reward,rm_score,penalty,loss\n10,-0.2,-0.1,0.1,0.03\n11,0,0,0,0\n")
    run = read_run("log", path)
    assert run.column("step").tolist() == [10, 11] and run.title == "log †"
    parts = sections([run])
    (note,) = parts["glance"].footnotes
    assert "† log: metrics of another program" in note and "not known" in note
    (picture,) = parts["reward"].pictures
    assert picture.caption == "log †: the reward and the terms that are recorded"


def test_our_metrics_without_the_other_files_of_the_run(tmp_path):
    own = write_run(tmp_path / "own")
    run = read_run("own", own / "metrics.csv")
    assert run.title == "own" and run.column("step")[0] == 0 and run.has("ref_kl")
    assert tables.glance([run]).rows == tables.glance([read_run("own", own)]).rows


def test_the_references_columns_are_marked_whatever_the_file_name(tmp_path):
    path = write_recording(tmp_path, "full")
    path.rename(tmp_path / "metrics.csv")
    assert read_run("full", tmp_path).title == "full †"


def test_names_of_recorded_runs(tmp_path):
    text = "a/full_method_metrics.csv,a/log.csv,tau 2=b/x_metrics.csv,c"
    names = named_workdirs(text, tmp_path, "report.runs")
    assert list(names) == ["full_method", "log", "tau 2", "c"]
    with pytest.raises(InputError, match="two runs are called 'full'"):
        named_workdirs("a/full_metrics.csv,b/full_metrics.csv", tmp_path, "report.runs")


@pytest.mark.parametrize("given", ["{0}/full", "my run={0}/full/full_metrics.csv", "full"])
def test_an_edited_recording_makes_the_report_out_of_date(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    path = write_recording(Path("full"), "full", steps=4)
    Path("full", "adapter_model.safetensors").write_text("weights")
    config, out = base.get_config(), tmp_path / "out"
    out.mkdir()
    config.prompts_jsonl = "asked"
    config.report.runs = given.format(tmp_path)
    assert load("report").wanted(config)

    def outcome() -> str:
        return run_stages(config, out, [load("report")])[0].action

    assert outcome() == "done"
    Path("full", "adapter_model.safetensors").write_text("others")  # the report does not read it
    assert outcome() == "up to date"
    text = path.read_text()
    path.write_text(text.replace("-0.1", "-0.3"))
    assert "full_metrics.csv has changed" in outcome()
    assert outcome() == "up to date"
    if ".csv" not in given:
        summary = Path("full", "full_summary.json")
        summary.write_text(summary.read_text().replace('"total_steps": 4', '"total_steps": 9'))
        assert "full_summary.json has changed" in outcome()
