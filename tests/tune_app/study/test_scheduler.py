import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from trainables.diagnosis import VERDICTS
from tune_app.study.errors import SpecError
from tune_app.study.policy import Decision, Policy, rung_cutoff, rung_epochs
from tune_app.study.policy_spec import (
    DEFAULT_ACTIONS,
    POLICIES,
    RAY_ASHA,
    PolicyError,
    PolicySpec,
    read_policy,
)
from tune_app.study.prior import shipped_prior
from tune_app.study.spec import build_spec, recorded_spec

PLAIN = {"epochs": 10**6, "drw_start_epoch": 10**6}
SILENT = dict.fromkeys(VERDICTS, "ignore")


def halving(**fields: Any) -> PolicySpec:
    """A policy of halving alone: first rung 2, then 4, 8, ..."""
    fields = {
        "grace_epochs": 2,
        "reduction_factor": 2,
        "judge_from": 0,
        "compared": "current",
        "finalists": 0,
        "actions": SILENT,
    } | fields
    return PolicySpec(**fields)


def feed(
    policy: Policy,
    trial: str,
    values: Sequence[float | None],
    config: dict[str, Any] | None = PLAIN,
    first: int = 1,
    **columns: Sequence[Any],
) -> list[Decision]:
    """Report one trial's epochs until it is stopped; returns the decisions."""
    decisions = []
    for epoch, value in enumerate(values, start=first):
        row = {"trial": trial, "epoch": epoch, "val_auc": value}
        row |= {name: column[epoch - 1] for name, column in columns.items()}
        decisions.append(policy.decide(trial, config, row))
        if decisions[-1].stops:
            break
    return decisions


class RaysTrial:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(
    ("grace", "factor", "epochs"),
    [(1, 4, 60), (1, 3, 30), (5, 2, 60), (3, 2.5, 40), (2, 3, 2), (4, 4, 16), (1, 1.5, 20)],
)
def test_with_our_additions_off_every_decision_is_rays_own(
    mode: Literal["max", "min"], grace: int, factor: float, epochs: int
) -> None:
    """Oracle: Ray's ASHAScheduler on the same sequences: interleaved trials, ties, epochs left out."""
    from ray.tune.schedulers import ASHAScheduler

    stopped = compared = 0
    for seed in range(25):
        rng = random.Random(seed)
        ray = ASHAScheduler(
            time_attr="epoch",
            metric="val_auc",
            mode=mode,
            max_t=epochs,
            grace_period=grace,
            reduction_factor=factor,
        )
        spec = RAY_ASHA.model_copy(update={"grace_epochs": grace, "reduction_factor": factor})
        ours = Policy(spec, epochs, mode)
        running = {}
        for number in range(30):
            running[f"{number:05d}"] = 0
            ray.on_trial_add(None, RaysTrial(f"{number:05d}"))
        digits = rng.choice([1, 2, 6])
        while running:
            trial = rng.choice(list(running))
            running[trial] += rng.choice([1, 1, 1, 2, 5]) if seed % 2 else 1
            row = {"epoch": running[trial], "val_auc": round(rng.random(), digits)}
            decision = ours.decide(trial, PLAIN, row)
            assert decision.action.upper() == ray.on_trial_result(
                None, RaysTrial(trial), dict(row)
            ), (seed, row)
            compared += 1
            if decision.stops:
                stopped += 1
                del running[trial]
    assert stopped == 25 * 30
    assert compared > stopped


def test_the_shipped_defaults_of_rays_asha_are_those_we_compare_with() -> None:
    from ray.tune.schedulers import ASHAScheduler

    ray = ASHAScheduler(max_t=60)
    assert [rung for rung, _ in ray._brackets[0]._rungs][::-1] == Policy(RAY_ASHA, 60).rungs


def test_deciding_loads_neither_ray_nor_torch() -> None:
    code = "import sys, tune_app.study.policy, trainables.objective; print([m for m in ('ray', 'torch', 'pandas') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_rungs_lie_at_the_grace_epochs_times_powers_up_to_the_last_epoch() -> None:
    assert rung_epochs(6, 60, 2) == [6, 12, 24, 48]
    assert rung_epochs(1, 64, 4) == [1, 4, 16, 64]
    assert rung_epochs(60, 60, 2) == [60]
    assert Policy(PolicySpec(reduction_factor=2), 60).rungs == [20, 40]  # a third of the epochs
    assert Policy(PolicySpec(first_rung_share=0.1, reduction_factor=2), 60).rungs == [6, 12, 24, 48]
    assert Policy(PolicySpec(), 30).rungs == [10, 30]
    assert Policy(PolicySpec(), 6).rungs == [3]  # not before there is a median of three
    assert Policy(PolicySpec(), 2).rungs == [2]
    assert Policy(PolicySpec(grace_epochs=1), 12).rungs == [1, 3, 9]
    assert Policy(PolicySpec(grace_epochs=30), 10).rungs == [10]


