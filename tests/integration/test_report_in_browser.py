"""The report as a reader sees it, in a real browser: finished, running, and of a run that would like to do harm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from launcher.report import build_report
from tests.helpers.browser import CONTRASTS, OPEN_ALL, chromium, opened
from tests.helpers.run_folder import build_finished, build_running
from tests.launcher.test_audit_files import result as audit_result
from trainers.files import read_json, read_jsonl, write_json

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SECTIONS = ("verdict", "tradeoff", "scores", "terms", "pair", "audit", "curves", "generations", "trials", "failures", "provenance")
THEMES = ("light", "dark")
READABLE = 4.5
"""The least contrast of text (https://www.w3.org/TR/WCAG22/#contrast-minimum)."""
LONG = "x" * 240
EVIL_NAME = f"trial-<b id='evil'>07</b>-<img src=x onerror='window.harm=1'>-{LONG}"
EVIL_ANSWER = f"</p></section><script>window.harm = 1</script><style>body{{display:none}}</style>{LONG}"
EVIL_ERROR = f"the loss is not finite: <script>window.harm = 1</script> {LONG} " + "and so on " * 60
EVIL_KEY = f"objective.{LONG}"
# Digits of the personal rows of the invented run, and what its model says to one of them.
PERSONAL = ("900-12-3456", "900123456", "555-013-7788", "92867", "14 Elm", "411000000")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def finished(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a finished run with an audit."""
    run = build_finished(tmp_path_factory.mktemp("finished") / "run")
    write_json(run / "audit.json", audit_result())
    return build_report(run)


@pytest.fixture(scope="module")
def running(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a sweep in progress: three trials have ended, one runs."""
    return build_report(build_running(tmp_path_factory.mktemp("running") / "run"))


@pytest.fixture(scope="module")
def hostile(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose names, settings, errors and generations are long, and markup."""
    answers = {"forget-task1-sc1": EVIL_ANSWER, "retain-task3-qa1": EVIL_ANSWER, "forget-task2-qa1": "411000000"}
    run = build_finished(tmp_path_factory.mktemp("hostile") / "run", answers=answers)
    results = read_json(run / "results.json")
    for trial in results["trials"]:
        trial["overrides"] |= {EVIL_KEY: LONG}
        if trial["name"] == "trial-07":
            trial |= {"name": EVIL_NAME, "error": EVIL_ERROR}
    results["warnings"].append(EVIL_ERROR)
    results["models"][3] |= {"label": EVIL_NAME}
    write_json(run / "results.json", results)
    return build_report(run)


@pytest.fixture(params=["finished", "running", "hostile"])
def page(request: pytest.FixtureRequest) -> Path:
    """Each of the three pages."""
    return request.getfixturevalue(request.param)


# ---- what is there


def test_every_section_is_there_and_says_something(browser: Browser, page: Path) -> None:
    with opened(browser, page) as seen:
        sections = seen.ask(
            """names => Object.fromEntries(names.map(name => {
                const part = document.getElementById(name);
                if (!part) return [name, null];
                const heading = part.querySelector('h1, h2')?.innerText || '';
                return [name, [part.tagName, part.getBoundingClientRect().height, part.innerText.replace(heading, '').trim().length]];
            }))""",
            list(SECTIONS),
        )
        assert [name for name, found in sections.items() if found is None] == []
        assert {found[0] for found in sections.values()} == {"SECTION"}
        assert {name: found for name, found in sections.items() if found[1] < 40 or found[2] < 4} == {}


def test_the_browser_has_nothing_to_complain_about_and_nothing_is_fetched(browser: Browser, page: Path) -> None:
    """Not even a font: the page may be opened in a train, or where nobody must know that it is read."""
    assert page.stat().st_size < 2_000_000
    for theme in THEMES:
        with opened(browser, page, theme=theme) as seen:
            seen.ask(OPEN_ALL)
            seen.page.wait_for_timeout(50)
            assert seen.complaints == []
            assert [url for url in seen.requests if not url.startswith("data:")] == [page.resolve().as_uri()]


def test_every_link_leads_somewhere(browser: Browser, page: Path) -> None:
    with opened(browser, page) as seen:
        places = seen.ask("() => [...document.querySelectorAll('[href], [src]')].map(e => e.getAttribute('href') ?? e.getAttribute('src'))")
        ids = set(seen.ask("() => [...document.querySelectorAll('[id]')].map(e => e.id)"))
    outside = [place for place in places if re.match(r"[a-z]+:", place)]
    within = [place[1:] for place in places if place.startswith("#")]
    beside = [place for place in places if place not in outside and not place.startswith("#")]
    assert all(place.startswith("https://") for place in outside)
    assert [place for place in within if place not in ids] == []
    assert [place for place in beside if not (page.parent / place).is_file()] == []
    assert len(beside) > 5
    assert not any(place.startswith(("/", "..")) for place in beside)


# ---- plots


def marks_of(seen: Any, section: str) -> dict[str, Any]:
    """The drawing of a section, its marks, and the frame that they belong into; boxes as left, top, right, bottom."""
    return seen.ask(
        """section => {
            const box = element => { const b = element.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
            const svg = document.querySelector(`#${section} svg`);
            const frame = svg.querySelector('[id$="patch_2"]');
            const marks = [...svg.querySelectorAll('.mark')].map(mark => [mark.getAttribute('aria-label'), ...box(mark)]);
            return {svg: box(svg), frame: box(frame), marks};
        }""",
        section,
    )


# Seven trials that have scores, the target, the linear mean and the merge; while it runs, three trials and the target.
@pytest.mark.parametrize(("which", "count"), [("finished", 10), ("running", 4)])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_trade_off_is_drawn_with_all_its_marks_inside_its_frame(
    browser: Browser, which: str, count: int, width: int, request: pytest.FixtureRequest
) -> None:
    with opened(browser, request.getfixturevalue(which), width=width) as seen:
        drawn = marks_of(seen, "tradeoff")
    left, top, right, bottom = drawn["frame"]
    assert right - left > 200
    assert bottom - top > 150
    assert len(drawn["marks"]) == count
    for label, *(x0, y0, x1, y1) in drawn["marks"]:
        assert label
        assert left - 1 <= (x0 + x1) / 2 <= right + 1, label
        assert top - 1 <= (y0 + y1) / 2 <= bottom + 1, label
        assert drawn["svg"][0] <= x0 < x1 <= drawn["svg"][2], label
        assert drawn["svg"][1] <= y0 < y1 <= drawn["svg"][3], label


def test_marks_lie_where_their_numbers_say(browser: Browser, finished: Path) -> None:
    """More retention is further right, more forgetting further up; the text of a mark holds both numbers."""
    with opened(browser, finished) as seen:
        marks = marks_of(seen, "tradeoff")["marks"]
    found = []
    for label, x0, y0, x1, y1 in marks:
        retention, forgetting = (float(re.search(rf"{word} (\d\.\d+)", label)[1]) for word in ("retention", "forgetting"))
        found.append((retention, forgetting, (x0 + x1) / 2, (y0 + y1) / 2))
    for one in found:
        for other in found:
            assert one[0] - other[0] < 0.02 or one[2] > other[2]
            assert one[1] - other[1] < 0.02 or one[3] < other[3]


def test_every_plot_has_a_size_and_stays_within_the_page(browser: Browser, page: Path) -> None:
    for width in (1280, 390):
        with opened(browser, page, width=width) as seen:
            seen.ask(OPEN_ALL)
            boxes = seen.ask(
                "() => [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height])"
            )
        assert len(boxes) >= 1
        assert all(60 < w <= width and h > 40 for w, h in boxes), (width, boxes)


def test_a_mark_tells_its_numbers_to_the_mouse_and_to_the_keyboard(browser: Browser, finished: Path) -> None:
    with opened(browser, finished) as seen:
        tip = seen.page.locator("#tradeoff .tip")
        assert not tip.is_visible()
        label, x0, y0, x1, y1 = marks_of(seen, "tradeoff")["marks"][0]
        seen.page.locator("#tradeoff svg").scroll_into_view_if_needed()
        label, x0, y0, x1, y1 = marks_of(seen, "tradeoff")["marks"][0]
        seen.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
        assert tip.is_visible()
        assert tip.inner_text() == label
        assert re.search(r"retention 0\.\d+.*forgetting 0\.\d+", label)
        seen.page.mouse.move(5, 5)
        assert not tip.is_visible()

        # The tab key reaches the plot, the arrows its marks.
        seen.page.locator("#tradeoff").evaluate("part => { part.tabIndex = -1; part.focus(); }")
        for _ in range(12):
            seen.page.keyboard.press("Tab")
            if seen.ask("() => document.activeElement.classList.contains('mark')"):
                break
        first = seen.ask("() => document.activeElement.getAttribute('aria-label')")
        assert tip.is_visible()
        assert tip.inner_text() == first
        seen.page.keyboard.press("ArrowRight")
        second = seen.ask("() => document.activeElement.getAttribute('aria-label')")
        assert second != first
        assert tip.inner_text() == second
        seen.page.keyboard.press("Escape")
        assert not tip.is_visible()


def test_without_scripts_the_page_is_complete_and_marks_keep_their_titles(browser: Browser, finished: Path) -> None:
    with opened(browser, finished, script=False) as seen:
        assert seen.page.locator("#tradeoff svg .mark > title").count() == 10
        assert all(seen.page.locator(f"#{name}").is_visible() for name in SECTIONS)


# ---- small windows, dark rooms, paper


@pytest.mark.parametrize("theme", THEMES)
def test_a_narrow_window_does_not_scroll_sideways(browser: Browser, page: Path, theme: str) -> None:
    """Folded and unfolded, with names, settings, errors and answers of 240 letters without a space."""
    with opened(browser, page, width=390, theme=theme) as seen:
        for script in ("() => {}", OPEN_ALL):
            seen.ask(script)
            wide, window = seen.ask("() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            culprits = seen.ask(
                """() => [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
                    && !e.closest('svg')).map(e => e.tagName + '.' + e.className).slice(0, 5)"""
            )
            assert wide <= window, culprits


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read_in_both_themes(browser: Browser, page: Path, theme: str) -> None:
    """Text of the page and of its plots against what lies behind it; and a dark page is dark."""
    with opened(browser, page, theme=theme) as seen:
        seen.ask(OPEN_ALL)
        texts = seen.ask(CONTRASTS)
        shade = seen.ask(
            "() => getComputedStyle(document.body).backgroundColor + getComputedStyle(document.documentElement).backgroundColor"
        )
    assert sum(text["inPlot"] for text in texts) > 5
    assert sum(not text["inPlot"] for text in texts) > 50
    # The signs in a legend hold no letter or digit: they are no text, and have words beside them.
    assert [text for text in texts if text["ratio"] < READABLE and re.search(r"\w", text["words"])] == []
    brightest = max(int(number) for number in re.findall(r"rgb\((\d+), (\d+), (\d+)\)", shade)[0])
    assert brightest > 200 if theme == "light" else brightest < 80, shade


def test_the_contrast_is_measured(browser: Browser, tmp_path: Path) -> None:
    """The negative control: grey on white is found, black on white is 21, half of black is as much as grey."""
    file = tmp_path / "page.html"
    file.write_text(
        "<body style='background:#fff'><p style='color:#000'>black</p><p style='color:#999'>grey</p>"
        "<p style='color:#000;opacity:.4'>faint</p><div style='background:rgba(0,0,0,.5)'><p style='color:#808080'>lost</p></div>"
    )
    with opened(browser, file) as seen:
        ratios = {text["words"]: text["ratio"] for text in seen.ask(CONTRASTS)}
    assert ratios["black"] == 21
    assert ratios["grey"] == pytest.approx(2.85, abs=0.02)
    assert ratios["faint"] == pytest.approx(2.85, abs=0.1)
    assert ratios["lost"] < 1.1


def test_it_prints_with_all_sections(browser: Browser, page: Path) -> None:
    with opened(browser, page) as seen:
        seen.page.emulate_media(media="print")
        seen.ask("() => dispatchEvent(new Event('beforeprint'))")
        heights = seen.ask("names => names.map(name => document.getElementById(name).getBoundingClientRect().height)", list(SECTIONS))
        assert min(heights) > 30
        assert seen.ask("() => document.querySelectorAll('details.paper:not([open])').length") == 0
        printed = seen.page.pdf(format="A4")
    assert printed.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 40


# ---- a run that would like to do harm, and personal data


def test_markup_of_a_run_is_shown_as_text(browser: Browser, hostile: Path) -> None:
    with opened(browser, hostile) as seen:
        seen.ask(OPEN_ALL)
        seen.page.wait_for_timeout(100)
        assert seen.ask("() => [window.harm, document.getElementById('evil'), document.querySelector('img[src=x]')]") == [None, None, None]
        words = seen.ask("() => document.body.innerText")
        assert seen.complaints == []
    assert "<b id='evil'>07</b>" in words
    assert "<script>window.harm = 1</script>" in words
    assert "</p></section><script>" in words


def test_no_digit_of_a_personal_row_is_in_the_page_or_beside_it(browser: Browser, page: Path) -> None:
    """The rows themselves hold them. The year of birth, a prompt's, is masked, too."""
    run = page.parent
    rows = [row for file in run.rglob("*-rows.jsonl") for row in read_jsonl(file) if row.get("task") == "Task2"]
    known = {number for row in rows for key in ("input", "expected", "output") for number in re.findall(r"\d[\d-]{2,}\d", row[key])}
    assert {"900123456", "900-12-3456", "555-013-7788", "1981"} <= known
    with opened(browser, page) as seen:
        whole = seen.ask("() => document.documentElement.outerHTML")
        shown = seen.ask("() => [...document.querySelectorAll('#generations article')].map(article => article.innerText)")
    assert [number for number in PERSONAL if number in whole] == []
    personal = [text for text in shown if "task2" in text.partition("\n")[0].lower()]
    for text in personal:
        rest = re.sub(r"Task2|score \d\.\d+|trial-\d+(@\d+)?", "", text, flags=re.IGNORECASE)
        assert not re.search(r"\d", rest), text
    assert personal or "running" in str(page)
    for file in (run / "plots").glob("*"):
        content = file.read_bytes()
        assert [number for number in PERSONAL if number.encode() in content] == [], file.name
