"""What a run is worth: named objectives over the rows of its epochs. Scheduler, searcher and results all read this one.

A value that is missing or not finite ranks below every number and is never a score. All objectives are maximised.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Reduction = Literal["last", "best", "smoothed", "best_median3"]
"""How the epochs of a run become one number: the last epoch, the best one, the median of the last three, or the best
median of any three in a row."""

DEFAULT_OBJECTIVE = "best_median3"
"""One lucky epoch does not win: a value counts only if two of three neighbouring epochs reach it."""

WINDOW = 3
"""Epochs of the running median."""


@dataclass(frozen=True)
class Objective:
    """A column of the epochs' rows and how it is reduced to one number."""

    name: str
    column: str
    reduction: Reduction
    title: str


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            "best_median3", "val_auc", "best_median3", "best 3-epoch median of validation AUC"
        ),
        Objective("best", "val_auc", "best", "best validation AUC of any one epoch"),
        Objective("last", "val_auc", "last", "validation AUC of the last epoch"),
        Objective("smoothed", "val_auc", "smoothed", "median validation AUC of the last 3 epochs"),
        Objective(
            "best_median3_raw",
            "val_auc_raw",
            "best_median3",
            "best 3-epoch median, weights not averaged",
        ),
        Objective("best_raw", "val_auc_raw", "best", "best epoch, weights not averaged"),
        Objective("last_raw", "val_auc_raw", "last", "last epoch, weights not averaged"),
        Objective(
            "best_median3_auprc",
            "val_auprc_ema",
            "best_median3",
            "best 3-epoch median of validation AUPRC",
        ),
        Objective(
            "best_median3_balanced_accuracy",
            "val_balanced_accuracy_best_ema",
            "best_median3",
            "best 3-epoch median of balanced accuracy at the best validation threshold",
        ),
    )
}


def objective_value(rows: Sequence[Mapping[str, Any]], objective: str = DEFAULT_OBJECTIVE) -> float:
    """Return what the run with these rows (any order) is worth so far; NaN without a finite value to go by.

    Raises KeyError naming the known objectives.
    """
    chosen = _objective(objective)
    running = RunningValue(chosen.reduction)
    value = math.nan
    for row in _in_order(rows):
        value = running.update(row.get(chosen.column))
    return value


def best_epoch(rows: Sequence[Mapping[str, Any]], objective: str = DEFAULT_OBJECTIVE) -> int | None:
    """Return the epoch whose weights stand for `objective_value`; None where that is NaN.

    For a median it is the epoch that is the median, so that its own value is the objective's; the earlier of two.
    """
    chosen = _objective(objective)
    ordered = _in_order(rows)
    values = [as_number(row.get(chosen.column)) for row in ordered]
    value = objective_value(ordered, objective)
    if math.isnan(value):
        return None
    if chosen.reduction == "last":
        return int(ordered[-1]["epoch"])
    if chosen.reduction == "best":
        return int(ordered[values.index(value)]["epoch"])
    starts = (
        range(max(len(values) - WINDOW, 0), -1, -1)
        if chosen.reduction == "smoothed"
        else range(len(values))
    )
    for start in starts:
        if _low_median(values[start : start + WINDOW]) == value:
            return int(ordered[start + values[start : start + WINDOW].index(value)]["epoch"])
    raise AssertionError(f"no epoch of {values} has the {objective} {value}")


class RunningValue:
    """A reduction, an epoch at a time: `update()` with each epoch's value returns what the run is worth by then.

    Medians of three need three epochs. Until then the lowest of those there are stands in, and is forgotten
    afterwards: a lucky first epoch does not stay the best for ever.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self._recent: list[float] = []
        self._best = -math.inf
        self._epochs = 0

    def update(self, value: Any) -> float:
        """Return the reduced value so far, NaN if there is none; `value` is the epoch's, None or NaN where it has none."""
        number = as_number(value)
        self._epochs += 1
        if self._reduction == "last":
            return _or_nan(number)
        if self._reduction == "best":
            self._best = max(self._best, number)
            return _or_nan(self._best)
        self._recent.append(number)
        del self._recent[:-WINDOW]
        median = _low_median(self._recent)
        if self._reduction == "smoothed" or self._epochs < WINDOW:
            return _or_nan(median)
        self._best = max(self._best, median)
        return _or_nan(self._best)


def as_number(value: Any) -> float:
    """Return `value` as a float, and minus infinity for None, NaN, infinities and what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return -math.inf
    return float(value)


def _objective(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise KeyError(f"unknown objective {name!r}: one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def _in_order(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: row["epoch"])


def _low_median(values: Sequence[float]) -> float:
    """The median of three, and the lower of two or the only one before there are three."""
    return sorted(values)[(len(values) - 1) // 2]


def _or_nan(value: float) -> float:
    return math.nan if value == -math.inf else value
