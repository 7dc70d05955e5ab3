"""The page's curves, figures and table in a real browser: zoomed, filtered, chosen, saved and printed."""

import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from browsing import (
    PHONE,
    Browser,
    click,
    complaints,
    opened,
    printed_pages,
    ready,
    wait,
    wait_for,
)
from serving import Service, text

from tune_app.results.loading import load_study


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
    rows = [re.findall(r"^\s*(\d{5}) +. (?:completed|stopped|failed)", sheet, re.MULTILINE) for sheet in sheets]  # fmt: skip
    assert sorted(itertools.chain(*rows)) == sorted(study.trials["trial"])
    for sheet in (sheet for sheet, found in zip(sheets, rows, strict=True) if found):
        assert re.search(r"^\s*trial +state .*classifier_lr", sheet, re.MULTILINE)


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
