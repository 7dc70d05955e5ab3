"""How a running study is asked to stop, or to stop one of its trials: a file in the study's `requests/` folder.

Every program that can write to the folder may ask: `medtune serve`, or `touch`. The driver looks for the files, acts,
and removes them. A file, not a signal, because the driver may run as another process group, on another machine, or not
at all at the moment.

A trial that is stopped on request ends after the epoch it is in, by a decision like any other: one line in
decisions.jsonl with reason `requested`. A request does not follow from the rows, so when a killed study is replayed that
line alone holds the epoch at which the trial ended. A request that no decision has answered yet stays in its file, and
is answered at the trial's next epoch, in this session or a later one.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainables.checkpoints import write_json
from tune_app.study.files import StudyFiles

log = logging.getLogger("medtune.study")

ON_REQUEST = "stopped on request"
"""Summary of a decision that was asked for."""


EVERY_S = 0.5
"""Seconds between two looks at whether the study is to stop."""


def ask_to_stop_study(files: StudyFiles) -> None:
    """Ask the driver to stop as after Ctrl-C: within seconds, and so that `medtune resume` continues it."""
    _ask(files.stop_request)


def ask_to_stop_trial(files: StudyFiles, trial: str) -> None:
    """Ask the driver to stop the trial after the epoch it is in. A trial that has ended by then stays as it is."""
    _ask(files.trial_request(trial))


def asked_to_stop(files: StudyFiles) -> list[str]:
    """Return the trials whose stop has been asked for and not been answered, by id."""
    return sorted(path.stem for path in files.requests.glob("*.json") if path != files.stop_request)


def answered_requests(rows: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    """Return (trial, epoch) -> summary of the decisions that were asked for, from the rows of decisions.jsonl."""
    return {
        (row["trial"], row["epoch"]): row["summary"] for row in rows if row["reason"] == "requested"
    }


class TrialRequests:
    """The driver's view of the requests to stop single trials."""

    def __init__(self, files: StudyFiles) -> None:
        self._files = files

    def of(self, trial: str) -> str | None:
        """Return the summary for a decision to stop the trial; None without a request."""
        return ON_REQUEST if self._files.trial_request(trial).exists() else None

    def answered(self, trial: str) -> None:
        """Remove the request: the decision is in the log, or the trial has ended some other way."""
        self._files.trial_request(trial).unlink(missing_ok=True)


def _ask(path: Path) -> None:
    value: Mapping[str, Any] = {"asked": time.time()}
    write_json(path, value)
