"""Published searches, driven through their own packages' interfaces: Syne Tune's ASHACQR and NePS' PriorBand.

Both propose points of their own, so they replay on the pool of a surrogate only: a proposal is the free configuration
of the pool that is nearest to it, where distances count by what matters to the surrogate. The packages are no
dependencies (`INSTALL`): NePS asks for torchvision and pandas 2, Syne Tune for xgboost, which brings NCCL for CUDA 12.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution, IntDistribution
from sklearn import config_context

from search_spaces.fixes import DOCUMENT_EPOCHS
from search_spaces.space import Parameter, Space, is_read
from trainables.config import Scalar
from tune_app.backtest.strategies import (
    ENTRIES,
    Answer,
    Entry,
    Factory,
    RandomSearch,
    Seen,
    entries_named,
)
from tune_app.backtest.surrogate_curves import covered_space, encoded
from tune_app.backtest.tables import Table
from tune_app.study.prior import Floats, Prior

INSTALL = {
    "ASHACQR": "pip install --no-deps syne-tune==0.16.0 xgboost-cpu statsmodels patsy formulaic interface_meta dill sortedcontainers",
    "PriorBand": "pip install --no-deps neural-pipeline-search==0.17.0 botorch==0.12.0 gpytorch==1.13 linear_operator"
    " jaxtyping wadler_lindig pyro-ppl pyro-api opt_einsum pymoo ifbo submitit pyre-extensions typing-inspect"
    " multipledispatch 'more-itertools<10' 'portalocker<3' matplotlib contourpy cycler fonttools kiwisolver pyparsing"
    " seaborn tensorboard tensorboard-data-server werkzeug absl-py markdown",
}
"""What makes the packages importable next to this one without another torch, torchvision or pandas."""

REFIT_EVERY = 4
"""New trials after which ASHACQR's model is fitted again; 1 as shipped, which costs half a second per trial."""


def entries_to_replay(
    names: Sequence[str], *, on_pools: bool, say: Callable[[str], None]
) -> list[Entry]:
    """Return random search and the entries of these names, those of other packages included; all for none.

    An entry that cannot be replayed is left out with a line: on recorded tables, or without its package, which the line
    states how to install. Raises StrategyError for unknown names.
    """
    found = []
    for entry in entries_named(names, (*ENTRIES, *PUBLISHED)):
        if entry.package and not on_pools:
            say(
                f"{entry.name} left out: no recorded table has the points it proposes; add --surrogate 2000"
            )
        elif entry.package and (error := _missing(entry.package)):
            say(f"{entry.name} left out ({error}): {INSTALL[entry.name]}")
        else:
            found.append(entry)
    return found


def _missing(package: str) -> ImportError | None:
    try:
        import_module(package)
    except ImportError as error:
        return error
    return None


class Nearest:
    """The free configuration of a pool that is nearest to a proposed one. It reads no curve."""

    def __init__(self, table: Table) -> None:
        assert table.fit is not None, f"{table.name} is no pool"
        self._axes, self.samples = table.axes, table.samples
        self._weights = np.array(table.fit.importance)
        self._points = encoded(table.axes, table.samples)

    def __call__(self, sample: Mapping[str, Any], seen: Seen) -> int | None:
        free = seen.among("free")
        if not len(free):
            return None
        apart: Floats = self._points[free] - encoded(self._axes, [sample])
        return int(free[np.argmin(apart**2 @ self._weights)])


class AshaCqr(RandomSearch):
    """Syne Tune's ASHA with conformal quantile regression (Salinas and others 2023), told each epoch's validation AUC.

    The model learns from the pool's configurations, not from the proposals they stand for. The best objective wins.
    """

    def __init__(self, seen: Seen, budget: float, *, space: Space, nearest: Nearest) -> None:
        super().__init__(seen)
        asha = import_module("syne_tune.optimizer.schedulers.asha")
        searchers = import_module(
            "syne_tune.optimizer.schedulers.searchers.last_value_multi_fidelity_searcher"
        )
        domains = import_module("syne_tune.config_space")
        config_space = {p.name: _syne_tune_domain(domains, p) for p in space.parameters.values()}
        random_seed = int(seen.rng.integers(2**31))
        searcher = searchers.LastValueMultiFidelitySearcher(
            config_space, random_seed, update_frequency=REFIT_EVERY, searcher="cqr"
        )
        self._asha = asha.AsynchronousSuccessiveHalving(
            config_space,
            metric="val_auc",
            do_minimize=False,
            searcher=searcher,
            time_attr="epoch",
            max_t=seen.epochs,
            random_seed=random_seed,
        )
        self._trial = import_module("syne_tune.backend.trial_status").Trial
        self._nearest = nearest
        self._started: dict[int, Any] = {}

    def following(self) -> int | None:
        for ended in [t for t in self._started if self.seen.state[t] == "completed"]:
            self._asha.on_trial_complete(self._started.pop(ended), self._result(ended))
        unchecked = config_context(assume_finite=True, skip_parameter_validation=True)
        with seeded(self.seen.rng), unchecked:
            proposed = self._asha.suggest().config
            trial = self._nearest(proposed, self.seen)
            if trial is not None:
                config = {**proposed, **self._nearest.samples[trial]}
                self._started[trial] = self._trial(trial, config, datetime.now(UTC))
                self._asha.on_trial_add(self._started[trial])
        return trial

    def report(self, trial: int) -> Answer:
        answer = self._asha.on_trial_result(self._started[trial], self._result(trial))
        if answer != "STOP":
            return "continue"
        del self._started[trial]
        return "stop"

    def _result(self, trial: int) -> dict[str, Any]:
        return {"epoch": int(self.seen.done[trial]), "val_auc": self.seen.auc(trial)}


