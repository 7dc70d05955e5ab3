"""Predictions put together by subject: a score for each, and how well subjects are separated by class.

Volumes of one subject are alike. 199 nodules of 113 patients are not 199 independent cases, and an interval that takes
them so is too narrow.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from trainables.checkpoints import replacing
from trainables.subject_auc import subject_interval
from tune_app.results.calibration import Array

Pool = Literal["mean", "max"]
"""How the log-odds of a subject's volumes become one score: their mean, or the largest of class 1 (two classes)."""


@dataclass(frozen=True)
class SubjectScore:
    """One subject."""

    subject: str
    volumes: int
    log_odds_C: Array
    low: float
    """Lowest and highest score of class 1 (of two classes) over its volumes."""
    high: float
    label: int | None
    """The class of its labelled volumes; None where there are none, or several classes."""


def pool_subjects(
    subjects: Iterable[str], log_odds_NC: Array, labels: Iterable[int | None], pool: Pool
) -> list[SubjectScore]:
    """Return the subjects in the order of their first volume. `max` takes the volume with the largest score of class 1."""
    rows: dict[str, list[int]] = {}
    for row, subject in enumerate(subjects):
        rows.setdefault(subject, []).append(row)
    stated = list(labels)
    found = []
    for subject, own in rows.items():
        scores = log_odds_NC[own]
        pooled = scores[scores[:, 1].argmax()] if pool == "max" else scores.mean(axis=0)
        classes = {stated[row] for row in own} - {None}
        found.append(
            SubjectScore(
                subject,
                len(own),
                pooled,
                float(scores[:, 1].min()),
                float(scores[:, 1].max()),
                classes.pop() if len(classes) == 1 else None,
            )
        )
    return found


def write_subjects(path: Path, found: Iterable[SubjectScore], classes: int) -> None:
    """Write a CSV of one row per subject: subject, volumes, score_c, the range of score_1 over its volumes, label."""
    names = [f"score_{c}" for c in range(classes)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as stream,
    ):
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["subject", "volumes", *names, "score_1_low", "score_1_high", "label"])
        for one in found:
            numbers = [f"{value:.9g}" for value in (*one.log_odds_C, one.low, one.high)]
            label = "" if one.label is None else one.label
            writer.writerow([one.subject, one.volumes, *numbers, label])


def subject_lines(found: Iterable[SubjectScore], classes: int, pool: Pool) -> list[str]:
    """Return how well labelled subjects are separated by class, with an interval over subjects; none until each class has one."""
    found = list(found)
    labelled = [one for one in found if one.label is not None]
    if len({one.label for one in labelled}) < classes:
        return []
    scores = np.stack([one.log_odds_C for one in labelled])
    auc = subject_interval(
        scores[:, 1] if classes == 2 else scores,
        np.array([one.label for one in labelled]),
        np.arange(len(labelled)),
    )
    how = "mean of its volumes' scores" if pool == "mean" else "largest score of its volumes"
    line = f"{len(labelled)} subjects, each by the {how}: AUC {auc.auc:.3f} [{auc.low:.3f}, {auc.high:.3f}]"
    several = len(found) - len(labelled)
    return [
        line + (f"; {several} without a label, or with several, are left out" if several else "")
    ]
