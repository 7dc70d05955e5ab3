"""A study's dataframes -> one self-contained HTML page: figures, tables and the sentences of `tune_app.report.findings`.

`sections` and `comparison` choose the content of a page, `parts` are its elements, `rendering` makes HTML of it. Figures are
redrawn for dark mode and for paper by report.js; tables can be read without it.
"""

import time
from collections.abc import Callable
from pathlib import Path

from tune_app.report.comparison import comparison_page
from tune_app.report.rendering import figure_page, write
from tune_app.report.sections import SLICE, study_page
from tune_app.results.loading import load_study
from tune_app.results.study import Study
from tune_app.study.files import StudyFiles

REFRESH_S = 30
"""Seconds after which the page of a running study loads itself again, when asked to."""


def write_report(study: Study, path: str | Path, *, refresh_s: float | None = None) -> Path:
    """Write the page of one study to `path`, whole or not at all; returns the path.

    With `refresh_s` a browser loads the page of a running study again after that many seconds.
    """
    return write(Path(path), study_page(study, refresh_s if study.running else None))


def figure_pages(study: Study) -> dict[str, str]:
    """Return the figures of the study's page, each as a page of its own that needs no network, by name.

    Without those of single hyperparameters: each page holds Plotly, 4 MB.
    """
    found = study_page(study, None).plots
    return {
        name: figure_page(name, figure)
        for name, figure in found.items()
        if not name.startswith(SLICE)
    }


def write_comparison(first: Study, second: Study, path: str | Path) -> Path:
    """Write one page that sets two studies side by side to `path`; returns the path."""
    return write(Path(path), comparison_page(first, second))


def watch_report(
    root: str | Path,
    path: str | Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    every_s: float = 5.0,
    until: Callable[[Study], bool] = lambda study: not study.running,
) -> None:
    """Write the page of the study in `root` again whenever its files have changed, until its driver is gone.

    `say` is called with a line after each writing; `until` decides on the study just written whether that was the last time.
    """
    files = StudyFiles(Path(root))
    seen: tuple[float, ...] | None = None
    while True:
        now = tuple(
            file.stat().st_mtime if file.exists() else 0.0
            for file in (files.epochs, files.decisions, files.spec)
        )
        study = load_study(root)
        last = until(study)
        if now != seen or last:
            write_report(study, path, refresh_s=REFRESH_S)
            say(f"{time.strftime('%H:%M:%S')} {path}: {study.sentence()}")
            seen = now
        if last:
            return
        time.sleep(every_s)
