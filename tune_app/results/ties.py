"""Trials from best to worst, and which of several with the same value leads."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from trainables.diagnosis import WITHOUT_FAULT
from tune_app.results.importance import Axis

NEIGHBOURS = 5
"""Trials nearest in their settings, whose median decides between equal ones."""


def ranking(trials: pd.DataFrame, column: str, axes: Iterable[Axis], *, smaller: bool) -> list[int]:
    """Return the positions of the rows from best to worst value of `column`; rows without a value come last.

    Rows with exactly the same value are a tie, frequent where AUC is 1 or few volumes validate. In a tie a trial without
    a fault in its diagnosis is ahead; among these the one whose NEIGHBOURS nearest trials in the searched settings have
    the better median, because a good value among poor neighbours is more likely luck; then the earlier row. `axes`, those of the
    searched settings, are asked for in a tie only.
    """
    values = trials[column].to_numpy("float64", na_value=np.nan)
    worth = np.nan_to_num(-values if smaller else values, nan=-math.inf)
    sound = trials["verdict"].isin(WITHOUT_FAULT).to_numpy(dtype=bool)
    medians = np.zeros(len(trials))
    finite = np.flatnonzero(np.isfinite(values))
    equal, counts = np.unique(values[finite], return_counts=True)
    tied = finite[np.isin(values[finite], equal[counts > 1])]
    if len(tied) and len(finite) >= 3 and (axes := list(axes)):
        around = _medians_around(
            trials.iloc[finite], values[finite], axes, np.searchsorted(finite, tied)
        )
        medians[tied] = [-median if smaller else median for median in around]
    return sorted(range(len(trials)), key=lambda at: (-worth[at], not sound[at], -medians[at], at))


def _medians_around(
    trials: pd.DataFrame, values: np.ndarray, axes: Sequence[Axis], tied: np.ndarray
) -> list[float]:
    shares = np.stack(
        [[axis.share(place) for place in axis.places(trials)] for axis in axes], axis=1
    )
    found = []
    for at in tied:
        apart = np.abs(shares - shares[at])
        apart[np.isnan(apart)] = 1.0  # one of the two does not read the hyperparameter
        both = np.isnan(shares) & np.isnan(shares[at])
        apart[both] = 0.0
        away = np.square(apart).sum(axis=1)
        away[at] = math.inf
        nearest = np.argsort(away, kind="stable")[: min(NEIGHBOURS, len(trials) - 1)]
        found.append(float(np.median(values[nearest])))
    return found
