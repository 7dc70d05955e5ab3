"""Small cohorts of real NIfTI files with a known answer, for the demo and for tests.

The volumes are as untidy as real ones: shapes, spacings and orientations differ from file to file, intensities are
scaled integers, and a subject has one to three volumes. The classes differ in a shape in millimetres, so a
reader that mixes up spacing or orientation loses it.
"""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.orientations import axcodes2ornt, ornt_transform

from trainables.data.scans import write_nifti
from trainables.data.volumes import new_folder

ORIENTATIONS = ("RAS", "LAS", "LPS", "PIR")
"""In which a subject's files are stored, at random: radiological, neurological, DICOM's own, and sagittal slices."""

FLATNESS = 0.5
"""Height of the flattened ball over that of the round one. Its width makes up for it: both have the same volume."""

Array = npt.NDArray[np.float64]
Shape = Callable[[Array, float], Array]
"""Points (3, x, y, z) in mm from the centre, RAS+, and a size in mm -> how far inside the shape each point is, in mm."""


def write_cohort(
    folder: Path,
    *,
    subjects: int = 40,
    seed: int = 0,
    positive_share: float = 0.3,
    side: tuple[int, int] = (20, 28),
    noise: float = 0.6,
) -> Path:
    """Write a cohort of balls in noise, round (class 0) or flattened from feet to head (class 1); returns its table.

    positive_share: of the subjects, whose volumes (one to three) all have the same class. side: least and most voxels
    a side. noise: its standard deviation over the contrast. The same arguments give the same bytes. `folder` gets
    `table.csv` (path, label, subject) and `volumes/`, and appears only when it is complete.

    Raises CohortError when `folder` holds something already.
    """
    rng = np.random.default_rng([seed, 0])
    labels = np.zeros(subjects, dtype=np.int64)
    labels[rng.permutation(subjects)[: round(positive_share * subjects)]] = 1
    counts = rng.integers(1, 4, size=subjects)
    with new_folder(folder) as target:
        (target / "volumes").mkdir()
        lines = ["path,label,subject"]
        for subject, (label, count) in enumerate(zip(labels, counts, strict=True)):
            size = rng.uniform(0.9, 1.1)
            for number in range(count):
                name = f"volumes/{subject:04d}_{number}.nii.gz"
                voxels, affine = _scan((_ball, _flattened)[label], size, rng, side, noise)
                write_nifti(target / name, voxels, affine, dtype=np.int16)
                lines.append(f"{name},{label},subject-{subject:04d}")
        (target / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "table.csv"


def _scan(
    shape: Shape, size: float, rng: np.random.Generator, side: tuple[int, int], noise: float
) -> tuple[npt.NDArray[np.float32], Array]:
    """Voxels in a random orientation, and their affine."""
    sides = rng.integers(side[0], side[1] + 1, size=3)
    spacing_mm = rng.uniform(0.8, 1.25, size=3).round(2)
    extents_mm = sides * spacing_mm
    origin_mm = -(extents_mm - spacing_mm) / 2
    points = (
        np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"))
        * spacing_mm[:, None, None, None]
    )
    centre_mm = rng.uniform(-0.08, 0.08, size=3) * extents_mm
    inside_mm = shape(
        points + (origin_mm - centre_mm)[:, None, None, None], 0.24 * size * extents_mm.min()
    )
    intensity = 1 / (1 + np.exp(-inside_mm.clip(-20, 20) / 0.4)) + rng.normal(
        0, noise, size=inside_mm.shape
    )
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = origin_mm
    image = nib.Nifti1Image((100 + 300 * intensity).astype(np.float32), affine)
    orientation = axcodes2ornt(ORIENTATIONS[rng.integers(len(ORIENTATIONS))])
    turned = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), orientation))
    return np.asarray(turned.dataobj, dtype=np.float32), np.asarray(turned.affine, dtype=np.float64)


def _ellipsoid(points: Array, axes_mm: npt.ArrayLike) -> Array:
    axes = np.asarray(axes_mm, dtype=np.float64)[:, None, None, None]
    return np.asarray((1 - np.sqrt(((points / axes) ** 2).sum(axis=0))) * axes.min())


def _ball(points: Array, size: float) -> Array:
    return _ellipsoid(points, (size, size, size))


def _flattened(points: Array, size: float) -> Array:
    wide = size / FLATNESS**0.5
    return _ellipsoid(points, (wide, wide, FLATNESS * size))
