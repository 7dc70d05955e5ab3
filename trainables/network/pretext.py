"""Labels made from the volumes, to pretrain a backbone where released weights are not available or do not fit.

    rotation   which of ten turns a volume was given: none, or 90, 180 or 270 degrees about one of the three axes
               (Gidaris et al. 2018; in three dimensions Taleb et al. 2020). Each volume becomes ten.
    size       to which of `SIZES` equally large groups a volume belongs by the share of its voxels above its own mean:
               of a mask the size of the shape, of a scan how much of it the body fills.

Neither looks at a label of the table. Nothing here loads torch.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from trainables.data.folds import Split, grouped_folds
from trainables.data.volumes import Cohort

Pretext = Literal["rotation", "size"]

TURNS: tuple[tuple[tuple[int, int], int], ...] = (
    ((-2, -1), 0),
    *((axes, quarters) for axes in ((-2, -1), (-3, -1), (-3, -2)) for quarters in (1, 2, 3)),
)
"""The turn for each class of `rotation`: its plane, and the number of quarter turns."""

SIZES = 8
"""Classes of `size`."""

TENTHS = 10
"""Parts into which subjects are divided: shares are tenths, and a tenth of the pretraining subjects is held out."""


class PretextError(ValueError):
    """Volumes that a pretext cannot be made of."""


def part_of_subjects(
    labels: npt.NDArray[np.int64], subjects: npt.NDArray[np.str_], tenths: int
) -> npt.NDArray[np.bool_]:
    """Return which rows belong to the first `tenths` tenths of the subjects; the classes are spread evenly.

    No subject is on both sides, and the same rows give the same parts in any order. Raises PretextError when there are
    fewer than ten subjects.
    """
    if not 1 <= tenths <= TENTHS:
        raise PretextError(f"{tenths} tenths of the subjects: 1 to {TENTHS}")
    if tenths == TENTHS:
        return np.ones(len(labels), dtype=bool)
    found = len(np.unique(subjects))
    if found < TENTHS:
        raise PretextError(
            f"{found} training subjects: at least {TENTHS} are needed to give some of them to pretraining"
        )
    chosen: npt.NDArray[np.bool_] = grouped_folds(_capped(labels), subjects, TENTHS) < tenths
    return chosen


def _capped(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`labels`, classes with fewer rows than parts counted to the largest: they cannot be spread over all parts."""
    _, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    capped: npt.NDArray[np.int64] = np.where(counts[places] < TENTHS, counts.argmax(), places)
    return capped


def pretext_cohort(
    cohort: Cohort, rows: npt.NDArray[np.int64], pretext: Pretext, file: Path
) -> Cohort:
    """Return the volumes of `rows` as another cohort, labelled 0 .. classes - 1 by `pretext`; its volumes are in `file`.

    `rotation` writes `file`, ten volumes (C, D, H, W) float16 for each row, one after the other; `size` the rows' own.
    Raises PretextError: for `rotation` the volumes must be cubes, for `size` at least two a class are needed.
    """
    if pretext == "rotation":
        if len(set(cohort.volumes.shape[2:])) > 1:
            sides = " x ".join(map(str, cohort.volumes.shape[2:]))
            raise PretextError(
                f"volumes of {sides} voxels: rotation needs cubes; set volume_shape to one number, or use size"
            )
        turns = TURNS
        labels = np.tile(np.arange(len(turns)), len(rows))
    else:
        if len(rows) < 2 * SIZES:
            raise PretextError(
                f"{len(rows)} volumes: size needs {2 * SIZES}, two for each of its {SIZES} classes"
            )
        turns = TURNS[:1]
        shares = np.array([above_mean(cohort.volumes[row]) for row in rows])
        ranks = shares.argsort(kind="stable").argsort(kind="stable")
        labels = ranks * SIZES // len(rows)
    shape = (len(rows) * len(turns), *cohort.volumes.shape[1:])
    written = np.lib.format.open_memmap(file, mode="w+", dtype=np.float16, shape=shape)
    for place, row in enumerate(rows):
        volume = np.asarray(cohort.volumes[row])
        for turn, (axes, quarters) in enumerate(turns):
            written[place * len(turns) + turn] = np.rot90(volume, quarters, axes)
    written.flush()
    repeated = np.repeat(rows, len(turns))
    return dataclasses.replace(
        cohort,
        folder=file.parent,
        volumes=np.load(file, mmap_mode="r"),
        labels=labels.astype(np.int64),
        subjects=cohort.subjects[repeated],
        paths=tuple(cohort.paths[row] for row in repeated),
        spacings_mm=cohort.spacings_mm[repeated],
    )


def above_mean(volume_CDHW: npt.NDArray[np.floating]) -> float:
    """Return the share of voxels above the volume's mean."""
    values = volume_CDHW.astype(np.float32)
    return float((values > values.mean()).mean())


def held_out_split(cohort: Cohort) -> Split:
    """Return a split of a pretext cohort in which a tenth of the subjects, all their volumes, validates."""
    validates = part_of_subjects(cohort.labels, cohort.subjects, 1)
    none = np.zeros(0, dtype=np.int64)
    return Split(train=np.flatnonzero(~validates), val=np.flatnonzero(validates), test=none)


def classes_of(pretext: Pretext) -> int:
    """Return how many classes a pretext has."""
    return len(TURNS) if pretext == "rotation" else SIZES
