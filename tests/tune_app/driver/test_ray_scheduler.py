import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from browsing import wait_for
from ray import cloudpickle, tune
from ray.tune.trainable.function_trainable import wrap_function

from trainables.ray_trainable import TrialSetting, shown_name
from tune_app.driver.ray_scheduler import StudyScheduler, trial_name
from tune_app.driver.run import named_trainable
from tune_app.driver.tune_repairs import lost_processes_told_once, processes_named
from tune_app.study.files import job_name
from tune_app.study.policy import Policy
from tune_app.study.policy_spec import PolicySpec


class RaysTrial:
    def __init__(self, name: str, **overrides: Any) -> None:
        self.config = {"trial": name, "overrides": overrides}


def scheduler(
    spec: PolicySpec, events: list[Any], epochs: int = 60, **options: Any
) -> StudyScheduler:
    return StudyScheduler(
        Policy(spec, epochs),
        record=lambda row: events.append(("row", row)),
        log=lambda decision: events.append(("decision", decision)),
        **options,
    )


def test_a_row_is_recorded_before_it_is_decided_on_and_without_what_ray_adds() -> None:
    events: list[Any] = []
    result = {"epoch": 1, "val_auc": 0.7, "train_loss": math.nan, "epoch_s": 2.0}
    rays = {
        "trial_id": "x_1",
        "training_iteration": 9,
        "pid": 3,
        "node_ip": "10.0.0.1",
        "hostname": "h",
        "timestamp": 1,
    }
    rays |= {
        "date": "d",
        "time_total_s": 1.0,
        "time_this_iter_s": 1.0,
        "done": False,
        "config/trial": "00007",
    }
    rays |= {
        "time_since_restore": 1.0,
        "iterations_since_restore": 1,
        "checkpoint_dir_name": None,
        "experiment_tag": "7",
    }
    assert (
        scheduler(PolicySpec(), events).on_trial_result(None, RaysTrial("00007"), result | rays)
        == "CONTINUE"
    )
    (first, row), (second, decision) = events
    assert (first, second) == ("row", "decision")
    assert row.pop("time") > 1.7e9
    assert row == {"trial": "00007", "epoch": 1, "val_auc": 0.7, "train_loss": None, "epoch_s": 2.0}
    assert (decision.trial, decision.epoch) == ("00007", 1)


def test_epochs_reported_again_are_neither_recorded_nor_logged_and_a_stopped_trial_stays_stopped() -> (
    None
):
    events: list[Any] = []
    ray = scheduler(PolicySpec(halving=False), events)
    curve = [0.6, 0.7, 0.8, 0.85, 0.85, 0.85, 0.5, 0.5, 0.5]
    answers = [
        ray.on_trial_result(None, RaysTrial("00000"), {"epoch": epoch, "val_auc": value})
        for epoch, value in enumerate(curve, start=1)
    ]
    assert answers == ["CONTINUE"] * 8 + ["STOP"]
    assert len(events) == 18
    for epoch, value in enumerate(curve, start=1):
        assert (
            ray.on_trial_result(None, RaysTrial("00000"), {"epoch": epoch, "val_auc": value})
            == "STOP"
        )
    assert ray.on_trial_result(None, RaysTrial("00000"), {"done": True}) == "CONTINUE"
    assert len(events) == 18


def test_the_studys_own_settings_count_behind_the_trials() -> None:
    events: list[Any] = []
    spec = PolicySpec(grace_epochs=5, drw_guard_epochs=5)
    ray = scheduler(spec, events, base={"drw_start_epoch": 5, "epochs": 8})
    for name, overrides in (("00000", {}), ("00001", {"drw_start_epoch": 40})):
        for epoch in range(1, 6):
            ray.on_trial_result(
                None, RaysTrial(name, **overrides), {"epoch": epoch, "val_auc": 0.7}
            )
    assert [event.reason for kind, event in events if kind == "decision" and event.epoch == 5] == [
        "drw_guard",
        "rung",
    ]


def test_a_fresh_start_from_a_replayed_policy_goes_on_where_the_killed_one_was() -> None:
    rows: list[Any] = []
    decisions: list[Any] = []
    spec = PolicySpec(grace_epochs=2, judge_from=0, finalists=3)
    killed = scheduler(spec, [], 20)
    killed._record, killed._log = rows.append, decisions.append
    for name, value in (("00000", 0.9), ("00001", 0.8)):
        for epoch in (1, 2):
            killed.on_trial_result(None, RaysTrial(name), {"epoch": epoch, "val_auc": value})
    replayed = Policy(spec, 20)
    replayed.replay(json.loads(json.dumps(rows)), {"00000": {}, "00001": {}})
    events: list[Any] = []
    fresh = scheduler(spec, events, 20)
    fresh.policy = replayed
    assert (
        fresh.on_trial_result(None, RaysTrial("00000"), {"epoch": 2, "val_auc": 0.9}) == "CONTINUE"
    )
    assert events == []
    fresh.on_trial_result(None, RaysTrial("00002"), {"epoch": 1, "val_auc": 0.5})
    fresh.on_trial_result(None, RaysTrial("00002"), {"epoch": 2, "val_auc": 0.5})
    decision = events[-1][1]
    assert (decision.reason, decision.arrived) == ("finalist", 3)


