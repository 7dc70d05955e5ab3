"""Whole searches replayed over recorded tables: what each strategy would have chosen, by what its choice is worth.

An event simulation: `workers` trials run at a time, each epoch takes the time it took when it was
recorded, and a worker that has become free takes the next run that the strategy asks for. A strategy sees the rows
of the epochs that it has paid for, and nothing of the held-out AUC, by which its choice is judged.

The table is the space: a strategy draws among the configurations that are left in it, without replacement, so every replay
of a recorded table is exact. A model chooses among them, too: nothing is claimed about configurations between them.
Strategies that propose points of their own replay on the pool of a surrogate (`surrogate_curves`).

A choice is worth the held-out AUC of the weights that would be deployed: those of the epoch that the
best 3-epoch median stands for, for every strategy alike. A trial that still runs may be chosen.
"""

import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from trainables.diagnosis import VERDICTS
from tune_app.backtest.curves import Curve
from tune_app.backtest.replay import RayAsha
from tune_app.backtest.tables import CLAIM_FIT, Table, learn_prior, supports_claims
from tune_app.study.policy import Policy
from tune_app.study.policy_spec import PolicySpec
from tune_app.study.prior import Prior, shipped_prior
from tune_app.study.surrogate import CANDIDATES, Surrogate
from tune_app.study.tied import nearly_tied

Floats = npt.NDArray[np.float64]
Answer = Literal["continue", "pause", "stop"]

BUDGETS = (3, 6, 12, 24, 48)
"""Whole runs' worth of epochs at which strategies are compared."""

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Budgets among which the smallest one is looked for that reaches plain Ray Tune's value."""

TARGET_BUDGET = 24
"""Whole runs after which plain Ray Tune's value is the one to reach."""

BEFORE = PolicySpec(
    halving=True,
    grace_epochs=3,
    reduction_factor=2,
    judge_from=0,
    finalists=3,
    drw_guard_epochs=5,
)
"""medtune's stopping policy up to version 0.1, for runs of 30 epochs."""


class Seen:
    """The data that a strategy may look at: the table's configurations, and the rows of the epochs that were paid for."""

    def __init__(self, table: Table, rng: np.random.Generator) -> None:
        self._table = table
        self.rng = rng
        self.done = np.zeros(table.size, dtype=np.int64)
        """(trials,): epochs trained so far."""
        self.state = np.full(table.size, "free", dtype=object)
        """(trials,): free, running, paused, stopped or completed."""
        self.epochs = table.epochs

    def auc(self, trial: int) -> float:
        """Return the validation AUC of the trial's last epoch."""
        return float(self._table.auc[trial, self.done[trial] - 1])

    def values(self, trials: npt.NDArray[np.int64]) -> Floats:
        """Return the objective of trials (n,) that have trained at least one epoch."""
        return np.asarray(self._table.value[trials, self.done[trials] - 1])

    def among(self, *states: str) -> npt.NDArray[np.int64]:
        """Return the trials in these states."""
        return np.flatnonzero(np.isin(self.state, states))

    def begun(self) -> npt.NDArray[np.int64]:
        """Return the trials with at least one epoch."""
        return np.flatnonzero(self.done > 0)

    def curve(self, trial: int) -> Curve:
        """Return the trial with its rows so far."""
        table = self._table
        rows = table.rows[trial][: self.done[trial]]
        return Curve(table.trials[trial], rows, table.configs[trial])


class Strategy(Protocol):
    """One search. `following`: the free or paused trial to run next, None for none; `report`: what becomes of a
    trial after its new epoch, not asked after the last one; `choose`: the trial to deploy."""

    def following(self) -> int | None: ...

    def report(self, trial: int) -> Answer: ...

    def choose(self) -> int: ...


Factory = Callable[[Seen, float], Strategy]
"""(the visible data, the budget in epochs) -> a strategy."""


