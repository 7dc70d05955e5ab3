"""Preprocessing that suits a cohort, with the reason for each setting: shape, spacing and intensity.

The recommendation is a starting point. Nothing here loads torch.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainables.config import build_config
from trainables.data.intensity import Intensity, intensity_of
from trainables.data.manifest import Manifest
from trainables.data.scans import Recipe, read_header, read_scan
from trainables.data.spacing import WORTH_TELLING, CommonSpacing, common_spacing
from trainables.data.storage import url_of
from trainables.data.threads import Progress, in_threads

LARGEST_SIDE = 96
"""Voxels of a side that are recommended at most: MedicalNet's usual size, and small enough to train on a GPU in minutes."""

SMALLEST_SIDE = 16

STEP = 8
"""Sides are multiples of this: the network halves them several times."""

SAMPLED_SCANS = 24
"""Scans whose voxels are read for the intensity, evenly spaced over the table; headers are read of all."""

ZERO_BACKGROUND = 0.2
"""Share of voxels that are exactly 0, from which on 0 is taken for the background."""

WINDOW_PERCENTILES = (1.0, 99.0)
"""Of the values in the middle of the scans, where the organ is."""


@dataclass(frozen=True)
class Values:
    """Statistics of the intensities of one scan's voxels."""

    intensity: Intensity
    zeros: float
    """Share of voxels that are exactly 0."""
    middle: tuple[float, float]
    """WINDOW_PERCENTILES of the middle half along each axis."""


@dataclass(frozen=True)
class Recommendation:
    """One hyperparameter with the value that suits the cohort, and why."""

    name: str
    value: Any
    reason: str

    @property
    def line(self) -> str:
        """Return it as one line of text."""
        return f"{self.name}: {self.shown} ({self.reason})"

    @property
    def shown(self) -> str:
        """Return the value as text."""
        if isinstance(self.value, tuple):
            return "x".join(map(str, self.value))
        return f"{self.value:g}" if isinstance(self.value, float) else str(self.value)


def recommend_for_table(
    manifest: Manifest,
    *,
    volume_shape: tuple[int, int, int] | None = None,
    progress: Progress | None = None,
) -> list[Recommendation]:
    """Return the preprocessing that suits a table: headers of all files, voxels of up to SAMPLED_SCANS of them.

    `volume_shape`: keep this shape instead of recommending one. Raises VolumeError for a file that cannot be read.
    """
    paths = [url_of(path) or path for path in manifest.rows["path"]]
    headers = in_threads(read_header, paths)
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(SAMPLED_SCANS, len(paths))).astype(int))
    values = in_threads(
        lambda at: values_of(read_scan(paths[at], headers[at].channels).voxels),
        chosen,
        progress=progress,
    )
    shapes = [header.shape for header in headers]
    spacings_mm = [header.spacing_mm for header in headers]
    return recommend(shapes, spacings_mm, values, volume_shape=volume_shape)


def values_of(voxels: npt.NDArray[Any]) -> Values:
    """Return the statistics of the intensities of a scan's voxels (C, D, H, W)."""
    inside = [slice(side // 4, max(side // 4 + 1, side - side // 4)) for side in voxels.shape[1:]]
    middle = voxels[0][tuple(inside)]
    low, high = np.percentile(middle, WINDOW_PERCENTILES)
    return Values(
        intensity_of(voxels, Recipe.from_config(build_config({}))),
        float((voxels == 0).mean()),
        (float(low), float(high)),
    )


def recommend(
    shapes: npt.ArrayLike,
    spacings_mm: npt.ArrayLike,
    values: Sequence[Values],
    *,
    volume_shape: tuple[int, int, int] | None = None,
) -> list[Recommendation]:
    """Return volume_shape, spacing_mm and the intensity for scans of these shapes and spacings, (N, 3) each.

    `values` may be of some of the scans only. Raises ValueError for no scan.
    """
    if not len(np.asarray(shapes)) or not values:
        raise ValueError("no scan to recommend preprocessing for")
    found = [] if volume_shape is not None else [_shape(shapes, spacings_mm)]
    shape = volume_shape or found[0].value
    spacing = common_spacing(shapes, spacings_mm, shape)
    return [*found, _spacing(spacing), *_intensity(values)]


def _shape(shapes: npt.ArrayLike, spacings_mm: npt.ArrayLike) -> Recommendation:
    """The smallest shape that keeps the detail of the files, or LARGEST_SIDE voxels along the longest side."""
    extents_mm = np.multiply(shapes, spacings_mm).max(axis=0)
    native_mm = float(np.median(np.min(spacings_mm, axis=1)))
    longest_mm = float(extents_mm.max())
    needed = longest_mm / native_mm
    at_mm = native_mm if needed <= LARGEST_SIDE else longest_mm / LARGEST_SIDE
    sides = [
        min(LARGEST_SIDE, max(SMALLEST_SIDE, STEP * math.ceil(extent / at_mm / STEP - 1e-9)))
        for extent in extents_mm
    ]
    measured = f"the largest scan measures {' x '.join(f'{side:.0f}' for side in extents_mm)} mm"
    kept = (
        f"and at the files' own {native_mm:.3g} mm it fits without loss of detail"
        if needed <= LARGEST_SIDE
        else f"which would take {needed:.0f} voxels at the files' own {native_mm:.3g} mm: more than {LARGEST_SIDE} "
        "cost more than they bring in a search"
    )
    return Recommendation("volume_shape", (sides[0], sides[1], sides[2]), f"{measured}, {kept}")


def _spacing(found: CommonSpacing) -> Recommendation:
    reason = "the smallest at which every scan fits: size stays visible, nothing is cropped"
    if found.every_mm > WORTH_TELLING * found.most_mm:
        reason += (
            f"; {found.most_mm:g} shows more detail and crops {found.cropped} of {found.volumes} scans, one to "
            f"{found.kept:.0%} along {found.axis}"
        )
    return Recommendation("spacing_mm", found.every_mm, reason)


def _intensity(values: Sequence[Values]) -> list[Recommendation]:
    counts = Counter(one.intensity.kind for one in values)
    (kind, number), *others = counts.most_common()
    of = f"{number} of {len(values)} scans that were read look like {kind}"
    if others:
        also = ", ".join(f"{count} {other}" for other, count in others)
        return [
            Recommendation(
                "intensity", "zscore", f"the scans are of several kinds ({number} {kind}, {also})"
            )
        ]
    if kind == "CT in HU":
        low, high = (_tens(np.median([one.middle[side] for one in values])) for side in (0, 1))
        high = max(high, low + 10)
        why = "1st and 99th percentile of the middle of the scans, in Hounsfield units"
        return [
            Recommendation("intensity", "window", f"{of}, whose units mean the same in every scan"),
            Recommendation("window_low", low, why),
            Recommendation("window_high", high, why),
        ]
    if kind == "MR or other positive values":
        zeros = float(np.median([one.zeros for one in values]))
        if zeros > ZERO_BACKGROUND:
            reason = f"{of}, {zeros:.0%} of the voxels are 0: a background that should not enter the statistics"
            return [Recommendation("intensity", "zscore_nonzero", reason)]
    why = {
        "mask": "if the masks themselves are classified, their form matters and no value has a unit",
        "already normalised": "the same again changes little, and what was left out stays so",
    }.get(kind, "each scan has its own scale")
    return [Recommendation("intensity", "zscore", f"{of}: {why}")]


def _tens(value: Any) -> float:
    return float(round(float(value), -1))
