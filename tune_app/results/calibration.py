"""Scores of a network -> probabilities that can be believed: fitted on validation scores, applied in prediction.

Why Platt's method and not a temperature: margins and deferred class weights train the network for another class
balance than the cohort's, which shifts all its log-odds by a constant. A temperature can stretch log-odds but not
shift them. Platt's fit has both, and its softened targets keep it finite where classes separate perfectly, as they
often do among a handful of positives.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

Array = npt.NDArray[Any]

CROSS_FITS = 10
"""Parts into which subjects are cut to judge a fit on volumes it has not seen."""


class Calibration(BaseModel):
    """Scaled logits z -> probabilities softmax(slope * z + offsets); the order of volumes within a class pair stays."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    slope: float = Field(ge=0)
    """Stretches the scaled logits: below 1 the network was over-confident. 0: it ranks no better than chance."""
    offsets: tuple[float, ...] = Field(min_length=2)
    """One a class, the first 0: how much likelier the cohort makes a class than the network believes."""

    def logits(self, z_NC: Array) -> Array:
        """Return the calibrated logits (N, C): their softmax is the calibrated probability."""
        return np.asarray(self.slope * z_NC + np.asarray(self.offsets))

    def probabilities(self, z_NC: Array) -> Array:
        """Return the calibrated probabilities (N, C) of scaled logits (N, C)."""
        return np.asarray(softmax(self.logits(z_NC), axis=1))


def no_calibration(classes: int) -> Calibration:
    """Return the calibration that leaves scaled logits as they are."""
    return Calibration(slope=1.0, offsets=(0.0,) * classes)


def fit_calibration(z_NC: Array, labels_N: Array) -> Calibration:
    """Return the calibration with the least cross-entropy on scaled logits (N, C), finite, with labels 0 .. C - 1.

    The target of a volume of class c is not 1 but (n_c + 1) / (n_c + C), and 1 / (n_c + C) for each other class: the
    posterior mean under a uniform prior, from n_c volumes. The slope is kept at or above 0: scores that rank against
    their labels are not turned round, they count as knowing nothing.

    Two classes: Platt 1999, Probabilistic Outputs for Support Vector Machines, on the log-odds z_1 - z_0, targets as
    there. More: the same with one offset a class (Alexandari, Kundaje and Shrikumar 2020, bias-corrected temperature).
    """
    z, labels = np.asarray(z_NC, dtype=np.float64), np.asarray(labels_N)
    count, classes = z.shape
    counts = np.bincount(labels, minlength=classes)
    targets = np.ones((count, classes))
    targets[np.arange(count), labels] += counts[labels]
    targets /= (counts[labels] + classes)[:, None]
    z = z - z.mean(axis=1, keepdims=True)
    # logits of a saturated network reach hundreds: the search wants about 1
    spread = float(np.abs(z).max()) or 1.0
    z = z / spread

    def cross_entropy(parameters: Array) -> tuple[float, Array]:
        logits = parameters[0] * z + np.concatenate([[0.0], parameters[1:]])
        excess = softmax(logits, axis=1) - targets
        value = -(targets * log_softmax(logits, axis=1)).sum() / count
        gradient = np.concatenate([[(excess * z).sum()], excess.sum(axis=0)[1:]]) / count
        return float(value), gradient

    start = np.zeros(classes)
    bounds = [(0.0, None), *[(None, None)] * (classes - 1)]
    tight: Any = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 10_000}
    found = minimize(
        cross_entropy, start, jac=True, method="L-BFGS-B", bounds=bounds, options=tight
    ).x
    return Calibration(
        slope=float(found[0] / spread), offsets=(0.0, *(float(part) for part in found[1:]))
    )


def cross_fits(labels_N: Array, groups_N: Array) -> Iterator[tuple[Array, Array]]:
    """Yield (rows to fit on, rows to judge on) so that every row is judged once and no group is on both sides.

    Groups of the rarer classes are dealt out first, in turn, so that each part has its share of them. Always the same
    for the same rows. With a single group there is nothing to yield.
    """
    names, codes = np.unique(groups_N, return_inverse=True)
    order = np.random.default_rng(0).permutation(len(names))
    top = np.zeros(len(names), dtype=np.int64)
    rarity = np.argsort(
        np.argsort(-np.bincount(labels_N), kind="stable")
    )  # 0: the most frequent class
    np.maximum.at(top, codes, rarity[labels_N])
    dealt = order[np.argsort(-top[order], kind="stable")]
    parts = min(CROSS_FITS, len(names))
    if parts < 2:
        return
    part_of = np.empty(len(names), dtype=np.int64)
    part_of[dealt] = np.arange(len(names)) % parts
    for part in range(parts):
        judged = part_of[codes] == part
        yield np.flatnonzero(~judged), np.flatnonzero(judged)
