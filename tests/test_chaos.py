"""One short round of `make chaos` in the suite, and the killer's own checks: each check must notice its fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import chaos
import pytest
from chaos import TINY, Fault, Round, check, epochs_lost, plan_round, run_round

from trainables.checkpoints import load_state, save_state
from tune_app.study.files import StudyFiles, append_line
from tune_app.synthetic import write_cohort


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_survives_the_death_of_a_trial_and_of_its_driver(tmp_path: Path) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=14, side=(14, 18))
    faults = [Fault("actor", "kill", 1.0), Fault("driver", "kill", 1.0)]
    result = run_round(Round(seed=0, ranks=1, faults=faults), table, tmp_path)
    assert not result.problems
    assert all(fault.done for fault in result.faults), "the study was over too soon"
    assert result.starts == 2

    # A checker that finds nothing in anything would pass as well.
    files = StudyFiles(tmp_path / "study")
    rows = files.epochs.read_text().splitlines()
    last = max((json.loads(row) for row in rows), key=lambda row: (row["epoch"], row["trial"]))
    files.epochs.write_text("".join(f"{row}\n" for row in rows if json.loads(row) != last))
    found = " ".join(check(files.root, result))
    assert "decisions logged" in found
    assert "a completed trial lacks epochs" in found


def test_rounds_are_the_same_for_the_same_seed_and_differ_otherwise() -> None:
    plans = [plan_round(seed) for seed in range(50)]
    assert plans == [plan_round(seed) for seed in range(50)]
    names = {fault.name for plan in plans for fault in plan.faults}
    assert names >= {
        "kill driver",
        "kill actor",
        "kill rank",
        "kill raylet",
        "freeze actor",
        "freeze rank",
        "pause driver",
        "preempt driver",
        "outage storage",
        "kill head",
    }


def test_only_what_a_trial_has_to_repeat_counts_as_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk budget takes an ended trial's checkpoint, maybe in the very moment it is looked at."""
    files = StudyFiles(tmp_path)

    def report(trial: str, *epochs: int) -> None:
        for epoch in epochs:
            row = {"trial": trial, "time": 1.0, "epoch": epoch, "val_auc": 0.5}
            append_line(files.epochs, row)

    report("00000", *range(1, TINY["epochs"] + 1))
    report("00001", 1, 2, 3)
    report("00002", 1, 2)
    report("00003", 1, 2, 3)
    append_line(files.decisions, {"trial": "00001", "epoch": 3, "action": "stop"})
    for trial in ("00002", "00003"):
        files.trial(trial).folder.mkdir(parents=True)
        save_state(files.trial(trial).checkpoint, {"epoch": 2})
    assert epochs_lost(tmp_path) == 1
    report("00003", 4)
    assert epochs_lost(tmp_path) == 2

    def ends_first(path: Path) -> dict[str, object]:
        if path == files.trial("00003").checkpoint and path.exists():
            append_line(files.decisions, {"trial": "00003", "epoch": 4, "action": "stop"})
            path.unlink()
        return load_state(path)

    monkeypatch.setattr(chaos, "load_state", ends_first)
    assert epochs_lost(tmp_path) == 0


def test_a_round_that_breaks_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(result: Round, table: Path, folder: Path) -> Round:
        if result.seed == 0:
            raise FileNotFoundError("gone")
        return result

    monkeypatch.setattr(chaos, "run_round", run)
    monkeypatch.setattr("sys.argv", ["chaos.py", "--rounds", "3", "--keep", str(tmp_path)])
    assert chaos.main() == 1
    told = capsys.readouterr().out
    assert "FileNotFoundError: gone" in told
    assert "2 of 3 rounds hold" in told


@pytest.mark.parametrize("target", ["chaos", "soak"])
def test_the_make_targets_start(target: str) -> None:
    """The folders of tests are named like the packages and must not be taken for them."""
    root = Path(__file__).parents[1]
    of_make = (
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
    )  # `make test` passes them on, and make then prints its folders
    of_python = (
        "PYTHONPATH",
        "PYTHONSAFEPATH",
    )  # the latter is left by a command that ran in this process
    clean = {key: text for key, text in os.environ.items() if key not in (*of_make, *of_python)}
    told = subprocess.run(
        ["make", "-n", target, "ARGS=--help"],
        cwd=root,
        env=clean,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[-1]
    words = told.split()  # settings, python, script, options
    settings = dict(word.split("=") for word in words if "=" in word)
    arguments = words[len(settings) + 1 :]
    shown = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=clean | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "usage" in shown.stdout
