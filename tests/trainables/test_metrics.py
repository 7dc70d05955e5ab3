import math
import subprocess
import sys
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom
from score_oracles import cohort, delong_by_pairs
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    roc_auc_score,
    roc_curve,
)

from trainables.metrics import (
    PRIOR_FACTOR,
    PRIOR_SAMPLES,
    SCORE_METRICS,
    auc_interval,
    hanley_mcneil_error,
    ranking_scores,
    score_metrics,
)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# Against outside oracles


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("seed", range(4))
def test_two_class_metrics_equal_those_of_scikit_learn(seed: int, decimals: int | None) -> None:
    logits, labels = cohort(seed=seed, decimals=decimals)
    scale = 3.7
    ours = score_metrics(logits, labels, scale=scale)
    scores = (logits[:, 1].astype(np.float64) - logits[:, 0]) * scale
    probabilities = softmax(scale * logits.astype(np.float64))[:, 1]
    predicted = logits.argmax(axis=1)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    expected = {
        "auc": roc_auc_score(labels, scores),
        "auprc": average_precision_score(labels, scores),
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "balanced_accuracy_best": ((tpr + 1 - fpr) / 2).max(),
        "sensitivity_at_90_specificity": tpr[fpr <= 0.1 + 1e-12].max(),
        "brier": brier_score_loss(labels, probabilities),
    }
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert tuple(ours) == SCORE_METRICS
    assert all(type(value) is float for value in ours.values())


