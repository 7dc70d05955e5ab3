"""A search's model of configurations that have not been run: a Gaussian process with a prior learned elsewhere.

The process is defined on the logit of the validation AUC, where cohorts are comparable: between a poor and a
good learning rate there is a difference of .6 to .7 on two cohorts whose AUCs there differ by .14 and .04. So its scales
are constants, fitted by marginal likelihood on recorded curves, and three finished runs are enough
to use it. It is the sum of a level of the cohort, an effect of `backbone_lr` alone, and an effect of all
parameters together. Its mean is the effect of `backbone_lr` on other cohorts (`Prior`).

numpy only: the driver and the back-test of strategies both choose with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from optuna.distributions import CategoricalDistribution, IntDistribution

from search_spaces.space import Parameter, Space
from trainables.config import Scalar
from tune_app.study.prior import Floats, Prior

Indices = npt.NDArray[np.int64]

RATE = "backbone_lr"
"""The one parameter with an effect that carries over between cohorts."""

LOW_RATE, HIGH_RATE = 2e-5, 5e-4
"""One unit of the process' scale of rates lies between them."""

LEVEL_SD = 1.0
RATE_SD, RATE_LENGTH = 0.45, 0.3
JOINT_SD, JOINT_LENGTH = 0.25, 1 / 0.6
NOISE_SD = 0.14
"""Logits and units of the scaled parameters; medians over maximum-likelihood fits to four recorded tables."""

STOPPED_SD = 0.3
"""Logits; extra standard deviation of the value of a run stopped right at its start, compared with one that ended."""

RUNNING_SD = 0.05
"""Logits; deviation of the expected value that running trials count with, so that no two ask the same."""

LEVEL = 1.1
"""Logit of an AUC of .75: the expected value before anything has ended."""

CHOICE_SD = 0.7
"""Distance of two choices of a categorical parameter, divided by the square root of two."""

FIRST_EXPLORATION, EXPLORATION = 0.05, 0.5
"""Share of the posterior's standard deviation in each Thompson draw: before any trial has ended, and later. At first
the model knows the prior alone, whose whole range is smaller than that deviation."""

UNMODELLED = frozenset({3, 7})
"""Trials, by how many began before, that are drawn at random: so a prior that misleads is found out in time. On recorded
tables they cost nothing, and with a prior turned upside down they save a fifth to five sixths of its loss."""

MOST_OBSERVED = 256
"""Ended trials that the process is fitted to at most: its cost grows with their third power."""

CANDIDATES = 64
"""Random points among which the next trial is chosen; as many as the recorded tables had left, on which that was tested."""


@dataclass(frozen=True)
class Axis:
    """How a parameter becomes numbers of about unit range."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @classmethod
    def of(cls, parameter: Parameter) -> "Axis":
        """Return the axis of a parameter of a space."""
        distribution = parameter.distribution
        if isinstance(distribution, CategoricalDistribution):
            return cls(parameter.name, choices=parameter.choices)
        return cls(
            parameter.name,
            float(distribution.low),
            float(distribution.high),
            bool(distribution.log),
        )

    def scaled(self, values: Sequence[Any]) -> Floats:
        """Return (n, columns). A value that a sample lacks (None) is in the middle: nothing reads it."""
        if self.choices:
            return np.array(
                [[CHOICE_SD * (value == one) for one in self.choices] for value in values]
            )
        known = np.array([np.nan if value is None else float(value) for value in values])
        low, high = self.low, self.high
        if self.log:
            known, low, high = np.log(known), np.log(low), np.log(high)
        unit = (known - low) / (high - low) if high > low else np.zeros_like(known)
        return np.where(np.isnan(unit), 0.5, unit)[:, None]


def axes_of(space: Space) -> list[Axis]:
    """Return the axes of a space's parameters."""
    return [Axis.of(parameter) for parameter in space.parameters.values()]


def draw(parameter: Parameter, rng: np.random.Generator) -> Scalar:
    """Return a value of the parameter, uniform on the scale it is searched on."""
    distribution = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return parameter.choices[int(rng.integers(len(parameter.choices)))]
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        value = min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high)))))
        return round(value) if isinstance(distribution, IntDistribution) else float(value)
    if step:
        value = low + step * int(rng.integers(round((high - low) / step) + 1))
        return int(value) if isinstance(distribution, IntDistribution) else float(round(value, 12))
    return float(rng.uniform(low, high))


