"""Which hyperparameters matter, by Optuna's evaluators."""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from optuna.distributions import CategoricalDistribution

from search_spaces.space import DERIVED, READ_ONLY_WHEN, Parameter, Space, is_read
from tune_app.results.query import column_of, smaller_is_better
from tune_app.results.text import format_value


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
            texts = values.map(partial(_choice_text, self.name))
            found: np.ndarray = texts.map(order).to_numpy("float64", na_value=math.nan)
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
            text = _choice_text(self.name, value)
            return float(self.choices.index(text)) if text in self.choices else math.nan
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


def axis_of(values: pd.Series, space: Space | None, epochs: int) -> Axis:
    """Return the axis of the hyperparameter in column `values`: scale and range of the search space, or of the values.

    `ema_decay` and `drw_beta` are 1 - value on a logarithm; without a space, rates are logarithmic, and so are
    values that span a factor of 30.
    """
    name = str(values.name)
    parameter = _parameter(space, name)
    if parameter is not None and isinstance(parameter.distribution, CategoricalDistribution):
        texts = [_choice_text(name, choice) for choice in parameter.choices]
        # Warm starts may be outside
        choices = tuple(dict.fromkeys([*texts, *_texts(name, values)]))
        return Axis(name, "choice", 0.0, max(len(choices) - 1.0, 1.0), choices, ranged=True)
    if parameter is None and (
        not pd.api.types.is_numeric_dtype(values.dtype) or values.dtype == "boolean"
    ):
        choices = tuple(_texts(name, values))
        return Axis(name, "choice", 0.0, max(len(choices) - 1.0, 1.0), choices)
    numbers = values.dropna().to_numpy("float64")
    kind = _scale(name, parameter, numbers)
    ends = _ends(parameter, epochs) if parameter is not None else None
    ranged = ends is not None
    places = _on_scale(kind, np.array(ends) if ends is not None else numbers)
    places = places[np.isfinite(places)]
    if not len(places):
        return Axis(name, kind, 0.0, 1.0)
    return Axis(name, kind, float(places.min()), float(places.max()), ranged=ranged)


def _scale(
    name: str, parameter: Parameter | None, numbers: np.ndarray
) -> Literal["even", "log", "one_minus_log"]:
    if name in ("ema_decay", "drw_beta"):
        return "one_minus_log"
    if parameter is not None:
        return "log" if parameter.distribution.log else "even"
    positive = len(numbers) > 0 and (numbers > 0).all()
    wide = positive and (name.endswith("_lr") or numbers.max() / numbers.min() >= 30)
    return "log" if wide else "even"


def _choice_text(name: str, value: Any) -> str:
    """Return a choice of hyperparameter `name` as text."""
    return "none" if value is None or value is pd.NA else format_value(name, value)


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


def _parameter(space: Space | None, name: str) -> Parameter | None:
    if space is None:
        return None
    return next((p for p in space.parameters.values() if p.hyperparameter == name), None)


def _ends(parameter: Parameter, epochs: int) -> tuple[float, float] | None:
    """The hyperparameter's range in the space; None where it depends on another one's value."""
    if parameter.name in DERIVED and DERIVED[parameter.name].reads:
        return None
    low, high = (parameter.decode(end, {"epochs": epochs}) for end in parameter.ends)
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
    return sorted({_choice_text(name, value) for value in values})


def importance(
    trials: pd.DataFrame,
    axes: Mapping[str, Axis],
    metric: str,
    *,
    evaluator: str,
    repeats: int,
    seed: int,
) -> pd.DataFrame:
    """See `Study.importance`; `axes` are those of the hyperparameters searched."""
    column = column_of(trials, metric)
    rows = trials[trials["state"].isin(["completed", "stopped"]) & trials[column].notna()]
    axes = {name: axis for name, axis in axes.items() if rows[name].nunique(dropna=False) > 1}
    names = list(axes)
    if len(rows) < 4 or not names:
        raise ValueError(
            f"importance needs four ended trials that differ in something; here are {len(rows)} "
            f"that differ in {', '.join(names) or 'nothing'}"
        )
    if rows[column].nunique() < 2:
        raise ValueError(
            f"all {len(rows)} ended trials have the same {column}: nothing to account for"
        )
    from optuna.importance import get_param_importances

    with _quiet_optuna():
        temporary = _temporary_study(rows, axes, column)
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


def _temporary_study(rows: pd.DataFrame, axes: Mapping[str, Axis], column: str) -> Any:
    """An Optuna study in memory that holds `rows` as completed trials, whatever ended them."""
    import optuna
    from optuna.distributions import BaseDistribution, FloatDistribution

    distributions: dict[str, BaseDistribution] = {}
    values: dict[str, list[Any]] = {}
    for name, axis in axes.items():
        if axis.kind == "choice":
            values[name] = [_choice_text(name, v) for v in rows[name]]
            distributions[name] = CategoricalDistribution(axis.choices)
        else:  # read or not: Optuna's evaluators leave out hyperparameters that some trials lack
            places = _on_scale(axis.kind, rows[name].to_numpy("float64"))
            values[name] = places.tolist()
            distributions[name] = FloatDistribution(min(axis.low, *places), max(axis.high, *places))
    temporary = optuna.create_study(
        direction="minimize" if smaller_is_better(column) else "maximize"
    )
    for row, value in enumerate(rows[column].astype("float64")):
        params = {name: values[name][row] for name in axes}
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
