"""The live page in a real browser, over a real `medtune serve`: its content, its controls, and its updates."""

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from browsing import (
    DEADLINE_S,
    DESKTOP,
    PHONE,
    Browser,
    click,
    complaints,
    opened,
    printed_pages,
    ready,
    violations,
    wait,
    wait_for,
)
from filelock import FileLock
from object_storage import put_folder, s3_server

from tune_app.report.findings import rivals_within_noise
from tune_app.results.loading import load_study
from tune_app.results.tables import faulty
from tune_app.study.files import StudyFiles, append_line
from tune_app.study.presets import PRESETS
from tune_app.study.rows import is_held
from tune_app.study.spec import StudySpec
from tune_app.synthetic import write_cohort

TOKEN = "token-of-the-test"


class Service:
    """`medtune serve` as a separate process."""

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


# Content ---------------------------------------------------------------------------------------------------------------


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


# Curves and table ------------------------------------------------------------------------------------------------------


def drag(
    browser: Browser, selector: str, start: tuple[float, float], end: tuple[float, float]
) -> None:
    """Drag the mouse over an element, between places given as shares of its width and height."""
    from selenium.webdriver.common.action_chains import ActionChains

    browser.execute_script(
        "document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector
    )
    node = browser.find_element("css selector", selector)
    width, height = node.size["width"], node.size["height"]
    offsets = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in (start, end)]
    actions = ActionChains(browser, duration=50).move_to_element_with_offset(node, *offsets[0])
    actions.click_and_hold().move_to_element_with_offset(node, *offsets[1]).release().perform()


def shown(browser: Browser) -> list[int]:
    return [
        int(each)
        for each in browser.execute_script(
            "return [...document.querySelectorAll('.canvas')].map((each) => each.dataset.shown)"
        )
    ]


LEFT = ".pair figure:nth-child(1) .canvas canvas:nth-child(2)"


def test_any_metric_is_drawn_over_any_axis_and_the_address_keeps_it(
    browser: Browser, service: Service
) -> None:
    from selenium.webdriver.support.ui import Select

    opened(browser, f"{service.url}#/study/a%20search")
    metric = browser.find_element("css selector", "select[aria-label='metric of the left panel']")
    study = load_study(service.folder / "a search")
    offered = [option.text for option in Select(metric).options]
    assert offered[:2] == ["val_auc_ema", "val_auc_raw"]
    assert {"train_loss", "lr_backbone", "grad_norm"} <= set(offered)
    Select(metric).select_by_visible_text("train_loss")
    axis = browser.find_element("css selector", "select[aria-label='horizontal axis']")
    Select(axis).select_by_visible_text("time")
    label = "return document.querySelector('.canvas').getAttribute('aria-label')"
    wait(browser, f"{label} === 'train_loss by time, one line per trial'")
    assert "x=time" in browser.current_url
    assert "y=train_loss%2Cval_auc_raw" in browser.current_url
    opened(browser, browser.current_url)
    assert browser.execute_script(label) == "train_loss by time, one line per trial"
    assert int(text_of(browser, ".canvas", "drawn")) == study.epochs["trial"].nunique()
    assert complaints(browser) == []


def text_of(browser: Browser, selector: str, name: str) -> str:
    script = "return document.querySelector(arguments[0]).dataset[arguments[1]]"
    return str(wait(browser, script, selector, name))


