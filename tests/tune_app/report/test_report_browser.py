"""The report in a real browser: no script error, no request, and every interaction works as labelled."""

import base64
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import (
    DESKTOP,
    PHONE,
    Browser,
    click,
    complaints,
    opened,
    printed_pages,
    violations,
    wait,
)

from tune_app.report import figures
from tune_app.report.findings import LEAST_FOR_IMPORTANCE, rivals_within_noise
from tune_app.report.page import write_comparison, write_report
from tune_app.results.loading import load_study
from tune_app.results.study import Study

WriteStudy = Callable[..., Path]


@pytest.fixture(scope="module")
def search(a_search: Path) -> Study:
    return load_study(a_search)


@pytest.fixture(scope="module")
def search_page(search: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(search, tmp_path_factory.mktemp("pages") / "search.html")


@pytest.fixture
def page(browser: Browser, search_page: Path) -> Iterator[Browser]:
    """The page of a search, freshly opened at desktop size; afterwards nothing may have gone wrong in it."""
    opened(browser, search_page.as_uri())
    yield browser
    assert complaints(browser) == []


def figure(browser: Browser, name: str) -> dict[str, Any]:
    """What Plotly has drawn: data and layout of the figure, brought into view."""
    look_at(browser, name)
    found: dict[str, Any] = browser.execute_script(
        "const div = document.querySelector(`[data-figure='${arguments[0]}']`);"
        "return {data: JSON.parse(JSON.stringify(div.data)), layout: JSON.parse(JSON.stringify(div.layout))}",
        name,
    )
    return found


def look_at(browser: Browser, name: str) -> None:
    """Scroll to a figure and wait until it is drawn as things stand."""
    selector = f"[data-figure='{name}']"
    browser.execute_script(
        "document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector
    )
    wait(
        browser,
        "const div = document.querySelector(arguments[0]); return !div.dataset.stale && Boolean(div.data)",
        selector,
    )


def trace(browser: Browser, name: str, **meta: Any) -> dict[str, Any]:
    return next(
        each
        for each in figure(browser, name)["data"]
        if all((each.get("meta") or {}).get(key) == value for key, value in meta.items())
    )


# It opens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("kind", ["search", "ablation", "comparison"])
def test_the_page_opens_without_an_error_or_a_request_and_fits_its_window(
    browser: Browser,
    tmp_path: Path,
    search: Study,
    an_ablation: Path,
    search_page: Path,
    kind: str,
    size: tuple[int, int],
) -> None:
    path = {
        "search": lambda: search_page,
        "ablation": lambda: write_report(load_study(an_ablation), tmp_path / "a.html"),
        "comparison": lambda: write_comparison(
            search, load_study(an_ablation), tmp_path / "c.html"
        ),
    }[kind]()
    opened(browser, path.as_uri(), size)
    assert complaints(browser) == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    names = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map((div) => div.dataset.figure)"
    )
    for name in names:
        look_at(browser, name)
    assert complaints(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map((div) =>"
        " [div.dataset.figure, div.querySelectorAll('.main-svg').length, div.getBoundingClientRect().height])"
    )
    assert len(drawn) > 1
    for name, drawings, height in drawn:
        assert drawings > 0, name
        assert height > 80, name


def test_names_that_try_to_be_markup_stay_text(
    browser: Browser, write_study: WriteStudy, tmp_path: Path
) -> None:
    names = [
        "<img src=x onerror=window.hit=1>",
        "</script><script>window.hit=2</script>",
        "<b>bold</b>",
    ]
    study = load_study(
        write_study(
            "<svg onload=window.hit=3>", variants={name: {} for name in names}, seeds=2, epochs=3
        )
    )
    opened(browser, write_report(study, tmp_path / "nasty.html").as_uri())
    assert complaints(browser) == []
    assert browser.execute_script("return window.hit === undefined")
    assert (
        browser.execute_script(
            "return document.querySelectorAll('main img, main b:not(.tile b):not(.cautions b)').length"
        )
        == 0
    )
    look_at(browser, "effects-0")
    labels = browser.execute_script(
        "return [...document.querySelectorAll('.ytick text')].map((text) => text.textContent)"
    )
    assert names[0] in labels


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_breaks_no_rule_of_accessibility(page: Browser, theme: str) -> None:
    page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    assert violations(page) == []
    small = page.execute_script(
        "return [...document.querySelectorAll('button, select, input')].map((each) => [each.textContent, each.getBoundingClientRect()])"
        ".filter(([, box]) => box.width && (box.width < 24 || box.height < 24)).map(([text]) => text)"
    )
    assert small == []


def test_the_first_tile_says_how_sure_it_is(page: Browser, search: Study) -> None:
    best = search.best()
    tile = page.find_element("css selector", ".tile")
    low, high = best["best_val_auc_low"], best["best_val_auc_high"]
    assert f"{best['objective']:.3f} [{low:.2f}, {high:.2f}]" in tile.text
    rivals, _ = rivals_within_noise(search)
    assert f"{rivals} others within its noise" in tile.text
    ended = search.trials_full["state"].isin(["completed", "stopped"])
    assert ended.sum() < LEAST_FOR_IMPORTANCE
    section = page.find_element("css selector", "#importance")
    assert "fewer than 20 trials have ended" in section.text
    assert not section.find_elements("css selector", ".plot")


def test_axes_begin_where_values_can_be(page: Browser, search: Study) -> None:
    layout = figure(page, "progress")["layout"]
    assert layout["xaxis"]["range"] == [-0.5, len(search.trials_full) - 0.5]
    assert 0 <= layout["yaxis"]["range"][0] < layout["yaxis"]["range"][1] <= 1.02
    low, high = figure(page, "slice-max_m")["layout"]["yaxis"]["range"]
    assert 0 <= low < search.trials_full["objective"].min()
    assert search.trials_full["objective"].max() < high <= 1.02


# What can be clicked ---------------------------------------------------------------------------------------------------


def test_a_group_is_hidden_and_shown_in_all_figures_by_its_chip(page: Browser) -> None:
    chip = ".chip[data-group='halved']"
    assert trace(page, "curves-ema", group="halved").get("visible") is None
    click(page, chip)
    for name in ("curves-ema", "curves-raw", "slice-max_m"):
        assert trace(page, name, group="halved")["visible"] is False
    pressed = page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((c) => c.ariaPressed)", chip
    )
    assert pressed == ["false", "false"]  # one above the curves, one above the slices
    click(page, chip)
    assert trace(page, "curves-ema", group="halved").get("visible") in (None, True)