@pytest.mark.parametrize("classes", [3, 5])
def test_metrics_of_more_classes_equal_those_of_scikit_learn(classes: int) -> None:
    logits, labels = cohort(200, classes, seed=classes)
    scale = 2.0
    ours = score_metrics(logits, labels, scale=scale)
    probabilities = softmax(scale * logits.astype(np.float64))
    onehot = np.eye(classes)[labels]
    predicted = logits.argmax(axis=1)
    expected = {
        "auc": roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"),
        "auprc": average_precision_score(onehot, probabilities, average="macro"),
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "brier": ((probabilities - onehot) ** 2).sum(axis=1).mean() / 2,
    }
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert ours["auc_low"] < ours["auc"] < ours["auc_high"]
    assert 0.5 < ours["balanced_accuracy_best"] <= 1
    assert math.isnan(ours["threshold"])  # one a class, not one


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: 0 < sum(label for _, label in rows) < len(rows)
    )
)
def test_ranking_metrics_equal_scikit_learn_on_any_scores_with_ties(
    rows: list[tuple[int, bool]],
) -> None:
    scores, labels = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    ours = score_metrics(np.stack([0 * scores, scores], axis=1), labels, scale=1.0)
    assert ours["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert ours["auprc"] == pytest.approx(average_precision_score(labels, scores), abs=1e-12)

    def balanced_accuracy(threshold: float) -> float:
        called = scores >= threshold
        return (called[labels == 1].mean() + (~called)[labels == 0].mean()) / 2

    at_threshold = balanced_accuracy(ours["threshold"])
    assert at_threshold == pytest.approx(ours["balanced_accuracy_best"], abs=1e-12)
    best = max(balanced_accuracy(t) for t in [*scores, math.inf])
    assert at_threshold == pytest.approx(best, abs=1e-12)
    assert 0 <= ours["auc_low"] <= ours["auc"] <= ours["auc_high"] <= 1
    if 0.5 <= ours["auc"] < 1:
        assert ours["auc_low"] < ours["auc"] < ours["auc_high"]


def test_calibration_error_is_the_weighted_gap_in_fifteen_bins() -> None:
    logits, labels = cohort(300, 3, seed=5)
    p = softmax(logits.astype(np.float64))
    confidence, correct = p.max(axis=1), p.argmax(axis=1) == labels
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert score_metrics(logits, labels, scale=1.0)["ece"] == pytest.approx(expected, abs=1e-12)


def test_worked_values_of_a_small_cohort() -> None:
    # scores -2, -1, -1, 1, 3 with labels 0, 0, 1, 0, 1: pairs 2/2, 1.5/2 ... of six: (0.5 + 1 + 0 + 3) / 6
    logits = np.array([[0, -2], [0, -1], [0, -1], [0, 1], [0, 3]], dtype=np.float32)
    ours = score_metrics(logits, [0, 0, 1, 0, 1], scale=1.0)
    assert ours["auc"] == pytest.approx(4.5 / 6)
    assert ours["tied"] == pytest.approx(2 / 5)
    assert ours["logit_gap"] == pytest.approx(8 / 5)
    assert ours["accuracy"] == pytest.approx(3 / 5)
    assert ours["balanced_accuracy_best"] == pytest.approx(0.75)
    assert ours["threshold"] == pytest.approx(2.0)  # half-way between 1 and 3
    assert ours["sensitivity_at_90_specificity"] == pytest.approx(0.5)
    assert ours["nonfinite"] == 0


@pytest.mark.parametrize(("negatives", "sensitivity"), [(9, 0.0), (10, 0.5), (19, 0.5), (20, 1.0)])
def test_ninety_per_cent_specificity_allows_one_false_positive_in_ten_and_includes_the_limit(
    negatives: int, sensitivity: float
) -> None:
    # ranked from the top: negative, positive, negative, positive, and the other negatives below
    scores = np.array([5, 3, *np.linspace(-1, -2, negatives - 2), 4, 2])
    labels = np.repeat([0, 1], [negatives, 2])
    ours = score_metrics(np.stack([0 * scores, scores], axis=1), labels, scale=1.0)
    assert ours["sensitivity_at_90_specificity"] == sensitivity


def test_of_equally_good_thresholds_the_one_nearest_to_argmax_is_taken() -> None:
    logits = np.array([[0, -9], [0, -6], [0, -5], [0, 4]], dtype=np.float32)
    # -6 (positive) and 4 (positive) around -5 and -9 (negatives): cutting at -7.5 or at -0.5 is equally good
    assert score_metrics(logits, [0, 1, 0, 1], scale=1.0)["threshold"] == pytest.approx(-0.5)


# The interval


def interval_by_formula(scores: np.ndarray, labels: np.ndarray, z: float = 1.959964) -> list[float]:
    """The AUC and its score interval from all pairs, its ends by a root finder."""
    v10, v01, auc = delong_by_pairs(scores, labels)
    rarer, other = sorted((len(v10), len(v01)))

    def expected(t: float) -> float:
        q1, q2 = t / (2 - t) - t * t, 2 * t * t / (1 + t) - t * t
        spread = t * (1 - t) + (other - 1) * max(q1, q2) + (rarer - 1) * min(q1, q2)
        return spread / (rarer * other)

    factor = PRIOR_FACTOR
    if rarer > 1 and 0 < auc < 1:
        found = v10.var(ddof=1) / len(v10) + v01.var(ddof=1) / len(v01)
        between = min(((v > 0) & (v < 1)).sum() for v in (v10, v01))
        telling = max(0, between - 1)
        factor = (PRIOR_SAMPLES * PRIOR_FACTOR + telling * found / expected(auc)) / (
            PRIOR_SAMPLES + telling
        )
    ends = []
    for end in (1e-12, 1 - 1e-12):
        beyond = lambda t: abs(t - auc) - z * math.sqrt(factor * expected(t))  # noqa: E731
        start = auc + (1e-9 if end > auc else -1e-9)
        ends.append(brentq(beyond, start, end) if beyond(end) > 0 > beyond(start) else end)
    return [auc, *ends]


@pytest.mark.parametrize("decimals", [None, 0])
@pytest.mark.parametrize("count", [24, 90])
def test_the_interval_holds_what_its_own_expected_error_reconciles_with_the_auc(
    decimals: int | None, count: int
) -> None:
    logits, labels = cohort(count, seed=3, decimals=decimals)
    scores = ranking_scores(logits, scale=1.0)
    ours = auc_interval(scores, labels)
    np.testing.assert_allclose(ours, interval_by_formula(scores, labels), atol=1e-6)
    wider = auc_interval(scores, labels, confidence=0.99)
    assert wider.low < ours.low
    assert wider.high > ours.high


@pytest.mark.parametrize("positives", [1, 2, 3, 5, 10, 20])
@pytest.mark.parametrize("auc", [0.5, 0.8, 0.98])
def test_the_interval_holds_the_true_auc_with_few_positives(positives: int, auc: float) -> None:
    """DeLong's on the AUC's own scale does in 77 % of the cases with 2 positives at an AUC of .5."""
    random = np.random.default_rng(positives)
    labels = np.repeat([0, 1], [40, positives])
    shift = math.sqrt(2) * NormalDist().inv_cdf(auc)
    draws = 400
    hits = 0
    for _ in range(draws):
        interval = auc_interval(random.normal(size=len(labels)) + shift * labels, labels)
        hits += interval.low <= auc <= interval.high
    assert hits >= binom.ppf(0.001, draws, 0.93)


def test_positives_and_negatives_and_the_order_change_places() -> None:
    logits, labels = cohort(40, seed=5)
    scores = ranking_scores(logits, scale=1.0)
    ours = auc_interval(scores, labels)
    np.testing.assert_allclose(auc_interval(-scores, 1 - labels), ours, atol=1e-9)
    mirrored = auc_interval(-scores, labels)
    np.testing.assert_allclose(
        [1 - mirrored.auc, 1 - mirrored.high, 1 - mirrored.low], ours, atol=1e-9
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_the_interval_agrees_with_a_bootstrap(classes: int) -> None:
    logits, labels = cohort(300, classes, seed=7, signal=0.8)
    scores = ranking_scores(logits, scale=1.0)
    random = np.random.default_rng(0)
    groups = [np.flatnonzero(labels == c) for c in range(classes)]
    draws = []
    for _ in range(400):
        rows = np.concatenate([random.choice(group, len(group)) for group in groups])
        draws.append(auc_interval(scores[rows], labels[rows]).auc)
    ours = auc_interval(scores, labels)
    np.testing.assert_allclose(
        [ours.low, ours.high], np.quantile(draws, [0.025, 0.975]), atol=0.015
    )


def test_two_classes_given_as_one_against_the_rest_have_the_same_interval() -> None:
    logits, labels = cohort(80, seed=2)
    scores = ranking_scores(logits, scale=1.0)
    np.testing.assert_allclose(
        auc_interval(np.stack([-scores, scores], axis=1), labels),
        auc_interval(scores, labels),
        atol=1e-12,
    )


def test_the_interval_holds_the_true_auc_about_95_times_in_a_hundred() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], [80, 20])
    shift = 1.1902  # of two unit normals with AUC .8
    hits = 0
    for _ in range(1000):
        interval = auc_interval(random.normal(size=100) + shift * labels, labels)
        hits += interval.low <= 0.8 <= interval.high
    assert 930 <= hits <= 985


