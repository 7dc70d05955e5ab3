"""What a study's trials say about hyperparameters: the axes they lie on, importance, and effects of variants."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from optuna.distributions import CategoricalDistribution

from search_spaces.space import DERIVED, READ_ONLY_WHEN, Parameter, is_read
from trainables.diagnosis import FALLS
from tune_app.results.tables import came_back, column_of, format_value, smaller_is_better

if TYPE_CHECKING:
    from tune_app.results.study import Study

NAMES_OF_BASELINE = ("baseline", "all-fixes", "documented-after", "documented", "after", "defaults")
"""Variants that others are compared with when none is named: the first of these that is there, or the first variant."""

COLLAPSES = (*FALLS, "never_learned")
"""Verdicts of runs that came to nothing, or lost what they had; the others warn."""

EFFECT_COLUMNS = {
    "variant": "string",
    "pairs": "Int64",
    "mean": "float64",
    "low": "float64",
    "high": "float64",
    "p": "float64",
    "p_holm": "float64",
    "value": "float64",
    "baseline_value": "float64",
    "runs": "Int64",
    "collapsed": "Int64",
    "healed": "Int64",
    "failed": "Int64",
    "verdicts": "string",
    "call": "string",
}
"""Columns of `Study.effects()` -> dtype."""


# Axes ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A hyperparameter on the scale it is searched on. A place on it is a number; choices have places 0, 1, ..."""

    name: str
    kind: Literal["even", "log", "one_minus_log", "choice"]
    low: float
    """Place of its lower end."""
    high: float
    choices: tuple[str, ...] = ()
    """Texts of the choices, by place."""
    ranged: bool = False
    """Whether the ends are those of the search space; else those of the trials."""

    def places(self, trials: pd.DataFrame) -> np.ndarray:
        """Return where each trial lies, NaN where it has no value or its run does not read the hyperparameter."""
        values = trials[self.name]
        if self.kind == "choice":
            order = {text: float(place) for place, text in enumerate(self.choices)}
            found: np.ndarray = (
                values.map(self._text).map(order).to_numpy("float64", na_value=math.nan)
            )
        else:
            found = _on_scale(self.kind, values.to_numpy("float64", na_value=math.nan))
        if self.name in READ_ONLY_WHEN:
            names = READ_ONLY_WHEN[self.name].reads
            rows = zip(*(trials[name] for name in names), strict=True)
            read = [is_read(self.name, dict(zip(names, row, strict=True))) for row in rows]
            found = np.where(read, found, math.nan)
        return found

    def place(self, value: Any) -> float:
        """Return where `value` lies, NaN where that is nowhere."""
        if value is None or value is pd.NA:
            return math.nan
        if self.kind == "choice":
            return (
                float(self.choices.index(self._text(value)))
                if self._text(value) in self.choices
                else math.nan
            )
        return float(_on_scale(self.kind, np.array([float(value)]))[0])

    def text(self, place: float) -> str:
        """Return the hyperparameter's value at `place` as people write it."""
        if self.kind == "choice":
            return self.choices[round(place)] if 0 <= round(place) < len(self.choices) else ""
        value = {
            "even": lambda: place,
            "log": lambda: 10**place,
            "one_minus_log": lambda: 1 - 10**-place,
        }[self.kind]()
        return format_value(self.name, float(f"{value:.6g}"))

    def ticks(self) -> list[tuple[float, str]]:
        """Return places with their texts: every choice, or about five round values within the range."""
        if self.kind == "choice":
            return [(float(place), text) for place, text in enumerate(self.choices)]
        if self.kind == "even":
            places = _round_values(self.low, self.high)
        elif self.kind == "log":
            places = [math.log10(value) for value in _round_powers(self.low, self.high)]
        else:  # round in 1 - value
            places = [
                -math.log10(value) for value in reversed(_round_powers(-self.high, -self.low))
            ]
        return [(place, self.text(place)) for place in places]

    def share(self, place: float) -> float:
        """Return how far along the axis `place` lies, from 0 to 1."""
        return (place - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def _text(self, value: Any) -> str:
        return "none" if value is None or value is pd.NA else format_value(self.name, value)


def axis_of(study: "Study", name: str) -> Axis:
    """Return the axis of a hyperparameter: the search space's scale and range, or what the values suggest.

    `ema_decay` and `drw_beta` are 1 - value on a logarithm; without a space, rates are logarithmic, and what spans a
    factor of 30.
    """
    values = study.trials[name]
    parameter = _parameter(study, name)
    if parameter is not None and isinstance(parameter.distribution, CategoricalDistribution):
        texts = [
            "none" if choice is None else format_value(name, choice) for choice in parameter.choices
        ]
        seen = [
            text for text in _texts(name, values) if text not in texts
        ]  # warm starts may lie outside
        choices = (*texts, *seen)
        return Axis(name, "choice", 0.0, max(len(choices) - 1.0, 1.0), choices, ranged=True)
    if parameter is None and (
        not pd.api.types.is_numeric_dtype(values.dtype) or values.dtype == "boolean"
    ):
        choices = tuple(_texts(name, values))
        return Axis(name, "choice", 0.0, max(len(choices) - 1.0, 1.0), choices)
    numbers = values.dropna().to_numpy("float64")
    kind: Literal["even", "log", "one_minus_log"] = "even"
    if name in ("ema_decay", "drw_beta"):
        kind = "one_minus_log"
    elif parameter is not None:
        kind = "log" if parameter.distribution.log else "even"
    elif (
        len(numbers)
        and (numbers > 0).all()
        and (name.endswith("_lr") or numbers.max() / numbers.min() >= 30)
    ):
        kind = "log"
    ends = _ends(study, parameter) if parameter is not None else None
    ranged = ends is not None
    places = _on_scale(kind, np.array(ends) if ends is not None else numbers)
    places = places[np.isfinite(places)]
    if not len(places):
        return Axis(name, kind, 0.0, 1.0)
    return Axis(name, kind, float(places.min()), float(places.max()), ranged=ranged)


def _round_values(low: float, high: float) -> list[float]:
    """Three to six multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    if high <= low:
        return [low]
    size = 10 ** math.floor(math.log10(high - low))
    step = next(
        size * part for part in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if (high - low) / (size * part) <= 6
    )
    return [
        step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _round_powers(low: float, high: float) -> list[float]:
    """Values from 10**low to 10**high with the fewest digits that make at least three: powers, then 1 3, 1 2 5 and so on."""
    exponents = range(math.floor(low), math.ceil(high) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 7), range(1, 10)):
        values = [
            m * 10.0**e
            for e in exponents
            for m in mantissas
            if low - 1e-9 <= math.log10(m) + e <= high + 1e-9
        ]
        if len(values) >= 3:
            return values
    return [10**low, 10**high]


def _parameter(study: "Study", name: str) -> Parameter | None:
    if study.space is None:
        return None
    return next((p for p in study.space.parameters.values() if p.hyperparameter == name), None)


def _ends(study: "Study", parameter: Parameter) -> tuple[float, float] | None:
    """The hyperparameter's range in the space; None where it depends on another one's value."""
    if parameter.name in DERIVED and DERIVED[parameter.name].reads:
        return None
    low, high = (parameter.decode(end, {"epochs": study.spec.epochs}) for end in parameter.ends)
    assert isinstance(low, int | float)
    assert isinstance(high, int | float)
    return float(low), float(high)


def _on_scale(kind: str, values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == "log":
            return np.asarray(np.log10(values))
        if kind == "one_minus_log":
            return np.asarray(-np.log10(np.maximum(1 - values, 1e-12)))
    return values


def _texts(name: str, values: pd.Series) -> list[str]:
    return sorted(
        {
            "none" if value is pd.NA or value is None else format_value(name, value)
            for value in values
        }
    )


# Importance ------------------------------------------------------------------------------------------------------------


def importance(
    study: "Study", metric: str, evaluator: str, repeats: int, seed: int
) -> pd.DataFrame:
    """See `Study.importance`."""
    column = column_of(study.trials, metric)
    rows = study.trials[
        study.trials["state"].isin(["completed", "stopped"]) & study.trials[column].notna()
    ]
    names = [name for name in study.searched if rows[name].nunique(dropna=False) > 1]
    if len(rows) < 4 or not names:
        raise ValueError(
            f"{study.path}: importance needs four ended trials that differ in something; here are {len(rows)} "
            f"that differ in {', '.join(names) or 'nothing'}"
        )
    if rows[column].nunique() < 2:
        raise ValueError(
            f"{study.path}: all {len(rows)} ended trials have the same {column}: nothing to account for"
        )
    from optuna.importance import get_param_importances

    with _quiet_optuna():
        temporary = _temporary_study(study, rows, names, column)
        evaluators = _evaluators(evaluator, repeats, seed)
        found = pd.DataFrame(
            [get_param_importances(temporary, evaluator=each) for each in evaluators]
        )
    table = pd.DataFrame(
        {
            "parameter": pd.Series(names, dtype="string"),
            "importance": found[names].mean().to_numpy("float64"),
            "low": found[names].min().to_numpy("float64"),
            "high": found[names].max().to_numpy("float64"),
        }
    )
    table = table.sort_values("importance", ascending=False, kind="stable", ignore_index=True)
    stopped = int((rows["state"] == "stopped").sum())
    table.attrs["how"] = (
        f"{_EVALUATOR_NAMES[evaluator]} (Optuna) for {column} over {len(rows)} trials, {stopped or 'none'} of them stopped early"
        f"{' and counted with their value so far' if stopped else ''}; failed and unfinished trials left out; mean and extremes of {len(found)} evaluations"
    )
    return table


_EVALUATOR_NAMES = {
    "fanova": "fANOVA",
    "mdi": "mean decrease in impurity",
    "ped-anova": "PED-ANOVA",
}


def _temporary_study(study: "Study", rows: pd.DataFrame, names: list[str], column: str) -> Any:
    """An Optuna study in memory that holds `rows` as completed trials, whatever ended them."""
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution

    distributions: dict[str, BaseDistribution] = {}
    values: dict[str, list[Any]] = {}
    for name in names:
        axis = axis_of(study, name)
        if axis.kind == "choice":
            values[name] = ["none" if v is pd.NA else format_value(name, v) for v in rows[name]]
            distributions[name] = CategoricalDistribution(axis.choices)
        else:  # read or not: Optuna's evaluators leave out what not every trial has
            places = _on_scale(axis.kind, rows[name].to_numpy("float64"))
            values[name] = places.tolist()
            distributions[name] = FloatDistribution(min(axis.low, *places), max(axis.high, *places))
    temporary = optuna.create_study(
        direction="minimize" if smaller_is_better(column) else "maximize"
    )
    for row, value in enumerate(rows[column].astype("float64")):
        params = {name: values[name][row] for name in names}
        temporary.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=value)
        )
    return temporary


def _evaluators(evaluator: str, repeats: int, seed: int) -> list[Any]:
    from optuna.importance import (
        FanovaImportanceEvaluator,
        MeanDecreaseImpurityImportanceEvaluator,
        PedAnovaImportanceEvaluator,
    )

    if evaluator == "fanova":
        # Shallow trees: 1,000 trials take a second an evaluation instead of forty, with the same shares to two digits
        return [
            FanovaImportanceEvaluator(n_trees=16, max_depth=6, seed=seed + i)
            for i in range(repeats)
        ]
    if evaluator == "mdi":
        return [MeanDecreaseImpurityImportanceEvaluator(seed=seed + i) for i in range(repeats)]
    if evaluator == "ped-anova":
        return [PedAnovaImportanceEvaluator()]  # nothing random in it
    raise ValueError(f"unknown evaluator {evaluator!r}: one of fanova, mdi, ped-anova")


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """That a study was created in memory, and that an evaluator is experimental, is no news to anyone here."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


# Effects ---------------------------------------------------------------------------------------------------------------


def effects(study: "Study", metric: str, baseline: str | None) -> pd.DataFrame:
    """See `Study.effects`."""
    trials = study.trials[study.trials["variant"].notna()]
    variants = list(dict.fromkeys(trials["variant"]))
    if len(variants) < 2:
        raise ValueError(
            f"{study.path}: effects compare variants, and this {study.spec.kind} has {len(variants)}: "
            "`medtune ablate` and `medtune confirm` make studies with variants"
        )
    if baseline is None:
        baseline = next((name for name in NAMES_OF_BASELINE if name in variants), variants[0])
    elif baseline not in variants:
        raise ValueError(f"no variant {baseline!r}: one of {', '.join(variants)}")
    column = column_of(trials, metric)
    sign = -1.0 if smaller_is_better(column) else 1.0
    usable = trials[(trials["state"] == "completed") & trials[column].notna()]
    values = usable.groupby(["variant", "fold", "seed"], observed=True)[column].mean()
    reference = _of_variant(values, baseline)
    cut_into = int(trials["num_folds"].max())
    rows = []
    for variant in variants:
        own = trials[trials["variant"] == variant]
        counts = own["verdict"].value_counts()
        row: dict[str, Any] = {
            "variant": variant,
            "runs": len(own),
            "collapsed": int(own["verdict"].isin(COLLAPSES).sum()),
            "healed": int(came_back(own).sum()),
            "failed": int((own["state"] == "failed").sum()),
            "verdicts": ", ".join(f"{verdict} {count}" for verdict, count in counts.items())
            or None,
        }
        paired = _of_variant(values, variant)
        if variant == baseline:
            row |= {"value": paired.mean() if len(paired) else math.nan}
        else:
            pairs = paired.index.intersection(reference.index)
            row |= _paired(paired.loc[pairs], reference.loc[pairs], sign, cut_into)
        rows.append(row)
    for row, p in zip(rows, holm([row.get("p", math.nan) for row in rows]), strict=True):
        row["p_holm"] = p
    table = pd.DataFrame(rows, columns=list(EFFECT_COLUMNS)).astype(EFFECT_COLUMNS)
    folds = reference.index.get_level_values("fold").nunique() if len(reference) else 0
    table.attrs |= {"baseline": baseline, "metric": column, "folds": folds}
    table.attrs["how"] = (
        f"differences in {column} from {baseline}, paired over fold and seed ({folds} fold{'s' if folds != 1 else ''}); "
        "95 % intervals by Student's t"
        + (
            "",
            ", and of this fold only",
            " on the folds, variance raised for overlapping training parts",
        )[min(folds, 2)]
    )
    return table


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for being so many: below .05 at most one time in twenty that none of them is real.

    Source: Holm 1979. It holds however the comparisons depend on each other, and these share their baseline. NaN, a
    comparison without a p-value, stays NaN and does not count.
    """
    order = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    adjusted = [math.nan] * len(p)
    worst = 0.0
    for rank, (value, place) in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * value))
        adjusted[place] = worst
    return adjusted


def _of_variant(values: pd.Series, variant: str) -> pd.Series:
    """Values of one variant by (fold, seed), none where it has none."""
    own: pd.Series = values[values.index.get_level_values("variant") == variant].droplevel(
        "variant"
    )
    return own


def _paired(values: pd.Series, reference: pd.Series, sign: float, cut_into: int) -> dict[str, Any]:
    """Mean difference with its interval, p and call; both series share their index (fold, seed)."""
    row: dict[str, Any] = {"pairs": len(values), "call": "cannot tell"}
    if not len(values):
        return row
    row |= {"value": values.mean(), "baseline_value": reference.mean()}
    row |= interval_over_folds(values - reference, cut_into)
    if row["low"] > 0 or row["high"] < 0:
        row["call"] = "better" if sign * row["mean"] > 0 else "worse"
    return row


def interval_over_folds(values: pd.Series, cut_into: int) -> dict[str, float]:
    """Return mean, low, high (95 %) and the two-sided p of zero for values by (fold, seed); NaN for what one unit lacks.

    Over several folds the unit is the fold, its seeds averaged; `cut_into` is how many folds the table was cut into.
    Runs as units give too narrow an interval wherever folds differ more than seeds: with 5 folds of 3 seeds 83 %
    coverage instead of 95 in simulation, with 2 of 5 folds 65 %. Folds as units stay at 95 to 98, and are the narrower
    ones where seeds differ more. With one fold its seeds are the units. See `Study.effects` for the sources. Units that
    are all the same have no interval either, unless they are zero: an AUC of few volumes takes few values, and two
    differences that happen to be the same would pass for certainty.
    """
    by_fold = values.groupby(level="fold").mean().to_numpy("float64")
    several = len(by_fold) > 1
    units = by_fold if several else values.to_numpy("float64")
    n, mean = (
        len(units),
        float(units.mean()),
    )  # each fold counts once, however many of its runs failed
    if n < 2:
        return {"mean": mean, **_NO_INTERVAL}
    from scipy.stats import t

    overlap = (
        1 / (max(cut_into, n) - 1) if several else 0.0
    )  # volumes validated on over volumes trained on
    spread = float(units.std(ddof=1))
    if spread < 1e-9:  # rounding; the steps of an AUC are 1e-4 and larger
        none = not np.any(np.abs(units) > 1e-9)
        return (
            {"mean": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
            if none
            else {"mean": mean, **_NO_INTERVAL}
        )
    error = spread * math.sqrt(1 / n + overlap)
    half = float(t.ppf(0.975, n - 1)) * error
    return {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "p": 2 * float(t.sf(abs(mean) / error, n - 1)),
    }


_NO_INTERVAL = {"low": math.nan, "high": math.nan, "p": math.nan}