def test_curves_are_zoomed_smoothed_and_reset(browser: Browser, service: Service) -> None:
    opened(browser, f"{service.url}#/study/a%20search")
    assert not browser.find_element("css selector", "#unzoom").is_enabled()
    before = browser.execute_script("return document.querySelector('.canvas canvas').toDataURL()")
    drag(browser, LEFT, (0.3, 0.2), (0.7, 0.6))
    wait(browser, "return !document.querySelector('#unzoom').disabled")
    pixels = "return document.querySelector('.canvas canvas').toDataURL()"
    wait(browser, f"{pixels} !== arguments[0]", before)
    assert "pick=" not in browser.current_url, "a drag picks nothing"
    drag(
        browser, LEFT, (0.5, 0.02), (0.54, 0.9)
    )  # between two epochs: the lines cross, without a point of theirs
    blue = (
        "const c = document.querySelector('.canvas canvas');"
        "const { data } = c.getContext('2d').getImageData(c.width * 0.3, 0, c.width * 0.4, c.height);"
        "return data.filter((value, i) => i % 4 === 2 && value - data[i - 2] > 40 && data[i + 1] > 100).length"
    )
    wait(browser, f"{blue} > 200")
    click(browser, "#unzoom")
    wait(browser, f"{pixels} === arguments[0]", before)
    slider = "const s = document.querySelector('#smoothing'); s.value = 0.8; s.dispatchEvent(new Event('input'))"
    browser.execute_script(slider)
    wait(browser, f"{pixels} !== arguments[0]", before)
    assert text(browser, "label.range output") == "0.8"
    assert complaints(browser) == []


def test_smoothing_is_the_debiased_mean(browser: Browser, service: Service) -> None:
    values = [1.0, None, 0.0, 0.5]
    found = browser.execute_async_script(
        "const done = arguments[2]; import(arguments[0]).then((module) => done(module.smoothed(arguments[1], 0.5)))",
        f"{service.url}curves.js",
        values,
    )
    weights = {2: [(0.25, 1.0), (0.5, 0.0)], 3: [(0.125, 1.0), (0.25, 0.0), (0.5, 0.5)]}
    means = {at: sum(w * v for w, v in ws) / sum(w for w, _ in ws) for at, ws in weights.items()}
    assert found == [1.0, None, pytest.approx(means[2]), pytest.approx(means[3])]


def test_pointing_at_a_trial_points_at_it_in_both_panels(
    browser: Browser, service: Service
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    opened(browser, f"{service.url}#/study/a%20search")
    node = browser.find_element("css selector", LEFT)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
    tips = "return [...document.querySelectorAll('.tip')].map((tip) => tip.hidden ? '' : tip.textContent.split(',')[0])"
    for share in range(-45, 46, 3):
        away = round(share / 100 * node.size["height"])
        ActionChains(browser, duration=0).move_to_element_with_offset(node, 0, away).perform()
        browser.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        )
        left, right = browser.execute_script(tips)
        if left and right:
            break
    assert left == right
    assert left in set(load_study(service.folder / "a search").trials_full["trial"])


def test_the_filter_by_shown_headings_acts_on_curves_and_figures(
    browser: Browser, service: Service
) -> None:
    opened(browser, f"{service.url}#/study/a%20search")
    study = load_study(service.folder / "a search")
    run = set(study.epochs["trial"])
    wanted = study.trials_full[
        (study.trials_full["best_val_auc"] > 0.8) & (study.trials_full["epochs_run"] >= 10)
    ]
    assert 0 < len(wanted) < len(study.trials_full)
    browser.find_element("css selector", "#filter").send_keys("AUC > 0.8 and epochs >= 10")
    wait(
        browser,
        "return document.querySelectorAll('table.trials tr[data-trial]').length === arguments[0]",
        len(wanted),
    )
    wait_for(lambda: shown(browser) == [len(set(wanted["trial"]) & run)] * 2)
    browser.execute_script("document.querySelector('[data-figure=progress]').scrollIntoView()")
    marks = "return [...document.querySelectorAll('[data-figure=progress] .pickable')].filter((mark) => Number(mark.getAttribute('opacity')) > 0.5).length"
    wait_for(lambda: browser.execute_script(marks) == len(wanted))
    assert complaints(browser) == []