def test_shuffled_labels_have_an_auc_of_one_half_within_the_interval() -> None:
    logits, labels = cohort(150, seed=11, signal=2.0)
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        interval = auc_interval(ranking_scores(logits, scale=15.0), random.permutation(labels))
        hits += interval.low <= 0.5 <= interval.high
    assert 274 <= hits <= 299


@pytest.mark.parametrize(
    ("auc", "positives", "negatives", "error"),
    [(0.72, 4, 36, 0.151), (0.72, 10, 30, 0.101), (0.72, 20, 80, 0.069), (0.72, 50, 200, 0.044)],
)
def test_the_error_to_expect_has_its_published_values(
    auc: float, positives: int, negatives: int, error: float
) -> None:
    assert hanley_mcneil_error(auc, positives, negatives) == pytest.approx(error, abs=6e-4)


@pytest.mark.parametrize(("positives", "negatives"), [(1, 1), (1, 30), (4, 36), (50, 200)])
def test_perfect_separation_and_equal_scores_have_an_interval_of_some_width(
    positives: int, negatives: int
) -> None:
    labels = np.repeat([0, 1], [negatives, positives])
    perfect = auc_interval(labels.astype(float), labels)
    assert perfect.auc == perfect.high == 1
    assert 0.15 < perfect.low < 1 - 1 / (positives * negatives + 1)
    inverted = auc_interval(-labels.astype(float), labels)
    assert inverted.auc == inverted.low == 0
    assert inverted.high == pytest.approx(1 - perfect.low)
    constant = auc_interval(np.full(len(labels), 0.1), labels)
    assert constant.auc == 0.5
    assert constant.low < 0.46
    assert constant.high > 0.54


def test_perfect_separation_of_three_classes_is_as_uncertain_as_they_are_in_the_mean() -> None:
    labels = np.repeat([0, 1, 2], [30, 20, 4])
    ours = auc_interval(np.eye(3)[labels] + np.linspace(0, 0.1, 54)[:, None], labels)
    assert ours.auc == ours.high == 1
    alone = [auc_interval(labels == c, labels == c).low for c in range(3)]
    assert alone[2] < ours.low < min(alone[:2])


# Not a number


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [[3], slice(None)])
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_that_are_not_finite_never_become_a_number(
    bad: float, rows: Any, classes: int
) -> None:
    logits, labels = cohort(50, classes)
    logits[rows, 0] = bad
    ours = score_metrics(logits, labels, scale=15.0)
    assert ours.pop("nonfinite") == pytest.approx(0.02 if rows == [3] else 1.0)
    assert all(math.isnan(value) for value in ours.values())
    scores = ranking_scores(logits, scale=15.0)
    assert all(math.isnan(value) for value in auc_interval(scores, labels))


@pytest.mark.parametrize(("classes", "present"), [(2, [0]), (2, [1]), (3, [0, 2])])
def test_without_a_class_every_ranking_metric_is_nan_and_the_others_stay(
    classes: int, present: list[int]
) -> None:
    logits, _ = cohort(40, classes)
    labels = np.resize(present, 40)
    ours = score_metrics(logits, labels, scale=1.0)
    stay = ("accuracy", "brier", "ece", "tied", "logit_gap", "nonfinite")
    assert all(math.isfinite(ours[name]) for name in stay)
    assert all(math.isnan(value) for name, value in ours.items() if name not in stay)
    assert math.isnan(auc_interval(ranking_scores(logits, scale=1.0), labels).auc)


