"""What is changed from the page in a real browser: notes, studies asked for, confirmations, exports."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import yaml
from browsing import (
    Browser,
    click,
    complaints,
    opened,
    ready,
    violations,
    wait,
    wait_for,
)
from filelock import FileLock
from serving import TOKEN, Service, log_in, text

from tune_app.results.loading import load_study
from tune_app.study.files import StudyFiles
from tune_app.study.presets import PRESETS
from tune_app.study.rows import is_held
from tune_app.study.spec import StudySpec
from tune_app.synthetic import write_cohort


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
    assert "no file /nowhere/table.csv" in text(browser, "label:has(#f-data) .at-field")
    invalid = "return [...document.querySelectorAll('[aria-invalid]')].map((each) => each.id)"
    assert browser.execute_script(invalid) == ["f-data"]
    opened(browser, f"{service.url}#token=wrong")
    assert "not the token" in text(browser, "#notice")
    opened(browser, f"{service.url}#token={TOKEN}")
    assert "token" not in browser.current_url, "it must not stay in the address"
    browser.delete_all_cookies()


def test_notes_are_written_and_a_study_is_deleted_by_its_name(
    browser: Browser, service: Service, another: Callable[[str], StudyFiles]
) -> None:
    files = another("to be deleted")
    opened(browser, f"{service.url}#token={TOKEN}")
    browser.execute_script("location.hash = '#/study/to%20be%20deleted'")
    wait(browser, "return document.querySelector('.title h1')?.textContent === 'to be deleted'")
    click(browser, "#note-study")
    browser.find_element("css selector", "#note-text").send_keys("<i>odd</i>")
    browser.find_element("css selector", "#note-tags").send_keys("baseline, odd")
    click(browser, "#save-note")
    assert text(browser, ".note") == "<i>odd</i>"
    tags = "return [...document.querySelectorAll('.notes .tag')].map((tag) => tag.textContent)"
    assert wait(browser, tags) == ["baseline", "odd"]
    click(browser, "#manage")
    trials = len(load_study(files.root).trials_full)
    wait(
        browser,
        f"return document.querySelector('dialog').textContent.includes('Delete: {trials} trials')",
    )
    click(browser, "#delete")
    assert "only when its name is given" in text(browser, "#notice")
    assert files.root.is_dir()
    browser.find_element("css selector", "#typed-name").send_keys("to be deleted")
    click(browser, "#delete")
    wait_for(lambda: not files.root.exists())
    wait(browser, "return location.hash === '#/'")
    browser.delete_all_cookies()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort"), subjects=20, side=(8, 9))


@pytest.fixture
def readable(
    another: Callable[[str], StudyFiles], cohort: Path, service: Service
) -> Iterator[StudyFiles]:
    """A search whose table can be read; another study holds the machine, so that nothing that is queued starts."""
    files = another("readable")
    info = json.loads(files.spec.read_text())
    info["spec"]["data"] = str(cohort)
    files.spec.write_text(json.dumps(info))
    with FileLock(StudyFiles(service.folder / "an ablation").lock):
        yield files


def test_a_confirmation_is_planned_with_its_time_and_queued_from_the_page(
    browser: Browser, service: Service, readable: StudyFiles
) -> None:
    opened(browser, f"{service.url}#token={TOKEN}")
    browser.execute_script("location.hash = '#/study/readable'")
    click(browser, "#confirm")
    plan = "return document.querySelector('#plan').textContent"
    wait(browser, f"{plan}.includes('Measured in the study')")
    assert "runs of 20 epochs" in browser.execute_script(plan)
    field = browser.find_element("css selector", "#p-folds")
    field.clear()
    field.send_keys("x")
    click(browser, "#go")
    assert "all, own, or numbers" in text(browser, "label:has(#p-folds) .at-field")
    assert violations(browser) == []
    field.clear()
    field.send_keys("0,1")
    click(browser, "#go")
    wait(browser, "return location.hash === '#/study/readable~confirmation'")
    wait(browser, "return document.querySelector('.badge')?.textContent.includes('queued')")
    asked = yaml.safe_load(StudyFiles(readable.confirmation).asked.read_text())
    assert {trial["overrides"]["fold"] for trial in asked["planned"]} == {0, 1}
    click(browser, "#stop")  # out of the queue
    wait_for(lambda: not json.loads((service.folder / ".medtune" / "queue.json").read_text())["waiting"])  # fmt: skip
    browser.delete_all_cookies()


def test_an_export_that_fails_says_why_on_the_studys_page(
    browser: Browser, service: Service, readable: StudyFiles
) -> None:
    opened(browser, f"{service.url}#token={TOKEN}")
    browser.execute_script("location.hash = '#/study/readable/trial/00001'")
    wait(browser, "return document.querySelector('h1').textContent === 'Trial 00001'")
    click(browser, "#export")
    assert text(browser, "#p-trial option") == "trial 00001"
    click(browser, "#go")
    browser.execute_script("location.hash = '#/study/readable'")
    wait(browser, "return document.querySelector('[data-model] .badge.failed')")
    assert "error" in text(browser, "[data-model] .log"), "its weights are no weights"
    browser.delete_all_cookies()


@pytest.mark.slow
def test_a_model_is_exported_and_downloaded_from_the_page_and_predicts(
    browser: Browser, trained_study: Path, exported_model: Path, tmp_path: Path
) -> None:
    """The scores are those of the same trial as Python exports it."""
    folder, downloads = tmp_path / "studies", tmp_path / "downloads"
    shutil.copytree(trained_study, folder / "trained")
    service = Service(folder, trained_study.parent / "cache")
    there = {"behavior": "allow", "downloadPath": str(downloads)}
    try:
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", there)
        opened(browser, f"{service.url}#token={TOKEN}")
        browser.execute_script("location.hash = '#/study/trained/trial/00000'")
        click(browser, "#export")
        field = browser.find_element("css selector", "#p-name")
        field.clear()
        field.send_keys("from the page")
        click(browser, "#go")
        browser.execute_script("location.hash = '#/study/trained'")
        wait(browser, "return document.querySelector('[data-model] .badge.written')")
        assert text(browser, "[data-model]").startswith("✓ written from the page")
        click(browser, "[data-model] a.tool")
        archive = downloads / "from-the-page.zip"
        wait_for(archive.is_file)
        assert complaints(browser) == []
        browser.delete_all_cookies()
    finally:
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "default"})
        assert "Traceback" not in service.end()
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "unpacked")

    def scores(model: Path) -> pd.DataFrame:
        out = tmp_path / f"{model.name}.csv"
        command = ["predict", str(model), str(trained_study.parent / "cohort"), "--out", str(out)]
        subprocess.run([sys.executable, "-m", "tune_app.cli", *command, "--device", "cpu"], check=True)  # fmt: skip
        return pd.read_csv(out).drop(columns="model", errors="ignore")

    found = scores(tmp_path / "unpacked" / "from the page")
    assert len(found) == len(pd.read_csv(trained_study.parent / "cohort" / "table.csv"))
    pd.testing.assert_frame_equal(found, scores(exported_model))


def test_the_form_has_presets_the_time_and_each_problem_at_its_field(
    browser: Browser, service: Service, readable: StudyFiles, cohort: Path
) -> None:
    from selenium.webdriver.support.ui import Select

    opened(browser, f"{service.url}#token={TOKEN}")
    browser.execute_script("location.hash = '#/new'")
    wait(browser, "return document.querySelector('#f-data')")
    names = browser.execute_script(
        "return [...document.querySelectorAll('.field > span')].map((each) => each.textContent)"
    )
    assert set(names) - {"name", "preset", "epochs", "pretrained_path"} <= set(
        StudySpec.model_fields
    ), "fields are named as in a study file"
    Select(browser.find_element("css selector", "#f-preset")).select_by_visible_text("laptop")
    value = "return document.querySelector(arguments[0]).value"
    preset = PRESETS["laptop"]
    assert browser.execute_script(value, "#f-trials") == str(preset["trials"])
    assert browser.execute_script(value, "#f-epochs") == str(preset["config"]["epochs"])
    assert "width = 0.5" in browser.execute_script(value, "#f-config")
    browser.find_element("css selector", "#f-data").send_keys(str(cohort))
    lines = "depth = 10\nvolume_shape = 28"
    browser.execute_script("document.querySelector('#f-config').value = arguments[0]", lines)
    click(browser, "#check")
    wait(browser, "return document.querySelector('#outcome').textContent.includes('Time: about')")
    assert violations(browser) == []

    browser.find_element("css selector", "#f-weights").send_keys("/nowhere/resnet.pth")
    click(browser, "#check")
    assert "no file /nowhere/resnet.pth" in text(browser, "label:has(#f-weights) .at-field")
    browser.execute_script(
        "document.querySelector('#f-weights').value = '';"
        "document.querySelector('#f-config').value = 'depth = 11';"
        "document.querySelector('input.range[aria-label=s]').value = 90"
    )
    click(browser, "#check")
    invalid = "return [...document.querySelectorAll('[aria-invalid]')].map((each) => each.id || each.ariaLabel)"
    wait(browser, "return document.querySelector('#problems li')")
    assert browser.execute_script(invalid) == ["f-config"]
    browser.delete_all_cookies()


def test_an_epoch_is_measured_on_this_machine_from_the_form(
    browser: Browser, service: Service, cohort: Path
) -> None:
    opened(browser, f"{service.url}#token={TOKEN}")
    browser.execute_script("location.hash = '#/new'")
    wait(browser, "return document.querySelector('#f-data')")
    fill = "const field = document.querySelector(arguments[0]); field.value = arguments[1]; field.dispatchEvent(new Event('change'))"
    lines = "depth = 10\nwidth = 0.125\nvolume_shape = 20"
    outcome = "return document.querySelector('#outcome').textContent"
    for selector, value in (("#f-data", str(cohort)), ("#f-gpus", "0"), ("#f-config", lines)):
        browser.execute_script(fill, selector, value)
    wait(browser, f"{outcome}.includes('It can be measured on this machine')")
    click(browser, "#measure")
    wait(browser, "return document.querySelector('#measure').disabled")
    wait(browser, f"{outcome}.includes('Time on this machine: about')")
    found = browser.execute_script(outcome)
    assert "s per epoch" in found
    assert f"on {socket.gethostname()} (1 CPU thread per trial)" in found
    assert not browser.execute_script("return document.querySelector('#measure').disabled")
    assert violations(browser) == []
    opened(browser, f"{service.url}#/")  # remembered, whoever fills in the form
    browser.execute_script("location.hash = '#/new'")
    wait(browser, "return document.querySelector('#f-data')")
    for selector, value in (("#f-data", str(cohort)), ("#f-gpus", "0"), ("#f-config", lines)):
        browser.execute_script(fill, selector, value)
    wait(browser, f"{outcome}.includes('Time on this machine: about')")

    browser.execute_script(fill, "#f-config", f"{lines}\nbatch_size = 1")
    browser.execute_script(fill, "#f-gpus", "2")
    click(browser, "#measure")
    assert "trials of one process" in text(browser, "label:has(#f-gpus) .at-field")
    assert complaints(browser) == []
    browser.delete_all_cookies()


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
            lambda: (
                load_study(root).trials_full.set_index("trial").loc["00000", "state"] == "stopped"
            )
        )
        assert (
            load_study(root).trials_full.set_index("trial").loc["00000", "stopped_by"]
            == "requested"
        )
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
        trials = load_study(root).trials_full.set_index("trial")
        assert trials.loc["00000", "state"] == "stopped", "a trial stopped on request stays stopped"
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
