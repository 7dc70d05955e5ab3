"""The live page in a real browser, over a real `medtune serve`: its content and its updates."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from browsing import (
    DESKTOP,
    PHONE,
    Browser,
    click,
    complaints,
    opened,
    ready,
    violations,
    wait,
)
from filelock import FileLock
from object_storage import put_folder, s3_server
from serving import Service, text

from tune_app.report.findings import rivals_within_noise
from tune_app.results.loading import load_study
from tune_app.results.tables import faulty
from tune_app.study.files import StudyFiles, append_line


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize(
    "view",
    ["", "study/a%20search", "study/an%20ablation", "study/a%20search/trial/00003", "study/a%20search/compare/00001/00003", "across/a%20search/an%20ablation", "new"],
)  # fmt: skip
def test_every_view_opens_without_an_error_or_a_foreign_request_and_fits_its_window(
    browser: Browser, service: Service, view: str, size: tuple[int, int]
) -> None:
    opened(browser, f"{service.url}#/{view}", size)
    wait(browser, "return document.querySelector('main h1')")
    for top in range(
        0, int(browser.execute_script("return document.documentElement.scrollHeight")), 700
    ):
        browser.execute_script("scrollTo(0, arguments[0])", top)
    wait(
        browser,
        "return [...document.querySelectorAll('.plot')].every((plot) => !plot.getBoundingClientRect().height || plot.querySelector('svg')) ",
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    names = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert names
    assert all(name.startswith(service.url) for name in names)
    assert complaints(browser) == []


def test_the_page_tells_what_the_dataframes_tell(browser: Browser, service: Service) -> None:
    study = load_study(service.folder / "a search")
    opened(browser, f"{service.url}#/study/a%20search")
    best = study.best()
    assert f"{best['objective']:.3f}" in text(browser, ".tile b")
    assert f"Trial {best['trial']} is best" in text(browser, ".found")
    assert int(
        browser.execute_script("return document.querySelector('.canvas').dataset.drawn")
    ) == len(study.trials_full)
    rows = browser.execute_script(
        "return [...document.querySelectorAll('table.trials tr[data-trial]')].map((row) => row.dataset.trial)"
    )
    ranked = study.trials_full.sort_values("objective", ascending=False, kind="stable")[
        "trial"
    ].tolist()
    assert rows[:10] == ranked[:10]

    browser.find_element("css selector", "#filter").send_keys("state == failed")
    wait(browser, "return document.querySelectorAll('table.trials tr[data-trial]').length === 1")
    assert "where=state" in browser.current_url
    opened(browser, browser.current_url)  # as a colleague sees it with the shared address
    wait(browser, "return document.querySelectorAll('table.trials tr[data-trial]').length === 1")


def test_two_trials_are_picked_and_compared_and_a_diagnosis_opened_by_keyboard(
    browser: Browser, service: Service
) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, f"{service.url}#/study/a%20search")
    body = browser.find_element("css selector", "body")
    body.send_keys("jxjx")
    assert (
        len(
            wait(
                browser,
                "return document.querySelectorAll('tr.picked').length === 2 && location.hash",
            )
        )
        > 20
    )
    body.send_keys("c")
    ready(browser)
    names = wait(
        browser,
        "const rows = [...document.querySelectorAll('tr[data-name]')]; return rows.length && rows.map((row) => row.dataset.name)",
    )
    study = load_study(service.folder / "a search")
    pair = browser.current_url.rsplit("/", 2)[1:]
    first, second = (study.trials_full.set_index("trial").loc[trial] for trial in pair)
    assert all(first[name] != second[name] for name in names)
    browser.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    wait(browser, "return location.hash.startsWith('#/study/a%20search?pick=')")
    ready(browser)
    wait(browser, "return document.querySelectorAll('tr.picked').length === 2")
    collapsed = study.trials_full[faulty(study.trials_full)].iloc[0]
    opened(browser, f"{service.url}#/study/a%20search/trial/{collapsed['trial']}")
    assert collapsed["verdict_summary"] in text(browser, "#summary")
    assert "What to change" in text(browser, ".advice")
    assert complaints(browser) == []


def test_the_first_screen_says_how_sure_it_is(browser: Browser, service: Service) -> None:
    study = load_study(service.folder / "a search")
    best = study.best()
    opened(browser, f"{service.url}#/study/a%20search")
    low, high = best["best_val_auc_low"], best["best_val_auc_high"]
    assert text(browser, ".tile b") == f"{best['objective']:.3f} [{low:.2f}, {high:.2f}]"
    rivals, _ = rivals_within_noise(study)
    assert f"{rivals or 'no'} other" in text(browser, ".tile span")
    assert browser.execute_script("return document.querySelector('.doubts').open")
    live = "return document.querySelector('#live').textContent"
    assert browser.execute_script(live) == "", "nothing is live in a study that has ended"
    assert "begin" not in text(browser, ".tiles")


def test_a_number_is_written_as_python_writes_it(browser: Browser, service: Service) -> None:
    values = [0.5625, 0.5635, 0.8125, -0.5625, 0.0625, 1.0, 0.6875, 0.1]
    opened(browser, f"{service.url}#/")
    found = browser.execute_async_script(
        "const done = arguments[2]; import(arguments[0]).then((module) => done(arguments[1].map((value) => module.number(value))))",
        f"{service.url}parts.js",
        values,
    )
    assert found == [f"{value:.3f}" for value in values]


def test_studies_are_ticked_and_shown_side_by_side(browser: Browser, service: Service) -> None:
    opened(browser, f"{service.url}#/")
    wait(browser, "return document.querySelectorAll('.tick').length >= 2")
    assert not browser.find_element("css selector", "#side-by-side").is_enabled()
    for name in ("a search", "an ablation"):
        click(browser, f"[data-row='tick {name}']")
    click(browser, "#side-by-side")
    ready(browser)
    studies = [load_study(service.folder / name) for name in ("a search", "an ablation")]
    told = text(browser, "main")
    assert "[object" not in told
    for study in studies:
        assert f"{study.best()['objective']:.3f}" in told
    assert browser.execute_script("return document.querySelectorAll('.plot svg').length") == 2
    assert complaints(browser) == []


def test_names_and_errors_that_try_to_be_markup_stay_text(
    browser: Browser, service: Service, another: Callable[[str], StudyFiles]
) -> None:
    record = another("<img src=x onerror=window.hit=1>").trial("00005").record
    nasty = {"error": "<script>window.hit=2</script>", "variant": "</td><svg onload=window.hit=3>"}
    record.write_text(json.dumps(json.loads(record.read_text()) | nasty))
    opened(browser, f"{service.url}#/")
    wait(
        browser,
        "return [...document.querySelectorAll('td.name a')].some((a) => a.textContent.includes('onerror'))",
    )
    for view in ("", "/trial/00005"):
        opened(
            browser, f"{service.url}#/study/%3Cimg%20src%3Dx%20onerror%3Dwindow.hit%3D1%3E{view}"
        )
        wait(browser, "return document.querySelector('main h1')")
        assert browser.execute_script(
            "return window.hit === undefined && !document.querySelector('main img, main script')"
        )
        assert complaints(browser) == []


def test_a_study_that_appears_after_its_address_was_opened_is_shown_without_loading_again(
    browser: Browser, service: Service, another: Callable[[str], StudyFiles]
) -> None:
    browser.get("about:blank")
    browser.get(f"{service.url}#/study/about%20to%20begin")
    assert "no study 'about to begin' here" in text(browser, ".bad")
    another("about to begin")
    ready(browser)
    assert text(browser, ".title h1") == "about to begin"


def test_rows_of_a_running_study_appear_without_loading_again(
    browser: Browser, service: Service, another: Callable[[str], StudyFiles]
) -> None:
    files = another("running")
    record = files.trial("00003").record
    record.write_text(
        json.dumps(json.loads(record.read_text()) | {"state": "running", "ended": None})
    )
    rows = [json.loads(line) for line in files.epochs.read_text().splitlines()]
    last = [row for row in rows if row["trial"] == "00003"][-1]
    with FileLock(files.lock):
        opened(browser, f"{service.url}#/study/running")
        wait(browser, "return document.querySelector('#live').textContent === 'live'")
        assert "running" in text(browser, ".title .badge")
        browser.execute_script("window.same = true")
        for epoch in (last["epoch"] + 1, last["epoch"] + 2):
            append_line(
                files.epochs,
                last
                | {"epoch": epoch, "time": time.time(), "val_auc_ema": 0.987, "val_auc": 0.987},
            )
        wait(browser, "return document.documentElement.dataset.rows === '2'")
        wait(
            browser,
            "return [...document.querySelectorAll('tr[data-trial]')].some((row) => row.textContent.includes('0.987'))",
        )
        assert browser.execute_script("return window.same"), "the page was loaded again"
        assert int(browser.execute_script("return document.documentElement.dataset.lag")) < 20_000
    wait(
        browser,
        "return document.querySelector('.title .badge').textContent.includes('interrupted')",
    )
    assert complaints(browser) == []


def test_a_page_of_object_storage_says_when_that_does_not_answer(
    browser: Browser, a_search: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as running:
        for name, value in running.enter_context(s3_server()).items():
            monkeypatch.setenv(name, value)
        put_folder("s3://studies/browser/a search", a_search)
        service = Service(Path("s3://studies/browser"), tmp_path / "cache")
        opened(browser, f"{service.url}#/")
        wait(
            browser,
            "return document.querySelector('#studies tbody').textContent.includes('a search')",
        )
        wait(browser, "return document.querySelector('#trouble').textContent === ''")
        opened(browser, f"{service.url}#/study/a%20search")
        ready(browser)
        assert "s3://studies/browser/a search" in text(browser, "#page")
        assert browser.execute_script("return document.querySelector('#trouble')") is None
    wait(
        browser,
        "return document.querySelector('#trouble')?.textContent.startsWith('the storage does not answer since')",
    )
    opened(browser, f"{service.url}#/")
    wait(
        browser,
        "return document.querySelector('#trouble').textContent.startsWith('the storage does not answer since')",
    )
    assert "a search" in text(browser, "#studies tbody"), "the earlier list is still shown"
    assert complaints(browser) == []
    assert "Traceback" not in service.end()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("view", ["", "study/a%20search", "study/a%20search/trial/00003", "across/a%20search/an%20ablation", "new"])  # fmt: skip
def test_no_view_breaks_a_rule_of_accessibility(
    browser: Browser, service: Service, view: str, theme: str
) -> None:
    opened(browser, f"{service.url}#/{view}")
    browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    assert violations(browser) == []
    small = browser.execute_script(
        "return [...document.querySelectorAll('button, a.tool, select, input, summary')].map((each) => [each.id || each.textContent, each.getBoundingClientRect()])"
        ".filter(([, box]) => box.width && (box.width < 24 || box.height < 24)).map(([name]) => name)"
    )
    assert small == []
