"""Stopping what runs by asking: one trial, or the whole study; and that a resumed study knows of it."""

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from study_runs import medtune

from tune_app.driver.stopping import stopping_on_request
from tune_app.results.loading import load_study
from tune_app.study.files import StudyFiles
from tune_app.study.policy import Decision, Policy
from tune_app.study.policy_spec import PolicySpec
from tune_app.study.requests import (
    ON_REQUEST,
    TrialRequests,
    answered_requests,
    ask_to_stop_study,
    ask_to_stop_trial,
    asked_to_stop,
)
from tune_app.synthetic import write_cohort

TINY = [
    "--set",
    "depth=10",
    "--set",
    "width=0.125",
    "--set",
    "volume_shape=16",
    "--set",
    "num_folds=2",
]
TINY += ["--set", "train_auc_volumes=0"]
DEADLINE_S = 180


def rows_of(trials: int, epochs: int) -> list[dict[str, Any]]:
    """Trials in turn, an epoch each; the higher the number the better."""
    return [
        {"trial": f"{number:05d}", "epoch": epoch, "val_auc": 0.6 + 0.03 * number + 0.001 * epoch}
        for epoch in range(1, epochs + 1)
        for number in range(trials)
    ]


def decided(
    rows: list[dict[str, Any]], asked: dict[tuple[str, int], str]
) -> tuple[Policy, list[Decision]]:
    policy = Policy(PolicySpec(grace_epochs=2, reduction_factor=2, judge_from=0), 16)
    return policy, [
        policy.decide(row["trial"], {"epochs": 16}, row, asked.get((row["trial"], row["epoch"])))
        for row in rows
    ]


def test_a_request_stops_the_trial_and_leaves_everybody_elses_decisions_as_they_were() -> None:
    rows = rows_of(4, 10)
    _, without = decided(rows, {})
    _, asked = decided(rows, {("00003", 4): ON_REQUEST})
    stop = next(d for d in asked if (d.trial, d.epoch) == ("00003", 4))
    assert (stop.action, stop.reason, stop.summary) == ("stop", "requested", ON_REQUEST)
    assert stop.rung == 4, "the row counted at its rung first"
    others = [d for d in asked if d.trial != "00003"]
    assert others == [d for d in without if d.trial != "00003"]


def test_the_log_of_decisions_alone_says_on_replay_where_a_request_ended_a_trial() -> None:
    rows = rows_of(4, 10)
    _, first = decided(rows, {("00003", 5): ON_REQUEST})
    logged = json.loads(json.dumps([decision.as_row() for decision in first]))
    policy, again = decided(rows, answered_requests(logged))
    assert again == first
    assert policy.stopped()["00003"].reason == "requested"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([0.7] * 8, "completed"),
        ([0.8, 0.85, 0.85, 0.85, 0.5, 0.5, 0.5], "diagnosis"),
    ],
)
def test_a_trial_that_ends_by_itself_in_that_epoch_ends_for_its_own_reason(
    rows: list[float], reason: str
) -> None:
    policy = Policy(PolicySpec(halving=False), 8)
    for epoch, value in enumerate(rows, start=1):
        last = epoch == len(rows)
        decision = policy.decide(
            "00000", {"epochs": 8}, {"epoch": epoch, "val_auc": value}, ON_REQUEST if last else None
        )
    assert decision.reason == reason


def test_a_request_waits_in_its_file_until_it_is_answered(tmp_path: Path) -> None:
    files = StudyFiles(tmp_path)
    requests = TrialRequests(files)
    assert requests.of("00001") is None
    ask_to_stop_trial(files, "00001")
    ask_to_stop_trial(files, "00001")
    ask_to_stop_study(files)
    assert asked_to_stop(files) == ["00001"]
    assert requests.of("00001") == ON_REQUEST
    assert requests.of("00002") is None
    requests.answered("00001")
    requests.answered("00001")
    assert asked_to_stop(files) == []


def test_a_request_to_stop_the_study_interrupts_it_and_an_old_one_does_not(tmp_path: Path) -> None:
    files = StudyFiles(tmp_path)
    ask_to_stop_study(files)
    with stopping_on_request(files):
        assert not files.stop_request.exists(), "it was meant for a session that is over"
    before = signal.getsignal(signal.SIGUSR2)

    def work() -> None:
        with stopping_on_request(files):
            ask_to_stop_study(files)
            threading.Event().wait(DEADLINE_S)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGUSR2) == before
    assert not files.stop_request.exists()


# With a real Ray -------------------------------------------------------------------------------------------------------


def epochs_of(files: StudyFiles) -> list[dict[str, Any]]:
    lines = files.epochs.read_bytes().split(b"\n")[:-1] if files.epochs.exists() else []
    return [json.loads(line) for line in lines]


def wait_for(process: subprocess.Popen[str], what: Any) -> None:
    end = time.monotonic() + DEADLINE_S
    while not what():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < end, "not within the deadline"
        time.sleep(0.05)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)  # three starts of Ray
def test_a_trial_stopped_on_request_stays_stopped_when_the_killed_study_is_resumed(
    tmp_path: Path,
) -> None:
    table = write_cohort(tmp_path / "cohort", subjects=14, side=(14, 18))
    root = tmp_path / "study"
    files = StudyFiles(root)
    asked = [
        "run",
        "--data",
        table,
        "--trials",
        2,
        "--epochs",
        60,
        "--out",
        root,
        "--cache",
        tmp_path / "cache",
    ]
    process = medtune(*asked, "--max-concurrent", 2, *TINY, "--set", "grad_clip=1")
    wait_for(process, lambda: len(epochs_of(files)) >= 3)
    ask_to_stop_trial(files, "00000")
    wait_for(process, lambda: not asked_to_stop(files))
    os.killpg(
        process.pid, signal.SIGKILL
    )  # the driver dies, perhaps before it has written all it knows
    process.communicate()

    before = epochs_of(files)
    process = medtune("resume", root)
    wait_for(process, lambda: len(epochs_of(files)) >= len(before) + 1)
    ask_to_stop_study(files)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, f"{out}\n{err}"
    assert "Traceback" not in err

    process = medtune("resume", root)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, f"{out}\n{err}"
    study = load_study(root)
    trials = study.trials_full.set_index("trial")
    assert list(trials.loc["00000", ["state", "stopped_by"]]) == ["stopped", "requested"]
    assert trials.loc["00001", "state"] in ("completed", "stopped")
    stops = study.decisions[study.decisions["reason"] == "requested"]
    assert stops["trial"].tolist() == ["00000"]
    assert stops["epoch"].item() == trials.loc["00000", "epochs_run"], (
        "nothing was trained after the stop"
    )
    assert not study.epochs.duplicated(["trial", "epoch"]).any()
    assert ON_REQUEST in out