def simulate(
    table: Table,
    factory: Factory,
    budgets: Sequence[float],
    seed: int,
    *,
    workers: int = 4,
    start_s: float = 0.0,
    unit: Literal["epochs", "seconds"] = "epochs",
    together: bool = False,
) -> list[float]:
    """Return the held-out AUC of the run that the strategy would deploy at each budget, ascending, in whole runs.

    `together`: the runs that nearly tie with its choice (`study.tied`) are deployed with it, for a table with scores.

    `unit` "seconds": a whole run is the table's mean duration, the budget is time on `workers` shares of a GPU, and each
    start of a trial costs `start_s` more. Where the table runs out of configurations the search has ended.
    """
    whole = table.epochs if unit == "epochs" else float(table.seconds.sum(axis=1).mean())
    marks = [budget * whole for budget in budgets]
    seen = Seen(table, np.random.default_rng(seed))
    strategy = factory(seen, budgets[-1] * table.epochs)
    found: list[float] = []
    running: list[tuple[float, int, int]] = []
    spent, order, now = 0, 0, 0.0

    def judged() -> float:
        chosen = strategy.choose()
        if not together:
            return float(table.truth[chosen, seen.done[chosen] - 1])
        assert table.scored is not None
        begun = seen.begun()
        near = begun[nearly_tied(seen.values(begun))]
        return table.scored.auc((int(i), int(table.deployed[i, seen.done[i] - 1])) for i in near)

    def start() -> bool:
        nonlocal order
        trial = strategy.following()
        if trial is None:
            return False
        assert seen.state[trial] in ("free", "paused"), f"trial {trial} is {seen.state[trial]}"
        seen.state[trial] = "running"
        ends = now + start_s + table.seconds[trial, seen.done[trial]]
        heapq.heappush(running, (float(ends), order, trial))
        order += 1
        return True

    while len(running) < workers and start():
        pass
    while running and len(found) < len(marks):
        now, place, trial = heapq.heappop(running)
        while (
            unit == "seconds"
            and len(found) < len(marks)
            and now * workers > marks[len(found)]
            and spent
        ):
            found.append(judged())
        seen.done[trial] += 1
        spent += 1
        ended = seen.done[trial] == table.epochs
        answer = "completed" if ended else strategy.report(trial)
        seen.state[trial] = {"continue": "running", "pause": "paused", "stop": "stopped"}.get(
            answer, answer
        )
        while unit == "epochs" and len(found) < len(marks) and spent >= marks[len(found)]:
            found.append(judged())
        if answer == "continue":
            heapq.heappush(
                running, (now + float(table.seconds[trial, seen.done[trial]]), place, trial)
            )
        while len(running) < workers and start():
            pass
    return found + [judged()] * (len(marks) - len(found))


# Strategies ---------------------------------------------------------------------------------------


class RandomSearch:
    """Configurations at random, each to its end; the best objective wins."""

    def __init__(self, seen: Seen, budget: float = math.inf) -> None:
        self.seen = seen
        self._order = list(seen.rng.permutation(len(seen.state)))

    def following(self) -> int | None:
        return int(self._order.pop()) if self._order else None

    def report(self, trial: int) -> Answer:
        return "continue"

    def choose(self) -> int:
        begun = self.seen.begun()
        return int(begun[int(np.argmax(self.seen.values(begun)))])


