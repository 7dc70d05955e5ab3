"""The document's success indicators and warning signs, looked for in a study's trials."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from search_spaces.fixes import documented_after
from trainables.diagnosis import GAP, LOSS_SPIKE_FACTOR
from tune_app.report.findings import (
    leading,
    once_per_study,
    standard_error,
)
from tune_app.results.effects import COLLAPSES
from tune_app.results.study import Study
from tune_app.results.text import format_value

DOCUMENTED_AUC = 0.70
"""The document's own line: an AUC that does not get beyond it is a warning sign."""


@dataclass(frozen=True)
class Check:
    """One of the document's success indicators or warning signs, looked for in a trial."""

    kind: Literal["success", "warning"]
    text: str
    """As the document words it."""
    present: bool | None
    """None: the data are not enough to decide."""
    evidence: str
    among: str
    """In how many of all trials it is present."""

    @property
    def good(self) -> bool | None:
        return None if self.present is None else self.present == (self.kind == "success")


@once_per_study
def checklist(study: Study) -> list[Check]:
    """Return the document's five success indicators and four warning signs, looked for in the leading trial.

    `among` counts the trials that show it, of those where it can be decided.
    """
    best = leading(study)
    places = study.epochs.groupby("trial", observed=True).indices
    columns = {
        name: study.epochs[name].to_numpy("float64", na_value=math.nan) for name in _CHECKED_COLUMNS
    }
    shown: dict[str, list[bool]] = {text: [] for _, text, _ in _CHECKS}
    evidence: dict[str, tuple[bool | None, str]] = dict.fromkeys(
        shown, (None, "its epochs are missing")
    )
    for trial in study.trials_full.to_dict("records"):
        if trial["trial"] not in places:
            continue
        own = places[trial["trial"]]
        curves = _Curves(trial, {name: values[own] for name, values in columns.items()})
        for _, text, look in _CHECKS:
            present, told = look(curves)
            if present is not None:
                shown[text].append(present)
            if trial["trial"] == best["trial"]:
                evidence[text] = present, told
    return [
        Check(
            kind,
            text,
            *evidence[text],
            f"{sum(shown[text])} of {len(shown[text])} trials" if shown[text] else "no trial",
        )
        for kind, text, _ in _CHECKS
    ]


class _Curves:
    """One trial's columns as arrays over its epochs, and what several checks need of them."""

    def __init__(self, trial: Mapping[Any, Any], columns: Mapping[str, np.ndarray]) -> None:
        self.trial = trial
        self.columns = columns
        self.epoch = columns["epoch"].astype("int64")
        self.loss = columns["train_loss"]
        self.active = columns["drw_active"] == 1
        started = np.flatnonzero(self.active)
        self.drw_epoch = int(self.epoch[started[0]]) if len(started) else None
        self.median = _median3(columns["val_auc"])
        half = 1.96 * standard_error(trial)
        self.slack = half if math.isfinite(half) else 0.05
        self.worst_jump = self._worst_jump()

    def phases(self) -> list[np.ndarray]:
        """Places before and from the start of DRW on: the loss is on another scale in each."""
        return [
            places
            for places in (np.flatnonzero(~self.active), np.flatnonzero(self.active))
            if len(places)
        ]

    def _worst_jump(self) -> tuple[float, int]:
        """The largest loss against the median of up to five epochs before, and its epoch."""
        worst = (0.0, 0)
        for places in self.phases():
            losses = self.loss[places].tolist()
            for i in range(3, len(losses)):
                usual = statistics.median(losses[max(0, i - 5) : i])
                if usual > 0 and losses[i] > worst[0] * usual:
                    worst = (losses[i] / usual, int(self.epoch[places[i]]))
        return worst


def _median3(values: np.ndarray) -> np.ndarray:
    """Medians of three epochs in a row, one for each epoch from the third on."""
    if len(values) < 3:
        return np.full(0, math.nan)
    return np.asarray(np.median(np.stack([values[:-2], values[1:-1], values[2:]]), axis=0))