def test_only_rows_at_a_rung_are_compared_and_the_first_arrival_passes() -> None:
    policy = Policy(halving(), 60)
    good = feed(policy, "a", [0.9, 0.9, 0.9, 0.9])
    assert [(d.reason, d.rung) for d in good] == [
        ("between_rungs", None),
        ("rung", 2),
        ("between_rungs", None),
        ("rung", 4),
    ]
    assert (good[1].cutoff, good[1].rank, good[1].arrived) == (None, 1, 1)
    bad = feed(policy, "b", [0.99, 0.8])
    assert (bad[-1].action, bad[-1].reason) == ("stop", "halving")
    assert (bad[-1].value, bad[-1].cutoff, bad[-1].rank, bad[-1].arrived) == (0.8, 0.9, 2, 2)
    assert "rank 2 of 2 at rung 2" in bad[-1].summary


def test_a_rung_stops_none_before_enough_have_arrived_and_counts_them_all() -> None:
    policy = Policy(halving(judge_from=3), 60)
    assert feed(policy, "a", [0.9, 0.9])[-1].reason == "rung"
    worse = feed(policy, "b", [0.9, 0.8])[-1]
    assert (worse.action, worse.reason, worse.rank, worse.arrived) == ("continue", "rung", 2, 2)
    third = feed(policy, "c", [0.9, 0.7])[-1]
    assert (third.action, third.reason, third.rank, third.arrived) == ("stop", "halving", 3, 3)


@pytest.mark.parametrize(
    ("compared", "value"),
    [("current", 0.6), ("best", 0.95), ("smoothed", 0.6), ("best_median3", 0.7)],
)
def test_a_rung_compares_the_chosen_value(compared: str, value: float) -> None:
    policy = Policy(halving(grace_epochs=6, compared=compared), 60)
    assert feed(policy, "a", [0.95, 0.7, 0.7, 0.5, 0.6, 0.6])[-1].value == value


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
def test_what_is_not_finite_ranks_last_at_its_rung(missing: float | None) -> None:
    policy = Policy(halving(compared="current"), 60)
    first = feed(policy, "nan first", [0.9, missing])
    assert (first[-1].action, first[-1].value) == ("continue", None)  # nothing to compare with
    assert feed(policy, "also nan", [0.9, missing])[-1].action == "continue"
    assert feed(policy, "poor", [0.1, 0.1])[-1].action == "continue"  # better than none
    last = feed(policy, "nan last", [0.9, missing])[-1]
    assert (last.action, last.reason, last.rank, last.arrived) == ("stop", "halving", 2, 4)


def test_a_missing_value_is_best_or_median_of_what_was_there_before() -> None:
    policy = Policy(halving(compared="best"), 60)
    assert feed(policy, "a", [0.9, None])[-1].value == 0.9


def test_the_cutoff_is_rays_percentile_and_never_between_a_number_and_none() -> None:
    assert rung_cutoff([], 4) is None
    assert rung_cutoff([0.1, 0.2, 0.3, 0.4, 0.5], 4) == pytest.approx(0.4)
    assert rung_cutoff([-math.inf, -math.inf, 0.5], 2) == -math.inf
    assert rung_cutoff([-math.inf, 0.2, 0.4], 2) == pytest.approx(0.2)
    assert rung_cutoff([-math.inf, 0.5], 2) == -math.inf


def test_no_rung_falls_into_the_epochs_after_the_class_weights_began() -> None:
    policy = Policy(halving(grace_epochs=8, drw_guard_epochs=3), 60)
    feed(policy, "a", [0.9] * 16)
    config = {"epochs": 60, "drw_start_epoch": 7}
    fallen = [0.9] * 6 + [0.2] * 3 + [0.95] * 4
    decisions = feed(policy, "b", fallen, config)
    assert [(d.epoch, d.reason) for d in decisions if d.reason != "between_rungs"] == [
        (8, "drw_guard"),
        (9, "drw_guard"),
        (10, "rung"),
    ]
    assert decisions[9].value == 0.95
    assert "waits for epoch 10" in decisions[7].summary
    without = Policy(halving(grace_epochs=8, drw_guard_epochs=0), 60)
    feed(without, "a", [0.9] * 16)
    assert feed(without, "b", fallen, config)[-1].epoch == 8


