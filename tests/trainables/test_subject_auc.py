"""AUCs of volumes of one subject, and of two models on the same volumes, against oracles and simulations."""

import math

import numpy as np
import pytest
from scipy.stats import t
from score_oracles import cohort, delong_by_pairs

from trainables.metrics import auc_interval, ranking_scores, score_metrics
from trainables.subject_auc import (
    compare_auc,
    score_metrics_over_subjects,
    subject_interval,
    subjects_of_classes,
)


def test_the_paired_comparison_is_delongs_with_few_degrees_of_freedom() -> None:
    labels = np.repeat([0, 1], [60, 25])
    random = np.random.default_rng(1)
    a = random.normal(size=85) + labels
    b = 0.7 * a + random.normal(size=85)
    (v10a, v01a, auc_a), (v10b, v01b, auc_b) = (delong_by_pairs(s, labels) for s in (a, b))
    s10, s01 = np.cov(v10a, v10b), np.cov(v01a, v01b)
    contrast = np.array([1, -1])
    of_positives, of_negatives = (contrast @ s @ contrast for s in (s10 / 25, s01 / 60))
    variance = of_positives + of_negatives
    freedom = variance**2 / (of_positives**2 / 24 + of_negatives**2 / 59)
    error = math.sqrt(variance)
    ours = compare_auc(a, b, labels)
    assert (ours.auc_a, ours.auc_b) == pytest.approx((auc_a, auc_b))
    assert ours.difference == pytest.approx(auc_a - auc_b)
    assert ours.p == pytest.approx(2 * t.sf(abs(auc_a - auc_b) / error, freedom))
    half = t.ppf(0.975, freedom) * error
    assert (ours.low, ours.high) == pytest.approx((ours.difference - half, ours.difference + half))
    reverse = compare_auc(b, a, labels)
    assert (reverse.difference, reverse.low, reverse.high) == pytest.approx(
        (-ours.difference, -ours.high, -ours.low)
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_the_paired_interval_agrees_with_a_bootstrap(classes: int) -> None:
    logits, labels = cohort(250, classes, seed=8)
    random = np.random.default_rng(0)
    a = ranking_scores(logits, scale=1.0)
    b = ranking_scores(logits + random.normal(size=logits.shape), scale=1.0)
    groups = [np.flatnonzero(labels == c) for c in range(classes)]
    draws = []
    for _ in range(400):
        rows = np.concatenate([random.choice(group, len(group)) for group in groups])
        draws.append(compare_auc(a[rows], b[rows], labels[rows]).difference)
    ours = compare_auc(a, b, labels)
    assert (ours.high - ours.low) / (2 * 1.96) == pytest.approx(np.std(draws), rel=0.12)


def test_the_paired_test_rejects_as_often_as_it_says() -> None:
    labels = np.repeat([0, 1], [80, 30])
    random = np.random.default_rng(2)
    rejected = 0
    for _ in range(600):
        common = random.normal(size=110) + labels
        a, b = (common + random.normal(size=110) for _ in range(2))
        rejected += compare_auc(a, b, labels).p < 0.05
    assert 0.03 <= rejected / 600 <= 0.075


def test_equal_scores_do_not_differ_and_too_few_samples_cannot_tell() -> None:
    logits, labels = cohort(60)
    scores = ranking_scores(logits, scale=1.0)
    same = compare_auc(scores, 3 * scores, labels)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    opposite = compare_auc([0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1])
    assert opposite.difference == 1
    assert math.isnan(opposite.p)
    single = compare_auc([0.0, 2.0, 1.0], [0.0, 1.0, 2.0], [0, 0, 1])
    assert single.difference == -0.5
    assert math.isnan(single.low)
    assert math.isnan(single.p)


def test_scores_of_different_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples"):
        compare_auc([0.0, 1.0], [0.0, 1.0, 2.0], [0, 1])


@pytest.mark.parametrize(("positives", "least"), [(3, 0.9), (5, 0.92), (12, 0.92)])
def test_the_paired_interval_covers_with_few_positives(positives: int, least: float) -> None:
    """The normal one: .880, .917 and .930."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], [40, positives])
    covered = 0
    for _ in range(400):
        common = random.normal(size=len(labels))
        a, b = (common + 0.8 * random.normal(size=len(labels)) for _ in range(2))
        found = compare_auc(a, b, labels)
        covered += found.low <= 0 <= found.high
    assert covered / 400 >= least


def of_subjects(
    random: np.random.Generator, people: int, volumes: int, shift: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels and subjects of `volumes` nearly equal volumes a subject."""
    labels = np.repeat(np.arange(people) % 3 == 0, volumes).astype(int)
    own = np.repeat(random.normal(size=people), volumes)
    scores = own + 0.1 * random.normal(size=people * volumes) + shift * labels
    return scores, labels, np.repeat(np.arange(people), volumes)


def test_volumes_of_one_subject_do_not_make_an_interval_narrower() -> None:
    """Oracle: the AUC's spread over new draws of the subjects."""
    random = np.random.default_rng(0)
    aucs, widths, taken_for_independent = [], [], []
    for _ in range(300):
        scores, labels, subjects = of_subjects(random, people=45, volumes=4, shift=1.0)
        found = subject_interval(scores, labels, subjects)
        aucs.append(found.auc)
        widths.append(found.high - found.low)
        plain = auc_interval(scores, labels)
        taken_for_independent.append(plain.high - plain.low)
    spread = 2 * 1.96 * np.std(aucs)
    assert np.mean(widths) == pytest.approx(spread, rel=0.15)
    assert np.mean(taken_for_independent) < 0.6 * spread


def test_two_models_on_volumes_of_the_same_subjects_differ_as_often_as_chance_says() -> None:
    random = np.random.default_rng(0)
    apart = {True: 0, False: 0}
    for _ in range(400):
        a, labels, subjects = of_subjects(random, people=40, volumes=4, shift=0.5)
        b, _, _ = of_subjects(random, people=40, volumes=4, shift=0.5)
        apart[True] += compare_auc(a, b, labels, subjects).p < 0.05
        apart[False] += compare_auc(a, b, labels).p < 0.05
    assert apart[True] / 400 <= 0.07
    assert apart[False] / 400 > 0.15, "the case shows nothing"


@pytest.mark.parametrize("classes", [2, 3])
def test_the_metrics_over_subjects_differ_in_the_interval_alone(classes: int) -> None:
    logits, labels = cohort(120, classes, seed=1)
    alone = score_metrics_over_subjects(logits, labels, np.arange(120), scale=2.0)
    assert alone == pytest.approx(score_metrics(logits, labels, scale=2.0), rel=0, nan_ok=True)
    repeated = np.repeat(logits, 3, axis=0), np.repeat(labels, 3), np.repeat(np.arange(120), 3)
    found = score_metrics_over_subjects(*repeated, scale=2.0)
    plain = score_metrics(*repeated[:2], scale=2.0)
    differ = {name for name in found if found[name] != pytest.approx(plain[name], nan_ok=True)}
    assert differ == {"auc_low", "auc_high"}
    assert found["auc_high"] - found["auc_low"] > 1.5 * (plain["auc_high"] - plain["auc_low"])


def test_subjects_are_counted_by_class() -> None:
    labels, subjects = np.array([0, 0, 1, 1, 1, 2]), np.array(["a", "b", "b", "c", "c", "d"])
    assert subjects_of_classes(labels, subjects, 4) == [2, 2, 1, 0]


@pytest.mark.parametrize("classes", [2, 3])
def test_two_models_without_finite_scores_or_without_a_class_have_no_difference(
    classes: int,
) -> None:
    good, labels = cohort(50, classes)
    bad = good.copy()
    bad[3, 0] = math.nan
    good_scores, bad_scores = (ranking_scores(logits, scale=1.0) for logits in (good, bad))
    assert math.isnan(compare_auc(bad_scores, good_scores, labels).difference)
    assert math.isnan(compare_auc(good_scores, good_scores, np.zeros(50)).p)