def test_no_samples_have_no_metrics() -> None:
    assert all(
        math.isnan(value) for value in score_metrics(np.zeros((0, 2)), [], scale=1.0).values()
    )


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), [0, 1, 2], "label 2: must be a whole number from 0 to 1"),
        (np.zeros((3, 2)), [0, 1, 0.5], "label 0.5"),
        (np.zeros((3, 2)), [0, -1, 1], "label -1"),
        (np.zeros((3, 2)), [0, 1], r"logits of shape \(3, 2\) with labels of shape \(2,\)"),
        (np.zeros((3, 1)), [0, 1, 0], "C >= 2"),
        (np.zeros(3), [0, 1, 0], "C >= 2"),
    ],
)
def test_input_that_does_not_fit_is_named(
    logits: np.ndarray, labels: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_metrics(logits, labels, scale=1.0)


# Saturation


@pytest.mark.parametrize("shift", [150.0, -150.0, 0.0])
def test_the_auc_from_probabilities_falls_where_logits_saturate_and_the_ranking_is_the_same(
    shift: float,
) -> None:
    logits, labels = cohort(200, seed=4, signal=1.0)
    healthy = score_metrics(logits, labels, scale=1.0)
    saturated_logits = logits * np.float32(20 if shift else 200)
    saturated_logits[:, 1] += np.float32(shift)
    saturated = score_metrics(saturated_logits, labels, scale=1.0)
    assert healthy["auc_probability"] == pytest.approx(healthy["auc"], abs=1e-3)
    assert saturated["auc"] == pytest.approx(healthy["auc"], abs=1e-4)
    assert saturated["logit_gap"] > 100
    if shift:  # all towards one class: nothing is left of the ranking
        assert saturated["auc_probability"] < 0.55
    else:  # both ways: the accuracy remains
        assert saturated["auc_probability"] == pytest.approx(
            saturated["balanced_accuracy"], abs=0.02
        )
        assert saturated["auc"] - saturated["auc_probability"] > 0.05


def test_a_healthy_cosine_head_raises_no_alarm() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], [80, 20])
    cosine = np.clip(0.3 * (2 * labels - 1) + 0.15 * random.normal(size=100), -0.4, 0.4)
    ours = score_metrics(np.stack([-cosine, cosine], axis=1).astype(np.float32), labels, scale=15.0)
    assert ours["logit_gap"] > 7
    assert ours["auc"] - ours["auc_probability"] < 0.002


def test_the_saturation_alarm_of_more_classes_falls_too() -> None:
    logits, labels = cohort(200, 3, seed=4)
    logits = logits * np.float32(20) + np.array([300, 0, 0], np.float32)
    ours = score_metrics(logits, labels, scale=1.0)
    assert ours["auc"] > 0.7
    assert ours["auc_probability"] < 0.55


def test_ranking_does_not_depend_on_the_scale_of_two_class_logits_however_large() -> None:
    logits, labels = cohort(100, seed=9)
    small = score_metrics(logits, labels, scale=1e-6)
    large = score_metrics(logits, labels, scale=1e30)
    for name in ("auc", "auc_low", "auc_high", "auprc", "balanced_accuracy_best", "tied"):
        assert small[name] == pytest.approx(large[name], abs=1e-12), name
    assert large["threshold"] == pytest.approx(small["threshold"] * 1e36)
    assert math.isfinite(large["brier"])


@pytest.mark.parametrize("scale", [15.0, 13.371, 1e-3])
def test_equal_logit_differences_are_ties_at_any_scale(scale: float) -> None:
    logits = np.random.default_rng(0).integers(-40, 40, (200, 2)).astype(np.float32) / 8
    tied = np.unique(logits[:, 1] - logits[:, 0])
    assert len(np.unique(ranking_scores(logits, scale=scale))) == len(tied)


# Input


def test_tensors_of_any_type_arrays_and_lists_give_the_same_metrics() -> None:
    values, labels = cohort(60, decimals=1)
    logits = torch.from_numpy(values).bfloat16()
    expected = score_metrics(logits.float().numpy(), labels, scale=2.0)
    for variant in (logits, logits.double().requires_grad_(), logits.tolist()):
        ours = score_metrics(variant, torch.from_numpy(labels), scale=2.0)
        np.testing.assert_equal(ours, expected)


def test_metrics_load_no_torch() -> None:
    code = (
        "import sys, trainables.metrics; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
