"""The report: its inputs, its notes on missing files, and the data in the page."""

import base64
import dataclasses
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report import curves, tables
from pipeline.report.evaluations import read_evaluation
from pipeline.report.numbers import change, estimate, number
from pipeline.report.page import ReportConfig, write_report
from pipeline.report.pictures import file_name, label, smooth
from pipeline.report.runs import ends, read_run
from pipeline.report.samples import SHOWN_TERMS, browser_rows, pairs_of
from ppo.tracking.metrics import COLUMNS, summarise
from sarm_jax.io.errors import InputError
from sarm_jax.io.workdir import named_workdirs
from sarm_jax.reporting.plotting import by_step
from tests.command import run_main
from tests.evaluations import evaluation_of
from tests.report_runs import (
    ALPHAS,
    FEATURES,
    HOSTILE,
    NAMES,
    SIGMA,
    write_evaluation,
    write_feature_pages,
    write_lines,
    write_run,
)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Returns the directory of a report on two runs, with an evaluation of its own."""
    root = tmp_path_factory.mktemp("report")
    write_run(root / "penalty")
    write_run(root / "free", controls=False, seed=1)
    workdir = write_feature_pages(write_evaluation(root / "both"))
    runs = f"{root / 'penalty'},reward model alone={root / 'free'}"
    assert write_report(ReportConfig(runs, samples=12), workdir) == workdir / "report.html"
    return workdir


@pytest.fixture
def stage(tmp_path):
    """Returns a function that runs the stage from the command line and returns its exit code."""

    def call(*options: str, workdir=tmp_path / "out") -> int:
        arguments = [f"--config.report.{option}" for option in options]
        config = "--config=configs/base.py"
        return run_main(config, "--stage=report", f"--workdir={workdir}", *arguments)

    return call


class Page(HTMLParser):
    """The elements of a page with their attributes, and the texts of script and style."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag in ("script", "style")
        if self._inside:
            self.texts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.texts[-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag]


def read_page(workdir) -> tuple[str, Page]:
    text = (workdir / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def page_rows(workdir) -> list[dict]:
    _, page = read_page(workdir)
    return json.loads(page.texts[1])["rows"]


def notes_of(workdir) -> str:
    text, _ = read_page(workdir)
    return html.unescape(" ".join(re.findall(r'<p class="missing">(.*?)</p>', text)))


def test_the_page_has_every_section_and_is_self_contained(report):
    text, page = read_page(report)
    anchors = {a["href"][1:] for a in page.all("a")}
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    expected = "glance reward goodhart features length discriminator distributions latents policy"
    assert (
        anchors <= ids
        and {*expected.split(), "rm_bench", "steering", "feature_pages", "samples"} <= anchors
    )
    assert 'class="missing"' not in text.split('id="samples"')[0].split("</style>")[1]
    pictures = page.all("img")
    assert len(pictures) == len(page.all("source")) == len(list((report / "figures").iterdir()))
    assert all(len(picture["alt"]) > 30 for picture in pictures)
    for attrs in (attrs for _, attrs in page.elements):
        for name in ("src", "srcset", "href", "action"):
            assert attrs.get(name, "#").startswith(("data:", "#"))
        assert not any(name.startswith("on") or name == "style" for name in attrs)


def test_the_guards_warnings_are_shown_with_their_run(report):
    text, _ = read_page(report)
    glance = text.split('id="glance"')[1].split("</section>")[0]
    table = glance.split("<caption>Warnings of the guards</caption>")[1].split("</table>")[0]
    (row,) = re.findall("<tr>(.*)</tr>", table.split("<tbody>")[1])
    cells = [html.unescape(cell) for cell in re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row)]
    assert cells == ["reward model alone", "no_eos", "7", "3", HOSTILE[0]]


@pytest.mark.parametrize(
    ("warnings", "kept"), [(5, []), ("x", []), (None, []), ({"guard": 1}, []), ([1, {}], [{}])]
)
def test_warnings_in_another_structure_are_ignored(tmp_path, warnings, kept):
    folder = write_run(tmp_path / "run")
    (folder / "summary.json").write_text(json.dumps({"warnings": warnings}))
    assert read_run("run", folder).warnings == kept


