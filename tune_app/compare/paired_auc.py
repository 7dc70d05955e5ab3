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

from trainables.metrics import auc_interval, placements
from trainables.subject_auc import SMALLEST_VARIANCE, Part, combined, over_subjects


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
    parts = [Part(one.variance / len(means) ** 2, one.freedom) for one in parts]
    variance, freedom = combined(parts)
    if not math.isfinite(variance) or variance < SMALLEST_VARIANCE:
        same = variance < SMALLEST_VARIANCE and abs(mean) < 1e-12
        return Difference(0.0, 0.0, 0.0) if same else Difference(mean, math.nan, math.nan)
    half = float(t.ppf(0.975, freedom)) * math.sqrt(variance)
    return Difference(mean, mean - half, mean + half)


def _split_difference(split: PairedSplit) -> tuple[float, list[Part]]:
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
    parts = over_subjects(by_seed.mean(axis=0), split.labels, split.subjects)
    count = len(differences)
    spread = float(np.var(differences, ddof=1)) / count if count > 1 else math.nan
    parts.append(Part(spread, count - 1))
    return float(np.mean(differences)), parts
