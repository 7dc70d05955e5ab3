"""Which rows a search chose by, and the validation scores that judge a confirmation on the others.

Rows are known one by one, not by the number of their fold: a search with `cross_validate` and a confirmation on the table's
own split cut the same rows differently.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainables.data.json_files import read_json
from trainables.data.manifest import Manifest
from trainables.metrics import auc_interval
from tune_app.compare.ablation import Folds
from tune_app.compare.paired_auc import PairedSplit
from tune_app.results.study import Study
from tune_app.study.errors import SpecError
from tune_app.study.spec import StudySpec

FEWEST = 2
"""Subjects of each class that a fold needs for its AUC to count."""

SCORES_FORMAT = 1


def rows_that_chose(search: Study, manifest: Manifest) -> frozenset[int]:
    """Return the rows of the table that any trial of the search was validated on: its winner was chosen by these."""
    cuts = search.trials_full[["fold", "num_folds", "cross_validate"]].dropna().drop_duplicates()
    rows: set[int] = set()
    for fold, num_folds, cross_validate in cuts.itertuples(index=False):
        folds = Folds((int(fold),), int(num_folds), bool(cross_validate))
        rows |= set(folds.split(manifest, int(fold)).val.tolist())
    return frozenset(rows)


def folds_with(rows: Iterable[int], folds: Folds, manifest: Manifest) -> tuple[int, ...]:
    """Return the folds of a plan that are validated on any of `rows`."""
    wanted = np.fromiter(rows, dtype=np.int64)
    return tuple(
        fold for fold in folds.numbers if np.isin(folds.split(manifest, fold).val, wanted).any()
    )


# Scores of the validation rows, row by row -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RunScores:
    """How the kept weights of one run score the volumes that it was validated on."""

    rows: np.ndarray
    scores: np.ndarray
    """Log-odds, (N,) for two classes, else (N, C)."""


@dataclass(frozen=True, eq=False)
class ValidationScores:
    """validation_scores.json of a confirmation."""

    labels: np.ndarray
    """(N,) of all rows of the table."""
    subjects: np.ndarray
    """(N,) text."""
    runs: Mapping[str, RunScores]
    """By trial."""

    def rows_of(self, trials: Iterable[str]) -> np.ndarray:
        """Return the rows that any of these runs was validated on, in order."""
        found = [self.runs[trial].rows for trial in trials if trial in self.runs]
        return np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.int64)

    def suffice(self, rows: np.ndarray) -> bool:
        """Whether an AUC on `rows` can count: FEWEST subjects of every class of the table."""
        return len(rows) > 0 and all(
            len(np.unique(self.subjects[rows][self.labels[rows] == label])) >= FEWEST
            for label in np.unique(self.labels)
        )

    def on(self, trial: str, rows: np.ndarray) -> np.ndarray | None:
        """Return the run's scores of `rows`, None where it has not scored them all."""
        run = self.runs.get(trial)
        if run is None or not np.isin(rows, run.rows).all():
            return None
        order = np.argsort(run.rows)
        return run.scores[order[np.searchsorted(run.rows, rows, sorter=order)]]

    def auc(self, trial: str, rows: np.ndarray) -> float:
        """Return the run's AUC on `rows`; NaN where it has not scored them."""
        scores = self.on(trial, rows)
        return float("nan") if scores is None else auc_interval(scores, self.labels[rows]).auc

    def paired(
        self, ours: Mapping[int, str], theirs: Mapping[int, str], rows: np.ndarray
    ) -> PairedSplit | None:
        """Return two variants' runs of one fold on `rows`, paired by seed; None without a pair. Arguments: seed -> trial."""
        pairs = []
        for seed in sorted(ours.keys() & theirs.keys()):
            one, other = self.on(ours[seed], rows), self.on(theirs[seed], rows)
            if one is not None and other is not None:
                pairs.append((one, other))
        if not pairs:
            return None
        first, second = zip(*pairs, strict=True)
        return PairedSplit(self.labels[rows], self.subjects[rows], first, second)


def unseen_rows(spec: StudySpec, fold: int, validated: np.ndarray) -> np.ndarray:
    """Return those of a fold's validation rows that the search did not choose by."""
    if spec.seen_rows is None:  # of a version that knew whole folds only
        return validated[:0] if fold in spec.seen_folds else validated
    return validated[~np.isin(validated, np.array(spec.seen_rows, dtype=np.int64))]


def whole_unseen_folds(spec: StudySpec, folds: Iterable[int]) -> list[int]:
    """Return the folds without any row that the search chose by."""
    return [fold for fold in folds if fold not in spec.seen_folds]


def scores_file(root: Path) -> Path:
    """validation_scores.json of the confirmation in `root`."""
    return root / "validation_scores.json"


def read_scores(root: Path) -> ValidationScores | None:
    """Return the scores of the confirmation in `root`; None where there are none. Raises SpecError when damaged."""
    path = scores_file(root)
    if not path.is_file():
        return None
    try:
        written = read_json(path)
        if written["format"] != SCORES_FORMAT:
            raise ValueError(f"format {written['format']}")
        runs = {
            str(trial): RunScores(
                np.array(run["rows"], dtype=np.int64), np.array(run["scores"], dtype=np.float64)
            )
            for trial, run in written["runs"].items()
        }
        return ValidationScores(
            np.array(written["labels"], dtype=np.int64), np.array(written["subjects"]), runs
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(
            [f"{path}: damaged ({error}): remove it, and `medtune confirm` scores the rows again"]
        ) from None