def test_the_rows_know_better_than_the_config_when_the_class_weights_began() -> None:
    policy = Policy(halving(drw_guard_epochs=3), 60)
    late = [False] * 3 + [True] * 9
    decisions = feed(policy, "a", [0.9] * 12, {"drw_start_epoch": 2}, drw_active=late)
    assert [d.epoch for d in decisions if d.reason == "drw_guard"] == [4, 5, 6]
    always = feed(policy, "b", [0.9] * 12, {"drw_start_epoch": 2}, drw_active=[True] * 12)
    assert not [d for d in always if d.reason == "drw_guard"]


def test_the_default_start_of_class_weights_counts_where_the_overrides_are_silent_and_not_for_unknown_curves() -> (
    None
):
    spec = halving(grace_epochs=26, drw_guard_epochs=3)
    assert feed(Policy(spec, 60), "a", [0.9] * 26, {})[-1].reason == "drw_guard"
    assert feed(Policy(spec, 60), "a", [0.9] * 26, None)[-1].reason == "rung"


def test_finalists_train_to_the_end_whatever_their_rung_says() -> None:
    spec = {"grace_epochs": 2, "reduction_factor": 4, "compared": "best"}
    plain, policy = Policy(halving(**spec), 60), Policy(halving(**spec, finalists=2), 60)
    for kind in (plain, policy):
        feed(kind, "a", [0.9] * 8)
        feed(kind, "b", [0.8] * 7)
    assert feed(plain, "c", [0.85] * 8)[-1].reason == "halving"
    decisions = feed(policy, "c", [0.85] * 8)
    assert [(d.rung, d.reason) for d in decisions if d.rung] == [(2, "finalist"), (8, "finalist")]
    assert "among the 2 best" in decisions[1].summary
    assert feed(policy, "d", [0.84] * 8)[-1].reason == "halving"


RISE = [0.6, 0.7, 0.78, 0.82, 0.84, 0.85, 0.85, 0.86]


def test_a_collapsing_trial_is_stopped_with_its_verdict_and_since_when() -> None:
    policy = Policy(PolicySpec(halving=False), 60)
    decisions = feed(policy, "a", RISE + [0.5] * 10)
    last = decisions[-1]
    assert (last.epoch, last.action, last.reason, last.verdict, last.verdict_epoch) == (
        11,
        "stop",
        "diagnosis",
        "collapsed",
        9,
    )
    assert "0.850" in last.summary
    assert {(d.reason, d.warning) for d in decisions[:-1]} == {("between_rungs", False)}
    assert policy.stopped() == {"a": last}


def test_each_verdict_can_be_told_to_stop_to_warn_or_to_be_silent() -> None:
    curve = RISE + [0.5] * 6
    assert feed(Policy(PolicySpec(halving=False, actions={"collapsed": "stop"}), 60), "a", curve)[
        -1
    ].stops
    warned = feed(Policy(PolicySpec(halving=False, actions={"collapsed": "warn"}), 60), "a", curve)
    assert [d.epoch for d in warned if d.warning] == [11]  # once, not in every epoch
    assert [d.verdict for d in warned][-1] == "collapsed"
    silent = feed(
        Policy(PolicySpec(halving=False, actions={"collapsed": "ignore"}), 60), "a", curve
    )
    assert {(d.reason, d.warning) for d in silent} == {("between_rungs", False)}


def test_what_is_not_settled_is_told_and_not_stopped() -> None:
    policy = Policy(PolicySpec(halving=False), 60)
    decisions = []
    for epoch in range(1, 31):
        row = {"epoch": epoch, "val_auc": 0.5, "val_auc_ema": 0.5, "val_auc_raw": 0.85}
        decisions.append(policy.decide("a", {"epochs": 60}, row))
    assert [d.epoch for d in decisions if d.warning] == [5]
    assert [d.epoch for d in decisions if d.reason == "diagnosis"] == [22]


def test_the_last_epoch_is_completed_and_only_a_run_that_would_go_on_is_stopped() -> None:
    spec = PolicySpec(halving=False)
    own_end = feed(Policy(spec, 5), "a", [0.7] * 5, {"epochs": 5})[-1]
    assert (own_end.reason, own_end.action) == ("completed", "continue")
    longer = feed(Policy(spec, 5), "a", [0.7] * 9, {"epochs": 9})
    assert (len(longer), longer[-1].reason, longer[-1].action) == (5, "completed", "stop")
    capped = feed(
        Policy(PolicySpec(halving=False, max_epochs=3), 60), "a", [0.7] * 9, {"epochs": 60}
    )
    assert len(capped) == 3


