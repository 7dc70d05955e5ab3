"""How several test modules run studies: the real command in a separate process, waited for, and its results checked."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest

from tune_app.results.loading import load_study
from tune_app.study.files import StudyFiles

SMALL: dict[str, Any] = {
    "depth": 10,
    "width": 0.125,
    "volume_shape": 16,
    "num_folds": 2,
    "train_auc_volumes": 0,
}
TINY = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
"""The same for the command line."""


def medtune(
    *arguments: object, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[str]:
    """Start the command as a user would, in a new process group. `env`: all of its environment (None: this one)."""
    return subprocess.Popen(
        [sys.executable, "-m", "tune_app.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=env,
        **options,
    )


def finished(process: subprocess.Popen[str], *, timeout_s: float = 240) -> str:
    out, err = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, f"exit {process.returncode}\n{out}\n{err}"
    return out


def rows_of(root: Path) -> list[dict[str, Any]]:
    path = StudyFiles(root).epochs
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_rows(
    process: subprocess.Popen[str], root: Path, count: int, *, deadline_s: float = 280
) -> None:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if (
            StudyFiles(root).epochs.exists()
            and StudyFiles(root).epochs.read_bytes().count(b"\n") >= count
        ):
            return
        if process.poll() is not None:
            pytest.fail(
                f"ended with {process.returncode} before {count} rows: {process.communicate()}"
            )
        time.sleep(0.05)
    pytest.fail(f"no {count} rows within {deadline_s} s")


def check_whole(root: Path, *, trials: int, epochs: int) -> None:
    """Every trial ended, with each of its epochs exactly once, and all records agree."""
    study = load_study(root)
    assert len(study.trials_full) == trials
    assert set(study.trials_full["state"]) <= {"completed", "stopped"}
    for trial, rows in study.epochs.groupby("trial"):
        assert list(rows["epoch"]) == list(range(1, len(rows) + 1)), trial
    completed = study.trials_full[study.trials_full["state"] == "completed"]
    assert (completed["epochs_run"] == epochs).all()
    assert Counter((row["trial"], row["epoch"]) for row in rows_of(root)).most_common(1)[0][1] == 1
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    record = optuna.load_study(study_name=None, storage=f"sqlite:///{StudyFiles(root).database}")
    states = {f"{trial.number:05d}": trial.state.name for trial in record.trials}
    expected = {"completed": "COMPLETE", "stopped": "PRUNED"}
    assert states == study.trials_full.set_index("trial")["state"].map(expected).to_dict()


LEADER, RANK = r"^ray::\d{5} of [^,]*$", r"^ray::(Rank|.*, rank \d)"
"""Titles of the processes of a trial's rank 0, and of its other ranks."""


def processes(text: str, of: psutil.Process | None = None) -> list[psutil.Process]:
    """Living processes below `of` (this one) in whose command line the pattern `text` is found, such as RANK."""
    found = []
    for process in (of or psutil.Process()).children(recursive=True):
        try:
            alive = process.status() != psutil.STATUS_ZOMBIE and any(
                re.search(text, part) for part in process.cmdline()
            )
        except psutil.NoSuchProcess:
            continue
        if alive:
            found.append(process)
    return found


def wait_until(condition: Any, what: str, deadline_s: float = 60.0) -> float:
    """Return the seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < deadline_s, f"{what}: not within {deadline_s} s"
        time.sleep(0.05)
    return time.monotonic() - start
