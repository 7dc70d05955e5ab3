"""A model judged on labelled rows, with intervals."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import softmax

from trainables.errors import ProblemsError
from trainables.metrics import score_metrics
from trainables.subject_auc import (
    SMALLEST_VARIANCE,
    have_several,
    over_subjects,
    score_metrics_over_subjects,
    subjects_of_classes,
)
from tune_app.models.folder import (
    Evaluation,
    Measured,
)
from tune_app.models.model import class_scores, decide
from tune_app.results.calibration import Array, Calibration, cross_fits, fit_calibration

BOOTSTRAPS = 500
"""Resamples of the subjects behind each bootstrap interval."""


class ExportError(ProblemsError):
    """A model that cannot be made as asked. `problems` holds one line a problem."""


def class_counts(labels: Array, classes: int) -> tuple[int, ...]:
    return tuple(int(count) for count in np.bincount(labels, minlength=classes))


@dataclass(frozen=True)
class Judged:
    """What follows from scores of volumes whose class is known."""

    threshold: float | None
    calibration: Calibration
    evaluation: Evaluation


def judge(z_NC: Array, scale: float, labels_N: Array, subjects_N: Array) -> Judged:
    """Return the threshold with the best balanced accuracy, the calibration, and how the model does with both.

    Threshold and calibration are fitted on these very volumes. Their performance on others is given, too, under
    names that end in `_unseen`: ten times, each on a tenth of the subjects, with both fitted on the others.
    """
    z_NC = np.asarray(z_NC, dtype=np.float64)
    calibration = fit_calibration(scale * z_NC, labels_N)
    threshold = _threshold(z_NC, labels_N, scale)
    log_odds = class_scores(z_NC, scale=scale)
    unseen_z, unseen_decisions = np.full_like(z_NC, np.nan), np.full(len(z_NC), -1)
    for fit, held_out in cross_fits(labels_N, subjects_N):
        unseen_z[held_out] = fit_calibration(scale * z_NC[fit], labels_N[fit]).logits(
            scale * z_NC[held_out]
        )
        best = _threshold(z_NC[fit], labels_N[fit], scale)
        unseen_decisions[held_out] = decide(
            log_odds[held_out],
            0.0 if best is not None and math.isnan(best) else best,
            unseen_z[held_out],
        )
    evaluation = evaluate(
        z_NC,
        scale,
        labels_N,
        subjects_N,
        threshold=threshold,
        calibration=calibration,
        unseen=(unseen_z, unseen_decisions) if np.isfinite(unseen_z).all() else None,
    )
    return Judged(threshold, calibration, evaluation)


def _threshold(z_NC: Array, labels_N: Array, scale: float) -> float | None:
    """The log-odds with the best balanced accuracy on these volumes; None with more than two classes."""
    if z_NC.shape[1] != 2:
        return None
    return score_metrics(z_NC, labels_N, scale=scale)["threshold"]


def evaluate(
    z_NC: Array,
    scale: float,
    labels_N: Array,
    subjects_N: Array,
    *,
    threshold: float | None,
    calibration: Calibration,
    unseen: tuple[Array, Array] | None = None,
) -> Evaluation:
    """Return the metrics of scaled logits at a given threshold and calibration, with 95 % intervals.

    AUC: the score interval of `trainables.metrics`, or where subjects have several volumes the one over subjects. Shares of
    decisions (sensitivity, specificity, accuracy): Wilson's, of as many volumes as the subjects are worth.
    All others: percentiles over resamples of the subjects, whose volumes stay together. `unseen`: calibrated logits and
    decisions that were made for each volume without its subject.
    """
    classes = z_NC.shape[1]
    fitted = calibration.logits(scale * z_NC)
    decisions = {"": decide(class_scores(z_NC, scale=scale), threshold, fitted)}
    calibrated = {"_uncalibrated": scale * z_NC, "": fitted}
    if unseen is not None:
        calibrated["_unseen"], decisions["_unseen"] = unseen

    errors = {name: _squared_errors(logits, labels_N) for name, logits in calibrated.items()}

    def resampled(rows: Array) -> dict[str, float]:
        plain = score_metrics(z_NC[rows], labels_N[rows], scale=scale)
        found = {name: plain[name] for name in ("auc", "auprc", "sensitivity_at_90_specificity")}
        for name, made in decisions.items():
            found[f"balanced_accuracy{name}"] = _balanced_accuracy(
                made[rows], labels_N[rows], classes
            )
        return found | {
            f"brier{name}": float(of_each[rows].mean()) for name, of_each in errors.items()
        }

    values = resampled(np.arange(len(labels_N)))
    low, high = _bootstrap(resampled, subjects_N)
    by_subject = {
        name: _measured(value, low[name], high[name], "bootstrap over subjects")
        for name, value in values.items()
    }
    plain = score_metrics_over_subjects(z_NC, labels_N, subjects_N, scale=scale)
    kind = "over subjects" if have_several(subjects_N) else "score"
    metrics = {"auc": _measured(plain["auc"], plain["auc_low"], plain["auc_high"], kind)}
    metrics |= {name: by_subject[name] for name in ("auprc", "sensitivity_at_90_specificity")}
    for name, made in decisions.items():
        metrics[f"balanced_accuracy{name}"] = by_subject[f"balanced_accuracy{name}"]
        shares = {f"recall_{c}": labels_N == c for c in range(classes)}
        if classes == 2:
            shares = {"sensitivity": shares["recall_1"], "specificity": shares["recall_0"]}
        metrics |= {
            f"{share}{name}": wilson((made == labels_N)[among], subjects_N[among])
            for share, among in shares.items()
        }
    metrics |= {f"brier{name}": by_subject[f"brier{name}"] for name in calibrated}
    for name, logits in calibrated.items():
        # No interval: a resample repeats volumes, which empties bins, and its errors are all larger than the true one.
        metrics[f"ece{name}"] = _measured(score_metrics(logits, labels_N, scale=1.0)["ece"])
    return Evaluation(
        volumes=len(labels_N),
        subjects=len(np.unique(subjects_N)),
        classes=class_counts(labels_N, classes),
        class_subjects=tuple(subjects_of_classes(labels_N, subjects_N, classes)),
        metrics=metrics,
    )


def wilson(right: Array, subjects: Array) -> Measured:
    """Return the share of `right` with Wilson's score interval (Wilson 1927); no value for no volumes.

    Volumes of one subject stand for as many independent ones as the variance over subjects implies, and for the subjects
    where that variance is zero (Korn and Graubard 1998, Confidence intervals for proportions with small expected number of
    positive counts).
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    if not len(right):
        return Measured(value=None)
    share = float(right.mean())
    count = _independent(right, subjects)
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z
        / (1 + z * z / count)
        * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    )
    return Measured(
        value=share, low=max(0.0, centre - half), high=min(1.0, centre + half), interval="Wilson"
    )