def test_figures_are_also_written_to_files(report):
    _, page = read_page(report)
    shown = {base64.b64decode(p["src"].split(",")[1]) for p in page.all("img")}
    files = {path.read_bytes() for path in (report / "figures").glob("*.png")}
    assert shown == files and all(content.startswith(b"\x89PNG") for content in files)
    names = {path.stem for path in (report / "figures").iterdir()}
    assert {"goodhart", "reward_penalty", "reward_reward-model-alone", "disc_loss"} <= names
    assert {"above_tau_penalty", "activation_penalty", "latent_map_both"} <= names


def test_the_content_policy_allows_only_its_own_style_and_script(report):
    _, page = read_page(report)
    style, _, script = page.texts
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    for kind, text in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert "http" not in policy and "img-src data:;" in policy


def test_hostile_text_is_embedded_as_escaped_json(report):
    text, page = read_page(report)
    assert len(page.texts) == 3 and text.count("<script") == text.count("</script>") == 2
    data = text[text.index('id="data">') : text.index("</script>")]
    assert data.isascii() and not re.search(r"[<>&]", data.removeprefix('id="data">'))
    prompts = {row["prompt"] for row in page_rows(report)}
    assert all(any(prompt.endswith(attack) for prompt in prompts) for attack in HOSTILE)
    assert NAMES[1] not in text and html.escape(NAMES[1], quote=False)[:16] in text


def test_the_terms_on_the_page_add_up_to_the_scores(report):
    sides = [r[s] for r in page_rows(report) for s in ("before", "after") if r[s]]
    explained = [side for side in sides if side["terms"] is not None]
    assert len(explained) >= 40
    for side in explained:
        assert len(side["terms"]) == SHOWN_TERMS
        sizes = [abs(term[3]) for term in side["terms"]]
        assert sizes == sorted(sizes, reverse=True)
        assert math.fsum([t[3] for t in side["terms"]] + [side["rest"]]) == pytest.approx(
            side["score"], rel=1e-9, abs=1e-12
        )
        for _, z, w, part in side["terms"]:
            assert z * w == pytest.approx(part, rel=1e-9)


def test_samples_are_evenly_spaced_and_counted(report, tmp_path):
    rows = page_rows(report)
    counts = {name: sum(row["run"] == name for row in rows) for name in {r["run"] for r in rows}}
    assert counts == {NAMES[0]: 12, NAMES[1]: 12, "reward model alone": 5}
    first = [int(r["prompt"].split()[1].strip(":")) for r in rows if r["run"] == NAMES[0]]
    assert first == [round(29 * i / 11) for i in range(12)]
    text, _ = read_page(report)
    assert "29 of 65 rows, evenly spaced" in text
    run = read_run("penalty", write_run(tmp_path / "penalty"))
    assert len(browser_rows(pairs_of([run], []), 0)) == len(HOSTILE)


def test_without_an_evaluation_the_runs_own_responses_are_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    pairs = pairs_of([read_run("run", folder)], [])
    assert [pair.before["text"].startswith("after 0") for pair in pairs] == [True] * len(HOSTILE)
    assert pairs[0].after["score"] == 5.0 and pairs[0].after["terms"] is None
    assert pairs[1].after["ended"] is False and pairs[0].after["penalties"]["3"] == SIGMA
    (folder / "evaluations.jsonl").unlink()
    pairs = pairs_of([read_run("run", folder)], [])
    assert len(pairs) == 12 and pairs[3].before is None and pairs[3].origin == "sampled at step 3"


def test_each_penalty_by_hand(tmp_path):
    run = read_run("run", write_run(tmp_path / "run"))
    penalties = run.penalties()
    for feature, alpha in zip(FEATURES, ALPHAS, strict=True):
        expected = SIGMA * alpha * run.column(f"feat_{feature}_above_tau")
        np.testing.assert_allclose(penalties[feature], expected, rtol=1e-12)
    np.testing.assert_allclose(sum(penalties.values()), run.column("indicator_penalty"), rtol=1e-12)
    terms = curves.terms(run)
    total = terms.pop("R_total")
    np.testing.assert_allclose(sum(terms.values()), total, rtol=1e-12)


