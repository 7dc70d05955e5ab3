"""Studies whose trials have several ranks: nothing is left behind by a stop, and a lost process costs an epoch at most."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray._private.state import actors
from ray.util.state import list_tasks
from rich.console import Console
from study_runs import (
    LEADER,
    RANK,
    SMALL,
    TINY,
    check_whole,
    medtune,
    processes,
    rows_of,
    wait_for_rows,
    wait_until,
)

from trainables.diagnosis import VERDICTS
from tune_app.driver.run import Outcome, run_study
from tune_app.results.loading import load_study
from tune_app.study.files import StudyFiles
from tune_app.study.spec import build_spec
from tune_app.synthetic import write_cohort

STOPPED_TRIALS = int(os.environ.get("MEDTUNE_STOPPED_TRIALS", "3"))
"""Two processes each, with seconds of imports: more by MEDTUNE_STOPPED_TRIALS, such as 30 before a release."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("cohort") / "c", subjects=14, side=(14, 18))


def run_in_turn(table: Path, folder: Path, **fields: Any) -> tuple[Outcome, list[str]]:
    """Run three small trials one after the other, in a Ray of their own; how they ended, and the classes of its actors."""
    given = {
        "data": str(table),
        "trials": 3,
        "max_concurrent": 1,
        "sampler": "random",
        "cache": str(folder / "cache"),
    }
    quiet = Console(quiet=True)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        outcome = run_study(
            build_spec(given | fields), folder / "study", console=quiet, notes=quiet
        )
        return outcome, actor_classes()
    finally:
        ray.shutdown()


def actor_classes() -> list[str]:
    """Of all actors there were, by their last name: Ray reports some by their qualified one."""
    return sorted(actor["ActorClassName"].rpartition(".")[2] for actor in actors().values())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dashboard", [False, True])
