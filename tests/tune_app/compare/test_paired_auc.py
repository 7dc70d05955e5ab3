"""The interval of a difference of AUCs over subjects: against DeLong's own, and by simulation."""

import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trainables.subject_auc import compare_auc
from tune_app.compare.paired_auc import PairedSplit, paired_difference


def classes(positives: int, negatives: int) -> Any:
    return np.r_[np.ones(positives, int), np.zeros(negatives, int)]


def test_the_mean_is_that_of_seeds_and_folds() -> None:
    rng = np.random.default_rng(1)
    splits, expected = [], []
    for _ in range(2):
        labels = classes(8, 20)
        ours, theirs = rng.normal(size=(2, 3, 28)) + labels
        splits.append(PairedSplit(labels, np.arange(28), ours, theirs))
        expected += [
            roc_auc_score(labels, a) - roc_auc_score(labels, b)
            for a, b in zip(ours, theirs, strict=True)
        ]
    found = paired_difference(splits)
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-12)
    assert found.low < found.mean < found.high


def test_three_classes_have_the_mean_over_classes() -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(60) % 3
    ours, theirs = rng.normal(size=(2, 2, 60, 3)) + 1.5 * np.eye(3)[labels]
    found = paired_difference([PairedSplit(labels, np.arange(60), ours, theirs)])
    expected = [compare_auc(a, b, labels).difference for a, b in zip(ours, theirs, strict=True)]
    assert found.mean == pytest.approx(np.mean(expected), abs=1e-12)


@pytest.mark.parametrize(
    ("labels", "seeds"),
    [(classes(1, 20), 3), (classes(5, 20), 1)],
    ids=["one positive subject", "one seed"],
)
def test_what_cannot_be_known_has_no_interval(labels: Any, seeds: int) -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(size=(2, seeds, len(labels)))
    found = paired_difference([PairedSplit(labels, np.arange(len(labels)), ours, theirs)])
    assert math.isfinite(found.mean)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_equal_scores_differ_by_nothing() -> None:
    labels = classes(5, 20)
    scores = list(np.random.default_rng(4).normal(size=(2, 25)))
    split = PairedSplit(labels, np.arange(25), scores, scores)
    assert paired_difference([split]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("positives", "negatives"), [(3, 40), (10, 40), (40, 120)])
@pytest.mark.parametrize("volumes", [1, 2])
def test_the_interval_covers_where_nothing_differs(
    positives: int, negatives: int, volumes: int
) -> None:
    """Two settings that are equally good on the population: their networks, and how these see single subjects, are not."""
    rng = np.random.default_rng(5)
    of_subjects = classes(positives, negatives)
    labels = np.repeat(of_subjects, volumes)
    subjects = np.repeat(np.arange(positives + negatives), volumes)
    covered = []
    for _ in range(200):
        common, ours, theirs = np.repeat(rng.normal(size=(3, positives + negatives)), volumes, 1)

        def run(habit: Any, common: Any = common) -> Any:
            signal = 1.2 + rng.normal(0, 0.2)
            return signal * labels + 0.6 * common + 0.5 * habit + 0.5 * rng.normal(size=len(labels))

        split = PairedSplit(
            labels, subjects, [run(ours) for _ in range(3)], [run(theirs) for _ in range(3)]
        )
        found = paired_difference([split])
        covered.append(found.low <= 0 <= found.high)
    assert np.mean(covered) >= 0.92