class PriorBand(RandomSearch):
    """NePS' PriorBand (Mallik and others 2023) over Hyperband, told the objective at each rung, where runs pause.

    Its prior lies at medtune's default hyperparameters with the package's default confidence. The best objective wins.
    """

    def __init__(
        self,
        seen: Seen,
        budget: float,
        *,
        space: Space,
        prior: Mapping[str, Scalar],
        nearest: Nearest,
    ) -> None:
        super().__init__(seen)
        neps = import_module("neps")
        elements = {
            p.name: _neps_parameter(neps, p, prior.get(p.name)) for p in space.parameters.values()
        }
        epochs = neps.HPOInteger(1, seen.epochs, is_fidelity=True)
        searched = neps.SearchSpace({**elements, "epochs": epochs})
        self._neps = neps.AskAndTell(neps.algorithms.priorband(searched))
        self._nearest = nearest
        self._trials: dict[str, int] = {}
        """The pool's configuration that each of its trials runs."""
        self._asked: dict[int, Any] = {}
        """Its trial that each configuration runs at present."""

    def following(self) -> int | None:
        for ended in [t for t in self._asked if self.seen.state[t] == "completed"]:
            self._tell(ended)
        with seeded(self.seen.rng):
            asked = self._neps.ask()
        before = asked.metadata.previous_trial_id
        known = self._trials.get(before) if before is not None else None
        trial = self._nearest(asked.config, self.seen) if known is None else known
        if trial is not None:
            self._trials[asked.id], self._asked[trial] = trial, asked
        return trial

    def report(self, trial: int) -> Answer:
        if self.seen.done[trial] < self._asked[trial].config["epochs"]:
            return "continue"
        self._tell(trial)
        return "pause"

    def _tell(self, trial: int) -> None:
        value = float(self.seen.values(np.array([trial]))[0])
        self._neps.tell(self._asked.pop(trial), 1 - value)


@contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Seed the process-wide generators of numpy and torch, which both packages draw from, and restore them."""
    import torch

    state = np.random.get_state()
    seed = int(rng.integers(2**31))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            np.random.seed(seed)
            yield
    finally:
        np.random.set_state(state)


def default_sample(space: Space) -> dict[str, Scalar]:
    """Return the default hyperparameters as a sample of the space, those out of range at its ends."""
    values = space.start(DOCUMENT_EPOCHS)  # a share of the run is exact at the document's length
    sample: dict[str, Scalar] = {}
    for parameter in space.parameters.values():
        if not is_read(parameter.hyperparameter, values):
            continue
        value, distribution = parameter.encode(values), parameter.distribution
        if not isinstance(distribution, CategoricalDistribution):
            sample[parameter.name] = min(max(value, distribution.low), distribution.high)
        elif parameter.holds(value):
            sample[parameter.name] = value
    return sample


def _syne_tune_domain(domains: Any, parameter: Parameter) -> Any:
    distribution = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return domains.choice(list(parameter.choices))
    if isinstance(distribution, IntDistribution):
        return domains.randint(distribution.low, distribution.high)
    make = domains.loguniform if distribution.log else domains.uniform
    return make(distribution.low, distribution.high)


def _neps_parameter(neps: Any, parameter: Parameter, prior: Scalar) -> Any:
    distribution = parameter.distribution
    if isinstance(distribution, CategoricalDistribution):
        return neps.HPOCategorical(list(parameter.choices), prior=prior)
    make = neps.HPOInteger if isinstance(distribution, IntDistribution) else neps.HPOFloat
    return make(distribution.low, distribution.high, log=distribution.log, prior=prior)


def _ashacqr(table: Table, prior: Prior | None) -> Factory:
    space, nearest = covered_space(table), Nearest(table)
    return lambda seen, budget: AshaCqr(seen, budget, space=space, nearest=nearest)


def _priorband(table: Table, prior: Prior | None) -> Factory:
    space, nearest = covered_space(table), Nearest(table)
    known = default_sample(space)
    return lambda seen, budget: PriorBand(seen, budget, space=space, prior=known, nearest=nearest)


PUBLISHED: tuple[Entry, ...] = (
    Entry("ASHACQR", _ashacqr, package="syne_tune.optimizer.schedulers.asha"),
    Entry("PriorBand", _priorband, package="neps"),
)
"""Strategies of other packages."""
