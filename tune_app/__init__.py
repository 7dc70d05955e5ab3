"""The search over fine-tuning runs, and all around it: command line, studies, results, reports."""

import sys
from pathlib import Path

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    # `python -m tune_app...` has the current folder first: before anything else is imported, a copy.py there must not be
    # taken for Python's. Where our packages are found through it alone, it stays, as the last place.
    _here = sys.path.pop(0)
    if Path(_here) == Path(__file__).absolute().parents[1]:
        sys.path.append(_here)

from tune_app.api import confirm, export, load_study, predict, resume, search, write_report

__all__ = ["confirm", "export", "load_study", "predict", "resume", "search", "write_report"]