def test_rows_reported_again_change_nothing() -> None:
    policy, once = Policy(PolicySpec(), 20), Policy(PolicySpec(), 20)
    curves = {"a": RISE + [0.86] * 6, "b": [0.5] * 14, "c": RISE + [0.4] * 6}
    first = [
        d for trial, values in curves.items() for d in feed(once, trial, values, {"epochs": 20})
    ]
    again = []
    for trial, values in curves.items():
        for upto in range(1, len(values) + 1):
            for epoch in range(1, upto + 1):
                if policy.known(trial, epoch):
                    repeated = policy.decide(
                        trial, {"epochs": 20}, {"epoch": epoch, "val_auc": 0.0}
                    )
                    assert repeated.reason in ("known", "stopped_before")
                else:
                    again.append(
                        policy.decide(
                            trial, {"epochs": 20}, {"epoch": epoch, "val_auc": values[epoch - 1]}
                        )
                    )
    assert [d for d in again if d.reason != "stopped_before"] == first


def test_a_stopped_trial_that_reports_on_is_stopped_again() -> None:
    policy = Policy(halving(), 60)
    feed(policy, "a", [0.9] * 2)
    ended = feed(policy, "b", [0.5] * 2)[-1]
    again = policy.decide("b", PLAIN, {"epoch": 3, "val_auc": 0.99})
    assert (again.action, again.reason, again.summary) == ("stop", "stopped_before", ended.summary)


def test_a_search_killed_at_random_moments_and_replayed_decides_as_one_never_killed(
    tmp_path: Path,
) -> None:
    """The state is a function of the rows on disk: every restart begins with a fresh policy and the file."""
    rng = random.Random(3)
    configs = {
        f"{n:05d}": {"epochs": 40, "drw_start_epoch": rng.choice([5, 12, 40])} for n in range(40)
    }
    arrivals: list[dict[str, Any]] = []
    running = dict.fromkeys(configs, 0)
    while running:
        trial = rng.choice(list(running))
        running[trial] += 1
        value = rng.choice([None, 0.4, round(rng.random(), 3), round(0.6 + 0.3 * rng.random(), 3)])
        arrivals.append(
            {"trial": trial, "epoch": running[trial], "val_auc": value, "val_auc_raw": 0.8}
        )
        if running[trial] == 40:
            del running[trial]

    spec = PolicySpec(
        grace_epochs=3, reduction_factor=2, judge_from=2, drw_guard_epochs=5, finalists=3
    )
    never = Policy(spec, 40)
    expected = [never.decide(row["trial"], configs[row["trial"]], row) for row in arrivals]
    assert {d.reason for d in expected} >= {
        "rung",
        "halving",
        "drw_guard",
        "diagnosis",
        "stopped_before",
    }

    file = tmp_path / "epochs.jsonl"
    kills = sorted(rng.sample(range(1, len(arrivals)), 20))
    decided = []
    for start, end in zip([0, *kills], [*kills, len(arrivals)], strict=True):
        policy = Policy(spec, 40)
        stored = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        assert policy.replay(stored, configs) == expected[:start]
        with file.open("a") as out:
            for row in arrivals[start:end]:
                out.write(json.dumps(row) + "\n")
                decided.append(policy.decide(row["trial"], configs[row["trial"]], row))
    assert decided == expected


def test_a_decision_is_a_flat_row_of_json_with_what_it_was_based_on() -> None:
    policy = Policy(halving(), 60)
    feed(policy, "a", [0.9] * 2)
    row = feed(policy, "b", [0.5] * 2)[-1].as_row()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert list(row)[:6] == ["trial", "epoch", "action", "reason", "verdict", "verdict_epoch"]
    assert (row["trial"], row["epoch"], row["rung"], row["value"], row["cutoff"]) == (
        "b",
        2,
        2,
        0.5,
        0.9,
    )