def _smooth_loss(curves: _Curves) -> tuple[bool | None, str]:
    if len(curves.loss) < 4 or not np.isfinite(curves.loss).all():
        return (
            (None, "fewer than 4 epochs")
            if np.isfinite(curves.loss).all()
            else (False, "the loss is not finite")
        )
    falls, told = True, []
    for places, when in zip(
        curves.phases(), ("before the class weights", "with them"), strict=False
    ):
        if len(places) >= 4:
            loss = curves.loss[places]
            falls &= bool(np.median(loss[-3:]) <= np.median(loss[:3]) * 1.02)
            told.append(
                f"{loss[0]:.3g} to {loss[-1]:.3g} {when if len(curves.phases()) > 1 else 'in all'}"
            )
    jump, epoch = curves.worst_jump
    told.append(f"largest step {jump:.2f} times the epochs before, in epoch {epoch}")
    return falls and jump < 1.5, "loss " + "; ".join(told)


def _auc_rises(curves: _Curves) -> tuple[bool | None, str]:
    median = curves.median[np.isfinite(curves.median)]
    if len(median) < 4:
        return None, "fewer than 6 epochs with an AUC"
    first, best, last = float(median[0]), float(median.max()), float(median[-1])
    told = f"3-epoch median {first:.3f} at first, {best:.3f} at best, {last:.3f} at the end"
    if best - last > curves.slack:
        return False, told
    if last - first > curves.slack:
        return True, told
    return None, f"{told}: {_no_change(curves)}"


def _no_change(curves: _Curves) -> str:
    return f"no change beyond noise (± {curves.slack:.3f})"


def _no_collapse(curves: _Curves) -> tuple[bool | None, str]:
    verdict = curves.trial["verdict"]
    if pd.isna(verdict):
        return None, "not diagnosed"
    healed = curves.trial["healed_epochs"]
    if verdict in COLLAPSES or (not pd.isna(healed) and healed > 0):
        return False, str(curves.trial["verdict_summary"])
    if len(curves.median) < 2:
        return None, "fewer than 4 epochs"
    falls = np.maximum.accumulate(curves.median) - curves.median
    if not np.isfinite(falls).any():
        return None, "no AUC"
    at = int(np.nanargmax(falls))
    return (
        True,
        f"largest fall of the 3-epoch median {falls[at]:.3f}, by epoch {curves.epoch[at + 2]}",
    )


def _rates_differ(curves: _Curves) -> tuple[bool | None, str]:
    backbone, head = curves.columns["lr_backbone"], curves.columns["lr_classifier"]
    both = (backbone > 0) & (head > 0)
    if not both.any():
        return None, "no learning rates recorded"
    holds = bool((backbone[both] < head[both]).all())
    ratio = float(np.median(head[both] / backbone[both]))
    return holds, (
        f"{format_value('backbone_lr', curves.trial['backbone_lr'])} and "
        f"{format_value('classifier_lr', curves.trial['classifier_lr'])} at their peak; ratio {ratio:.3g} over "
        f"all {int(both.sum())} epochs"
    )


def _drw_starts(curves: _Curves) -> tuple[bool | None, str]:
    asked = int(curves.trial["drw_start_epoch"])
    document = documented_after(int(curves.trial["epochs"]))["drw_start_epoch"]
    scaled = f"; the recommended 25 of 60 is {document} here" if document != 25 else ""
    if curves.drw_epoch is None:
        ran = int(curves.epoch[-1])
        if asked > ran:
            return None, f"due in epoch {asked}, the run ended after {ran}{scaled}"
        return False, f"due in epoch {asked}, never active in {ran} epochs{scaled}"
    return (
        curves.drw_epoch == asked,
        f"active from epoch {curves.drw_epoch}, asked for {asked}{scaled}",
    )