def test_the_starts_of_the_class_weights_can_be_hidden(page: Browser) -> None:
    click(page, ".chip[data-group='drw']")
    assert all(
        each.get("visible") is False
        for each in figure(page, "curves-ema")["data"]
        if (each.get("meta") or {}).get("drw")
    )


def test_a_trial_picked_from_the_list_is_marked_everywhere(page: Browser, search: Study) -> None:
    trial = str(search.best()["trial"])
    page.execute_script(
        "const select = document.querySelector('select.pick'); select.value = arguments[0];"
        "select.dispatchEvent(new Event('change'))",
        trial,
    )
    picked = [each for each in trace(page, "curves-raw", picked=True)["y"] if each is not None]
    rows = search.epochs[search.epochs["trial"] == trial]
    assert picked == pytest.approx(rows["val_auc_raw"].tolist(), abs=1e-4)
    assert (
        len([y for y in trace(page, "parallel", picked=True)["y"] if y is not None])
        == len(search.searched) + 1
    )
    assert len([x for x in trace(page, "slice-max_m", picked=True)["x"] if x is not None]) == 1
    assert (
        page.execute_script("return document.querySelectorAll('#all-trials tr.picked').length") == 1
    )
    assert trial in page.find_element("css selector", ".picks").text
    click(page, ".clear")
    assert page.execute_script("return document.querySelectorAll('tr.picked').length") == 0
    assert trace(page, "curves-raw", picked=True)["y"] == []


def test_a_trial_is_picked_by_its_number_in_the_table_and_let_go_again(page: Browser) -> None:
    button = "#all-trials button.id[data-trial='00003']"
    click(page, button)
    assert page.find_element("css selector", button).get_attribute("aria-pressed") == "true"
    assert "1 picked: 00003" in page.find_element("css selector", ".picks").text
    click(page, button)
    assert page.find_element("css selector", button).get_attribute("aria-pressed") == "false"


def test_clicking_a_line_picks_its_trial(page: Browser, search: Study) -> None:
    best = str(search.best()["trial"])
    look_at(page, "curves-ema")
    x, y = page.execute_script(
        "const div = document.querySelector(`[data-figure='curves-ema']`); div.scrollIntoView({block: 'center'});"
        "const best = div.data.find((each) => each.meta && each.meta.best), last = best.x.length - 3;"
        "const box = div.getBoundingClientRect(), layout = div._fullLayout;"
        "return [box.left + layout.xaxis._offset + layout.xaxis.c2p(best.x[last]),"
        " box.top + layout.yaxis._offset + layout.yaxis.c2p(best.y[last])]"
    )
    mouse(page, "mouseMoved", x, y)
    wait(
        page,
        "return document.querySelector(`[data-figure='curves-ema']`).querySelector('.hoverlayer').childElementCount",
    )
    mouse(page, "mousePressed", x, y)
    mouse(page, "mouseReleased", x, y)
    wait(page, "return document.querySelector('.picks').textContent.includes(arguments[0])", best)


