"""The diagnosis of a run from its epochs: no fault, or a fault with its first epoch, its evidence, and the change to make.

Pure arithmetic on the rows that the run reports; no torch, no Ray, and a few microseconds an epoch, so that the same
code decides inside a search, explains in a report and is replayed over thousands of recorded runs.

Every comparison is held against the noise of the AUC, taken from the interval in the rows or, where there is
none, from the class counts (Hanley and McNeil, Radiology 1982). Two networks of one run are scored on the same volumes,
so their errors go together: their difference is taken to have the noise of one of them, not sqrt(2) times it (a
correlation of 1/2; measured ones are higher, so that this errs on the side of waiting).

How well it does depends on the validation fold. On generated runs of 60 epochs (`tune_app.backtest.curves`), stopped within five
epochs of the onset of their collapse, and stopped though healthy or dipping: 99 % and 0.3 % with 50 positive and 200
negative volumes, 91 % and 0.5 % with 20 and 80, 68 % and 1.1 % with 10 and 30 (seeds 30 to 35, which no constant here
was chosen on). The rest of the small folds' collapses is not to be seen in the AUC: with 10 and 30 one fall in five is
within what noise explains.

Rows of other origin may hold no more than `epoch` and `val_auc`. A verdict that needs a missing column is not given:
without raw and averaged values there is no `ema_lag`, without `train_auc` no `train_validation_gap`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from trainables.config import FineTuneConfig
from trainables.course import (
    HEALTHY,
    NO_FAULT,
    VERDICTS,
    WITHOUT_FAULT,
    Course,
    Diagnosis,
    DrwStart,
    Fall,
    Healed,
    Verdict,
    auc_low,
    class_sizes,
    expected_error,
    run_verdict,
    trial_verdict,
)
from trainables.verdicts import GAP, IN_ORDER, LOSS_SPIKE_FACTOR, Drop

__all__ = [
    "FALLS",
    "GAP",
    "HEALTHY",
    "LOSS_SPIKE_FACTOR",
    "NO_FAULT",
    "VERDICTS",
    "WITHOUT_FAULT",
    "Diagnosis",
    "DrwStart",
    "Healed",
    "RunMonitor",
    "Verdict",
    "auc_low",
    "class_sizes",
    "diagnose",
    "expected_error",
    "run_verdict",
    "trial_verdict",
]

FALLS: tuple[Verdict, ...] = ("non_finite", "ema_lag", "collapsed_after_drw", "collapsed")
"""Verdicts that the deployed network was lost; it may recover, and later rows alone would not show the loss."""

HEALED_SHOWN = 4
"""Falls that healed which a summary names, the last ones."""


def diagnose(
    rows: Iterable[Mapping[str, Any]], config: FineTuneConfig | Mapping[str, Any] | None = None
) -> Diagnosis:
    """Return the diagnosis of a run from its rows, in the order of their epochs.

    `config` is the run's config or its overrides; the defaults hold for fields that it leaves out. Without any (None: a
    curve of unknown origin) the start of the deferred weights is read from the rows alone. A run without rows has no fault.
    """
    monitor = RunMonitor(config)
    diagnosis = monitor.diagnosis
    for row in rows:
        diagnosis = monitor.update(row)
    return diagnosis


class RunMonitor:
    """The diagnosis of a run kept up to date: `update()` with each row, in the order of the epochs, costs O(1)."""

    def __init__(self, config: FineTuneConfig | Mapping[str, Any] | None = None) -> None:
        self.diagnosis: Diagnosis = NO_FAULT
        self._course = Course(config)
        self._drop = Drop(self._course)
        self._rules = tuple(rule(self._course, self._drop) for rule in IN_ORDER)
        self._healed: tuple[Healed, ...] = ()

    def update(self, row: Mapping[str, Any]) -> Diagnosis:
        """Return the diagnosis with this row added. Columns: the contract of `finetune`, all but `epoch` optional."""
        self._course.read(row)
        self._drop.follow()
        for rule in self._rules:
            rule.follow()
        self._course.add()
        found = next((one for rule in self._rules if (one := rule.found()) is not None), NO_FAULT)
        self._follow_fall(found)
        self.diagnosis = self._with_healed(found)
        return self.diagnosis

    def _follow_fall(self, found: Diagnosis) -> None:
        if (
            found.verdict in FALLS
            and (found.settled or self._course.fall is not None)
            and found.epoch is not None
        ):
            self._course.fall = self._course.fall or Fall(found.epoch)
            self._course.fall.add(self._course.epoch, found)
        elif self._course.fall is not None:
            self._healed, self._course.fall = (*self._healed, self._course.fall.healed()), None

    def _with_healed(self, found: Diagnosis) -> Diagnosis:
        if not self._healed:
            return found
        shown = self._healed[-HEALED_SHOWN:]
        told = [
            f"{verdict} in epochs "
            + ", ".join(f"{fall.first} to {fall.last}" for fall in shown if fall.verdict == verdict)
            for verdict in dict.fromkeys(fall.verdict for fall in shown)
        ]
        if earlier := len(self._healed) - len(shown):
            told.append(f"{earlier} time{'s' if earlier > 1 else ''} before")
        return replace(
            found,
            summary=f"{found.summary}; healed: {', '.join(told)}",
            advice=found.advice or self._healed[-1].advice,
            healed=self._healed,
        )
