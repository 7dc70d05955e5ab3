"""A page in a real browser, as the tests of the report and of the live page use it."""

import base64
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
DESKTOP, PHONE = (1280, 900), (390, 844)
DEADLINE_S = 120

Browser = Any


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """One headless Chromium; without one the test is skipped, and the reason names the missing program."""
    selenium = pytest.importorskip(
        "selenium.webdriver", reason="selenium is missing: pip install 'medtune[test]'"
    )
    from selenium.webdriver.chrome.service import Service

    program = next(
        (
            found
            for name in ("chromium", "chromium-browser", "google-chrome")
            if (found := shutil.which(name))
        ),
        None,
    )
    driver = shutil.which("chromedriver")
    missing = [
        name for name, found in (("chromium", program), ("chromedriver", driver)) if found is None
    ]
    if missing:
        pytest.skip(f"{' and '.join(missing)} missing: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = selenium.Chrome(options=options, service=Service(driver))
    window.set_page_load_timeout(DEADLINE_S)
    window.set_script_timeout(DEADLINE_S)
    yield window
    window.quit()


def opened(browser: Browser, url: str, size: tuple[int, int] = DESKTOP) -> Browser:
    """Load a page, even an open one, and wait until its script has run; figures are drawn when they come into view."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")  # an address that differs after # only would not load again
    browser.get_log("browser")  # forget the messages of earlier pages
    browser.get(url)
    ready(browser)
    return browser


def ready(browser: Browser) -> None:
    wait(browser, "return document.documentElement.dataset.ready === 'yes'")


def wait(browser: Browser, script: str, *arguments: Any) -> Any:
    """Wait until `script` returns something true, and return it."""
    return wait_for(lambda: browser.execute_script(script, *arguments), script)


def wait_for(condition: Callable[[], Any], what: str = "", deadline_s: float = DEADLINE_S) -> Any:
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.02)
    return found


def click(browser: Browser, selector: str) -> None:
    """Scroll there and click; try again when the page has just redrawn the element."""
    from selenium.common.exceptions import (
        ElementNotInteractableException,
        StaleElementReferenceException,
    )

    wait(browser, "return document.querySelector(arguments[0])", selector)
    for _ in range(20):
        browser.execute_script(
            "document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector
        )
        try:
            browser.find_element("css selector", selector).click()
        except (StaleElementReferenceException, ElementNotInteractableException):
            continue
        return
    raise AssertionError(f"cannot click {selector}")


def violations(browser: Browser) -> list[str]:
    """What axe finds wrong with the page as it is shown, a line per rule and first place."""
    axe = pytest.importorskip(
        "axe_core_python.base", reason="axe-core-python is missing: pip install 'medtune[test]'"
    )
    browser.execute_script((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found: list[str] = browser.execute_async_script(
        "const done = arguments[0]; axe.run().then((found) => done(found.violations.map("
        "(each) => `${each.id}: ${each.nodes[0].target.join(' ')}: ${each.nodes[0].failureSummary}`)))"
    )
    return found


def printed_pages(browser: Browser, pdf: Path) -> list[str]:
    """Print the page into the file `pdf` as a user would, and return the text of each sheet, its layout kept."""
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext missing: apt-get install poppler-utils")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    pdf.write_bytes(base64.b64decode(printed))
    command = ["pdftotext", "-layout", str(pdf), "-"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return told.removesuffix("\f").split("\f")


def complaints(browser: Browser) -> list[str]:
    """Errors and warnings of the page's console: scripts, and what its content security policy refused."""
    return [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] in ("SEVERE", "WARNING")
    ]
