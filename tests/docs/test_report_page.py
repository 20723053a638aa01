"""The page of ``python -m executors report``, in Chromium: narrow and wide, light and dark, without scripts too."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import report_page
from browser import PROGRAM, WITHOUT, Browser, browsing
from executors._compare.run import CompareRow
from executors._report.judged import JudgedExecutor, SuiteRun
from executors._report.page import Report
from executors._report.page import page as page_of
from moe_ref.conformance.reporting.ledger import CLAUSES
from moe_ref.conformance.reporting.results import ClauseResult, ExecutorResults, FailureKind

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WITHOUT)
CELL, PANEL = "a[href='#e3-C1']", "#e3-C1"
RIGHT_NUMBER = f"{PANEL} dd.right"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on a small layer, without the memory."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    report_page.save_small_layer(path.with_name("small.safetensors"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("executors._compare.run.peak_memory", lambda *_: 1.5)
        ran = report_page.make(path, str(path.with_name("small.safetensors")), "--repeats", "2")
    assert ran.exit_code == 1, ran.output
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as own:
        yield own


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_click_shows_the_failing_example(page: Path, browser: Browser, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    fits(browser, width)
    assert not browser.is_seen(PANEL)
    browser.click(CELL)
    assert browser.is_seen(RIGHT_NUMBER)
    assert browser.value(f"document.querySelector(\"{CELL}\").getAttribute('aria-expanded')") == "true"
    text = browser.value(f"document.querySelector('{PANEL}').innerText")
    assert "C1 on my_loop" in text
    assert "check_exact(get('my_loop')" in text
    fits(browser, width)
    browser.click(CELL)
    assert not browser.is_seen(PANEL)
    assert browser.requests == []
    assert browser.errors == []


def fits(browser: Browser, width: int) -> None:
    """Nothing reaches beyond the window, and what scrolls sideways is the table at most."""
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert (
        browser.value(
            "Math.max(...[...document.querySelectorAll('td, th, figure')].map(e => e.scrollWidth - e.clientWidth))"
        )
        <= 1
    )


@pytest.mark.parametrize("width", [400, 1400])
def test_whatever_is_told_fits_and_runs_nothing(browser: Browser, tmp_path: Path, width: int) -> None:
    """Twelve executors with names and messages that are long, or are elements."""
    told = "<script>document.title = 'run'</script><img src=http://127.0.0.1:9/x.png>" + "a" * 300
    clauses = {clause: ClauseResult("fails", failed=1) for clause in CLAUSES}
    results = ExecutorResults(clauses, (FailureKind((*CLAUSES, told), 1, told, told, told, told),))
    names = [f"{number}{told}" for number in range(12)]
    executors = [
        JudgedExecutor(n, SuiteRun(results, told, told, told, again=told), CompareRow(n, told), told) for n in names
    ]
    path = tmp_path / "hostile.html"
    path.write_text(page_of(Report(executors, [told], [(told, told)], [(told, told)])), encoding="utf-8")
    browser.open(path, width)
    browser.click("a[href='#e11-T1']")
    assert browser.value("document.querySelector('#e11-T1').checkVisibility()")
    left, right = browser.value(
        "(r => [r.left, r.right])(document.querySelector('#e11-T1 .example').getBoundingClientRect())"
    )
    assert left >= 0
    assert right <= width
    fits(browser, width)
    assert browser.value("document.title").startswith("moe-ref report: 0<script>")
    assert browser.requests == []
    assert browser.errors == []


@pytest.mark.parametrize("width", [400, 1400])
def test_without_scripts_the_address_opens_it(page: Path, browser: Browser, width: int) -> None:
    browser.open(page, width, scripts=False)
    assert not browser.is_seen(PANEL)
    browser.click(CELL)
    assert browser.is_seen(RIGHT_NUMBER)
    browser.open(page, width, fragment=PANEL)
    assert browser.is_seen(RIGHT_NUMBER)
    browser.click(CELL)
    assert not browser.is_seen(PANEL)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(page: Path, browser: Browser, dark: bool) -> None:
    """Each text has a contrast of at least 4.5 to what is behind it, as WCAG 2 asks for."""
    report_page.opened_cell(browser, page, 1400, dark=dark)
    poor = browser.value(CONTRAST)
    assert poor == []
    behind = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (behind == "rgb(255, 255, 255)") is not dark


CONTRAST = """(() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest("script")) continue;
    const style = getComputedStyle(e);
    const [a, b] = [light(numbers(e.closest("svg") ? style.fill : style.color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push([e.tagName, e.className.toString(), e.textContent.slice(0, 30), ratio]);
  }
  return poor;
})()"""


def test_a_page_that_reaches_out_would_be_seen(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "reaching.html"
    page.write_text("<!doctype html><img src='http://127.0.0.1:9/x.png'><div style='width:900px'>wide</div>")
    known = [*browser.requests], [*browser.errors]
    browser.open(page, 400)
    assert "http://127.0.0.1:9/x.png" in browser.requests
    assert browser.value("document.documentElement.scrollWidth") > 400
    browser.requests[:], browser.errors[:] = known


def test_the_pages_own_policy_stops_what_would_reach_out(page: Path, browser: Browser, tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(page.read_text().replace("<main>", "<main><script>document.title = 'run'</script>"))
    known = [*browser.errors]
    browser.open(spoiled, 400)
    assert browser.value("document.title") != "run"
    browser.errors[:] = known


def test_the_picture_of_the_docs_is_taken(page: Path, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    report_page.take(browser, page, path)
    for taken in (path, report_page.PICTURE):
        width, height = struct.unpack(">II", taken.read_bytes()[16:24])
        assert width == 1400
        assert 1000 < height < 3000