class Surrogate:
    """The process over a fixed list of points; everything is asked for by index into it.

    `samples` are the points, each a mapping from parameter to value, without those that nothing
    would read.
    """

    def __init__(
        self, axes: Sequence[Axis], samples: Sequence[Mapping[str, Any]], prior: Prior | None
    ) -> None:
        columns = {axis.name: axis.scaled([s.get(axis.name) for s in samples]) for axis in axes}
        self.prior_mean = np.zeros(len(samples))
        unit = np.log(HIGH_RATE / LOW_RATE)
        rates = np.zeros(len(samples))
        if RATE in columns:
            logs = np.log([float(sample[RATE]) for sample in samples])
            rates = (logs - np.log(LOW_RATE)) / unit
            if prior is not None:
                self.prior_mean = prior(logs)
            del columns[RATE]
        others = np.concatenate([np.zeros((len(samples), 1)), *columns.values()], axis=1)
        square = (rates[:, None] - rates[None, :]) ** 2
        apart = (others**2).sum(axis=1)
        distance = np.maximum(apart[:, None] + apart[None, :] - 2 * others @ others.T, 0.0)
        by_rate = np.exp(-square / (2 * RATE_LENGTH**2))
        self.covariance: Floats = (
            LEVEL_SD**2
            + RATE_SD**2 * by_rate
            + JOINT_SD**2 * by_rate * np.exp(-distance / (2 * JOINT_LENGTH**2))
        )

    def posterior(
        self, seen: Indices, values: Floats, noise: Floats, at: Indices
    ) -> tuple[Floats, Floats]:
        """Return mean (m,) and covariance (m, m) in logits at the points `at`.

        `values` (n,) are logits seen at the points `seen`, `noise` (n,) their variances.
        """
        mean, covariance = LEVEL + self.prior_mean[at], self.covariance[np.ix_(at, at)]
        if len(seen):
            between = self.covariance[np.ix_(at, seen)]
            known = self.covariance[np.ix_(seen, seen)] + np.diag(noise)
            residual = values - LEVEL - self.prior_mean[seen]
            solved = np.linalg.solve(known, np.column_stack([residual, between.T]))
            mean = mean + between @ solved[:, 0]
            covariance = covariance - between @ solved[:, 1:]
        return mean, covariance

    def choose(
        self,
        seen: Indices,
        auc: Floats,
        share: Floats,
        running: Indices,
        free: Indices,
        rng: np.random.Generator,
    ) -> int:
        """Return the point among `free` to run next: the best of a draw from the posterior at each.

        `auc` (n,) are the values of the points `seen` that have ended, `share` (n,) the share of
        their epochs that they trained. Each draw is the difference of a point from the mean of `free`:
        the level of the cohort is unknown at first, but the same for all.
        """
        if len(seen) + len(running) in UNMODELLED:
            return int(free[rng.integers(len(free))])
        exploration = EXPLORATION if len(seen) else FIRST_EXPLORATION
        values, noise = logit(auc), NOISE_SD**2 + STOPPED_SD**2 * (1 - share)
        if len(running):
            expected, _ = self.posterior(seen, values, noise, running)
            values = np.concatenate([values, expected])
            noise = np.concatenate([noise, np.full(len(running), RUNNING_SD**2)])
            seen = np.concatenate([seen, running])
        mean, covariance = self.posterior(seen, values, noise, free)
        variance = np.diag(covariance) - 2 * covariance.mean(axis=1) + covariance.mean()
        deviation = np.sqrt(np.maximum(variance, 1e-9))
        drawn = mean + exploration * deviation * rng.standard_normal(len(free))
        return int(free[int(np.argmax(drawn))])


def observed(auc: Floats) -> Indices:
    """Return which of the ended trials with these values (n,), in order of their numbers, the process is fitted to.

    All up to MOST_OBSERVED. Of more: the best quarter of as many, the latest quarter, and half evenly spaced in the
    ranking of the others, so that the poor regions stay known. The same values give the same answer.
    """
    count = len(auc)
    if count <= MOST_OBSERVED:
        return np.arange(count)
    quarter = MOST_OBSERVED // 4
    ranking = np.argsort(-auc, kind="stable")
    kept = np.zeros(count, dtype=bool)
    kept[ranking[:quarter]] = True
    latest = np.flatnonzero(~kept)[-quarter:]
    kept[latest] = True
    others = ranking[~kept[ranking]]
    spaced = np.linspace(0, len(others) - 1, MOST_OBSERVED - 2 * quarter).round().astype(np.int64)
    kept[others[spaced]] = True
    return np.flatnonzero(kept)


def logit(auc: Floats) -> Floats:
    """Return log odds of AUCs, which are taken as between .02 and .995."""
    bounded = np.clip(auc, 0.02, 0.995)
    return np.asarray(np.log(bounded / (1 - bounded)))
