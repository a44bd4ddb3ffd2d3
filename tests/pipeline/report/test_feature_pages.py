"""The pages on single features: their files, their merge, and that texts stay texts."""

import html
import json
import re

import pytest

from pipeline.report.feature_files import read_pages
from pipeline.report.feature_pages import LEVELS, read_feature_pages
from pipeline.report.invisible import visible
from pipeline.report.page import ReportConfig, write_report
from pipeline.report.runs import read_run
from sarm_jax.features.feature_names import NO_NAMES, FeatureNames
from sarm_jax.features.feature_pages import MAX_PAGES
from sarm_jax.io.errors import InputError
from tests.report_runs import (
    FEATURES,
    HOSTILE,
    NAMES,
    mentions_of_features,
    write_evaluation,
    write_feature_pages,
    write_run,
)

EVERY = FeatureNames({i: f"name of {i}" for i in range(64)}, "identify.feature_names=x")


@pytest.fixture
def folder(tmp_path):
    return write_feature_pages(write_run(tmp_path / "run"))


def pages_of(folder, names=NO_NAMES):
    (pages,) = read_feature_pages({"run": folder}, [read_run("run", folder)], names)
    return pages


def test_the_files_of_both_stages_are_merged(folder):
    pages = pages_of(folder)
    assert [page.feature for page in pages.pages] == [*FEATURES, 5]  # penalised features first
    first, _, last = pages.pages
    assert first.roles == ["penalised", "detector", "carrier", "top mover"]
    assert last.roles == ["penalised", "certified", "detector"]
    assert last.certificate == f"it is real {HOSTILE[1]}" and not first.certificate
    assert [strip.group for strip in first.strips] == [
        "chosen",
        "rejected",
        "human",
        "base",
        *NAMES,
    ]
    assert (first.low, first.high, first.tau) == (0.0, 2.0, 0.4)
    # Shares above another τ than the one that is shown are left out.
    assert [strip.above_tau is None for strip in first.strips] == [True] * 2 + [False] * 4
    for strip, end in zip(first.strips, [0.5] * 2 + [1.0] * 4, strict=True):
        assert strip.tau == pytest.approx(0.2)
        assert max(bar.x + bar.width for bar in strip.bars) <= end + 1e-9
        assert max(bar.height for bar in strip.bars) == 1
    assert len(first.examples) == len(HOSTILE)  # the same responses in both files
    assert {example.groups for example in first.examples} == {"chosen, human"}
    assert [n.feature for n in first.neighbours] == [3, 9]  # not the one that is not similar
    assert [n.anchor for n in first.neighbours] == ["feature-3", None]
    levels = [piece.level for e in first.examples for piece in e.pieces]
    assert min(levels) == 0 and max(levels) == LEVELS
    words = [piece.text for piece in first.strongest]
    assert len(words) == len(set(words)) and "<|eot_id|>" not in words
    assert [p.z for p in first.strongest] == sorted((p.z for p in first.strongest), reverse=True)


def test_a_penalised_feature_without_a_page_is_named(folder):
    write_feature_pages(folder, features=(5, 7))
    pages = pages_of(folder)
    assert list(pages.missing) == [3]
    text = write_report(ReportConfig("", samples=1), folder, EVERY).read_text("utf-8")
    assert "No page for 3 &#34;name of 3&#34;:" in text


def test_clamped_features_are_read_from_the_options(folder):
    options = json.loads((folder / "config.json").read_text())
    options["reward"] |= {"clamp_features": "@lists.json:clamped"}
    (folder / "config.json").write_text(json.dumps(options))
    (folder.parent / "lists.json").write_text(json.dumps({"clamped": [5, 8]}))
    pages = pages_of(folder)
    assert pages.pages[2].roles[:2] == ["penalised", "clamped"] and list(pages.missing) == [8]


def test_there_are_at_most_so_many_pages(folder):
    write_feature_pages(folder, features=tuple(range(63)))
    path = folder / "eval" / "feature_pages.json"
    content = json.loads(path.read_text())
    content["latents"] = 1000
    content["features"] = [row | {"feature": row["feature"] + 50} for row in content["features"]]
    path.write_text(json.dumps(content))
    (folder / "probes" / "feature_pages.json").unlink()
    pages = pages_of(folder)
    assert len(pages.pages) == 63 and pages.left_out == 0
    content["features"] += [content["features"][0] | {"feature": 200 + i} for i in range(9)]
    path.write_text(json.dumps(content))
    pages = pages_of(folder)
    assert len(pages.pages) == MAX_PAGES and pages.left_out == 63 + 9 - MAX_PAGES