def test_the_policy_of_a_study_file_is_checked_and_completed() -> None:
    assert PolicySpec(actions={"collapsed": "warn"}).actions == {
        **DEFAULT_ACTIONS,
        "collapsed": "warn",
    }
    assert set(DEFAULT_ACTIONS) == set(VERDICTS)
    assert PolicySpec(**json.loads(PolicySpec().model_dump_json())) == PolicySpec()
    for wrong in (
        {"reduction_factor": 1},
        {"grace_epochs": 0},
        {"compared": "mean"},
        {"actions": {"collapse": "stop"}},
        {"actions": {"collapsed": "kill"}},
        {"actions": {"no_fault": "stop"}},
        {"actions": {"healthy": "stop"}},  # its name in version 0.1
        {"grace": 3},
    ):
        with pytest.raises(ValidationError):
            PolicySpec(**wrong)
    with pytest.raises(ValueError, match="at least one epoch"):
        Policy(PolicySpec(), 0)


def test_a_policy_file_tells_each_violation_in_our_own_words(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("grace_epochs: 0\nactions: {no_fault: stop}\n")
    with pytest.raises(PolicyError) as told:
        read_policy(path)
    assert told.value.problems == [
        f"{path}: grace_epochs: Input should be greater than or equal to 1",
        f"{path}: actions: no_fault=stop would end every trial: warn or ignore",
    ]


def test_rungs_compare_what_the_objective_is_of() -> None:
    """The same rows, of two networks: which trial halving stops follows from the objective's own column."""
    values = {"a": (0.9, 0.6), "b": (0.8, 0.7), "c": (0.7, 0.8), "d": (0.6, 0.9)}
    stopped = {}
    for objective in ("best_median3", "best_median3_raw"):
        policy = Policy(halving(grace_epochs=3, finalists=0), 6, objective=objective)
        order = values if objective == "best_median3" else dict(reversed(values.items()))
        for trial, (ema, raw) in order.items():
            for epoch in (1, 2, 3):
                row = {"epoch": epoch, "val_auc": ema, "val_auc_raw": raw}
                decision = policy.decide(trial, {"epochs": 6}, row)
            assert decision.value == (ema if objective == "best_median3" else raw)
        stopped[objective] = {name for name, found in policy.stopped().items() if found.stops}
    assert stopped == {"best_median3": {"b", "c", "d"}, "best_median3_raw": {"a", "b", "c"}}


def test_a_study_of_an_earlier_version_decides_as_it_would_have() -> None:
    """Its study.json holds the policy in full, without the field that later replaced a fixed tenth."""
    fields = {"data": "/data/table.csv", "config": {"epochs": 60}}
    new = build_spec(fields)
    assert (new.sampler, new.warm_start, Policy(new.policy, 60).rungs) == ("model", (), [20, 60])
    assert new.used_prior == shipped_prior()
    policy = {"halving": True, "grace_epochs": None, "compared": "best_median3"}
    old = recorded_spec({**fields, "policy": policy})
    assert (old.sampler, old.warm_start, old.policy.finalists) == ("tpe", None, 3)
    assert (old.policy.drw_guard_epochs, Policy(old.policy, 60).rungs) == (5, [6, 12, 24, 48])
    assert old.used_prior is None
    assert old.policy.judge_from == 0
    assert recorded_spec(new.model_dump(mode="json")) == new


def test_a_rung_of_a_study_from_before_judge_from_does_not_begin_to_wait() -> None:
    fields = build_spec({"data": "/data/table.csv"}).model_dump(mode="json")
    assert fields["policy"].pop("judge_from") == 4
    old = recorded_spec(fields)
    assert (old.policy.judge_from, old.sampler) == (0, "model")
    assert Policy(old.policy, 60).rungs == [20, 60]


@pytest.mark.parametrize(("name", "policy"), POLICIES.items())
def test_a_study_file_may_name_its_policy(name: str, policy: PolicySpec) -> None:
    assert build_spec({"data": "/data/table.csv", "policy": name}).policy == policy


def test_a_policy_of_an_unknown_name_is_told_with_those_there_are() -> None:
    with pytest.raises(SpecError, match="unknown policy 'asha': one of medtune, ray_asha"):
        build_spec({"data": "/data/table.csv", "policy": "asha"})


@pytest.mark.parametrize(
    ("config", "uses"),
    [({}, True), ({"pretrained_path": "/weights.pth"}, False), ({"optimizer": "sgd"}, False)],
)
def test_the_prior_is_used_where_it_holds(config: dict[str, Any], uses: bool) -> None:
    assert (
        build_spec({"data": "/data/table.csv", "config": config}).used_prior is None
    ) is not uses
    for fields in ({"prior": False}, {"sampler": "tpe"}):
        assert build_spec({"data": "/t.csv", "config": config, **fields}).used_prior is None