class TopK(RandomSearch):
    """`first` epochs of as many configurations as leave enough for the best `kept` of them to run to their end.

    Egele and others 2024, arXiv:2404.04111: a baseline that multi-fidelity methods often fail to beat.
    """

    def __init__(self, seen: Seen, budget: float, *, first: int, kept: int = 3) -> None:
        super().__init__(seen)
        self._first = first
        fits = int((budget - kept * (seen.epochs - first)) // first)
        self._order = self._order[: max(fits, 1)]
        self._left: list[int] | None = None
        self._kept = kept

    def following(self) -> int | None:
        if self._order or self.seen.among("running").size:
            return super().following()
        if self._left is None:
            paused = self.seen.among("paused")
            best = paused[np.argsort(-self.seen.values(paused), kind="stable")]
            self._left = [int(trial) for trial in best[: self._kept]]
        return self._left.pop(0) if self._left else None

    def report(self, trial: int) -> Answer:
        return (
            "pause" if self.seen.done[trial] == self._first and self._left is None else "continue"
        )


class RayAshaSearch(RandomSearch):
    """Random draws under Ray's own `ASHAScheduler` as shipped; the best last value wins, as in Ray."""

    def __init__(self, seen: Seen, budget: float = math.inf) -> None:
        super().__init__(seen)
        self._asha = RayAsha(seen.epochs)

    def report(self, trial: int) -> Answer:
        curve = self.seen.curve(trial)
        return "stop" if self._asha(curve, curve.rows[-1]) else "continue"

    def choose(self) -> int:
        begun = self.seen.begun()
        return int(max(begun, key=self.seen.auc))


class MedtuneSearch(RandomSearch):
    """A stopping policy over random draws, known settings first where asked, or over a model's draws."""

    def __init__(
        self,
        seen: Seen,
        budget: float,
        *,
        policy: PolicySpec,
        ill: Mapping[int, int],
        surrogate: Surrogate | None = None,
        candidates: int | None = None,
        first: Sequence[int] = (),
    ) -> None:
        """`ill`: the epoch after which the policy's diagnosis stops a trial, of those it stops. `candidates`: the number
        of free configurations that the model chooses among; None for all."""
        super().__init__(seen)
        ignored = dict.fromkeys(VERDICTS, "ignore")
        self._policy = Policy(policy.model_copy(update={"actions": ignored}), seen.epochs)
        self._ill = ill
        self._surrogate, self._candidates = surrogate, candidates or len(seen.state)
        self._order = [t for t in self._order if t not in first] + list(reversed(first))

    def following(self) -> int | None:
        if self._surrogate is None:
            return super().following()
        seen = self.seen
        free = seen.among("free")
        if not len(free):
            return None
        if len(free) > self._candidates:
            free = np.sort(seen.rng.choice(free, self._candidates, replace=False))
        ended = seen.among("stopped", "completed")
        share = seen.done[ended] / seen.epochs
        values = seen.values(ended)
        return self._surrogate.choose(ended, values, share, seen.among("running"), free, seen.rng)

    def report(self, trial: int) -> Answer:
        if self._ill.get(trial) == self.seen.done[trial]:
            return "stop"  # before it counts at a rung, as in the policy
        curve = self.seen.curve(trial)
        decision = self._policy.decide(curve.trial, curve.config, curve.rows[-1])
        return "stop" if decision.stops else "continue"


@dataclass(frozen=True)
class Entry:
    """A line of the comparison."""

    name: str
    make: Callable[[Table, Prior | None], Factory]
    by_budget: bool = False
    """Whether it has to know the budget before it starts, so that each budget needs a separate search."""
    together: bool = False
    """Whether the runs that nearly tie are deployed together; left out on tables without scores."""
    package: str = ""
    """The module of another package that it needs. It proposes its own points: left out on recorded tables."""

    def replays_on(self, table: Table) -> bool:
        return (table.scored is not None or not self.together) and bool(
            table.fit or not self.package
        )


def _plain(kind: Callable[[Seen, float], Strategy]) -> Callable[[Table, Prior | None], Factory]:
    return lambda table, prior: kind


def _top(first: int) -> Entry:
    def make(table: Table, prior: Prior | None) -> Factory:
        return lambda seen, budget: TopK(seen, budget, first=first)

    return Entry(f"{first}-epoch top-3", make, by_budget=True)


def _before(table: Table, prior: Prior | None) -> Factory:
    known = [index for index, origin in enumerate(table.origins) if origin != "random"]
    ill = diagnosed(table, BEFORE)
    return lambda seen, budget: MedtuneSearch(seen, budget, policy=BEFORE, ill=ill, first=known)


def medtune(
    policy: PolicySpec | None = None, *, model: bool = True
) -> Callable[[Table, Prior | None], Factory]:
    """Return the maker of medtune's own search with a policy, by default the default one, with or without its model."""

    def make(table: Table, prior: Prior | None) -> Factory:
        surrogate = Surrogate(table.axes, table.samples, prior) if model else None
        chosen = policy or PolicySpec()
        ill = diagnosed(table, chosen)
        candidates = CANDIDATES if table.fit else None  # a pool is a space, as a search has it
        return lambda seen, budget: MedtuneSearch(
            seen, budget, policy=chosen, ill=ill, surrogate=surrogate, candidates=candidates
        )

    return make


def diagnosed(table: Table, policy: PolicySpec) -> dict[int, int]:
    """Return the epoch after which the policy's diagnosis stops a trial, by trial, of those that it stops.

    The diagnosis of a run depends on the run alone: so it is computed once per table, and not in each replay.
    """
    found: dict[int, int] = {}
    if all(action == "ignore" for action in policy.actions.values()):
        return found
    alone = Policy(policy.model_copy(update={"halving": False}), table.epochs)
    for trial in range(table.size):
        for row in table.rows[trial]:
            if alone.decide(table.trials[trial], table.configs[trial], row).stops:
                found[trial] = int(row["epoch"])
                break
    return found


NO_STOPS = PolicySpec(halving=False, actions=dict.fromkeys(VERDICTS, "ignore"))

ENTRIES: tuple[Entry, ...] = (
    Entry("random", _plain(RandomSearch)),
    Entry("random tied runs together", _plain(RandomSearch), together=True),
    _top(1),
    _top(3),
    _top(6),
    Entry("Ray ASHA as shipped", _plain(RayAshaSearch)),
    Entry("medtune before", _before),
    Entry("medtune without model", medtune(model=False)),
    Entry("medtune without stops", medtune(NO_STOPS)),
    Entry("medtune", medtune()),
    Entry("medtune tied runs together", medtune(), together=True),
)
"""The strategies compared: baselines, earlier medtune, medtune without each part, present medtune, its runs together."""

PLAIN = "Ray ASHA as shipped"


def entries_named(names: Sequence[str], entries: Sequence[Entry] = ENTRIES) -> tuple[Entry, ...]:
    """Return random search and the entries of these names; all for none. Raises StrategyError for unknown ones."""
    known = {entry.name: entry for entry in entries}
    if unknown := [name for name in names if name not in known]:
        raise StrategyError(f"no strategy {', '.join(unknown)}: there are {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(("random", *(names or known))))


class StrategyError(ValueError):
    """A comparison that cannot be made as asked; the message names what there is."""


# Comparison ---------------------------------------------------------------------------------------


def compare(
    tables: Sequence[Table],
    entries: Iterable[Entry] = ENTRIES,
    *,
    replays: int = 400,
    resamples: int = 40,
    workers: int = 4,
    start_s: float = 0.0,
    unit: Literal["epochs", "seconds"] = "epochs",
    seed: int = 0,
    most: float = math.inf,
    taught_by: Sequence[Table] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Return one row per table, strategy and budget.

    The prior that a model may use on a table is learned from the tables of other cohorts among `taught_by`, by default
    those compared; where there are none it is the shipped one. `most`: the largest budget, in whole runs.
    Columns: `table`, `strategy`, `budget` (whole runs), `auc` (mean held-out AUC of the choice), `gain` over
    random in the same replays with `low` and `high` (95 %, bootstrap over replays), `table_low` and `table_high`
    (95 %, over the table's configurations: each of `resamples` tables drawn with replacement is
    replayed a tenth as often), `won` (share of replays above random; ties count half), `worst` (lowest tenth of `auc`),
    `reaches` (smallest budget of GRID at which the mean is at least plain Ray Tune's at 24 whole runs; NaN: none),
    `fit_truth` and `fit_value` (the surrogate's out-of-bag rank correlations; NaN for recorded tables).
    """
    result = []
    asked = list(entries)
    for table in tables:
        entries = [entry for entry in asked if entry.replays_on(table)]
        prior = prior_for(table, tables if taught_by is None else taught_by)
        budgets = [budget for budget in GRID if budget <= min(table.size, most)]
        how = {"workers": workers, "start_s": start_s, "unit": unit}
        worth: dict[str, Floats] = {}
        spread: dict[str, Floats] = {}
        for entry in entries:
            worth[entry.name] = _replayed(
                table, entry, prior, budgets, range(seed, seed + replays), how
            )
            spread[entry.name] = _resampled(
                table, entry, prior, budgets, resamples, max(1, replays // 100), how
            )
            say(
                f"{table.name}: {entry.name} {' '.join(f'{x:.3f}' for x in worth[entry.name].mean(axis=0))}"
            )
        result += _rows(table, entries, budgets, worth, spread)
    return pd.DataFrame(result)


def prior_for(table: Table, tables: Sequence[Table]) -> Prior:
    """Return the prior fitted to the other cohorts among `tables`, or the shipped prior where there is no other cohort."""
    others = [other for other in tables if other.cohort != table.cohort]
    return learn_prior(others) if others else shipped_prior()


def _replayed(
    table: Table,
    entry: Entry,
    prior: Prior,
    budgets: Sequence[float],
    seeds: Iterable[int],
    how: Mapping[str, object],
) -> Floats:
    """(replays, budgets)."""
    factory = entry.make(table, prior)
    how = {**how, "together": entry.together}
    found = []
    for seed in seeds:
        if entry.by_budget:
            found.append([simulate(table, factory, [b], seed, **how)[0] for b in budgets])  # type: ignore[arg-type]
        else:
            found.append(simulate(table, factory, budgets, seed, **how))  # type: ignore[arg-type]
    return np.array(found)


def _resampled(
    table: Table,
    entry: Entry,
    prior: Prior,
    budgets: Sequence[float],
    resamples: int,
    each: int,
    how: Mapping[str, object],
) -> Floats:
    """(resamples, budgets): means over `each` replays of a table drawn with replacement; the same for all entries."""
    means = []
    for number in range(resamples):
        drawn = np.random.default_rng([7, number]).integers(table.size, size=table.size)
        part = table.part(drawn)
        seeds = range(1000 * number, 1000 * number + each)
        means.append(_replayed(part, entry, prior, budgets, seeds, how).mean(axis=0))
    return np.array(means)


def _rows(
    table: Table,
    entries: Sequence[Entry],
    budgets: Sequence[float],
    worth: Mapping[str, Floats],
    spread: Mapping[str, Floats],
) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    base, base_spread = worth["random"], spread["random"]
    plain = worth.get(PLAIN)
    target = (
        None
        if plain is None or TARGET_BUDGET not in budgets
        else plain.mean(axis=0)[budgets.index(TARGET_BUDGET)]
    )
    for entry in entries:
        mine = worth[entry.name]
        means = mine.mean(axis=0)
        reached = [
            b for b, m in zip(budgets, means, strict=True) if target is not None and m >= target
        ]
        for place, budget in enumerate(budgets):
            if budget not in BUDGETS:
                continue
            gain = mine[:, place] - base[:, place]
            low, high = _bootstrap(gain)
            apart = (
                spread[entry.name][:, place] - base_spread[:, place]
                if len(base_spread)
                else np.array([np.nan])
            )
            rows.append(
                {
                    "table": table.name,
                    "strategy": entry.name,
                    "budget": budget,
                    "auc": means[place],
                    "gain": gain.mean(),
                    "low": low,
                    "high": high,
                    "table_low": np.quantile(apart, 0.025),
                    "table_high": np.quantile(apart, 0.975),
                    "won": float(np.mean(gain > 0) + np.mean(gain == 0) / 2),
                    "worst": np.quantile(mine[:, place], 0.1),
                    "reaches": min(reached, default=math.nan),
                    "fit_truth": table.fit.truth if table.fit else math.nan,
                    "fit_value": table.fit.value if table.fit else math.nan,
                }
            )
    return rows


def _bootstrap(values: Floats, draws: int = 1000) -> tuple[float, float]:
    """Return the ends of the 95 % bootstrap interval of the mean."""
    drawn = _indices(len(values), draws)
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=4)
def _indices(count: int, draws: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(count, size=(draws, count))


def strategies_text(result: pd.DataFrame) -> str:
    """Return the comparison as Markdown, a table for each recorded one: AUC of random, and gains in thousandths."""
    parts = []
    for name, part in result.groupby("table", sort=False):
        truth, value = part["fit_truth"].iloc[0], part["fit_value"].iloc[0]
        weak = not supports_claims(truth, value)
        table = f"{name!s} (no claim)" if weak else str(name)
        budgets = list(dict.fromkeys(part["budget"]))
        heads = [
            "strategy",
            *(f"{b} runs" for b in budgets),
            "won",
            "worst tenth",
            "reaches plain at",
        ]
        lines = [f"| {table} | {' | '.join(heads[1:])} |", "|---|" + "--:|" * (len(heads) - 1)]
        for strategy, rows in part.groupby("strategy", sort=False):
            cells = [_cell(str(strategy), row) for row in rows.to_dict("records")]
            last = rows.iloc[-1]
            reaches = "-" if math.isnan(last["reaches"]) else f"{last['reaches']:g}"
            tail = [f"{last['won']:.0%}", f"{last['worst']:.3f}", reaches]
            lines.append(f"| {strategy} | {' | '.join([*cells, *tail])} |")
        if not math.isnan(truth):
            lines.append(
                f"\nSurrogate of {name}: out-of-bag rank correlation {truth:.3f} with the held-out AUC, {value:.3f} with"
                f" the objective. "
                + (f"Below {CLAIM_FIT:g}: nothing is claimed from this table." if weak else "")
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cell(strategy: str, row: Mapping[Hashable, float]) -> str:
    if strategy == "random":
        return f"{row['auc']:.4f}"
    wide = (
        ""
        if math.isnan(row["table_low"])
        else f" ({1000 * row['table_low']:+.0f} to {1000 * row['table_high']:+.0f})"
    )
    return f"{1000 * row['gain']:+.1f} [{1000 * row['low']:+.1f}, {1000 * row['high']:+.1f}]{wide}"
