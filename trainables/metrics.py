"""Scores and labels -> AUC with its interval, AUPRC, accuracies, calibration, and the signs of saturation.

Two rules stand behind all of it. The ranking is taken from logits, never from probabilities: a softmax of large logits
rounds to 0 and 1, and AUC falls to one half while the network ranks as well as before. And a score that is not finite
never becomes a number: NaN ranks happily in most libraries, and a run that died then reads .53.

The AUC interval is a score interval: it holds the AUCs t with |auc - t| <= z * sqrt(c * V(t)), V being the variance that
Hanley and McNeil expect at t with these class counts, and c how many times that the data's own variance (DeLong's) is. Few
samples give little information about c, and perfect separation none: it is drawn towards PRIOR_FACTOR, which counts as much
as PRIOR_SAMPLES of the samples of the rarer class that rank between samples of the other class. So few positives have the
interval of their counts, and many DeLong's. DeLong's own (Wald) interval holds the truth in 77 % of the draws with 2
positives at an AUC of .5, in 86 % with 3.

Coverage of the nominal 95 % in simulation, lowest of true AUC .5, .6, .7, .8, .9, .95, .98 and 10, 40, 200 negatives (3,000
draws of each, standard error .004; positives and negatives change places without a difference):

    positives                    1     2     3     5     10    20
    normal scores                .964  .965  .953  .941  .939  .937
    logistic                     .962  .958  .951  .947  .940  .943
    exponential                  .929  .933  .932  .931  .939  .941
    exponential, mirrored        .989  .967  .951  .943  .933  .947
    normal, positives 1.5 x wide .933  .895  .895  .909  .925  .934
    normal, positives 2 x wide   .894  .819  .846  .894  .922  .923

Inputs may be numpy arrays, torch tensors on any device, or lists; this module itself needs numpy only.
"""

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor | list

SCORE_METRICS = (
    "auc",
    "auc_low",
    "auc_high",
    "auprc",
    "accuracy",
    "balanced_accuracy",
    "balanced_accuracy_best",
    "threshold",
    "sensitivity_at_90_specificity",
    "brier",
    "ece",
    "tied",
    "auc_probability",
    "logit_gap",
    "nonfinite",
)
"""Keys of what `score_metrics` returns, in order."""

ECE_BINS = 15


class AucInterval(NamedTuple):
    """An AUC and the ends of its interval; all NaN where there is none."""

    auc: float
    low: float
    high: float


