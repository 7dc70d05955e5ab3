"""The value of a run, and the epoch whose weights represent it: named objectives over the rows of its epochs.

Searcher, rungs, the weights a trial keeps, export, back-test and results all read this one.

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

    @property
    def weights(self) -> Literal["raw", "ema"]:
        """Which of a run's two networks the column scores: the one to keep, export and predict with."""
        return "raw" if self.column.endswith("_raw") else "ema"


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
    """Return the value so far of the run with these rows (any order); NaN without a finite value.

    Raises KeyError naming the known objectives.
    """
    chosen = _objective(objective)
    running = RunningValue(chosen.reduction)
    value = math.nan
    for row in _in_order(rows):
        value = running.update(row.get(chosen.column))
    return value


def best_epoch(rows: Sequence[Mapping[str, Any]], objective: str = DEFAULT_OBJECTIVE) -> int | None:
    """Return the epoch whose weights stand for `objective_value`; None where that is NaN. See `BestEpoch`."""
    best = BestEpoch(objective)
    for row in _in_order(rows):
        best.update(row)
    return best.epoch


class BestEpoch:
    """The epoch whose weights stand for a run's objective: `update()` with each epoch's row, in order.

    For a median it is the epoch that is the median, so that its own value is the objective's; the earlier of two. The
    first epoch that reaches a value keeps its place against later ones that only equal it. `last` and `smoothed` follow
    the last epochs; all others, the best so far.

    `window_end` is the rule of studies of format 1: the epoch that completes the window, whatever its own value is.
    """

    def __init__(self, objective: str = DEFAULT_OBJECTIVE, *, window_end: bool = False) -> None:
        self._objective = _objective(objective)
        self._running = RunningValue(self._objective.reduction)
        self._window_end = window_end
        self._window: list[tuple[int, float]] = []
        self._value = math.nan
        self._epochs = 0
        self.epoch: int | None = None
        """None while the objective has no value."""

    def update(self, row: Mapping[str, Any]) -> bool:
        """Take the next epoch's row; True when the weights to keep are those of another epoch than before."""
        before, epoch = self.epoch, int(row["epoch"])
        self._window.append((epoch, as_number(row.get(self._objective.column))))
        del self._window[:-WINDOW]
        self._epochs += 1
        value = self._running.update(self._window[-1][1])
        if math.isnan(value):
            self.epoch = None
        elif self._moves(value):
            self.epoch = epoch if self._window_end else self._epoch_of(value)
        self._value = value
        return self.epoch is not None and self.epoch != before

    @property
    def pending(self) -> tuple[int, ...]:
        """Epochs that the next rows may yet make the best: their weights have to be held until then."""
        if self._window_end or self._objective.reduction in ("best", "last"):
            return ()
        may = self._window[-(WINDOW - 1) :]
        floor = -math.inf
        if self._objective.reduction == "best_median3" and len(self._window) == WINDOW:
            floor = as_number(self._value)  # only a higher median takes its place
        return tuple(epoch for epoch, value in may if value > floor)

    def _moves(self, value: float) -> bool:
        reduction = self._objective.reduction
        if reduction in ("last", "smoothed"):
            return True
        if reduction == "best_median3" and self._epochs == WINDOW:
            return True  # what stood in for a median is forgotten
        if self._window_end:
            return value > as_number(self._value)
        return value != self._value

    def _epoch_of(self, value: float) -> int:
        width = 1 if self._objective.reduction in ("best", "last") else WINDOW
        return next(epoch for epoch, own in self._window[-width:] if own == value)


class RunningValue:
    """A reduction, one epoch at a time: `update()` with each epoch's value returns the run's value so far.

    Medians of three need three epochs. Until then the lowest value so far is used, and is forgotten
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
    """Return `value` as a float, and minus infinity for None, NaN, infinities and non-numbers."""
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
