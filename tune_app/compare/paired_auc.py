"""Two variants on the same validation subjects: the difference of their AUCs, with an interval over subjects.

Runs with several seeds on one split share their validation subjects, and a t-test with seeds as its units takes the luck of
these subjects for a property of the variants: under a simulated null it names a winner in 26 to 74 % of the cases. Here
the subjects are the units, and the seeds add their own spread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainables.metrics import AucInterval, auc_interval, placements


@dataclass(frozen=True, eq=False)
class PairedSplit:
    """Scores of two variants on the validation volumes of one split, run by run: runs at the same place share a seed."""

    labels: np.ndarray
    """(N,) int64."""
    subjects: np.ndarray
    """(N,): whose volumes they are."""
    ours: Sequence[np.ndarray]
    """Log-odds of each run, (N,) for two classes, else (N, C), as `trainables.metrics.ranking_scores`."""
    theirs: Sequence[np.ndarray]


class Difference(NamedTuple):
    """Mean difference of AUC, ours - theirs, and its 95 % interval; NaN where there is none."""

    mean: float
    low: float
    high: float


class _Part(NamedTuple):
    """A part of a variance, and the degrees of freedom that its estimate has."""

    variance: float
    freedom: int


def paired_difference(splits: Sequence[PairedSplit]) -> Difference:
    """Return the difference of AUC, averaged over splits and over the seeds of each, with its 95 % interval.

    The variance is DeLong's of the paired difference with a subject's volumes kept together (DeLong et al. 1988; Obuchowski
    1997), plus that of the mean over seeds; the interval is Student's t with Satterthwaite's degrees of freedom, since few
    positives estimate their variance badly. Another training sample is in none of it. NaN ends where a class has fewer than
    two subjects, where there is one seed, which does not show what another would change, and where nothing varies and the
    difference is not zero.
    """
    from scipy.stats import t

    means, parts = [], []
    for split in splits:
        difference, of_split = _split_difference(split)
        means.append(difference)
        parts += of_split
    if not means:
        return Difference(math.nan, math.nan, math.nan)
    mean = float(np.mean(means))
    parts = [_Part(one.variance / len(means) ** 2, one.freedom) for one in parts]
    if any(one.freedom < 1 for one in parts):
        return Difference(mean, math.nan, math.nan)
    variance = sum(one.variance for one in parts)
    if variance < 1e-24:
        same = abs(mean) < 1e-12
        return Difference(0.0, 0.0, 0.0) if same else Difference(mean, math.nan, math.nan)
    freedom = variance**2 / sum(one.variance**2 / one.freedom for one in parts)
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Difference(mean, mean - half, mean + half)


def subject_interval(scores: np.ndarray, labels: np.ndarray, subjects: np.ndarray) -> AucInterval:
    """Return the AUC of `scores` and its 95 % interval over subjects, whose volumes stay together.

    Scores and labels as in `trainables.metrics.auc_interval`, whose interval this is where every subject has one volume:
    otherwise DeLong's variance over subjects (Obuchowski 1997) on the logit scale, with Student's t by the subjects of the
    rarest class. Where that variance is zero or unknown, the interval takes the volumes as independent.
    """
    plain = auc_interval(scores, labels)
    if len(np.unique(subjects)) == len(labels) or not 0 < plain.auc < 1:
        return plain
    from scipy.stats import t

    parts = _over_subjects(placements(scores, labels), labels, subjects)
    variance = sum(one.variance for one in parts)
    if any(one.freedom < 1 for one in parts) or variance < 1e-24:
        return plain
    freedom = variance**2 / sum(one.variance**2 / one.freedom for one in parts)
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance) / (plain.auc * (1 - plain.auc))
    centre = math.log(plain.auc / (1 - plain.auc))
    low, high = ((1 + math.tanh(end / 2)) / 2 for end in (centre - half, centre + half))
    return AucInterval(plain.auc, low, high)


def _split_difference(split: PairedSplit) -> tuple[float, list[_Part]]:
    by_seed = np.array(
        [
            placements(one, split.labels) - placements(other, split.labels)
            for one, other in zip(split.ours, split.theirs, strict=True)
        ]
    )
    differences = [
        auc_interval(one, split.labels).auc - auc_interval(other, split.labels).auc
        for one, other in zip(split.ours, split.theirs, strict=True)
    ]
    parts = _over_subjects(by_seed.mean(axis=0), split.labels, split.subjects)
    count = len(differences)
    spread = float(np.var(differences, ddof=1)) / count if count > 1 else math.nan
    parts.append(_Part(spread, count - 1))
    return float(np.mean(differences)), parts


def _over_subjects(values: np.ndarray, labels: np.ndarray, subjects: np.ndarray) -> list[_Part]:
    """Variance of the sum of `values`, class by class; what a subject with volumes of two classes adds goes to the rarer."""
    _, codes = np.unique(subjects, return_inverse=True)
    sums = []
    for label in np.unique(labels):
        among = labels == label
        centred = values[among] - values[among].mean()
        sums.append((np.bincount(codes[among], centred, codes.max() + 1), np.unique(codes[among])))
    sums.sort(key=lambda one: len(one[1]))
    parts = []
    for place, (own, present) in enumerate(sums):
        count = len(present)
        if count < 2:
            return [_Part(math.nan, 0)]
        variance = count / (count - 1) * float((own**2).sum())
        variance += 2 * sum(float((own * other).sum()) for other, _ in sums[place + 1 :])
        parts.append(_Part(max(0.0, variance), count - 1))
    return parts