def test_importance_is_computed_again_for_the_trials_that_the_filter_leaves(
    browser: Browser, service: Service, write_study: Callable[..., Path]
) -> None:
    root = shutil.copytree(write_study("long", trials=26, epochs=6), service.folder / "long")
    objective = load_study(root).trials["objective"].sort_values()
    opened(browser, f"{service.url}#/study/long")
    box = "document.querySelector('[data-figure=importance]')"
    browser.execute_script(f"{box}.scrollIntoView()")
    bars = f"return [...{box}.querySelectorAll('rect title')].map((bar) => bar.textContent).join()"
    before = wait(browser, bars)
    field = browser.find_element("css selector", "#filter")
    field.send_keys(f"objective > {objective.iloc[3]:.4f}")
    browser.execute_script(f"{box}.scrollIntoView()")
    wait(browser, f"const now = (() => {{ {bars} }})(); return now && now !== arguments[0]", before)
    field.clear()
    field.send_keys(f"objective > {objective.iloc[-4]:.4f}")
    browser.execute_script(f"{box}.scrollIntoView()")
    wait(browser, f"return {box}.querySelector('figcaption').textContent.includes('fewer than 20')")
    assert not browser.execute_script(bars), "no order of the earlier trials stays"
    shutil.rmtree(root)


def test_a_range_of_a_parallel_axis_filters_the_table_and_a_click_takes_it_away(
    browser: Browser, service: Service
) -> None:
    opened(browser, f"{service.url}#/study/a%20search")
    total = len(load_study(service.folder / "a search").trials_full)
    browser.execute_script("document.querySelector('[data-figure=parallel]').scrollIntoView()")
    wait(browser, "return document.querySelector('.brush[data-axis=objective]')")
    count = "return document.querySelector('#table-tools [role=status]').textContent"
    drag(browser, ".brush[data-axis=objective]", (0.5, 0.02), (0.5, 0.3))
    wait(browser, f"{count}.includes(' of ')")
    objective = load_study(service.folder / "a search").trials_full["objective"]
    kept = browser.execute_script(
        "return [...document.querySelectorAll('table.trials tr[data-trial]')].map((row) => row.dataset.trial)"
    )
    assert 0 < len(kept) < total
    ranked = load_study(service.folder / "a search").trials_full.loc[objective.notna()]
    best = ranked.sort_values("objective", ascending=False)["trial"].tolist()
    assert set(kept) == set(best[: len(kept)]), "the upper end of the axis holds the best"
    click(browser, ".brush[data-axis=objective]")
    wait(browser, f"{count} === '{total} trials'")


def test_columns_are_chosen_and_what_is_shown_is_saved_as_csv(
    browser: Browser, service: Service, tmp_path: Path
) -> None:
    import csv

    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    opened(browser, f"{service.url}#/study/a%20search", (1300, 900))
    heads = "return [...document.querySelectorAll('table.trials thead th')].map((head) => head.dataset.column)"
    assert browser.execute_script(heads)[:4] == ["trial", "state", "verdict", "why"]
    right = "return document.querySelector('th[data-column=why]').getBoundingClientRect().right"
    assert browser.execute_script(right) < 1300
    click(browser, "#columns")
    click(browser, "[data-column=verdict] input")
    click(browser, "dialog .tool.main")
    assert "verdict" not in browser.execute_script(heads)
    opened(browser, f"{service.url}#/study/a%20search", (1300, 900))
    names = browser.execute_script(heads)
    assert "verdict" not in names, "the choice is kept"
    browser.find_element("css selector", "#filter").send_keys("state == completed")
    wait(
        browser,
        "return document.querySelector('#table-tools [role=status]').textContent.includes(' of ')",
    )
    click(browser, "#csv")
    saved = tmp_path / "a-search-trials.csv"
    wait_for(saved.is_file)
    with saved.open(newline="") as file:
        rows = list(csv.DictReader(file))
    study = load_study(service.folder / "a search")
    completed = study.trials_full[study.trials_full["state"] == "completed"].set_index("trial")
    assert list(rows[0]) == names
    assert {row["trial"]: float(row["objective"]) for row in rows} == pytest.approx(
        completed["objective"].to_dict()
    )
    click(browser, "#columns")
    click(browser, "dialog .tool:not(.main)")
    assert "verdict" in browser.execute_script(heads)


