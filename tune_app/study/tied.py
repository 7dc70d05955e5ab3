"""Which runs of a search nearly tie with its best: together they are a better answer than the best alone.

Chosen on recorded scores of 140 runs (`medtune bench strategies`, "medtune tied runs together"; docs/results.md).
"""

import numpy as np
import numpy.typing as npt

TIED_AUC = 0.02
"""AUC below the best value. Wider margins gained more in space `documented` and lost in `wide`."""

TIED_RUNS = 5
"""Runs at most, the best among them."""


def nearly_tied(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the positions of the values (n,) that are within TIED_AUC of the best, best first; NaN is no value."""
    order = np.argsort(-values, kind="stable")
    known = order[np.isfinite(values[order])]
    if not len(known):
        return known
    near: npt.NDArray[np.int64] = known[values[known] >= values[known[0]] - TIED_AUC]
    return near[:TIED_RUNS]
