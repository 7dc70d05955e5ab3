"""Recorded curves replayed through stopping policies, without training anything: what each would have saved and lost.

The replay is asynchronous, as a search is: `workers` trials run at a time, each epoch takes the time it took when it was
recorded, and a worker whose trial ends takes the next one. So trials meet at rungs in an order like the real one.

Nothing is known of a run beyond its recording: a trial that a policy would have let run longer ends where its curve ends.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from trainables.objective import (
    DEFAULT_OBJECTIVE,
    OBJECTIVES,
    as_number,
    best_epoch,
    objective_value,
)
from tune_app.backtest.curves import SOUND, Curve, CurveError, read_curves
from tune_app.study.policy import Decision, Policy
from tune_app.study.policy_spec import PolicySpec

RAY: Literal["ray"] = "ray"
"""Stands for Ray's own `ASHAScheduler`, with the settings it is shipped with."""

Compared = PolicySpec | Literal["ray"] | None
"""A policy, Ray's scheduler, or None: every trial trains to its end."""

POLICIES: dict[str, Compared] = {
    "train everything": None,
    "Ray ASHA as shipped": RAY,
    "diagnosis only": PolicySpec(halving=False),
    "medtune default": PolicySpec(),
}
"""The policies that a back-test compares by default."""

IN_TIME_EPOCHS = 5
"""Epochs after its onset in which a collapse should be stopped."""

RECOVERED = 0.01
"""AUC; a recorded run that gained as much after a diagnosis would have stopped it was stopped wrongly."""


class Decider(Protocol):
    """What decides in a replay: True ends the trial."""

    def __call__(self, curve: Curve, row: Mapping[str, Any]) -> Decision | bool: ...


@dataclass(frozen=True)
class Replay:
    """How far each trial came, in the order of the curves."""

    epochs: list[int]
    """Rows of the curve that were spent."""
    ended: list[Decision | None]
    """The decision that stopped the trial, where the policy gives one."""
    stopped: list[bool]
    """Whether it was stopped before its curve ended."""
    makespan: float
    """Time until the last worker was done: seconds, or epochs where the curves have no `epoch_s`."""


def replay(curves: Sequence[Curve], decide: Decider, *, workers: int = 8) -> Replay:
    """Run the curves in their order on `workers` workers; deterministic, ties go to the worker that began earlier."""
    if workers < 1:
        raise ValueError(f"workers={workers}: at least one")
    spent = [0] * len(curves)
    ended: list[Decision | None] = [None] * len(curves)
    stopped = [False] * len(curves)
    waiting = iter(range(len(curves)))
    running: list[tuple[float, int, int]] = []  # end of the epoch, order of start, curve
    started = 0
    now = 0.0

    def start() -> None:
        nonlocal started
        for index in waiting:
            if curves[index].rows:
                heapq.heappush(running, (now + _seconds(curves[index].rows[0]), started, index))
                started += 1
                return

    for _ in range(workers):
        start()
    while running:
        now, order, index = heapq.heappop(running)
        rows = curves[index].rows
        row = rows[spent[index]]
        spent[index] += 1
        decision = decide(curves[index], row)
        stops = decision.stops if isinstance(decision, Decision) else decision
        if stops or spent[index] == len(rows):
            stopped[index] = stops and spent[index] < len(rows)
            if stops and isinstance(decision, Decision):
                ended[index] = decision
            start()
        else:
            heapq.heappush(running, (now + _seconds(rows[spent[index]]), order, index))
    return Replay(spent, ended, stopped, now)