def test_early_stopped_trials_of_two_ranks_leave_nothing_behind(
    table: Path, tmp_path: Path, dashboard: bool
) -> None:
    """Each is stopped by the scheduler in the middle of its run: the way in which placement groups have leaked before.

    The processes of the first serve all, as they have loaded and found out what takes longest.
    """
    spec = build_spec(
        {
            "data": str(table),
            "trials": STOPPED_TRIALS,
            "ranks": 2,
            "config": SMALL | {"epochs": 500, "batch_size": 3},
            "policy": {"max_epochs": 1},
            "sampler": "random",
            "cache": str(tmp_path / "cache"),
        }
    )
    quiet = Console(quiet=True)
    rays = ray.init(
        num_cpus=2, include_dashboard=dashboard, log_to_driver=False, logging_level="ERROR"
    )
    try:
        outcome = run_study(spec, tmp_path / "study", console=quiet, notes=quiet)
        assert outcome.states == {"stopped": STOPPED_TRIALS}
        if dashboard:
            names = {f"{trial:05d} of study" for trial in range(STOPPED_TRIALS)}
            names |= {f"{trial}, rank 1" for trial in names}
            asked = {"address": f"http://{rays.dashboard_url}", "limit": 1000}
            wait_until(lambda: names <= {task.name for task in list_tasks(**asked)}, "names")
        free = wait_until(lambda: ray.available_resources().get("CPU") == 2.0, "all CPUs free")
        assert free < 5
        wait_until(lambda: not processes(RANK), "ranks gone")
        groups = ray.util.placement_group_table().values()
        assert {group["state"] for group in groups} <= {"REMOVED"}
        assert {actor["State"] for actor in actors().values()} <= {"DEAD"}
        assert actor_classes() == ["ImplicitFunc", "Rank"]
    finally:
        ray.shutdown()
    study = load_study(tmp_path / "study")
    assert list(study.trials_full["epochs_run"]) == [1] * STOPPED_TRIALS, (
        "stopped after the first of 500 epochs"
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_rank_costs_the_trials_beside_it_nothing(table: Path, tmp_path: Path) -> None:
    """Four trials of two ranks at a time: the one that loses a rank resumes from its checkpoint, the others continue."""
    root = tmp_path / "study"
    spec = build_spec(
        {
            "data": str(table),
            "trials": 4,
            "ranks": 2,
            "max_concurrent": 4,
            "config": SMALL | {"epochs": 150, "batch_size": 3},
            "policy": {"halving": False, "actions": dict.fromkeys(VERDICTS, "ignore")},
            "sampler": "random",
            "cache": str(tmp_path / "cache"),
        }
    )

    def kill_a_rank_when_all_train() -> None:
        wait_until(
            lambda: len({row["trial"] for row in rows_of(root)}) == 4, "an epoch of each trial", 300
        )
        os.kill(processes(RANK)[0].pid, signal.SIGKILL)

    quiet = Console(quiet=True)
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with ThreadPoolExecutor(1) as pool:
            killed = pool.submit(kill_a_rank_when_all_train)
            outcome = run_study(spec, root, console=quiet, notes=quiet)
            killed.result()
    finally:
        ray.shutdown()
    assert outcome.states == {"completed": 4}
    check_whole(root, trials=4, epochs=150)
    assert sorted(load_study(root).trials_full["failures"]) == [0, 0, 0, 1]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trial_without_memory_left_costs_the_next_one_no_attempt(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """One of several ranks has lost the others, and its process with them: the next trial has others from the first."""

    def trial_that_may_lack_memory(trial: dict[str, Any], setting: Any) -> None:
        from trainables import ranks, saved_run
        from trainables.ray_trainable import run_trial

        def none_left(*_: object) -> None:
            raise MemoryError("none left")

        patched: Any = saved_run
        ranked: Any = ranks
        before = patched.open_inputs
        if trial["trial"] == "00000":
            ranked.open_inputs = patched.open_inputs = none_left
        try:
            run_trial(trial, setting)
        finally:
            patched.open_inputs = (
                before  # a process of one rank serves the next trial; that of several must not
            )

    monkeypatch.setattr("tune_app.driver.run.run_trial", trial_that_may_lack_memory)
    outcome, classes = run_in_turn(
        table,
        tmp_path,
        ranks=ranks,
        max_failures=0,
        config=SMALL | {"epochs": 2, "batch_size": 3},
        policy={"halving": False, "actions": dict.fromkeys(VERDICTS, "ignore")},
    )
    assert outcome.states == {"failed": 1, "completed": 2}
    trials = load_study(tmp_path / "study").trials_full
    assert trials["reason"][0].startswith(
        "out of memory: " + ("rank 0 on node" if ranks > 1 else "none left")
    )
    assert list(trials["failures"][1:]) == [0, 0]
    assert classes == (["ImplicitFunc"] if ranks == 1 else ["ImplicitFunc"] * 2 + ["Rank"] * 2), (
        "no more than it takes"
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_lost_between_two_trials_costs_the_next_one_a_single_attempt(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    def trial_that_takes_its_process_with_it(trial: dict[str, Any], setting: Any) -> None:
        from trainables.ray_trainable import run_trial

        try:
            run_trial(trial, setting)
        finally:
            if trial["trial"] == "00000":  # stopped, and its process has been given the next trial
                os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("tune_app.driver.run.run_trial", trial_that_takes_its_process_with_it)
    outcome, _ = run_in_turn(
        table,
        tmp_path,
        ranks=ranks,
        max_failures=1,
        config=SMALL | {"epochs": 500, "batch_size": 3},
        policy={"max_epochs": 1},
    )
    assert outcome.states == {"stopped": 3}
    assert list(load_study(tmp_path / "study").trials_full["failures"]) == [0, 1, 0]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_of_two_gpus_follow_each_other_in_the_same_processes(tmp_path: Path) -> None:
    """Stopped ones and whole ones, with steps enough for captures that hold NCCL's collectives."""
    table = write_cohort(tmp_path / "c", subjects=120, side=(14, 18))
    spec = build_spec(
        {
            "data": str(table),
            "trials": 5,
            "gpus_per_trial": 2,
            "config": SMALL | {"epochs": 4, "batch_size": 2, "gradient_accumulation_steps": 1},
            "policy": {
                "grace_epochs": 1,
                "reduction_factor": 2.0,
                "judge_from": 0,
                "finalists": 0,
                "drw_guard_epochs": 0,
            },
            "sampler": "random",
            "cache": str(tmp_path / "cache"),
        }
    )
    quiet = Console(quiet=True)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        outcome = run_study(spec, tmp_path / "study", console=quiet, notes=quiet)
        assert (
            sum(outcome.states.values())
            == outcome.states.get("stopped", 0) + outcome.states["completed"]
            == 5
        )
        assert actor_classes() == ["ImplicitFunc", "Rank"]
        assert wait_until(lambda: ray.available_resources()["GPU"] >= 2.0, "GPUs free") < 5
    finally:
        ray.shutdown()
    trials = load_study(tmp_path / "study").trials_full
    assert list(trials["failures"]) == [0] * 5


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("lost", [RANK, LEADER], ids=["rank", "leader"])
def test_a_trial_that_loses_a_rank_or_its_actor_goes_on_from_its_checkpoint(
    table: Path, tmp_path: Path, lost: str
) -> None:
    root = tmp_path / "study"
    asked = [
        "--trials",
        1,
        "--epochs",
        15,
        "--ranks",
        2,
        "--out",
        root,
        "--cache",
        tmp_path / "cache",
        *TINY,
    ]
    process = medtune("run", "--data", table, *asked, "--set", "batch_size=3")
    wait_for_rows(process, root, 3)
    driver = psutil.Process(process.pid)
    (victim,) = processes(lost, driver)
    ranks = processes(RANK, driver)
    os.kill(victim.pid, signal.SIGKILL)
    wait_until(
        lambda: not any(rank.is_running() and rank.status() != "zombie" for rank in ranks),
        "old ranks gone",
        30,
    )
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert re.search(
        rf"trial 00000: rank {int(lost == RANK)} on node [\d.]+ died: ",
        " ".join(err.split()),
    )
    check_whole(root, trials=1, epochs=15)
    (trial,) = load_study(root).trials_full.to_dict("records")
    assert trial["failures"] == 1
    if lost == RANK:
        said = StudyFiles(root).trial("00000").log.read_text()
        assert "rank 1 on node" in said
        assert "died" in said