def _independent(right: Array, subjects: Array) -> float:
    """The number of independent volumes that determine the share of `right` as precisely as these correlated ones."""
    persons = len(np.unique(subjects))
    share = float(right.mean())
    if persons == len(right) or persons < 2 or share in (0, 1):
        return float(persons)
    [part] = over_subjects(right / len(right), np.zeros(len(right)), subjects)
    if part.variance < SMALLEST_VARIANCE:
        return float(persons)
    return min(share * (1 - share) / part.variance, float(len(right)))


def _bootstrap(
    measure: Callable[[Array], dict[str, float]], subjects_N: Array
) -> tuple[dict[str, float], dict[str, float]]:
    """2.5 and 97.5 percent points of each value over resamples of the subjects; resamples without a value are left out."""
    _, codes = np.unique(subjects_N, return_inverse=True)
    rows_of = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    rng = np.random.default_rng(0)
    draws = [
        measure(
            np.concatenate([rows_of[code] for code in rng.integers(0, len(rows_of), len(rows_of))])
        )
        for _ in range(BOOTSTRAPS)
    ]
    table = pd.DataFrame(draws)
    low, high = (
        {str(name): float(end) for name, end in table.quantile(q).items()} for q in (0.025, 0.975)
    )
    return low, high


def _squared_errors(logits_NC: Array, labels_N: Array) -> Array:
    """(N,): each volume's part of the Brier score, from 0 to 1."""
    p_NC = softmax(logits_NC, axis=1)
    return np.asarray(((p_NC - np.eye(p_NC.shape[1])[labels_N]) ** 2).sum(axis=1) / 2)


def _balanced_accuracy(decisions_N: Array, labels_N: Array, classes: int) -> float:
    counts = np.bincount(labels_N, minlength=classes)
    if not counts.all():
        return math.nan
    return float(
        (np.bincount(labels_N[decisions_N == labels_N], minlength=classes) / counts).mean()
    )


def _measured(
    value: float, low: float = math.nan, high: float = math.nan, interval: str | None = None
) -> Measured:
    """A number as a model's folder holds it: None for NaN."""
    known = [None if math.isnan(one) else float(one) for one in (value, low, high)]
    return Measured(value=known[0], low=known[1], high=known[2], interval=interval)