def test_the_goodhart_plot_counts_steps_beyond_its_edge(tmp_path):
    run = read_run("run", write_run(tmp_path / "run"))
    assert "beyond" not in curves.goodhart([run]).caption
    kl_t = run.column("ref_kl").copy()
    kl_t[4], kl_t[5] = 700.0, np.nan
    picture = curves.goodhart([dataclasses.replace(run, column_t=run.column_t | {"ref_kl": kl_t})])
    assert picture.caption.endswith("Steps beyond the right edge: 1")


@pytest.mark.parametrize(("count", "title"), [(3, "mean and one sd"), (4, "mean")])
def test_bands_of_many_runs_are_left_out(stage, tmp_path, monkeypatch, count, title):
    bands = []
    monkeypatch.setattr(Axes, "fill_between", lambda *_, **__: bands.append(1))
    folders = [write_run(tmp_path / f"run{n}") for n in range(count)]
    assert stage(f"runs={','.join(map(str, folders))}") == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"Response length, {title}.</figcaption>" in page
    assert len(bands) == (2 * count if count == 3 else 0)  # light and dark


def test_ticks_are_whole_steps():
    axes = Figure().subplots()
    axes.plot(range(18), range(18))
    by_step(axes, ylabel="tokens")
    ticks = axes.get_xticks()
    assert (ticks == np.round(ticks)).all() and len(ticks) > 3
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("PPO step", "tokens")