def score_metrics(logits_NC: "Array", labels_N: "Array", *, scale: float) -> dict[str, float]:
    """Return all metrics of one network on one set of samples, keyed as `SCORE_METRICS`; undefined ones are NaN.

    Logits are (N, C), unscaled; softmax(scale * logits) is the predicted probability; labels are 0 .. C - 1.

    auc, auc_low, auc_high: area under the ROC curve with its 95 % interval. Two classes: class 1 is positive and the
        score is the difference of the logits. More: mean over classes of one against the rest, score as `ranking_scores`.
    auprc: average precision; mean over classes when more than two.
    accuracy, balanced_accuracy: of the class with the largest logit (two classes: threshold 0 on the log-odds).
    balanced_accuracy_best, threshold: the best attainable, and the log-odds scale * (z_1 - z_0) at or above which a
        sample is then positive: half-way between two scores, and of equally good ones the nearest to 0. Chosen on these
        very samples: optimistic. More classes: mean over classes of the best one-against-rest, and no threshold.
    sensitivity_at_90_specificity: largest sensitivity with at least 90 % specificity, no interpolation; mean over classes.
    brier: mean squared error of the probabilities, from 0 to 1 (more classes: half the sum over classes).
    ece: expected calibration error of the predicted class's probability in 15 equal bins (Guo et al. 2017).
    tied: share of samples whose score another sample has too; mean over classes.
    auc_probability: AUC as it would be from float32 probabilities, the saturation alarm: far below `auc` means the
        ranking is sound and the probabilities are not. The score is p_1 - p_0, which rounds at both ends, since p_1
        alone would not show logits saturated towards class 0. It begins to suffer at gaps of about 15. Half precision
        would at 8, which a healthy run with s = 15 reaches.
    logit_gap: mean of largest minus second largest logit, times scale: |log-odds| for two classes.
    nonfinite: share of samples with a logit that is NaN or infinite. If there is any, all else is NaN.

    If a class has no sample, what needs one of each is NaN; accuracy, brier, ece, tied and logit_gap stay.
    Raises ValueError for shapes or labels that do not fit.
    """
    z_NC, labels = _float64(logits_NC), _float64(labels_N)
    if z_NC.ndim != 2 or z_NC.shape[1] < 2 or labels.shape != z_NC.shape[:1]:
        raise ValueError(
            f"logits of shape {z_NC.shape} with labels of shape {labels.shape}: must be (N, C) with C >= 2, and (N,)"
        )
    num_classes = z_NC.shape[1]
    labels = _checked_labels(labels, num_classes)
    metrics = dict.fromkeys(SCORE_METRICS, math.nan)
    if not len(labels):
        return metrics
    metrics["nonfinite"] = 1 - float(np.isfinite(scale * z_NC).all(axis=1).mean())
    if metrics["nonfinite"] > 0:
        return metrics

    predicted = z_NC.argmax(axis=1)
    top_two = np.partition(z_NC, num_classes - 2, axis=1)[:, -2:]
    p_NC = _softmax(scale * z_NC)
    metrics["accuracy"] = float((predicted == labels).mean())
    metrics["logit_gap"] = float(scale * (top_two[:, 1] - top_two[:, 0]).mean())
    metrics["brier"] = float(((p_NC - np.eye(num_classes)[labels]) ** 2).sum(axis=1).mean() / 2)
    metrics["ece"] = _calibration_error(p_NC.max(axis=1), predicted == labels)

    scores = ranking_scores(z_NC, scale=scale)
    curves = [_Curve(column, labels == c) for c, column in _one_against_rest(scores)]
    metrics["tied"] = _mean(curve.tied for curve in curves)
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        return metrics
    metrics["auc"], metrics["auc_low"], metrics["auc_high"] = _interval(curves, labels, 0.95)
    metrics["auprc"] = _mean(curve.average_precision() for curve in curves)
    metrics["balanced_accuracy"] = float(
        (np.bincount(labels[predicted == labels], minlength=num_classes) / counts).mean()
    )
    best = [curve.best_threshold() for curve in curves]
    metrics["balanced_accuracy_best"] = _mean(value for value, _ in best)
    metrics["threshold"] = best[0][1] if num_classes == 2 else math.nan
    metrics["sensitivity_at_90_specificity"] = _mean(
        curve.sensitivity_at_90_specificity() for curve in curves
    )
    p32_NC = _softmax((scale * (z_NC - z_NC.max(axis=1, keepdims=True))).astype(np.float32))
    margins = (
        p32_NC[:, 1] - p32_NC[:, 0]
        if num_classes == 2
        else p32_NC - (p32_NC.sum(axis=1, keepdims=True) - p32_NC)
    )
    metrics["auc_probability"] = _mean(
        _Curve(s, labels == c).auc() for c, s in _one_against_rest(margins)
    )
    return metrics


def ranking_scores(logits_NC: "Array", *, scale: float) -> np.ndarray:
    """Return the scores by which samples are ranked, float64: the log-odds of each class that is ranked.

    Two classes: shape (N,), scale * (z_1 - z_0). More: shape (N, C), z_c minus logsumexp of the other scaled logits,
    which orders as the probability of class c does but does not round to 0 or 1.
    """
    z_NC = _float64(logits_NC)
    # Infinite minus infinite is NaN, which every metric then is too
    with np.errstate(invalid="ignore"):
        if z_NC.shape[1] == 2:
            return scale * (z_NC[:, 1] - z_NC[:, 0])  # scaled last: equal differences stay equal
        z_NC = scale * z_NC
        return np.stack(
            [z - _logsumexp(np.delete(z_NC, c, axis=1)) for c, z in enumerate(z_NC.T)], axis=1
        )


def auc_interval(scores: "Array", labels_N: "Array", *, confidence: float = 0.95) -> AucInterval:
    """Return the AUC of `scores` and its interval (see the module's docstring).

    Scores are (N,) for two classes, the larger the more class 1, or (N, C) one against the rest as `ranking_scores`
    makes them: then the AUC is the mean over classes, and its variance accounts for the samples being the same.
    All NaN if a score is not finite or a class has no sample.
    Source: DeLong, DeLong and Clarke-Pearson 1988, computed in O(N log N) as Sun and Xu 2014; score interval with Hanley
    and McNeil's variance: Newcombe 2006, Confidence intervals for an effect size measure based on the Mann-Whitney
    statistic, part 2, method 5, with the counts themselves and the data's variance.
    """
    values = _float64(scores)
    num_classes = 2 if values.ndim == 1 else values.shape[1]
    labels = _checked_labels(_float64(labels_N), num_classes)
    if not _rankable(values, labels, num_classes):
        return AucInterval(math.nan, math.nan, math.nan)
    return _interval(
        [_Curve(s, labels == c) for c, s in _one_against_rest(values)], labels, confidence
    )