@pytest.mark.ray
def test_a_real_search_stops_what_collapses_and_ends_with_every_row_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    import ray
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        for epoch in range(1, 13):
            collapsed = config["overrides"]["collapses"] and epoch > 6
            tune.report({"epoch": epoch, "val_auc": 0.5 if collapsed else 0.8 + 0.001 * epoch})

    rows: list[Any] = []
    decisions: list[Any] = []
    policy = Policy(PolicySpec(halving=False), 12)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        result = tune.run(
            trial,
            config={
                "trial": tune.grid_search(["00000", "00001", "00002", "00003"]),
                "overrides": tune.sample_from(
                    lambda spec: {"collapses": spec.config["trial"] in ("00001", "00003")}
                ),
            },
            scheduler=StudyScheduler(
                policy, record=rows.append, log=decisions.append, base={"epochs": 12}
            ),
            storage_path=str(tmp_path),
            reuse_actors=True,
            verbose=0,
            raise_on_failed_trial=True,
        )
    finally:
        ray.shutdown()
    assert {trial.status for trial in result.trials} == {"TERMINATED"}
    epochs = {
        name: [row["epoch"] for row in rows if row["trial"] == name]
        for name in ("00000", "00001", "00002", "00003")
    }
    assert epochs["00000"] == epochs["00002"] == list(range(1, 13))
    assert epochs["00001"] == epochs["00003"] == list(range(1, 10))
    assert {d.trial: d.verdict for d in decisions if d.stops} == {
        "00001": "collapsed",
        "00003": "collapsed",
    }
    replayed = Policy(PolicySpec(halving=False), 12)
    assert replayed.replay(rows, {name: {"epochs": 12} for name in epochs}) == decisions


@pytest.mark.ray
def test_rays_dashboard_shows_which_trial_a_process_works_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process runs both trials. Ray is asked over the dashboard's own HTTP API, as its pages and `ray list tasks` do."""
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    import ray
    from ray import tune
    from ray.util.state import list_tasks

    def trial(config: dict[str, Any]) -> None:
        import psutil

        tune.report({"epoch": 1, "title": psutil.Process().cmdline()[0]})

    rays = ray.init(
        num_cpus=1, include_dashboard=True, log_to_driver=False, configure_logging=False
    )
    asked = {"address": f"http://{rays.dashboard_url}", "limit": 1000}
    try:
        with processes_named(lambda trial: shown_name(trial_name(trial), "/studies/a caf\udce9/")):
            result = tune.run(
                trial,
                config={"trial": tune.grid_search(["00000", "00001"])},
                storage_path=str(tmp_path),
                reuse_actors=True,
                verbose=0,
            )
        names = ["00000 of a caf\\udce9", "00001 of a caf\\udce9"]
        rows = [trial.last_result for trial in result.trials]
        assert [row["title"] for row in rows] == [f"ray::{name}" for name in names]
        assert rows[0]["pid"] == rows[1]["pid"]
        shown = {(name, rows[0]["pid"]) for name in names}
        wait_for(
            lambda: shown <= {(task.name, task.worker_pid) for task in list_tasks(**asked)},
            str(shown),
        )
    finally:
        ray.shutdown()


@pytest.mark.ray
def test_a_process_that_cannot_be_made_ready_costs_its_next_trial_one_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is gone, as when something clears /tmp: Tune by itself ends that trial, and starts no further one."""
    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    import ray
    from ray import tune

    def trial(config: dict[str, Any]) -> None:
        tune.report({"epoch": 1, "val_auc": 0.7})
        if config["trial"] == "00000":
            folder = tempfile.mkdtemp()
            os.chdir(folder)
            Path(folder).rmdir()

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        with lost_processes_told_once():
            result = tune.run(
                trial,
                config={"trial": tune.grid_search(["00000", "00001", "00002"])},
                storage_path=str(tmp_path),
                reuse_actors=True,
                max_failures=1,
                verbose=0,
                raise_on_failed_trial=False,
            )
    finally:
        ray.shutdown()
    assert [trial.status for trial in result.trials] == ["TERMINATED"] * 3
    assert max(trial.num_failures for trial in result.trials) <= 1


def test_rays_pages_show_the_study_as_the_name_of_its_trials_processes(tmp_path: Path) -> None:
    setting = TrialSetting(study=str(tmp_path), table="", cohort="")
    trainable = named_trainable(setting, "/studies/caf\udce9 [red]/=first")
    actor = wrap_function(tune.with_resources(trainable, {"CPU": 1}))
    assert repr(actor.__new__(actor)) == job_name("/studies/caf\udce9 [red]/=first")
    assert repr(actor.__new__(actor)).startswith("medtune-first-")
    assert cloudpickle.loads(cloudpickle.dumps(trainable)).keywords == {"setting": setting}
