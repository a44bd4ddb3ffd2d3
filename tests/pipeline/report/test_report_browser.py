"""The report in a real browser: display, filters, keyboard, and what its policy forbids."""

import itertools
import json
import re

import pytest

from pipeline.report.page import ReportConfig, write_report
from sarm_jax.features.feature_names import FeatureNames
from tests.browser import Browser, find_chromium
from tests.report_runs import (
    FEATURES,
    HOSTILE,
    NAMES,
    write_evaluation,
    write_feature_pages,
    write_lines,
    write_run,
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not find_chromium(), reason="Chromium is not installed (apt-get install chromium)"
    ),
]
CARDS = "[...document.querySelectorAll('article')]"
PHONE, DESKTOP = 390, 1200


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    write_run(root / "penalty")
    write_run(root / "free", controls=False, seed=1)
    workdir = write_feature_pages(write_evaluation(root / "both"))
    names = FeatureNames({i: f"name of {i}" for i in range(64) if i != 7})
    return write_report(ReportConfig(f"{root / 'penalty'},{root / 'free'}", 0), workdir, names)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with Browser(find_chromium(), tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(shared, page):
    """The browser with the page newly opened."""
    shared.problems.clear()
    shared.requests.clear()
    shared.open(page, DESKTOP)
    return shared


def choose(browser, **filters) -> list[dict]:
    """Sets filters as a reader would, and returns all cards that are then shown."""
    for name, value in filters.items():
        browser.evaluate(
            f"(() => {{ const field = document.getElementById('filters').elements['{name}'];"
            f"field.value = {json.dumps(value)};"
            "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
    browser.evaluate("(() => { const b = document.getElementById('more'); "
                     "while (!b.hidden) b.click(); })()")  # fmt: skip
    return browser.evaluate(
        CARDS + ".map(card => ({prompt: card.querySelector('h3').textContent, "
        "facts: card.querySelector('.note').textContent, all: card.textContent}))"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_it_opens_without_errors_or_requests(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    assert browser.evaluate(CARDS + ".length") == 20
    assert browser.problems == []
    assert {url for url in browser.requests.values() if not url.startswith("data:")} == {
        page.as_uri()
    }
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    source = "source" if dark else "img"
    shown, expected = browser.evaluate(
        f"[document.querySelector('figure img').currentSrc, (e => e.srcset || e.src)"
        f"(document.querySelector('figure {source}'))]"
    )
    assert shown == expected
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(27, 30, 35)" if dark else "rgb(255, 255, 255)")


def test_errors_in_a_page_are_recorded(shared, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<!doctype html><script>console.error('one'); nothing.there</script>")
    shared.problems.clear()
    shared.open(path)
    assert len(shared.problems) == 2


def test_nothing_can_be_loaded_or_run(browser):
    attempt = "fetch('https://example.org').then(() => 'loaded', () => 'refused')"
    assert browser.evaluate(attempt) == "refused"
    browser.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s); const i = new Image(); i.src = 'https://example.org/x.png'; })()"
    )
    assert browser.evaluate("window.ran === undefined")
    assert not any(url.startswith("http") for url in browser.requests.values())
    assert sum("Content Security Policy" in problem for problem in browser.problems) >= 2


def test_hostile_text_is_shown_as_text(browser):
    cards = choose(browser)
    assert browser.evaluate("document.title").startswith("Report: ")
    prompts = [card["prompt"] for card in cards]
    for attack in (HOSTILE[0], HOSTILE[1], HOSTILE[2]):
        assert sum(prompt.endswith(attack) for prompt in prompts) >= 12
    marked = "lineU+2028separatorU+2029and U+202Egnirts desreverU+202C and U+FEFF"
    assert sum(prompt.endswith(marked) for prompt in prompts) >= 12
    assert any("a\nsecond line" in prompt for prompt in prompts)
    inside = browser.evaluate(
        "[...new Set([...document.querySelectorAll('#list *')].map(e => e.localName))].sort()"
    )
    harmless = "article details div h3 h4 p span summary table tbody td tfoot th thead tr"
    assert set(inside) <= set(harmless.split())
    assert browser.evaluate("[...document.querySelector('[name=run]').options].map(o => o.text)")[
        1:
    ] == [*NAMES, "free"]
    assert browser.problems == []


def test_samples_are_filtered_and_sorted(browser):
    assert len(choose(browser)) == 65
    assert "65 of 65 shown" in browser.evaluate("document.getElementById('count').textContent")
    (card,) = choose(browser, text="QUESTION 17:", run="penalty")
    assert card["facts"].startswith("penalty · held-out prompt · score change")
    assert len(choose(browser, text="", run="penalty")) == 30
    fired = choose(browser, penalty="f7")
    assert len(fired) == 10
    assert all("Penalty fired: feature 7 (−1)" in card["all"] for card in fired)
    assert len(choose(browser, penalty="any")) == 10 and choose(browser, penalty="f3") == []
    assert len(choose(browser, penalty="none")) == 20
    assert "20 of 65" in browser.evaluate("document.getElementById('count').textContent")
    assert choose(browser, penalty="", text="no such words") == []
    for order, sense in (("up", -1), ("down", 1)):
        cards = choose(browser, text="", order=order)
        changes = [number(card["facts"].split("change ")[1]) for card in cards]
        assert changes == sorted(changes, key=lambda value: sense * value) and len(changes) == 30


def test_names_stand_behind_numbers(browser):
    options = browser.evaluate(
        "[...document.querySelector('[name=penalty]').options].map(o => o.text)"
    )
    assert options[-2:] == ['feature 3 "name of 3"', "feature 7"]
    cards = choose(browser)
    assert any("Penalty fired: feature 7 (−1)" in card["all"] for card in cards)
    rows = browser.evaluate(
        "[...document.querySelectorAll('#list details tbody th')].map(e => e.textContent)"
    )
    named = [row for row in rows if row != "rest"]
    assert named and all(row == "7" or row.endswith(f'"name of {row.split()[0]}"') for row in named)


def test_features_are_found_by_number_name_and_role(browser):
    def find(text: str) -> list[str]:
        browser.evaluate(
            "(() => { const field = document.getElementById('find').elements.feature;"
            f"field.value = {json.dumps(text)};"
            "field.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )
        return browser.evaluate(
            "[...document.querySelectorAll('.feature')].filter(c => c.checkVisibility())"
            ".map(c => c.id)"
        )

    everything = [f"feature-{i}" for i in (*FEATURES, 5)]
    assert sorted(find("")) == sorted(everything)
    assert find("NAME OF 5") == ["feature-5"] == find("certified")
    assert find("7") == ["feature-7"] and find("detector 3") == ["feature-3"]
    assert find("no such feature") == []
    assert browser.evaluate("document.getElementById('found').textContent") == "0 of 3 shown"
    browser.evaluate("location.hash = '#feature-3'")
    browser.evaluate("new Promise(done => setTimeout(done, 50))")
    assert browser.evaluate("document.getElementById('feature-3').checkVisibility()")
    assert len(find("")) == 3 and browser.problems == []


def test_what_excites_a_feature_is_marked(browser):
    shades = browser.evaluate(
        "[...document.querySelectorAll('#feature-7 .example mark:not(.end)')].map("
        "m => [m.className, Number(m.title.replace('−', '-')), "
        "getComputedStyle(m).backgroundColor])"
    )
    assert shades and all(z > 0 and colour != "rgba(0, 0, 0, 0)" for _, z, colour in shades)
    order = sorted(shades, key=lambda shade: shade[1])
    assert [name for name, *_ in order] == sorted(name for name, *_ in order)
    ends = browser.evaluate("document.querySelectorAll('#feature-7 mark.end').length")
    assert ends == len(HOSTILE)
    bars = browser.evaluate("document.querySelectorAll('#feature-7 svg rect').length")
    assert bars > 60


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def test_the_rounded_terms_add_up_to_the_rounded_score(browser):
    choose(browser)
    tables = browser.evaluate(
        "[...document.querySelectorAll('#list details')].map(d => ({"
        "title: d.firstChild.textContent, "
        "parts: [...d.querySelectorAll('tbody .part')].map(c => c.textContent), "
        "sum: d.querySelector('tfoot .part').textContent}))"
    )
    assert len(tables) == 120
    for table in tables:
        assert len(table["parts"]) == 9 and table["title"] == f"Why {table['sum']}"
        digits = len(table["sum"].partition(".")[2])
        units = [round(number(part) * 10**digits) for part in table["parts"]]
        assert digits >= 3 and sum(units) == round(number(table["sum"]) * 10**digits)


def test_an_opened_explanation_fits_a_phone(browser, page):
    browser.open(page, PHONE)
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    wide = browser.evaluate(
        "[...document.querySelectorAll('details')].filter(d => d.scrollWidth > d.clientWidth + 1)"
        ".map(d => [d.scrollWidth, d.clientWidth])"
    )
    assert wide == [] and browser.evaluate("document.documentElement.scrollWidth") == PHONE


def test_the_keyboard_reaches_everything(browser):
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.className") == "skip"
    browser.press("Enter", 13, "\r")
    assert browser.evaluate("location.hash") == "#samples"
    stops = []
    for _ in range(7):
        browser.press("Tab", 9)
        stops.append(
            browser.evaluate("document.activeElement.name || document.activeElement.localName")
        )
    assert stops[:4] == ["text", "run", "penalty", "order"] and stops[4] == "summary"
    browser.press("Enter", 13, "\r")
    assert browser.evaluate("document.querySelectorAll('details[open]').length") == 1
    browser.evaluate("document.getElementById('more').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate(CARDS + ".indexOf(document.activeElement)") == 20
    assert browser.evaluate(CARDS + ".length") == 40


def test_every_control_and_figure_has_a_name(browser):
    nameless = browser.evaluate(
        "[...document.querySelectorAll('input, select')].filter(e => !e.labels.length)"
        ".concat([...document.querySelectorAll('img')].filter(e => e.alt.length < 30))"
        ".concat([...document.querySelectorAll('[tabindex=\"0\"]')].filter(e => !e.ariaLabel))"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => h.localName)")
    steps = [int(b[1]) - int(a[1]) for a, b in itertools.pairwise(levels)]
    assert levels[0] == "h1" and max(steps) == 1


@pytest.mark.parametrize("dark", [False, True])
def test_there_is_enough_contrast(browser, page, dark):
    browser.open(page, DESKTOP, dark=dark)
    texts = browser.evaluate(
        """(() => [...document.querySelectorAll('body *')].filter(e => [...e.childNodes].some(
             n => n.nodeType === 3 && n.textContent.trim()) && e.checkVisibility()).map(e => {
          let on = e;
          const paper = x => getComputedStyle(x).backgroundColor;
          while (on !== document.body && paper(on) === 'rgba(0, 0, 0, 0)') on = on.parentElement;
          return [e.localName + '.' + e.className, getComputedStyle(e).color, paper(on)];
        }))()"""
    )
    assert len(texts) > 200
    for name, colour, paper in {tuple(row) for row in texts}:
        light, deep = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= 4.5, (name, colour, paper)


def luminance(colour: str) -> float:
    """Returns the relative luminance of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_figures_are_shown_without_javascript(browser, page):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page, DESKTOP)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.evaluate("document.querySelectorAll('figure img').length") > 15
    assert browser.evaluate("document.querySelector('noscript').checkVisibility()")


def test_a_conversation_is_shown_turn_by_turn(shared, tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "evaluations.jsonl"
    turns = [
        ("system", "<b>Be</b> brief."),
        ("user", "hi\u202e"),
        ("assistant", "yo"),
        ("user", "ho"),
    ]
    prompt = [{"role": role, "content": content} for role, content in turns]
    lines = path.read_text(encoding="utf-8").strip().split("\n")
    write_lines(path, [json.loads(line) | {"prompt": prompt} for line in lines])
    shared.problems.clear()
    shared.open(write_report(ReportConfig("", samples=0), tmp_path / "run"), PHONE)
    card = choose(shared, text="brief")[0]
    assert card["prompt"] == "Conversation of 4 turns"
    headings, texts = (
        shared.evaluate(
            f"[...document.querySelectorAll('article')[0].querySelectorAll('{name}')]"
            ".map(element => element.textContent)"
        )
        for name in ("h4.role", "h4.role + p")
    )
    assert headings == [role for role, _ in turns]
    assert texts == ["<b>Be</b> brief.", "hiU+202E", "yo", "ho"]
    assert not choose(shared, text="no such words")
    assert not shared.problems