def placements(scores: "Array", labels_N: "Array") -> np.ndarray:
    """Return what each sample adds to the AUC of `auc_interval`, (N,): the sum over any one class is that AUC for two classes.

    DeLong's structural components over the class size: for a positive its share of negatives below it, for a negative its
    share of positives above it; averaged over classes where there are more than two. Scores must be finite, and every class
    needs a sample.
    """
    values = _float64(scores)
    num_classes = 2 if values.ndim == 1 else values.shape[1]
    labels = _checked_labels(_float64(labels_N), num_classes)
    return _placements([_Curve(s, labels == c) for c, s in _one_against_rest(values)])


def hanley_mcneil_error(auc: float, positives: int, negatives: int) -> float:
    """Return the standard error to expect of an AUC from its value and the class counts alone.

    Source: Hanley and McNeil 1982, The meaning and use of the area under a ROC curve, eq. 1.
    """
    return math.sqrt(_hanley_mcneil(auc, positives, negatives, *_shared_terms(auc)))


def _hanley_mcneil(auc: float, first: int, second: int, of_first: float, of_second: float) -> float:
    """Hanley and McNeil's variance: two classes of these sizes, and what pairs that share one of either add."""
    spread = auc * (1 - auc) + (first - 1) * of_first + (second - 1) * of_second
    return max(spread, 0.0) / (first * second)


def _shared_terms(auc: float) -> tuple[float, float]:
    """Covariance of two pairs with the same negative, and with the same positive, for exponential scores."""
    return auc / (2 - auc) - auc * auc, 2 * auc * auc / (1 + auc) - auc * auc


PRIOR_FACTOR, PRIOR_SAMPLES = 1.2, 5
"""Chosen by simulation, see the module's docstring: without the factor, exponential scores are covered to 91 %."""

SMALLEST_ERROR = 1e-12
"""A standard error below this is rounding: one half-discordant pair among 100,000 samples makes 1e-10."""


class _Curve:
    """The ROC curve of one class against the rest: counts of positives and negatives at each distinct score, ascending.
    All rank statistics follow from these counts exactly, ties included, after one sort."""

    def __init__(self, scores: np.ndarray, positive: np.ndarray) -> None:
        self.values, self.group = np.unique(scores, return_inverse=True)
        self.positive = positive
        self.pos = np.bincount(self.group[positive], minlength=len(self.values))
        self.neg = np.bincount(self.group[~positive], minlength=len(self.values))
        self.num_pos, self.num_neg = int(self.pos.sum()), int(self.neg.sum())
        # a sample at or above the g-th distinct score is called positive
        self.tp = self.pos[::-1].cumsum()[::-1]
        self.fp = self.neg[::-1].cumsum()[::-1]

    @property
    def tied(self) -> float:
        sizes = self.pos + self.neg
        return float(sizes[sizes > 1].sum() / sizes.sum())

    def auc(self) -> float:
        # Integers: exact at 0, 1/2 and 1
        twice = int((self.pos * (2 * (self.num_neg - self.fp) + self.neg)).sum())
        return twice / (2 * self.num_pos * self.num_neg)

    def placements(self) -> np.ndarray:
        """(N,): for a positive its share of negatives below it, over the number of positives; for a negative its share of
        positives above it, over the number of negatives. DeLong's structural components, divided by the class size."""
        above_neg = (self.num_neg - self.fp + self.neg / 2) / (self.num_neg * self.num_pos)
        below_pos = (self.tp - self.pos / 2) / (self.num_neg * self.num_pos)
        return np.where(self.positive, above_neg[self.group], below_pos[self.group])

    def between(self) -> int:
        """Samples that rank between samples of the other class, counted in the class that has fewer of them."""
        below_pos, above_neg = self.tp - self.pos / 2, self.num_neg - self.fp + self.neg / 2
        positives = self.pos[(above_neg > 0) & (above_neg < self.num_neg)].sum()
        negatives = self.neg[(below_pos > 0) & (below_pos < self.num_pos)].sum()
        return int(min(positives, negatives))

    def average_precision(self) -> float:
        return float((self.pos / self.num_pos * self.tp / (self.tp + self.fp)).sum())

    def best_threshold(self) -> tuple[float, float]:
        """Best balanced accuracy over all thresholds, and the threshold."""
        youden = self.tp * self.num_neg - self.fp * self.num_pos
        # Group 0 calls all positive: never worse than calling none
        candidates = np.flatnonzero(youden == youden.max())
        upper = self.values[candidates]
        lower = self.values[np.maximum(candidates - 1, 0)]
        middle = lower + (upper - lower) / 2
        # Between neighbouring floats there is no middle
        thresholds = np.where(middle > lower, middle, upper)
        best = int(np.abs(thresholds).argmin())
        value = (1 + youden[candidates[best]] / (self.num_pos * self.num_neg)) / 2
        return float(value), float(thresholds[best])

    def sensitivity_at_90_specificity(self) -> float:
        allowed = 10 * self.fp <= self.num_neg
        return float(self.tp[allowed].max(initial=0) / self.num_pos)


