"""The report in a browser: quiet, complete, usable by pointer and keys, at any width, in light, dark and print. Pictures go to build/."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from finished_run import finished

from sparc3.report.write import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
PICTURES = Path(__file__).parents[1] / "build" / "report-screenshots"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(finished(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(autouse=True)
def quiet(browser: Browser, report: Path) -> Iterator[None]:
    """Nothing is logged, thrown or asked of the network in any test here."""
    browser.said.clear()
    browser.asked.clear()
    yield
    assert not browser.said
    assert {address for address in browser.asked if not address.startswith("data:")} <= {report.as_uri()}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 400])
def test_it_fits_and_is_drawn(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    sticking_out = """[...document.querySelectorAll("body *")].filter((one) => !one.closest(".scroll, pre, nav, .skip, svg *, #tip, .switch input")
        && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 120))"""
    assert browser.run(sticking_out) == []
    light = sum(
        map(int, browser.run("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(","))
    )
    assert (light < 200) == dark
    browser.picture(PICTURES / f"report-{width}-{'dark' if dark else 'light'}.png")


def test_the_figures_are_there(browser: Browser, report: Path) -> None:
    browser.open(report, 1400)
    drawn = {
        name: browser.run(f"document.querySelectorAll('#{name} figure svg').length")
        for name in ("tradeoff", "curves", "methods", "where")
    }
    assert drawn["tradeoff"] == 4
    assert drawn["curves"] > 4
    assert drawn["methods"] > 4
    assert drawn["where"] == 1
    assert browser.run("document.querySelectorAll('#where .strip').length") == 4
    small = "[...document.querySelectorAll('figure svg')].filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 100).length"
    assert browser.run(small) == 0
    assert (
        browser.run("document.querySelectorAll('.short').length") == 2
    )  # the script ran and shortened the pairs and the cards
    assert "alert(1)" in browser.run("document.body.textContent")


def test_words_are_masked_until_the_switch(browser: Browser, report: Path) -> None:
    browser.open(report, 1400)
    seen = "['.veil', '.bare'].map((kind) => [...document.querySelectorAll('#texts ' + kind)].filter((one) => one.checkVisibility()).length)"
    veiled, bare = browser.run(seen)
    assert veiled > 0
    assert bare == 0
    browser.run("document.getElementById('unmask').click()")
    assert browser.run(seen) == [0, veiled]


def test_a_pointer_reads_the_numbers(browser: Browser, report: Path) -> None:
    browser.open(report, 1400)
    for place in ("#curves .column", "#tradeoff .spot.m0", "#where .mark"):
        browser.run(
            f"document.querySelector('{place}').scrollIntoView({{block: 'center', behavior: 'instant'}})"
        )
        browser.run(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        )  # scrolling hides a tip
        middle = "(() => { const box = document.querySelector('%s').getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        browser.point(*browser.run(middle % place))
        assert browser.run("document.getElementById('tip').checkVisibility()"), place
        wanted = browser.run(
            f"JSON.parse(document.getElementById('tips').textContent)[document.querySelector('{place}').dataset.tip].head"
        )
        assert wanted in browser.run("document.getElementById('tip').textContent")


def test_keys_read_the_numbers(browser: Browser, report: Path) -> None:
    browser.open(report, 1400)
    for figure in ("#curves svg", "#tradeoff svg", "#where .map"):
        stops = browser.run(
            f"document.querySelectorAll('{figure}')[0].querySelectorAll('[data-tip][tabindex=\"0\"]').length"
        )
        assert stops == 1, "one stop of the tab key a figure"
        browser.run(f"document.querySelector('{figure} [data-tip][tabindex=\"0\"]').focus()")
        first = browser.run("document.getElementById('tip').textContent")
        browser.press("ArrowRight")
        second = browser.run("document.getElementById('tip').textContent")
        assert first
        assert second
        assert first != second
        browser.press("ArrowLeft")
        assert browser.run("document.getElementById('tip').textContent") == first
        browser.press("Escape")
        assert not browser.run("document.getElementById('tip').checkVisibility()")


def test_a_method_can_be_taken_out_of_the_figures(browser: Browser, report: Path) -> None:
    browser.open(report, 1400)
    browser.run("document.querySelector('#tradeoff [data-toggle=\"mr\"]').click()")
    hidden = "[...document.querySelectorAll('#tradeoff figure .mr')].every((one) => getComputedStyle(one).visibility == 'hidden')"
    assert browser.run(hidden)
    assert (
        browser.run("document.querySelector('#tradeoff [data-toggle=\"mr\"]').getAttribute('aria-pressed')")
        == "false"
    )


def test_it_prints(browser: Browser, report: Path) -> None:
    browser.open(report, 1400)
    printed = browser.printed()
    assert printed.startswith(b"%PDF")
    assert (
        printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") + printed.count(b"/Type /Page/") > 3
    )
    assert browser.run("document.querySelectorAll('details:not([open], [data-long])').length") == 0, (
        "what is folded away is opened for paper"
    )


def test_it_reads_without_its_script(browser: Browser, report: Path) -> None:
    browser.open(report, 1400, script=False)
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.run("document.querySelectorAll('.short').length") == 0
    assert browser.run("document.querySelectorAll('#texts .pairs > li').length") > 20
    assert browser.run("document.querySelector('#tradeoff .spot').getAttribute('aria-label')")