def backtest(
    curves: Sequence[Curve],
    policies: Mapping[str, Compared] | None = None,
    *,
    workers: int = 8,
    objective: str = DEFAULT_OBJECTIVE,
    max_epochs: int | None = None,
) -> pd.DataFrame:
    """Return one row per policy, in the order given: its epochs spent, values found and values lost on these curves.

    `max_epochs` is a full trial's number of epochs; None: the longest curve's. Columns:

    - `policy`, `trials`, `epochs`, `epochs_all`, `epochs_share` (spent, there are, their ratio)
    - `gpu_hours`, `gpu_hours_saved`, `makespan_hours`: one GPU a trial; NaN unless every row has `epoch_s`
    - `winner` (trial), `winner_rank` (1 is the best) among all trials trained to the end, by the objective
    - `best_auc` and `found_auc`: the objective of the best trial trained to the end, and of the winner as far as this
      policy trained it; `auc_lost` their difference. `true_auc_lost`: the same of the deployed networks' AUC without
      noise, where truth is known; a part of that is choosing by a noisy AUC, which "train everything" has, too
    - `stopped_by_halving`, `stopped_by_diagnosis`: trials
    - `top_stopped`: of the best hundredth of trials (at least three), those stopped with more than .005 yet to gain
    - `wrongly_stopped`: trials ended by a diagnosis that are no collapsing ones in truth or, where it is not known, that
      gained more than .01 afterwards; `wrong_share` of the trials that do not collapse (of all, if truth is not known);
      `healthy_stopped_share`: of the healthy and dipping trials alone, which lack nothing (truth known)
    - `collapsed`: trials whose collapse the policy lived to see (truth known); `caught_share` of them stopped within 5
      epochs of the onset; `delay_median`, `delay_max`: epochs from the onset to the stop, of those stopped
    """
    if not curves:
        raise CurveError(
            "no curves to replay: name a study with finished epochs, or a folder of curve files"
        )
    twice = sorted(
        name for name, count in Counter(curve.trial for curve in curves).items() if count > 1
    )
    if twice:
        raise CurveError(
            f"trial {', '.join(twice[:5])} is there more than once: each run needs its own name"
        )
    longest = max_epochs or max(
        (int(row["epoch"]) for curve in curves for row in curve.rows[-1:]), default=1
    )
    worth = _Worth(curves, objective)
    rows = []
    for name, policy in (policies or POLICIES).items():
        outcome = replay(curves, _decider(policy, longest, objective), workers=workers)
        rows.append({"policy": name, **worth.compare(outcome)})
    return pd.DataFrame(rows)


def backtest_studies(
    paths: Iterable[Path],
    policies: Mapping[str, Compared] | None = None,
    *,
    workers: int = 8,
    objective: str = DEFAULT_OBJECTIVE,
) -> pd.DataFrame:
    """Return `backtest` of each study folder or curve file, with the path's name in a first column `study`.

    Raises CurveError with the problems of all of them.
    """
    tables = []
    for path in paths:
        table = backtest(read_curves(path), policies, workers=workers, objective=objective)
        table.insert(0, "study", path.resolve().name)
        tables.append(table)
    if not tables:
        raise ValueError("no studies named: give folders of studies or of curve files")
    return pd.concat(tables, ignore_index=True)


