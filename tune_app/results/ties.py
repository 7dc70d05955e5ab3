"""Which of several trials with the same value leads."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from tune_app.results.importance import Axis

NEIGHBOURS = 5
"""Trials nearest in their settings, whose median decides between equal ones."""


def lead_of_ties(trials: pd.DataFrame, column: str, axes: Sequence[Axis], *, smaller: bool) -> int:
    """Return the position of the row with the best value of `column`, which no row may miss.

    Rows with exactly the same value are a tie, frequent where AUC is 1 or few volumes validate. A tie goes to a trial
    without a fault in its diagnosis; among these to the one whose NEIGHBOURS nearest trials in the searched settings have
    the best median, because a good value among poor neighbours is more likely luck; then to the first.
    """
    values = trials[column].to_numpy("float64")
    best = values.min() if smaller else values.max()
    tied = np.flatnonzero(values == best)
    sound = (trials["verdict"].iloc[tied] == "healthy").fillna(False).to_numpy(dtype=bool)
    if sound.any():
        tied = tied[sound]
    if len(tied) == 1 or not axes or len(trials) < 3:
        return int(tied[0])
    medians = _medians_around(trials, values, axes, tied)
    known = [-math.inf if math.isnan(each) else (-each if smaller else each) for each in medians]
    return int(tied[int(np.argmax(known))])


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
