"""A search that has a time instead of a number of trials: the plan in words, and when time is over."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

from tune_app.study.duration import expected_epochs, span, study_s
from tune_app.study.policy import Policy
from tune_app.study.spec import StudySpec

MEASURED_EPOCHS = 3
"""Epochs whose median is taken as the usual length; the first epoch of a trial is longer and does not count."""

HOUR_S = 3600.0


class TimeBudget:
    """Seconds that a session may take from now on, shared by `concurrent` trials at a time."""

    def __init__(self, spec: StudySpec, policy: Policy, concurrent: int, gpus: float) -> None:
        """`gpus`: that all trials together hold, 0 on CPUs; GPU hours are hours of all of them."""
        hours = spec.hours
        if spec.gpu_hours is not None:
            by_gpu = spec.gpu_hours / gpus if gpus else spec.gpu_hours
            hours = by_gpu if hours is None else min(hours, by_gpu)
        self._whole, self._kept = hours, spec.confirm_share if spec.kind == "search" else 0.0
        self.seconds = None if hours is None else hours * HOUR_S * (1 - self._kept)
        self._until = None if self.seconds is None else time.monotonic() + self.seconds
        self._concurrent, self._epochs = concurrent, spec.epochs
        self._trials, self._expected = spec.num_trials, expected_epochs(policy, spec.num_trials)
        self._seen: list[float] = []

    @property
    def over(self) -> bool:
        """Whether the time has been spent."""
        return self._until is not None and time.monotonic() >= self._until

    @property
    def plan(self) -> str | None:
        """Return the line to show before anything was measured; None without a time budget."""
        if self.seconds is None:
            return None
        kept = (
            f" of {_hours((self._whole or 0.0) * HOUR_S)}, the rest is for the confirmation"
            if self._kept
            else ""
        )
        return (
            f"time budget: {_hours(self.seconds)}{kept}, {self._concurrent} trials at a time; a whole run has "
            f"{self._epochs} epochs, and what fits is shown after the first {MEASURED_EPOCHS} measured epochs"
        )

    def measured(self, row: Mapping[str, Any]) -> str | None:
        """Take an epoch's row; return the plan in words once enough is measured, and None before and after."""
        seconds = row.get("epoch_s")
        if row["epoch"] < 2 or not isinstance(seconds, int | float):
            return None
        self._seen.append(float(seconds))
        if len(self._seen) != MEASURED_EPOCHS:
            return None
        epoch_s = max(statistics.median(self._seen), 1e-3)
        if self.seconds is None:
            rest = study_s(self._trials, self._expected, epoch_s, self._concurrent)
            return (
                f"an epoch takes {epoch_s:.3g} s: {self._trials} trials take about {span(rest)} in all, of which "
                f"{self._expected * self._trials:.0f} of {self._epochs * self._trials} epochs are expected to run"
            )
        epochs = self.seconds * self._concurrent / epoch_s
        ends = time.strftime("%H:%M", time.localtime(time.time() + self._left()))
        return (
            f"an epoch takes {epoch_s:.3g} s: {_hours(self.seconds)} are worth about {epochs / self._epochs:.3g} whole "
            f"runs, or {epochs / self._expected:.3g} trials of which most stop early; the search ends at {ends}"
        )

    def _left(self) -> float:
        return 0.0 if self._until is None else max(0.0, self._until - time.monotonic())


def _hours(seconds: float) -> str:
    if seconds >= HOUR_S:
        return f"{seconds / HOUR_S:.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 60 else f"{seconds:.3g} s"