def _spikes_or_nan(curves: _Curves) -> tuple[bool | None, str]:
    nans = int((~np.isfinite(curves.loss)).sum())
    skipped = float(np.nansum(curves.columns["skipped_updates"]))
    nonfinite = int(
        (
            np.nan_to_num(
                np.fmax(curves.columns["val_nonfinite_raw"], curves.columns["val_nonfinite_ema"])
            )
            > 0
        ).sum()
    )
    jump, epoch = curves.worst_jump
    told = "losses and scores finite in every epoch"
    if nans or nonfinite:
        told = f"epochs whose loss is not finite: {nans}, whose scores: {nonfinite}"
    told += f"; {skipped:g} updates skipped"
    if jump:
        told += (
            f", largest jump {jump:.2f} times in epoch {epoch} (a spike is {LOSS_SPIKE_FACTOR:g})"
        )
    return nans > 0 or nonfinite > 0 or jump >= LOSS_SPIKE_FACTOR, told


def _falls_after_drw(curves: _Curves) -> tuple[bool | None, str]:
    if curves.drw_epoch is None:
        return None, "no class weights in this run"
    before = (curves.epoch < curves.drw_epoch) & (curves.epoch >= curves.drw_epoch - 3)
    after = (curves.epoch >= curves.drw_epoch + 2) & (curves.epoch < curves.drw_epoch + 10)
    if before.sum() < 2 or after.sum() < 3:
        return None, f"too few epochs around their start in epoch {curves.drw_epoch}"
    told, fell, declined = [], False, False
    for name, words in (("val_auc", "AUC"), ("val_balanced_accuracy_ema", "balanced accuracy")):
        values = curves.columns[name]
        with np.errstate(invalid="ignore"):
            first, then = float(np.median(values[before])), float(np.median(values[after]))
        if math.isfinite(first) and math.isfinite(then):
            fell |= first - then > curves.slack
            declined |= first > then
            told.append(f"{words} {first:.3f} before, {then:.3f} after")
    if not told:
        return None, "no scores around their start"
    if declined and not fell:
        return None, f"{'; '.join(told)}: {_no_change(curves)}"
    return fell, "; ".join(told)


def _stays_low(curves: _Curves) -> tuple[bool | None, str]:
    finite = curves.median[np.isfinite(curves.median)]
    if not len(finite):
        return None, "fewer than 3 epochs with an AUC"
    return bool(finite.max() <= DOCUMENTED_AUC), f"best 3-epoch median {finite.max():.3f}"


def _wide_gap(curves: _Curves) -> tuple[bool | None, str]:
    if pd.isna(curves.trial["best_epoch"]):
        return None, "no best epoch"
    at = curves.epoch == curves.trial["best_epoch"]
    train, validation = (
        float(curves.columns["train_auc"][at][0]),
        float(curves.columns["val_auc_raw"][at][0]),
    )
    if not math.isfinite(train) or not math.isfinite(validation):
        return None, "no training AUC was measured"
    told = f"training {train:.3f}, validation {validation:.3f} (raw weights, epoch {curves.trial['best_epoch']})"
    return train - validation > GAP, told


_CHECKED_COLUMNS = (
    "epoch",
    "train_loss",
    "drw_active",
    "val_auc",
    "lr_backbone",
    "lr_classifier",
    "skipped_updates",
    "val_nonfinite_raw",
    "val_nonfinite_ema",
    "val_balanced_accuracy_ema",
    "val_auc_raw",
    "train_auc",
)
_CHECKS: tuple[tuple[Literal["success", "warning"], str, Any], ...] = (
    ("success", "Loss decreases smoothly (no spikes)", _smooth_loss),
    ("success", "Validation AUC increases steadily", _auc_rises),
    ("success", "No sudden metric collapses", _no_collapse),
    ("success", "Backbone LR < classifier LR", _rates_differ),
    ("success", "DRW activates at its epoch", _drw_starts),
    ("warning", "Loss spikes or NaN values", _spikes_or_nan),
    ("warning", "Validation metrics decreasing after DRW activation", _falls_after_drw),
    ("warning", "AUC not improving beyond 0.70", _stays_low),
    ("warning", "Large gap between train and validation metrics", _wide_gap),
)
"""Kind, the document's words, and how it is looked for."""