def _one_against_rest(scores: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The classes that are ranked, each with its scores: class 1 alone where there are two."""
    return [(1, scores)] if scores.ndim == 1 else list(enumerate(scores.T))


def _placements(curves: list[_Curve]) -> np.ndarray:
    return np.stack([curve.placements() for curve in curves]).mean(axis=0)


def _variance(placements: np.ndarray, labels: np.ndarray) -> float:
    """DeLong's variance, class by class. With two classes it is the published formula; with more, a sample is a positive
    of one class and a negative of the others at once, and the sum over its roles carries their covariance."""
    counts = np.bincount(labels)
    if counts.min() < 2:
        return math.nan
    means = np.bincount(labels, weights=placements) / counts
    squares = np.bincount(labels, weights=(placements - means[labels]) ** 2)
    return float((counts * squares / (counts - 1)).sum())


def _interval(curves: list[_Curve], labels: np.ndarray, confidence: float) -> AucInterval:
    auc = _mean(curve.auc() for curve in curves)
    counts = [(curve.num_pos, curve.num_neg) for curve in curves]
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(
        _variance_factor(auc, curves, counts, labels)
    )
    low, high = (_reconciled(auc, end, reach, counts) for end in (0.0, 1.0))
    return AucInterval(auc, low, high)


def _variance_factor(
    auc: float, curves: list[_Curve], counts: list[tuple[int, int]], labels: np.ndarray
) -> float:
    """How many times the variance expected from the counts the data's own is, drawn towards PRIOR_FACTOR."""
    expected = _expected_variance(auc, counts)
    found = _variance(_placements(curves), labels)
    if not expected or not found > SMALLEST_ERROR**2:
        return PRIOR_FACTOR
    telling = max(0, min(curve.between() for curve in curves) - 1)
    return (PRIOR_SAMPLES * PRIOR_FACTOR + telling * found / expected) / (PRIOR_SAMPLES + telling)


def _expected_variance(auc: float, counts: list[tuple[int, int]]) -> float:
    """Hanley and McNeil's variance of the mean AUC of several classes against their rest, taken to err together.

    Their formula favours few positives above one half and few negatives below: here the rarer class has the larger of the
    two terms, so that classes, and rankings, may change places.
    """
    terms = sorted(_shared_terms(auc))
    errors = (math.sqrt(_hanley_mcneil(auc, *sorted(pair), *terms)) for pair in counts)
    return _mean(errors) ** 2


def _reconciled(auc: float, end: float, reach: float, counts: list[tuple[int, int]]) -> float:
    """The AUC between `auc` and `end` that is `reach` times its expected error away from `auc`, by bisection."""
    near, far = auc, end
    for _ in range(50):
        middle = (near + far) / 2
        if abs(middle - auc) < reach * math.sqrt(_expected_variance(middle, counts)):
            near = middle
        else:
            far = middle
    return near


def _calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    bins = np.clip(np.ceil(confidence * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    return float(
        np.abs(np.bincount(bins, weights=confidence - correct, minlength=ECE_BINS)).sum()
        / len(bins)
    )


def _softmax(z_NC: np.ndarray) -> np.ndarray:
    exponentials = np.exp(z_NC - z_NC.max(axis=1, keepdims=True))
    normalised: np.ndarray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return normalised


def _logsumexp(z: np.ndarray) -> np.ndarray:
    top = z.max(axis=1, keepdims=True)
    total: np.ndarray = top[:, 0] + np.log(np.exp(z - top).sum(axis=1))
    return total


def _mean(values: Any) -> float:
    return math.fsum(collected := list(values)) / len(collected)


def _rankable(scores: np.ndarray, labels: np.ndarray, num_classes: int) -> bool:
    return bool(np.isfinite(scores).all()) and bool(
        np.bincount(labels, minlength=num_classes).all()
    )


def _checked_labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    bad = labels[~np.isin(labels, np.arange(num_classes))]
    if len(bad):
        raise ValueError(f"label {bad[0]:g}: must be a whole number from 0 to {num_classes - 1}")
    return labels.astype(np.int64)


def _float64(values: "Array") -> np.ndarray:
    # A torch tensor; bfloat16 has no numpy type, so it is widened first
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)