def test_brushing_axes_of_the_parallel_coordinates_keeps_the_trials_that_pass_all(
    page: Browser, search: Study
) -> None:
    names = [*search.searched, "objective"]
    ended = search.trials_full[
        search.trials_full["objective"].notna() & (search.trials_full["state"] != "failed")
    ]
    middle = (ended["objective"].min() + ended["objective"].max()) / 2
    brush(page, names.index("objective"), 0.5, 1.06)
    upper = set(ended.loc[ended["objective"] > middle, "trial"])
    assert picked_rows(page) == upper
    assert "by objective" in page.find_element("css selector", ".picks").text
    axis = "head"
    brush(page, names.index(axis), -0.04, 0.3)  # the lower end: the first choice
    both = set(ended.loc[ended["trial"].isin(upper) & (ended[axis] == "cosine"), "trial"])
    assert picked_rows(page) == both
    assert 0 < len(both) < len(upper)
    click(page, "#parallel .clear")
    assert picked_rows(page) == set()


def picked_rows(browser: Browser) -> set[str]:
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#all-trials tr.picked')].map((r) => r.dataset.trial)"
    )
    return set(rows)


def brush(browser: Browser, axis: int, low: float, high: float) -> None:
    """Drag a box over one axis, as a mouse does."""
    look_at(browser, "parallel")
    left, right, bottom, top = browser.execute_script(
        "const div = document.querySelector(`[data-figure='parallel']`); div.scrollIntoView({block: 'center'});"
        "const box = div.getBoundingClientRect(), {xaxis, yaxis} = div._fullLayout;"
        "const x = (value) => box.left + xaxis._offset + xaxis.c2p(value), y = (value) => box.top + yaxis._offset + yaxis.c2p(value);"
        "return [x(arguments[0] - 0.2), x(arguments[0] + 0.2), y(arguments[1]), y(arguments[2])]",
        axis,
        low,
        high,
    )
    before = browser.find_element("css selector", ".picks").text
    mouse(browser, "mouseMoved", left, top)
    mouse(browser, "mousePressed", left, top)
    for share in (0.3, 0.6, 1.0):
        mouse(
            browser,
            "mouseMoved",
            left + share * (right - left),
            top + share * (bottom - top),
            pressed=True,
        )
    mouse(browser, "mouseReleased", right, bottom)
    wait(browser, "return document.querySelector('.picks').textContent !== arguments[0]", before)


def mouse(browser: Browser, kind: str, x: float, y: float, *, pressed: bool = False) -> None:
    button = "none" if kind == "mouseMoved" and not pressed else "left"
    event = {
        "type": kind,
        "x": x,
        "y": y,
        "button": button,
        "buttons": int(pressed),
        "clickCount": int(kind != "mouseMoved"),
    }
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def test_the_table_of_trials_is_sorted_by_a_column_either_way_with_missing_values_last(
    page: Browser, search: Study
) -> None:
    headings = page.execute_script(
        "return [...document.querySelectorAll('#all-trials th')].map((h) => h.textContent)"
    )
    column = headings.index("objective") + 1

    def values() -> list[str]:
        found: list[str] = page.execute_script(
            "return [...document.querySelectorAll(`#all-trials td:nth-child(${arguments[0]})`)].map((c) => c.dataset.value)",
            column,
        )
        return found

    head = f"#all-trials th:nth-child({column}) button"
    click(page, head)
    numbers = [float(value) for value in values() if value]
    assert numbers == sorted(numbers, reverse=True)
    click(page, head)
    numbers = [float(value) for value in values() if value]
    assert numbers == sorted(numbers)
    assert len(numbers) == search.trials_full["objective"].notna().sum()
    assert (
        page.execute_script("return document.querySelectorAll('#all-trials th[aria-sort]').length")
        == 1
    )
    click(page, "#all-trials th:nth-child(1) button")
    ids = page.execute_script(
        "return [...document.querySelectorAll('#all-trials tbody tr')].map((r) => r.dataset.trial)"
    )
    assert ids == sorted(search.trials_full["trial"])


