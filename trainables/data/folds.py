"""Folds and splits of a cohort: stratified by label, grouped by subject."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.config import FineTuneConfig
from trainables.data.manifest import Manifest
from trainables.data.table_file import ManifestError
from trainables.subject_auc import subjects_of_classes

FOLD_SEED = 0
"""Folds depend on the table alone, never on a run's seed: or scores of two seeds would be of different volumes."""

FEWEST = 5
"""Volumes of a class in a validation part, below which a notice calls its AUC of little use."""


@dataclass(frozen=True, eq=False)
class Split:
    """Positions in `Manifest.rows` (and in its cohort), int64, ascending; no subject is in two of them."""

    train: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def split_rows(manifest: Manifest, *, fold: int, num_folds: int, cross_validate: bool) -> Split:
    """Return which rows train, validate and test; always the same for the same table, whatever its row order.

    1. Rows whose split is `test` are the test rows, and never in the other two.
    2. Where the table has `val` rows, its own split decides and `fold` is not used, unless `cross_validate`.
    3. Else, where the table has a `fold` column, the rows of `fold` validate and the others train.
    4. Else scikit-learn's StratifiedGroupKFold makes `num_folds` folds: subjects stay whole, classes are spread evenly.

    Raises ManifestError: no such fold, or a fold whose training or validation part would lack a class.
    """
    rows = manifest.rows
    words = rows["split"].to_numpy(dtype=object)
    test = np.flatnonzero(words == "test")
    pool = np.flatnonzero(words != "test")
    folds = rows["fold"].to_numpy(dtype=float, na_value=np.nan)[pool]
    if (words == "val").any() and not cross_validate:
        validates = words[pool] == "val"
    elif len(pool) and not np.isnan(folds).any():
        given = sorted({int(number) for number in folds})
        if fold not in given:
            raise ManifestError(
                f"fold={fold}: the table's fold column has {', '.join(map(str, given))}; choose one of them"
            )
        validates = folds == fold
    else:
        if not 0 <= fold < num_folds:
            raise ManifestError(
                f"fold={fold}: there are folds 0 to {num_folds - 1}; raise num_folds or lower fold"
            )
        labels = rows["label"].to_numpy(dtype=np.int64)[pool]
        subjects = rows["subject"].to_numpy(dtype=object)[pool]
        validates = _made_folds(labels, subjects, num_folds, manifest.num_classes) == fold
    return Split(train=pool[~validates], val=pool[validates], test=test)


def split_of(manifest: Manifest, config: FineTuneConfig) -> Split:
    """Return the split that a run with `config` trains and validates on. Raises ManifestError as `split_rows` does."""
    return split_rows(
        manifest, fold=config.fold, num_folds=config.num_folds, cross_validate=config.cross_validate
    )


def few_of_a_class(counts: Sequence[int], unit: str = "subjects") -> str | None:
    """Return a notice on a validation part with these `counts` of subjects per class; None with FEWEST of each or more.

    `unit`: `volumes` where only these have been counted.
    """
    few = [
        f"{_counted(count, unit)} of class {label}"
        for label, count in enumerate(counts)
        if count < FEWEST
    ]
    return _too_few(", ".join(few), unit) if few else None


def few_of_the_rarest(count: int) -> str | None:
    """Return the same where only the number of subjects of the rarest class is known."""
    if count >= FEWEST:
        return None
    return _too_few(f"{_counted(count, 'subjects')} of the rarest class", "subjects")


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit.removesuffix('s') if count == 1 else unit}"


def _too_few(what: str, unit: str) -> str:
    return (
        f"only {what} to validate on: with fewer than {FEWEST} {unit} of a class the 95 % interval of an AUC is .4 wide or "
        "wider, and which run is best is mostly luck; use fewer folds (num_folds), or judge over folds (`medtune confirm`)"
    )


def thin_folds(manifest: Manifest, config: FineTuneConfig, *, all_folds: bool = False) -> list[str]:
    """Return a line for the validation part of the config's fold, or of each fold, that has few subjects of a class.

    Raises ManifestError as `split_rows` does.
    """
    own = (manifest.rows["split"] == "val").any() and not config.cross_validate
    folds = [config.fold]
    if all_folds and not own:
        given = manifest.rows.loc[manifest.rows["split"] != "test", "fold"]
        there = len(given) and given.notna().all()
        folds = sorted({int(one) for one in given}) if there else list(range(config.num_folds))
    labels = manifest.rows["label"].to_numpy(dtype=np.int64)
    subjects = manifest.rows["subject"].to_numpy(dtype=str)
    lines = []
    for fold in folds:
        split = split_rows(
            manifest, fold=fold, num_folds=config.num_folds, cross_validate=config.cross_validate
        )
        told = few_of_a_class(
            subjects_of_classes(labels[split.val], subjects[split.val], manifest.num_classes)
        )
        if told is not None:
            lines.append(f"{'validation rows' if own else f'fold {fold}'}: {told}")
    return lines


def _made_folds(
    labels: npt.NDArray[np.int64],
    subjects: npt.NDArray[np.object_],
    num_folds: int,
    num_classes: int,
) -> npt.NDArray[np.int64]:
    """The fold in which each row validates. Rows are sorted first, so that their order in the table does not matter."""
    problems = []
    for label in range(num_classes):
        count = len(set(subjects[labels == label]))
        if count < num_folds:
            problems.append(
                f"num_folds={num_folds}: class {label} has {count} subject(s) to spread over the folds; "
                f"lower num_folds{f' to {count}' if count > 1 else ''}, or add volumes of other subjects"
            )
    if problems:
        raise ManifestError(problems)
    folds = grouped_folds(labels, subjects, num_folds)
    inside = np.zeros((num_folds, num_classes), dtype=np.int64)
    np.add.at(inside, (folds, labels), 1)
    outside = inside.sum(axis=0) - inside
    for fold, label in np.argwhere((inside == 0) | (outside == 0)):
        part = "training" if inside[fold, label] else "validation"
        problems.append(
            f"num_folds={num_folds}: the {part} part of fold {fold} would have no row of class {label}: "
            "lower num_folds, or give the table a fold column"
        )
    if problems:
        raise ManifestError(problems)
    return folds


def grouped_folds(
    labels: npt.NDArray[np.int64], subjects: npt.NDArray[Any], num_folds: int
) -> npt.NDArray[np.int64]:
    """Return the fold of each row: subjects whole, labels spread evenly, the same folds for the same rows in any order."""
    order = np.lexsort((labels, subjects.astype(str)))
    folds = np.empty(len(labels), dtype=np.int64)
    folds[order] = _folds_of_sorted(
        tuple(labels[order].tolist()), tuple(map(str, subjects[order])), num_folds
    )
    return folds


@functools.lru_cache(maxsize=4)
def _folds_of_sorted(
    labels: tuple[int, ...], subjects: tuple[str, ...], num_folds: int
) -> tuple[int, ...]:
    """The folds of rows in their order. Remembered: a thousand rows take half a second, and every trial asks for them."""
    # A second to import, and only needed here
    from sklearn.model_selection import StratifiedGroupKFold

    folds = [0] * len(labels)
    folder = StratifiedGroupKFold(num_folds, shuffle=True, random_state=FOLD_SEED)
    for number, (_, validates) in enumerate(folder.split(labels, labels, subjects)):
        for row in validates:
            folds[row] = number
    return tuple(folds)