def test_files_of_different_reward_models_are_not_merged(folder):
    path = folder / "probes" / "feature_pages.json"
    content = json.loads(path.read_text())
    content["features"][0]["weight"] += 1
    path.write_text(json.dumps(content))
    pages = pages_of(folder)
    assert [strip.group for strip in pages.pages[0].strips] == ["human", "base", *NAMES]
    assert "is of another reward model than" in pages.notes[0]


def test_a_name_of_no_latent_is_refused(folder):
    names = FeatureNames({64: "x"}, "identify.feature_names=names.json")
    with pytest.raises(InputError, match=r"names\.json: 64: the reward model has 64 latents"):
        pages_of(folder, names)


BAD = {
    "latents": None,
    "features": {},
    "features.0": 3,
    "features.0.feature": 64,
    "features.0.roles": "detector",
    "features.0.weight": "1",
    "features.0.weight_rank": 1.5,
    "features.0.tau": "x",
    "features.0.groups": [],
    "features.0.groups.chosen": None,
    "features.0.groups.chosen.responses": -1,
    "features.0.groups.chosen.fires": None,
    "features.0.groups.chosen.above_tau": "x",
    "features.0.groups.chosen.range": [1, 1],
    "features.0.groups.chosen.counts": [],
    "features.0.neighbours": [3],
    "features.0.examples": [{}],
    "features.0.examples.0.z": True,
    "features.0.examples.0.prompt": None,
    "features.0.examples.0.groups": [1],
    "features.0.examples.0.tokens": [["a"]],
    "features.0.examples.0.tokens.1.0": 5,
    "features.0.examples.0.tokens.1.1": "x",
    "features.0.examples.0.tokens.0.left_out": "x",
}


@pytest.mark.parametrize("field", BAD)
def test_a_malformed_file_is_refused(folder, field):
    path = folder / "probes" / "feature_pages.json"
    assert read_pages(path)["latents"] == 64
    content = json.loads(path.read_text())
    place, parts = content, field.split(".")
    for part in parts[:-1]:
        place = place[int(part) if isinstance(place, list) else part]
    place[int(parts[-1]) if isinstance(place, list) else parts[-1]] = BAD[field]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        read_pages(path)
    expected = f"features[0]: field {parts[2]!r}" if len(parts) > 2 else "expected"
    assert str(error.value).startswith(f"{path}: ") and expected in str(error.value)


def test_hostile_text_is_shown_as_text(folder):
    text = write_report(ReportConfig("", samples=1), folder).read_text("utf-8")
    section = text.split('id="feature_pages"')[1].split('id="samples"')[0]
    assert "<script" not in section and "<img" not in section and "style=" not in section
    assert "\u202e" not in section and 'class="code">U+202E</span>' in section
    assert 'class="code">U+D83D</span>' in section
    shown = html.unescape(re.sub("<[^>]+>", "", section))
    assert "document.title='broken'" in shown and "{{" in shown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a <b>", "a &lt;b&gt;"),
        ("x\u202ey", 'x<span class="code">U+202E</span>y'),
        ("\x00\ud83d", '<span class="code">U+0000</span><span class="code">U+D83D</span>'),
        ("line\n\ttab", "line\n\ttab"),
        ("", ""),
    ],
)
def test_invisible_characters_are_shown_by_their_number(text, shown):
    assert str(visible(text)) == shown


def test_no_feature_is_a_bare_number_if_it_has_a_name(tmp_path):
    folder = write_feature_pages(write_evaluation(write_run(tmp_path / "run")))
    text = write_report(ReportConfig("", samples=0), folder, EVERY).read_text("utf-8")
    mentions = mentions_of_features(text)
    assert len(mentions) > 15
    for number, after in mentions:
        assert after.startswith(f' "name of {number}'[:12]), number + after
    links = re.findall(r"<a href=\"#feature-(\d+)\">(.*?)</a>", html.unescape(text))
    assert len(links) > 8 and all(text == f'{i} "name of {i}"' for i, text in links)
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert {"7", "3", "0"} <= data["names"].keys()
