"""Curves of configurations that were not recorded, from a surrogate fitted to a recorded table.

Strategies that propose their own points need them: a pool of thousands of random configurations, on which all
strategies are replayed alike. The surrogate is a forest of whole curves. It knows the truth of every configuration of
the pool, and a strategy sees as little of it as of a recorded table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from scipy.special import expit
from scipy.stats import spearmanr
from sklearn.ensemble import ExtraTreesRegressor

from search_spaces.space import Parameter, Space
from tune_app.backtest.tables import Fit, Table, objective_by_epoch
from tune_app.study.prior import Floats
from tune_app.study.surrogate import Axis, Indices, draw, logit

TREES = 500


def encoded(axes: Sequence[Axis], samples: Sequence[Mapping[str, Any]]) -> Floats:
    """Return the samples as points (n, columns) of about unit range; parameters that are not read are in the middle."""
    return np.concatenate(
        [axis.scaled([sample.get(axis.name) for sample in samples]) for axis in axes], axis=1
    )


def covered_space(table: Table) -> Space:
    """Return the space that the random configurations of a table cover: their ranges, and what all of them share."""
    drawn = [index for index, origin in enumerate(table.origins) if origin == "random"]
    samples = [table.samples[index] for index in drawn or range(table.size)]
    configs = [table.configs[index] for index in drawn or range(table.size)]
    names = {axis.name for axis in table.axes}
    fixed = {
        name: value
        for name, value in configs[0].items()
        if name not in names and all(config.get(name) == value for config in configs)
    }
    parameters = {
        axis.name: Parameter(axis.name, _distribution(axis, samples)) for axis in table.axes
    }
    return Space(table.name, "the ranges of a recorded table", parameters, fixed)


def _distribution(axis: Axis, samples: Sequence[Mapping[str, Any]]) -> BaseDistribution:
    values = [sample[axis.name] for sample in samples if axis.name in sample]
    if axis.choices:
        return CategoricalDistribution(sorted(set(values)))
    low, high = float(min(values)), float(max(values))
    if all(float(value).is_integer() for value in values):
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=axis.log)


class CurveSurrogate:
    """Extremely randomised trees, each on a bootstrap sample, from a configuration to its whole curves in logits.

    The outputs are the validation AUC and the held-out AUC of all epochs together.
    """

    def __init__(self, table: Table, *, trees: int = TREES, seed: int = 0) -> None:
        self.table, self.seed = table, seed
        self.points = encoded(table.axes, table.samples)
        self.curves = logit(np.concatenate([table.auc, table.hold], axis=1))
        self.forest = ExtraTreesRegressor(trees, bootstrap=True, oob_score=True, random_state=seed)
        self.forest.fit(self.points, self.curves)

    @property
    def out_of_bag(self) -> Floats:
        """(runs, 2 epochs): logits predicted for each recorded run by the trees that were not fitted to it."""
        return np.asarray(self.forest.oob_prediction_)

    @cached_property
    def fit(self) -> Fit:
        """The out-of-bag rank correlations, at the last epoch."""
        auc, hold = np.split(self.out_of_bag, 2, axis=1)
        value, deployed = objective_by_epoch(auc)
        truth = np.take_along_axis(hold, deployed, axis=1)
        return Fit(
            truth=_rank_correlation(truth, self.table.truth),
            value=_rank_correlation(value, self.table.value),
            importance=tuple(map(float, self.forest.feature_importances_)),
        )

    def donors(self, points: Floats, rng: np.random.Generator) -> Indices:
        """Return a recorded run for each point (n, columns): one that shares the leaf of a random tree with it."""
        here, there = self.forest.apply(self.points), self.forest.apply(points)
        trees = rng.integers(here.shape[1], size=len(points))
        return np.array(
            [
                rng.choice(np.flatnonzero(here[:, tree] == leaves[tree]))
                for leaves, tree in zip(there, trees, strict=True)
            ]
        )

    def pool(self, size: int, *, seed: int = 0) -> Table:
        """Return a table of `size` random configurations of the space, after the known settings of the recorded table.

        The known settings keep their recorded curves. Any other curve is the forest's prediction and the out-of-bag
        residual of a recorded run close by (`donors`), the validation's and the held-out one together: so runs are as
        noisy as recorded ones, and effects of hyperparameters that the forest misses are noise, too. The durations and
        the columns from which a diagnosis is made are those of that recorded run.
        """
        table, epochs = self.table, self.table.epochs
        space = covered_space(table)
        known = [index for index, origin in enumerate(table.origins) if origin != "random"]
        samples = [table.samples[index] for index in known]
        for number in range(size):
            suggest = partial(draw, rng=np.random.default_rng([seed, number]))
            samples.append(space.sample(suggest, epochs))
        points = encoded(table.axes, samples)
        donors = self.donors(points, np.random.default_rng([self.seed, seed]))
        donors[: len(known)] = known
        curves = self.forest.predict(points) + (self.curves - self.out_of_bag)[donors]
        curves[: len(known)] = self.curves[known]
        auc, hold = np.split(expit(curves), 2, axis=1)
        value, deployed = objective_by_epoch(auc)
        drawn = [space.sample_to_overrides(sample, epochs) for sample in samples[len(known) :]]
        return replace(
            table,
            trials=tuple(f"{number:05d}" for number in range(len(samples))),
            origins=(*(table.origins[index] for index in known), *["random"] * size),
            samples=tuple(samples),
            configs=(*(table.configs[index] for index in known), *drawn),
            rows=tuple(
                [row | {"val_auc": float(one)} for row, one in zip(rows, curve, strict=True)]
                for rows, curve in zip((table.rows[i] for i in donors), auc, strict=True)
            ),
            auc=auc,
            value=value,
            hold=hold,
            truth=np.take_along_axis(hold, deployed, axis=1),
            seconds=table.seconds[donors],
            deployed=deployed,
            scored=None,
            fit=self.fit,
        )


def _rank_correlation(predicted: Floats, recorded: Floats) -> float:
    return float(spearmanr(predicted[:, -1], recorded[:, -1]).statistic)
