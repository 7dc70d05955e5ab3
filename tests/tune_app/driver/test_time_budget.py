"""A search with a time instead of a number of trials: the plan, and when it is over."""

import time
from typing import Any

import pytest

from tune_app.driver.time_budget import TimeBudget
from tune_app.study.errors import SpecError
from tune_app.study.policy import Policy
from tune_app.study.policy_spec import POLICIES
from tune_app.study.spec import AS_MANY_AS_FIT, build_spec


def budget(
    policy: str = "medtune", gpus: float = 0.0, concurrent: int = 4, **fields: Any
) -> TimeBudget:
    spec = build_spec({"data": "/t.csv", "config": {"epochs": 30}, "policy": policy, **fields})
    return TimeBudget(spec, Policy(POLICIES[policy], 30), concurrent, gpus)


def test_a_time_asks_for_as_many_trials_as_fit() -> None:
    assert build_spec({"data": "/t.csv", "hours": 2}).trials == AS_MANY_AS_FIT
    assert build_spec({"data": "/t.csv", "hours": 2, "trials": 7}).trials == 7
    assert build_spec({"data": "/t.csv"}).trials == 20
    with pytest.raises(SpecError, match="hours"):
        build_spec({"data": "/t.csv", "hours": 0})


@pytest.mark.parametrize(
    ("fields", "gpus", "seconds"),
    [({"hours": 2}, 8, 7200), ({"gpu_hours": 2}, 4, 1800), ({"gpu_hours": 2}, 0, 7200), ({}, 4, None),
     ({"hours": 1, "gpu_hours": 2}, 8, 900)],
)  # fmt: skip
def test_gpu_hours_are_hours_of_all_gpus_in_use(
    fields: dict[str, Any], gpus: float, seconds: float | None
) -> None:
    assert budget(gpus=gpus, **fields).seconds == seconds


def test_the_plan_counts_whole_runs_and_trials() -> None:
    """2 h, 4 at a time, 6 s an epoch: 4,800 epochs; 160 runs of 30, or 288 of 10 + 20 / 3 epochs."""
    plan = budget(hours=2)
    assert "2 h, 4 trials at a time; a whole run has 30 epochs" in str(plan.plan)
    told = [plan.measured({"epoch": epoch, "epoch_s": 6.0}) for epoch in (1, 2, 3, 4, 5)]
    assert [text is not None for text in told] == [False, False, False, True, False]
    assert "an epoch takes 6 s: 2 h are worth about 160 whole runs, or 288 trials" in str(told[3])


def test_a_share_of_the_time_is_kept_for_the_confirmation() -> None:
    plan = budget(hours=2, confirm_share=0.25)
    assert plan.seconds == 5400
    assert "time budget: 1.5 h of 2 h, the rest is for the confirmation, 4 trials" in str(plan.plan)


def test_without_rungs_a_trial_is_a_whole_run() -> None:
    plan = budget(policy="none", hours=2)
    told = [plan.measured({"epoch": 2, "epoch_s": 6.0}) for _ in range(3)]
    assert "about 160 whole runs, or 160 trials" in str(told[-1])


def test_the_time_ends_when_it_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    plan, forever = budget(hours=1), budget()
    for now, over in ((0.0, False), (3599.0, False), (3600.0, True)):
        clock[0] = now
        assert (plan.over, forever.over) == (over, False)
    assert forever.plan is None