def test_runs_of_different_reward_models_are_not_compared(stage, tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    for folder, model in zip(folders, ("one", "two", "two"), strict=True):
        options = json.loads((folder / "config.json").read_text()) | {"sarm_model": model}
        (folder / "config.json").write_text(json.dumps(options))
    for chosen, differ in ((folders[:2], True), (folders[1:], False)):
        assert stage(f"runs={','.join(map(str, chosen))}") == 0
        assert ("The reward models differ (one, two)" in notes_of(tmp_path / "out")) == differ


def test_start_and_end_of_a_short_run_do_not_overlap():
    assert ends(np.arange(3.0)) == (0.0, 2.0)
    assert ends(np.arange(8.0)) == (1.5, 5.5)
    assert ends(np.arange(20.0)) == (2.0, 17.0)
    rows = [dict.fromkeys(COLUMNS, float(step)) for step in range(3)]
    summary = summarise(rows, 0.0, 2.0)
    assert summary["total_reward_change_in_sd"] == 1.0  # from 0 to 2


def test_a_clamped_score_is_labelled(stage, tmp_path):
    folder = write_run(tmp_path / "run")
    options = json.loads((folder / "config.json").read_text())
    assert list(curves.terms(read_run("run", folder)))[1] == "R_SARM"
    options["reward"]["clamp_features"] = "7"
    (folder / "config.json").write_text(json.dumps(options))
    assert list(curves.terms(read_run("run", folder)))[1] == "R_SARM(clamp z)"
    assert stage(workdir=folder) == 0
    assert "run: R_SARM is the score of the clamped latents" in notes_of(folder)


def test_tables_of_several_evaluations_are_named(stage, tmp_path):
    for name in ("one", "two"):
        write_evaluation(write_run(tmp_path / name), prompts=3)
    out = tmp_path / "out"
    assert stage(f"runs={tmp_path}/one,{tmp_path}/two", workdir=out) == 0
    text, _ = read_page(out)
    for name in ("one", "two"):
        assert f"{name}: RM-Bench: accuracy" in text and f"{name}: Steering: score before" in text


def test_options_that_name_files(tmp_path):
    folder = write_run(tmp_path / "outputs" / "run")
    options = json.loads((folder / "config.json").read_text())
    options["reward"]["tau_values"] = "@outputs/lists.json:taus"
    options["reward"]["alpha_values"] = "@outputs/gone.json:alphas"
    (folder / "config.json").write_text(json.dumps(options))
    (tmp_path / "outputs" / "lists.json").write_text(json.dumps({"taus": [0.3, 0.6]}))
    run = read_run("run", folder)  # started in tmp_path, read from another directory
    assert run.taus == (0.3, 0.6) and run.alphas is None and run.penalties() is None
    assert list(curves.terms(run)) == ["R_total", "R_SARM", "− penalties", "− β · D"]


def test_options_younger_than_a_run_do_not_make_a_difference(tmp_path):
    runs = [read_run(name, write_run(tmp_path / name)) for name in "ab"]
    runs[1].options["reward"] |= {"ensemble": "mean", "screen": False}  # as before these options
    assert tables.options(runs) is None
    runs[1].options["reward"]["screen"] = True
    assert tables.options(runs).rows == [["reward.screen", "False", "True"]]


def test_the_report_says_what_stopped_a_run(stage, tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"steps": 3, "total_steps": 20, "stopped": "guards.stop (no_eos)"}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert stage(workdir=folder) == 0
    sentence = f"{folder} was stopped by guards.stop (no_eos) after 3 of 20 steps."
    assert sentence in notes_of(folder)


def test_the_report_names_missing_files_of_an_interrupted_run(stage, tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    (folder / "summary.json").unlink()
    (folder / "evaluations.jsonl").unlink()
    (folder / "samples.jsonl").write_text("")
    with (folder / "metrics.csv").open("a") as file:
        file.write("3,17.5,0.1")  # an incomplete row
    assert stage(workdir=folder) == 0
    notes = notes_of(folder)
    train = f"python main.py --config=CONFIG --stage=train --workdir={folder}"
    assert (
        f"no summary.json: the run did not finish, and only its log has its warnings; {train}"
        in notes
    )
    assert f"an empty samples.jsonl; {train} makes it" in notes
    evaluate = f"python main.py --config=CONFIG --stage=evaluate --workdir={folder}"
    assert f"There is no eval/rm_bench.json; {evaluate}" in notes
    assert f"There is no eval/latent_map.json; {evaluate}" in notes
    assert "No run has samples yet" in notes
    assert read_run("run", folder).steps == 3


def test_a_run_that_became_non_finite_is_shown_with_a_note(stage, tmp_path):
    folder = write_run(tmp_path / "run", steps=4)
    lines = (folder / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    cells = [line.split(",") for line in lines]
    for row, value in ((3, "nan"), (4, "inf")):
        cells[row][names.index("rm_score")] = value
        cells[row][names.index("total_reward")] = value
    (folder / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in cells))
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    write_lines(folder / "samples.jsonl", [sample | {"rm_score": math.nan}])
    (folder / "evaluations.jsonl").unlink()
    assert stage(workdir=folder) == 0
    assert "run: rm_score is not a finite number at 2 of 4 steps, first at step 2." in notes_of(
        folder
    )
    (row,) = page_rows(folder)
    assert row["after"]["score"] is None


def test_an_empty_and_a_missing_metrics_file(stage, tmp_path):
    folder = write_run(tmp_path / "run")
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    (folder / "metrics.csv").write_text(header + "\n")
    assert stage(workdir=folder) == 0
    assert "a metrics.csv without a finished step" in notes_of(folder)
    (folder / "metrics.csv").unlink()
    assert stage(workdir=folder) == 0
    assert "has no metrics.csv; python main.py" in notes_of(folder)
    assert len(page_rows(folder)) == len(HOSTILE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: r.update(rest=r["rest"] + 0.01), "responses.jsonl:2: base: the terms and the"),
        (lambda r: r["terms"][0].__setitem__(1, 99.0), "is not z·w"),
        (lambda r: r["terms"].append([1, 2]), r"a term must be \[feature, z, w, z·w\]"),
        (lambda r: r.pop("score"), "field 'score' must be a number"),
        (lambda r: r.pop("response"), "field 'response' must be str"),
        (lambda r: r.update(rest=None), "field 'rest' must be a number"),
    ],
)
def test_an_explanation_that_does_not_add_up_is_refused(tmp_path, damage, message):
    folder = write_evaluation(tmp_path, prompts=3)
    path = folder / "eval" / "responses.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    damage(rows[1]["responses"]["base"])
    write_lines(path, rows)
    with pytest.raises(InputError, match=message):
        read_evaluation("x", folder)