def test_paper_gets_the_whole_table(browser: Browser, service: Service, tmp_path: Path) -> None:
    opened(browser, f"{service.url}#/study/a%20search", PHONE)
    browser.execute_script(
        "addEventListener('beforeprint', () => { window.printed = document.querySelectorAll('table.trials tr[data-trial]').length })"
    )
    sheets = printed_pages(browser, tmp_path / "study.pdf")
    study = load_study(service.folder / "a search")
    assert browser.execute_script("return window.printed") == len(study.trials)
    rows = [re.findall(r"^\s*(\d{5}) +. (?:completed|stopped|failed)", text, re.MULTILINE) for text in sheets]  # fmt: skip
    assert sorted(itertools.chain(*rows)) == sorted(study.trials["trial"])
    for text in (text for text, found in zip(sheets, rows, strict=True) if found):
        assert re.search(r"^\s*trial +state .*classifier_lr", text, re.MULTILINE)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_paper_gets_every_figure_in_dark_ink_without_scrolling(
    browser: Browser, service: Service, tmp_path: Path, theme: str
) -> None:
    opened(browser, f"{service.url}#/")
    browser.execute_script("localStorage.setItem('theme', arguments[0])", theme)
    opened(browser, f"{service.url}#/study/a%20search")
    drawn = "const all = [...document.querySelectorAll('[data-figure]')];"
    wait(browser, f"{drawn} return all.length && all.every((each) => each.querySelector('svg'))")
    titles = browser.execute_script(f"{drawn} return all.map((each) => each.querySelector('h3').textContent)")  # fmt: skip
    pdf = tmp_path / "study.pdf"
    sheets = printed_pages(browser, pdf)
    for title in titles:
        assert any(title in text for text in sheets), title
    number = next(number for number, text in enumerate(sheets, 1) if "Curves" in text)
    drawing = ["pdftoppm", "-r", "40", "-f", str(number), "-l", str(number), str(pdf)]
    kind, size, most, pixels = subprocess.run(drawing, capture_output=True, check=True).stdout.split(b"\n", 3)  # fmt: skip
    assert (kind, most) == (b"P6", b"255")
    width, height = map(int, size.split())
    colours = np.frombuffer(pixels, np.uint8).reshape(height, width, 3).astype(int)
    red, blue = colours[..., 0], colours[..., 2]
    assert (blue - red > 40).sum() > 300, "lines of sound trials"
    assert (colours.max(axis=-1) < 90).sum() > 300, "the best trial and text are dark"
    assert np.median(colours) == 255, "on white"
    assert browser.execute_script("return document.documentElement.dataset.theme") == theme
    assert complaints(browser) == []
    browser.execute_script("localStorage.clear()")


def test_the_first_column_stays_and_escape_keeps_what_was_picked(
    browser: Browser, service: Service
) -> None:
    from selenium.webdriver.common.keys import Keys

    opened(browser, f"{service.url}#/study/a%20search", PHONE)
    browser.execute_script("document.querySelector('.rows').scrollLeft = 300")
    place = "const box = (s) => document.querySelector(s).getBoundingClientRect(); return box('tr[data-trial] th').left - box('.rows').left"
    assert 0 <= browser.execute_script(place) < 3
    opened(browser, f"{service.url}#/study/a%20search?pick=00001,00003,00004")
    assert browser.execute_script("return document.querySelectorAll('tr.picked').length") == 3
    colours = "return [...document.querySelectorAll('.picks .swatch')].map((mark) => mark.style.borderTopColor)"
    assert len(set(browser.execute_script(colours))) == 3
    browser.execute_script("location.hash = '#/study/a%20search/trial/00003'")
    wait(browser, "return document.querySelector('h1').textContent === 'Trial 00003'")
    ready(browser)
    browser.find_element("css selector", "body").send_keys(Keys.ESCAPE)
    wait(browser, "return document.querySelectorAll('tr.picked').length === 3")


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


@pytest.fixture
def another(service: Service) -> Iterator[Callable[[str], StudyFiles]]:
    """Return a function that puts a copy of the search next to it under another name; whatever happens, it is removed."""
    copies = []

    def copy(name: str) -> StudyFiles:
        copies.append(service.folder / name)
        return StudyFiles(shutil.copytree(service.folder / "a search", copies[-1]))

    yield copy
    for root in copies:
        shutil.rmtree(root, ignore_errors=True)


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
