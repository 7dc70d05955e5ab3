"""The evidence of a study's trials about hyperparameters: their axes, importance, and effects of variants."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from trainables.diagnosis import FALLS
from tune_app.results.query import column_of, smaller_is_better
from tune_app.results.tables import came_back
from tune_app.study.rows import ENDED

NAMES_OF_BASELINE = ("baseline", "all-fixes", "documented-after", "documented", "after", "defaults")
"""Variants that others are compared with when none is named: the first of these that is there, or the first variant."""

COLLAPSES = (*FALLS, "never_learned")
"""Verdicts of runs that never learned, or lost their performance; the others warn."""

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
    "unscored": "Int64",
    "verdicts": "string",
    "call": "string",
}
"""Columns of `Study.effects()` -> dtype."""


# Effects ---------------------------------------------------------------------------------------------------------------


def effects(trials: pd.DataFrame, metric: str, baseline: str | None) -> pd.DataFrame:
    """See `Study.effects`."""
    trials = trials[trials["variant"].notna()]
    variants = list(dict.fromkeys(trials["variant"]))
    if len(variants) < 2:
        raise ValueError(
            f"effects compare variants, and these trials have {len(variants)}: "
            "`medtune ablate` and `medtune confirm` make studies with variants"
        )
    baseline = _baseline(variants) if baseline is None else baseline
    if baseline not in variants:
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
        row: dict[str, Any] = {"variant": variant, **_counts(own, usable)}
        paired = _of_variant(values, variant)
        if variant == baseline:
            row |= {"value": paired.mean()}
        else:
            pairs = paired.index.intersection(reference.index)
            row |= _paired(paired.loc[pairs], reference.loc[pairs], sign, cut_into)
        rows.append(row)
    _let_no_survivors_win(rows, baseline)
    for row, p in zip(rows, holm([row.get("p", math.nan) for row in rows]), strict=True):
        row["p_holm"] = p
    table = pd.DataFrame(rows, columns=list(EFFECT_COLUMNS)).astype(EFFECT_COLUMNS)
    folds = reference.index.get_level_values("fold").nunique()
    table.attrs |= {"baseline": baseline, "metric": column, "folds": folds}
    table.attrs["how"] = (
        f"differences in {column} from {baseline}, paired over fold and seed ({folds} fold{'s' if folds != 1 else ''}); "
        "95 % intervals by Student's t"
        + (
            "",
            ", over the seeds of this fold only, which is no test",
            " on the folds, variance raised for overlapping training parts",
        )[min(folds, 2)]
    )
    return table


def _baseline(variants: Sequence[str]) -> str:
    return next((name for name in NAMES_OF_BASELINE if name in variants), variants[0])


def _counts(own: pd.DataFrame, usable: pd.DataFrame) -> dict[str, Any]:
    """How the runs of a variant ended; `unscored` of them are in no pair: without a finite score, failed, or stopped."""
    verdicts = own["verdict"].value_counts()
    return {
        "runs": len(own),
        "collapsed": int(own["verdict"].isin(COLLAPSES).sum()),
        "healed": int(came_back(own).sum()),
        "failed": int((own["state"] == "failed").sum()),
        "unscored": int((own["state"].isin(ENDED) & ~own.index.isin(usable.index)).sum()),
        "verdicts": ", ".join(f"{verdict} {count}" for verdict, count in verdicts.items()) or None,
    }


def _let_no_survivors_win(rows: list[dict[str, Any]], baseline: str) -> None:
    """Take back a call in favour of a variant that lost runs: the pairs hold only those runs that came through."""
    lost = {row["variant"]: row["unscored"] > 0 for row in rows}
    for row in rows:
        favoured = {"better": row["variant"], "worse": baseline}.get(str(row.get("call")))
        if favoured is not None and lost[favoured]:
            row["call"] = "cannot tell"


def holm(p: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for their number: below .05 at most one time in twenty that none of them is real.

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
    tested = not math.isnan(row["p"])
    if tested and (row["low"] > 0 or row["high"] < 0):
        row["call"] = "better" if sign * row["mean"] > 0 else "worse"
    return row


def interval_over_folds(values: pd.Series, cut_into: int) -> dict[str, float]:
    """Return mean, low, high (95 %) and the two-sided p of zero for values by (fold, seed); NaN for what one unit lacks.

    Over several folds the unit is the fold, its seeds averaged; `cut_into` is how many folds the table was cut into.
    Runs as units give too narrow an interval wherever folds differ more than seeds: with 5 folds of 3 seeds 83 %
    coverage instead of 95 in simulation, with 2 of 5 folds 65 %. Folds as units stay at 95 to 98, and are the narrower
    ones where seeds differ more. With one fold its seeds are the units of the interval, and there is no p: under a simulated
    null, a test over the seeds of one split is below .05 in 26 to 74 % of the cases, since all of them share its volumes. See
    `Study.effects` for the sources. Units that
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

    # volumes validated on over volumes trained on
    overlap = 1 / (max(cut_into, n) - 1) if several else 0.0
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
        "p": 2 * float(t.sf(abs(mean) / error, n - 1)) if several else math.nan,
    }


_NO_INTERVAL = {"low": math.nan, "high": math.nan, "p": math.nan}
