"""The live page in a real browser, over a real `medtune serve`: what is shown, what can be clicked, and what comes in."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from browsing import (
    DEADLINE_S,
    DESKTOP,
    PHONE,
    Browser,
    click,
    complaints,
    opened,
    ready,
    wait,
    wait_for,
)
from filelock import FileLock
from object_storage import put_folder, s3_server

from tune_app.results.loading import load_study
from tune_app.study.files import StudyFiles, append_line
from tune_app.study.rows import is_held
from tune_app.synthetic import write_cohort

TOKEN = "token-of-the-test"


class Service:
    """`medtune serve` as a process of its own."""

    def __init__(self, folder: Path, cache: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}/"
        environment = os.environ | {"MEDTUNE_TOKEN": TOKEN, "MEDTUNE_CACHE": str(cache)}
        command = [
            sys.executable,
            "-m",
            "tune_app.cli",
            "serve",
            str(folder),
            "--port",
            str(self.port),
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        wait_for(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()
        try:
            with urllib.request.urlopen(f"{self.url}api/session", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def end(self, how: int = signal.SIGINT) -> str:
        self.process.send_signal(how)
        return str(self.process.communicate(timeout=DEADLINE_S)[1])


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, a_search: Path, an_ablation: Path
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(a_search, folder / "a search")
    shutil.copytree(an_ablation, folder / "an ablation")
    running = Service(folder, folder / "cache")
    yield running
    said = running.end()
    assert "Traceback" not in said, said


def text(browser: Browser, selector: str) -> str:
    return str(wait(browser, "return document.querySelector(arguments[0])?.textContent", selector))


def log_in(browser: Browser) -> None:
    field = browser.find_element("css selector", "#token")
    field.send_keys(TOKEN)
    click(browser, "dialog button[type=submit]")
    wait(browser, "return document.querySelector('#login').textContent === 'log out'")


# What is shown ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize(
    "view",
    ["", "study/a%20search", "study/an%20ablation", "study/a%20search/trial/00003", "study/a%20search/compare/00001/00003", "new"],
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
    ) == len(study.trials)
    rows = browser.execute_script(
        "return [...document.querySelectorAll('table.trials tr[data-trial]')].map((row) => row.dataset.trial)"
    )
    ranked = study.trials.sort_values("objective", ascending=False, kind="stable")["trial"].tolist()
    assert rows[:10] == ranked[:10]

    browser.find_element("css selector", "#filter").send_keys("state == failed")
    wait(browser, "return document.querySelectorAll('table.trials tr[data-trial]').length === 1")
    assert "where=state" in browser.current_url
    opened(browser, browser.current_url)  # what a colleague gets who is sent the address
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
    first, second = (study.trials.set_index("trial").loc[trial] for trial in pair)
    assert all(first[name] != second[name] for name in names)
    browser.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    wait(browser, "return location.hash === '#/study/a%20search'")
    ready(browser)
    collapsed = study.trials[study.trials["verdict"] != "healthy"].iloc[0]
    opened(browser, f"{service.url}#/study/a%20search/trial/{collapsed['trial']}")
    assert collapsed["verdict_summary"] in text(browser, "#summary")
    assert "What to change" in text(browser, ".advice")
    assert complaints(browser) == []


@pytest.fixture
def another(service: Service) -> Iterator[Callable[[str], StudyFiles]]:
    """Return a function that puts a copy of the search beside it under another name; whatever happens, it is removed."""
    copies = []

    def copy(name: str) -> StudyFiles:
        copies.append(service.folder / name)
        return StudyFiles(shutil.copytree(service.folder / "a search", copies[-1]))

    yield copy
    for root in copies:
        shutil.rmtree(root)


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
        wait(browser, "return document.querySelector('#live').textContent === 'live'")
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
    assert "a search" in text(browser, "#studies tbody"), "what was there is still shown"
    assert complaints(browser) == []
    assert "Traceback" not in service.end()


def test_changing_asks_for_the_token_and_a_wrong_form_says_why(
    browser: Browser, service: Service
) -> None:
    browser.delete_all_cookies()
    opened(browser, f"{service.url}#/new")
    browser.find_element("css selector", "#f-data").send_keys("/nowhere/table.csv")
    click(browser, "#begin")
    wait(browser, "return document.querySelector('dialog').open")
    log_in(browser)
    assert "no file /nowhere/table.csv" in text(browser, "#problems li")
    opened(browser, f"{service.url}#token=wrong")
    assert "not the token" in text(browser, "#notice")
    opened(browser, f"{service.url}#token={TOKEN}")
    assert "token" not in browser.current_url, "it must not stay in the address"
    browser.delete_all_cookies()


# A study from its start on the page to its end -------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)  # starts Ray twice
def test_a_study_is_started_watched_stopped_and_resumed_on_the_page(
    browser: Browser, tmp_path: Path
) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=16, side=(14, 18))
    folder = tmp_path / "studies"
    folder.mkdir()
    service = Service(folder, tmp_path / "cache")
    root = folder / "from the page"
    files = StudyFiles(root)
    small = {
        "depth": 10,
        "width": 0.125,
        "volume_shape": 16,
        "num_folds": 2,
        "train_auc_volumes": 0,
    }
    try:
        opened(browser, f"{service.url}#token={TOKEN}")
        wait(browser, "return document.querySelector('#login').textContent === 'log out'")
        click(browser, "#new")
        ready(browser)
        for selector, value in (
            ("#f-name", "from the page"), ("#f-data", str(table)), ("#f-trials", "2"), ("#f-epochs", "400"),
            ("#f-config", "\n".join(f"{name} = {value}" for name, value in small.items())),
        ):  # fmt: skip
            field = browser.find_element("css selector", selector)
            field.clear()
            field.send_keys(value)
        low = browser.find_element("css selector", "table.ranges input.range")
        low.clear()
        low.send_keys("0.1")
        click(browser, "#begin")
        wait(browser, "return location.hash === '#/study/from%20the%20page'")
        wait_for(
            lambda: browser.execute_script(
                "return Number(document.documentElement.dataset.rows || 0) > 4"
            ),
            deadline_s=600,
        )
        assert load_study(root).space.parameters["max_m"].ends[0] == 0.1  # type: ignore[union-attr]
        assert complaints(browser) == []

        service.end(signal.SIGKILL)  # the service dies; the study does not
        seen = files.epochs.read_bytes().count(b"\n")
        wait_for(lambda: files.epochs.read_bytes().count(b"\n") > seen + 2)
        service = Service(folder, tmp_path / "cache")
        opened(browser, f"{service.url}#token={TOKEN}")
        wait(browser, "return document.querySelector('#login').textContent === 'log out'")

        browser.execute_script("location.hash = '#/study/from%20the%20page/trial/00000'")
        click(browser, "#stop-trial")
        click(browser, "#yes")
        wait_for(
            lambda: load_study(root).trials.set_index("trial").loc["00000", "state"] == "stopped"
        )
        assert load_study(root).trials.set_index("trial").loc["00000", "stopped_by"] == "requested"
        wait(
            browser,
            "return document.querySelector('.title .badge').textContent.includes('stopped')",
        )
        assert "on request" in browser.execute_script(
            "return document.querySelector('main').textContent"
        )

        browser.execute_script("location.hash = '#/study/from%20the%20page'")
        ready(browser)
        click(browser, "#stop")
        click(browser, "#yes")
        wait_for(lambda: not is_held(files.lock), deadline_s=300)
        click(browser, "#start")
        wait_for(lambda: is_held(files.lock), deadline_s=300)
        rows = files.epochs.read_bytes().count(b"\n")
        wait_for(lambda: files.epochs.read_bytes().count(b"\n") > rows + 1, deadline_s=600)
        trials = load_study(root).trials.set_index("trial")
        assert trials.loc["00000", "state"] == "stopped", "what was stopped on request stays so"
        wait(
            browser,
            "return [...document.querySelectorAll('.badge')].some((badge) => badge.textContent.includes('running'))",
        )
        click(browser, "#stop")
        click(browser, "#yes")
        wait_for(lambda: not is_held(files.lock), deadline_s=300)
    finally:
        service.end(signal.SIGKILL)
        if is_held(files.lock):
            files.stop_request.parent.mkdir(exist_ok=True)
            files.stop_request.write_text("{}")
