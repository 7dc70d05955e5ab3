"""AUCs of volumes that are not independent: several of one subject, or two models on the same ones.

The subjects are the units of every variance here (Obuchowski 1997): 199 nodules of 113 patients hold less information than
199 patients do. Few subjects of a class estimate that variance badly, so the intervals of differences are Student's t with
Satterthwaite's degrees of freedom instead of the normal one's. Coverage of the nominal 95 % of a paired difference in
simulation (two normal scores with correlation .6, 60 negatives, 800 draws), normal and t:

    positives                 2            3            5            8            20
    AUC .5 against .5     .794  .886   .880  .935   .917  .954   .939  .966   .946  .954
    AUC .7 against .6     .764  .874   .860  .938   .911  .948   .927  .939   .940  .946
    AUC .9 against .8     .733  .816   .774  .843   .879  .921   .911  .934   .946  .948
    AUC .98 against .88   .632  .705   .720  .780   .795  .819   .870  .889   .912  .922

`auc_interval` of `trainables.metrics` has the numbers for one AUC.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from trainables.metrics import AucInterval, auc_interval, placements, ranking_scores, score_metrics

if TYPE_CHECKING:
    from trainables.metrics import Array


SMALLEST_VARIANCE = 1e-24
"""Of a difference of AUCs: below it lies rounding."""


class Part(NamedTuple):
    """A part of a variance, and the degrees of freedom that its estimate has."""

    variance: float
    freedom: int


@dataclass(frozen=True)
class AucDifference:
    """Two AUCs on the same samples: difference a - b, its 95 % interval, and the two-sided p of no difference."""

    auc_a: float
    auc_b: float
    difference: float
    low: float
    high: float
    p: float


def compare_auc(
    scores_a: "Array", scores_b: "Array", labels_N: "Array", subjects_N: np.ndarray | None = None
) -> AucDifference:
    """Return the difference of two AUCs on the same samples, with the interval and the test of its paired variance.

    Scores as in `trainables.metrics.auc_interval`, row by row of the same samples; `subjects_N` names their subjects, None
    means that every sample is a subject. All is NaN if a score is not finite or a class has no sample; interval and p are
    NaN if the data cannot decide: a class of one subject, or different AUCs without variance. Equal scores have p = 1.
    Raises ValueError for shapes or labels that do not fit.
    Source: DeLong, DeLong and Clarke-Pearson 1988; over subjects Obuchowski 1997.
    """
    from scipy.stats import t

    shapes = np.shape(scores_a), np.shape(scores_b)
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"scores of shape {shapes[0]} against {shapes[1]}: both must be of the same samples and classes"
        )
    auc_a, auc_b = auc_interval(scores_a, labels_N).auc, auc_interval(scores_b, labels_N).auc
    difference = auc_a - auc_b
    if not math.isfinite(difference):
        return AucDifference(*[math.nan] * 6)
    labels = np.asarray(labels_N).astype(np.int64)
    subjects = np.arange(len(labels)) if subjects_N is None else np.asarray(subjects_N)
    parts = over_subjects(
        placements(scores_a, labels_N) - placements(scores_b, labels_N), labels, subjects
    )
    variance, freedom = combined(parts)
    if not math.isfinite(variance) or variance < SMALLEST_VARIANCE:
        same = variance < SMALLEST_VARIANCE and abs(difference) < 1e-12
        ends = (difference, difference, 1.0) if same else [math.nan] * 3
        return AucDifference(auc_a, auc_b, difference, *ends)
    error = math.sqrt(variance)
    half = float(t.ppf(0.975, freedom)) * error
    p = 2 * float(t.sf(abs(difference) / error, freedom))
    return AucDifference(auc_a, auc_b, difference, difference - half, difference + half, p)


def subject_interval(scores: np.ndarray, labels: np.ndarray, subjects: np.ndarray) -> AucInterval:
    """Return the AUC of `scores` and its 95 % interval over subjects, whose volumes stay together.

    Scores and labels as in `trainables.metrics.auc_interval`, whose interval this is where every subject has one volume:
    otherwise DeLong's variance over subjects (Obuchowski 1997) on the logit scale, with Student's t by the subjects of the
    rarest class. Where that variance is zero or unknown, the interval takes the volumes as independent.
    """
    plain = auc_interval(scores, labels)
    if not have_several(subjects) or not 0 < plain.auc < 1:
        return plain
    from scipy.stats import t

    variance, freedom = combined(over_subjects(placements(scores, labels), labels, subjects))
    if not math.isfinite(variance) or variance < SMALLEST_VARIANCE:
        return plain
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance) / (plain.auc * (1 - plain.auc))
    centre = math.log(plain.auc / (1 - plain.auc))
    low, high = ((1 + math.tanh(end / 2)) / 2 for end in (centre - half, centre + half))
    return AucInterval(plain.auc, low, high)


def score_metrics_over_subjects(
    logits_NC: "Array", labels_N: "Array", subjects_N: np.ndarray, *, scale: float
) -> dict[str, float]:
    """Return `trainables.metrics.score_metrics` with the AUC's interval over subjects, whose volumes stay together."""
    metrics = score_metrics(logits_NC, labels_N, scale=scale)
    if math.isfinite(metrics["auc"]) and have_several(np.asarray(subjects_N)):
        scores = ranking_scores(logits_NC, scale=scale)
        labels = np.asarray(labels_N).astype(np.int64)
        found = subject_interval(scores, labels, np.asarray(subjects_N))
        metrics |= {"auc_low": found.low, "auc_high": found.high}
    return metrics


def have_several(subjects_N: np.ndarray) -> bool:
    """Return whether any subject has several of these volumes."""
    return len(np.unique(subjects_N)) < len(subjects_N)


def subjects_of_classes(labels_N: np.ndarray, subjects_N: np.ndarray, classes: int) -> list[int]:
    """Return how many subjects have a volume of each class, 0 to `classes` - 1."""
    return [len(np.unique(subjects_N[labels_N == label])) for label in range(classes)]


def combined(parts: Sequence[Part]) -> tuple[float, float]:
    """Return the sum of parts of a variance and Satterthwaite's degrees of freedom of it; NaN where a part is unknown.

    Source: Satterthwaite 1946, An approximate distribution of estimates of variance components.
    """
    variance = sum(one.variance for one in parts)
    if not parts or any(one.freedom < 1 for one in parts):
        return math.nan, math.nan
    if variance < SMALLEST_VARIANCE:
        return variance, math.nan
    return variance, variance**2 / sum(one.variance**2 / one.freedom for one in parts)


def over_subjects(values: np.ndarray, labels: np.ndarray, subjects: np.ndarray) -> list[Part]:
    """Variance of the sum of `values`, class by class; the covariance of subjects in two classes goes to the rarer."""
    _, codes = np.unique(subjects, return_inverse=True)
    sums = []
    for label in np.unique(labels):
        among = labels == label
        centred = values[among] - values[among].mean()
        sums.append((np.bincount(codes[among], centred, codes.max() + 1), np.unique(codes[among])))
    sums.sort(key=lambda one: len(one[1]))
    parts: list[Part] = []
    for place, (own, present) in enumerate(sums):
        count = len(present)
        if count < 2:
            return [Part(math.nan, 0)]
        variance = count / (count - 1) * float((own**2).sum())
        variance += 2 * sum(float((own * other).sum()) for other, _ in sums[place + 1 :])
        parts.append(Part(max(0.0, variance), count - 1))
    return parts
