"""What to expect of a confirmation's variants, and of the candidates together.

The best mean of several is too good: partly it is noise. Means that are shrunken towards each other by as much as their
noise explains are what to expect on average (Efron and Morris 1975). A winner is another question, that of proof, and
`confirm.judge` answers it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from trainables.metrics import auc_interval, ranking_scores
from tune_app.compare.seen_rows import ValidationScores, whole_unseen_folds
from tune_app.results.calibration import Array, fit_calibration
from tune_app.results.effects import interval_over_folds
from tune_app.results.study import Study

CANDIDATE = "trial-"
"""A candidate of the search: this and the trial's id there. The other variants are known settings."""


@dataclass(frozen=True)
class Together:
    """The ensemble of a confirmation's candidates, cross-validated: each fold is scored by runs that did not train on it."""

    members: tuple[str, ...]
    """Variants, in the search's order, the search's best first."""
    folds: tuple[int, ...]
    auc: dict[str, float]
    """Mean over folds and seeds, with `low` and `high` of the 95 % interval over folds and the `p` of zero."""
    gain: dict[str, float]
    """The same of the difference from the first member alone: the best of the search, unless it has no runs here."""


def shrunken_means(values: pd.DataFrame, cut_into: int) -> pd.Series:
    """Return the expected mean of each variant, from `values` of folds (rows) by variants (columns), none missing.

    Each mean moves towards the mean of all by noise / (noise + spread) of its distance: the noise of a mean is that of
    folds within variants, fold by fold and raised by 1 / (cut_into - 1) for training parts that overlap (Nadeau and
    Bengio 2003); the spread is what the variance of the means has in excess of it, at least 0. Two folds and two
    variants are needed; otherwise all NaN.
    """
    folds, variants = values.shape
    means = values.mean()
    if folds < 2 or variants < 2:
        return means * math.nan
    rest = values.sub(values.mean(axis=1), axis=0) - (means - means.mean())
    noise = float((rest**2).to_numpy().sum()) / ((folds - 1) * (variants - 1))
    noise *= 1 / folds + 1 / (max(cut_into, folds) - 1)
    observed = float(means.var(ddof=1))
    kept = max(0.0, 1 - noise / observed) if observed > 0 else 0.0
    return means.mean() + kept * (means - means.mean())


def expected_means(study: Study, folds: Sequence[int]) -> pd.Series:
    """Return the shrunken mean objective of each variant over those of `folds` on which every variant has a score."""
    trials = study.trials_full
    scored = trials[
        (trials["state"] == "completed")
        & trials["objective"].notna()
        & trials["fold"].isin(list(folds))
    ]
    if scored.empty:
        return pd.Series(dtype="float64")
    by_fold = scored.groupby(["fold", "variant"], observed=True)["objective"].mean().unstack()
    names = [name for name in dict.fromkeys(trials["variant"].dropna()) if name in by_fold]
    return shrunken_means(by_fold[names].dropna(), int(scored["num_folds"].max()))


def candidates_together(study: Study, scores: ValidationScores) -> Together | None:
    """Return the cross-validated AUC of the candidates' ensemble; None without two candidates on two unseen folds.

    On each fold and seed it is the AUC of the mean of the candidates' log-odds, each calibrated as an export's are, on
    the variant's scores of the other folds: no score is judged by a fit that saw its label.
    """
    trials = study.trials_full[study.trials_full["state"] == "completed"]
    variants = trials["variant"].dropna().unique()
    members = [name for name in variants if name.startswith(CANDIDATE)]
    folds = whole_unseen_folds(study.spec, sorted(set(trials["fold"].dropna().astype(int))))
    keys = trials[["trial", "variant", "fold", "seed"]].itertuples(index=False)
    runs = {
        (str(variant), int(fold), int(seed)): str(trial)
        for trial, variant, fold, seed in keys
        if str(trial) in scores.runs
    }
    found: dict[tuple[int, int], tuple[float, float]] = {}
    for at in sorted({(fold, seed) for _, fold, seed in runs}):
        if (both := _ensemble_and_first(scores, runs, members, at, folds)) is not None:
            found[at] = both
    judged = tuple(sorted({fold for fold, _ in found}))
    if len(judged) < 2:
        return None
    index = pd.MultiIndex.from_tuples(list(found), names=["fold", "seed"])
    table = pd.DataFrame(list(found.values()), index=index, columns=["ensemble", "first"])
    cut_into = int(trials["num_folds"].max())
    return Together(
        tuple(members),
        judged,
        interval_over_folds(table["ensemble"], cut_into),
        interval_over_folds(table["ensemble"] - table["first"], cut_into),
    )


def _ensemble_and_first(
    scores: ValidationScores,
    runs: dict[tuple[str, int, int], str],
    members: list[str],
    at: tuple[int, int],
    folds: Sequence[int],
) -> tuple[float, float] | None:
    """AUC of the ensemble and of its first member `at` a fold of `folds` and a seed; None where a member has no score."""
    if at[0] not in folds:
        return None
    others = [other for other in folds if other != at[0]]
    rows = scores.rows_of([runs[name, *at] for name in members if (name, *at) in runs])
    parts = [_calibrated(scores, runs, name, at, others, rows) for name in members]
    scored = [part for part in parts if part is not None]
    if len(parts) < 2 or len(scored) < len(parts):
        return None
    mean = np.mean(scored, axis=0)
    ensemble = auc_interval(ranking_scores(mean, scale=1.0), scores.labels[rows]).auc
    return ensemble, scores.auc(runs[members[0], *at], rows)


def _calibrated(
    scores: ValidationScores,
    runs: dict[tuple[str, int, int], str],
    name: str,
    at: tuple[int, int],
    others: Sequence[int],
    rows: Array,
) -> Array | None:
    """Log-odds (N, C) of `rows` by a variant's run `at` a fold and seed, calibrated on its runs of the `others`."""
    fold, seed = at
    own = runs.get((name, fold, seed))
    on_rows = None if own is None else scores.on(own, rows)
    fitted_on = [runs[name, other, seed] for other in others if (name, other, seed) in runs]
    if on_rows is None or not fitted_on:
        return None
    z_NC = np.concatenate([_logits(scores.runs[trial].scores) for trial in fitted_on])
    labels = np.concatenate([scores.labels[scores.runs[trial].rows] for trial in fitted_on])
    return fit_calibration(z_NC, labels).logits(_logits(on_rows))


def _logits(scores: Array) -> Array:
    """Logits (N, C) with the given log-odds: (N,) of class 1 of two, else (N, C) of each class against the rest.

    With more than two classes log(p_c) is recovered from the log-odds of p_c.
    """
    if scores.ndim == 1:
        return np.stack([np.zeros_like(scores), scores], axis=1)
    return -np.logaddexp(0, -scores)