class _Worth:
    """The values of the curves trained to the end, computed once for all policies."""

    def __init__(self, curves: Sequence[Curve], objective: str) -> None:
        self.curves, self.objective = curves, objective
        self.full = [as_number(objective_value(curve.rows, objective)) for curve in curves]
        self.truths = [curve.truth for curve in curves]
        known = [truth.auc for truth in self.truths if truth is not None]
        self.best_truth = max(
            (np.nanmax(auc) for auc in known if np.isfinite(auc).any()), default=math.nan
        )
        self.timed = all(
            isinstance(row.get("epoch_s"), int | float) for curve in curves for row in curve.rows
        )

    def compare(self, outcome: Replay) -> dict[str, Any]:
        parts = [
            curve.rows[:epochs] for curve, epochs in zip(self.curves, outcome.epochs, strict=True)
        ]
        values = [
            whole
            if len(part) == len(curve.rows)
            else as_number(objective_value(part, self.objective))
            for whole, part, curve in zip(self.full, parts, self.curves, strict=True)
        ]
        winner = max(range(len(values)), key=values.__getitem__)
        best, total = max(self.full), sum(len(curve.rows) for curve in self.curves)
        hours = _hours(parts) if self.timed else math.nan
        by_diagnosis = [
            decision is not None and decision.reason == "diagnosis" for decision in outcome.ended
        ]
        return {
            "trials": len(self.curves),
            "epochs": sum(outcome.epochs),
            "epochs_all": total,
            "epochs_share": sum(outcome.epochs) / max(total, 1),
            "gpu_hours": hours,
            "gpu_hours_saved": _hours([curve.rows for curve in self.curves]) - hours
            if self.timed
            else math.nan,
            "makespan_hours": outcome.makespan / 3600 if self.timed else math.nan,
            "winner": self.curves[winner].trial,
            "winner_rank": 1 + sum(value > self.full[winner] for value in self.full),
            "best_auc": _finite(best),
            "found_auc": _finite(values[winner]),
            "auc_lost": _finite(best) - _finite(values[winner]),
            "true_auc_lost": self.best_truth - self._true_auc(winner, parts[winner]),
            "stopped_by_halving": sum(outcome.stopped)
            - sum(map(bool.__and__, by_diagnosis, outcome.stopped)),
            "stopped_by_diagnosis": sum(by_diagnosis),
            "top_stopped": self._top_stopped(outcome, values),
            **self._wrongly(by_diagnosis, values),
            **self._caught(outcome),
        }

    def _true_auc(self, winner: int, part: list[dict[str, Any]]) -> float:
        truth = self.truths[winner]
        epoch = best_epoch(part, self.objective)
        if truth is None or epoch is None:
            return math.nan
        return truth.auc[epoch - 1]

    def _top_stopped(self, outcome: Replay, values: list[float]) -> int:
        top = sorted(range(len(self.full)), key=lambda index: -self.full[index])[
            : max(3, len(self.full) // 100)
        ]
        return sum(
            outcome.stopped[index] and self.full[index] - values[index] > 0.005 for index in top
        )

    def _wrongly(self, by_diagnosis: list[bool], values: list[float]) -> dict[str, Any]:
        wrong = total = 0
        sound: list[bool] = []
        for truth, ended, whole, value in zip(
            self.truths, by_diagnosis, self.full, values, strict=True
        ):
            if truth is None:
                total += 1
                wrong += ended and whole - value > RECOVERED
            elif not truth.collapsing:
                total += 1
                wrong += ended
                sound += [ended] if truth.kind in SOUND else []
        return {
            "wrongly_stopped": wrong,
            "wrong_share": wrong / total if total else math.nan,
            "healthy_stopped_share": sum(sound) / len(sound) if sound else math.nan,
        }

    def _caught(self, outcome: Replay) -> dict[str, Any]:
        delays: list[float] = []
        for truth, curve, epochs, stopped in zip(
            self.truths, self.curves, outcome.epochs, outcome.stopped, strict=True
        ):
            if (
                truth is None
                or truth.onset is None
                or not epochs
                or curve.rows[epochs - 1]["epoch"] < truth.onset
            ):
                continue  # ended before it collapsed: nothing was there to be caught
            delays.append(curve.rows[epochs - 1]["epoch"] - truth.onset if stopped else math.inf)
        caught = [delay for delay in delays if math.isfinite(delay)]
        return {
            "collapsed": len(delays),
            "caught_share": sum(delay <= IN_TIME_EPOCHS for delay in delays) / len(delays)
            if delays
            else math.nan,
            "delay_median": float(np.median(caught)) if caught else math.nan,
            "delay_max": max(caught, default=math.nan),
        }


def _decider(policy: Compared, max_epochs: int, objective: str) -> Decider:
    if policy is None:
        return lambda curve, row: False
    if policy == RAY:
        return RayAsha(max_epochs, OBJECTIVES[objective].column)
    assert isinstance(policy, PolicySpec)
    decisions = Policy(policy, max_epochs, objective=objective)
    return lambda curve, row: decisions.decide(curve.trial, curve.config, row)


class RayAsha:
    """Ray's own `ASHAScheduler` in a replay: its code, its defaults (grace 1, reduction 4), `epoch` as its time."""

    def __init__(self, max_epochs: int, metric: str = "val_auc", **settings: Any) -> None:
        from ray.tune.schedulers import ASHAScheduler  # here, because importing Ray takes seconds

        self._scheduler = ASHAScheduler(
            time_attr="epoch", metric=metric, mode="max", max_t=max_epochs, **settings
        )
        self._metric = metric
        self._trials: dict[str, _RayTrial] = {}

    def __call__(self, curve: Curve, row: Mapping[str, Any]) -> bool:
        trial = self._trials.get(curve.trial)
        if trial is None:
            trial = self._trials[curve.trial] = _RayTrial(curve.trial)
            self._scheduler.on_trial_add(None, trial)
        value = row.get(self._metric)
        result = {"epoch": row["epoch"], self._metric: math.nan if value is None else value}
        return bool(self._scheduler.on_trial_result(None, trial, result) == "STOP")


@dataclass(frozen=True)
class _RayTrial:
    """All of a Ray trial that `ASHAScheduler` looks at."""

    trial_id: str


def _seconds(row: Mapping[str, Any]) -> float:
    seconds = row.get("epoch_s")
    return float(seconds) if isinstance(seconds, int | float) and seconds > 0 else 1.0


def _hours(parts: Iterable[Sequence[Mapping[str, Any]]]) -> float:
    return sum(float(row["epoch_s"]) for part in parts for row in part) / 3600


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