def test_the_table_of_trials_is_filtered_by_any_text(page: Browser, search: Study) -> None:
    field = page.find_element("css selector", "input.filter")
    field.send_keys("FAILED")
    shown = page.execute_script(
        "return [...document.querySelectorAll('#all-trials tbody tr:not([hidden])')].map((r) => r.dataset.trial)"
    )
    assert (
        shown == search.trials_full.loc[search.trials_full["state"] == "failed", "trial"].tolist()
    )
    assert (
        page.find_element("css selector", "#all-trials-count").text
        == f"1 of {len(search.trials_full)}"
    )


def test_the_stopped_trials_unfold(page: Browser, search: Study) -> None:
    assert not page.find_element("css selector", "#stops details table").is_displayed()
    click(page, "#stops summary")
    assert page.find_element("css selector", "#stops details table").is_displayed()
    rows = page.execute_script("return document.querySelectorAll('#stops details tbody tr').length")
    assert rows == (search.trials_full["state"] == "stopped").sum()


def test_the_theme_changes_page_and_figures(page: Browser) -> None:
    def colours() -> tuple[str, str, str]:
        paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        chip = page.execute_script(
            "return document.querySelector('.chip line').getAttribute('stroke')"
        )
        return paper, figure(page, "curves-ema")["layout"]["font"]["color"], chip

    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "light"}]},
    )
    light = colours()
    click(page, "#theme")
    assert colours() == light
    click(page, "#theme")
    dark = colours()
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    assert dark[2] == figures.PALETTE[light[2]]
    click(page, "#theme")
    assert colours() == light
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    page.get_screenshot_as_png()  # draws a frame: media queries are looked at again with one, and no window asks for it
    wait(
        page,
        "return getComputedStyle(document.body).backgroundColor === arguments[0]"
        " && document.querySelector(`[data-figure='curves-ema']`).layout.font.color === arguments[1]",
        *dark[:2],
    )
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_paper_gets_light_figures_and_nothing_folded_away(page: Browser) -> None:
    page.execute_script("document.documentElement.dataset.theme = 'dark'")
    page.execute_script(
        "const figureOf = () => document.querySelector(`[data-figure='parallel']`);"
        "addEventListener('beforeprint', () => { window.atPrint = {"
        " open: [...document.querySelectorAll('details')].every((d) => d.open),"
        " ink: document.querySelector(`[data-figure='curves-ema']`).layout.font.color,"
        " heads: figureOf().layout.annotations.filter((each) => /^head-/.test(each.name || '')).map((each) => each.y),"
        " why: getComputedStyle(document.querySelector('#all-trials td.text')).display,"
        " widest: Math.max(...[...document.querySelectorAll('.plot .main-svg')].map((s) => s.getBoundingClientRect().width)) } })"
    )
    printed = base64.b64decode(
        page.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    )
    assert printed.startswith(b"%PDF")
    at_print = page.execute_script("return window.atPrint")
    assert at_print["open"]
    assert at_print["ink"] == "#1b2430"
    assert at_print["widest"] <= 690
    assert at_print["why"] == "table-cell", "no column is left out on paper"
    heads = at_print["heads"]
    assert all(one != other for one, other in itertools.pairwise(heads)), "names do not overlap"
    assert page.execute_script(
        "return [...document.querySelectorAll('details')].every((d) => !d.open)"
    )
    assert figure(page, "curves-ema")["layout"]["font"]["color"] == "#e8ecf1"


def test_each_sheet_of_the_printed_table_has_its_heading(
    page: Browser, search: Study, tmp_path: Path
) -> None:
    sheets = printed_pages(page, tmp_path / "report.pdf")
    first = next(number for number, text in enumerate(sheets) if "Every trial" in text)
    rows = [re.findall(r"^\s*(\d{5}) ", text, re.MULTILINE) for text in sheets[first:]]
    assert sorted(itertools.chain(*rows)) == sorted(search.trials_full["trial"])
    with_rows = [sheets[first + number] for number, found in enumerate(rows) if found]
    assert len(with_rows) > 1
    for text in with_rows:
        assert re.search(r"^\s*trial +state +verdict .*classifier_lr", text, re.MULTILINE)


def test_links_of_the_contents_lead_to_their_sections(page: Browser) -> None:
    targets = page.execute_script(
        "return [...document.querySelectorAll('nav.contents a')].map((a) => a.hash.slice(1))"
    )
    assert len(targets) >= 10
    for target in targets:
        assert page.execute_script("return document.getElementById(arguments[0]) !== null", target)