def test_names_of_runs(tmp_path):
    assert named_workdirs("", tmp_path / "own", "report.runs") == {"own": tmp_path / "own"}
    runs = named_workdirs("a/b, full method=c=d/e", tmp_path, "report.runs")
    assert {name: str(path) for name, path in runs.items()} == {"b": "a/b", "full method=c": "d/e"}


def test_features_have_tables_and_inactive_ones_are_only_named(tmp_path):
    policy_tables = tables.policy(read_evaluation("both", write_evaluation(tmp_path)))
    rows = {table.caption: [row[0] for row in table.rows] for table in policy_tables}
    means = "Held-out prompts: means with 95 % intervals"
    paired = "The same, minus base, paired by prompt"
    active, latent = "share of responses with z above 0", "mean z"
    assert rows == {
        means: ["R_SARM", "length, tokens"],
        f"{means}: {active}; 0 everywhere: feature 3": ["feature 7"],
        f"{means}: {latent}; 0 everywhere: feature 3": ["feature 7"],
        paired: ["R_SARM", "length, tokens"],
        f"{paired}: {active}; 0 everywhere: feature 3": ["feature 7"],
        f"{paired}: {latent}; 0 everywhere: feature 3": ["feature 7"],
    }


def test_benchmarks_in_either_layout():
    level = {"easy": 0.8, "normal": 0.7, "hard": 0.5, "average": 0.667}
    matrix = {"matrix": [[0.7, 0.5, 0.4], [0.8, 0.7, 0.6], [0.9, 0.8, 0.7]]}
    flat = {"without_controls": level | matrix | {"domains": {}}, "with_controls": level | matrix}
    deep = {
        "rows": 9,
        "variants": {"plain": {"overall": level | matrix}, "controlled": {"overall": level}},
    }
    for content, squares in ((flat, 2), (deep, 1)):
        result = tables.rm_bench(evaluation_of(rm_bench=content))
        assert result[0].header == ["", "easy", "normal", "hard", "average"]
        assert result[0].rows[0] == ["without controls", "0.800", "0.700", "0.500", "0.667"]
        assert result[1].rows[0][1:] == ["0.700", "0.500", "0.400"] and len(result) == 1 + squares
    flat = {"without_controls": {"subsets": {"Focus": 0.25}, "average": 0.25}}
    score = {"mean": 0.25, "low": None, "high": None}
    deep = {"variants": {"plain": {"subsets": {"Focus": {"score": score}}, "score": score}}}
    for content in (flat, deep):
        (table,) = tables.rewardbench2(evaluation_of(rewardbench2=content))
        assert list(table.header) == ["", "without controls"]
        assert table.rows == [["Focus", "0.250"], ["all subsets", "0.250"]]


def test_numbers_by_hand():
    shown = {
        1.2345: "1.23",
        -0.04567: "−0.0457",
        1234.5: "1,234",
        0.0: "0",
        60: "60",
        1e-11: "1.00e−11",
        1e-17: "0",
    }
    assert {value: number(value) for value in shown} == shown
    assert number(float("nan")) == number(None) == number(True) == "–"
    assert change((0.5, math.nan)) == "0.500 → –"
    assert estimate({"mean": 0.5, "low": 0.25, "high": 0.75}) == "0.500\n(0.250 to 0.750)"
    assert estimate({"mean": 0.5, "low": 0.01234, "high": 1.0}) == "0.50\n(0.01 to 1.00)"
    assert estimate({"mean": 0.5, "low": None, "high": None}) == "0.500"
    assert estimate({"mean": 0.0, "low": 0.0, "high": 0.0}) == "0"


def test_smoothing_and_names_by_hand():
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0, np.nan])  # windows: 1 2 | 1 2 4 | 1 2 4 9 | …
    np.testing.assert_allclose(smooth(values), [1.5, 2.0, 3.0, 4.0, 6.5, 6.5])
    assert file_name("a b/../<c>") == "a-b-..-c" and file_name("..") == "run"
    assert label("_a$b$") == "\u2060_a\\$b\\$" and len(label("x" * 99)) == 28
