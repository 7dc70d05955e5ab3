"""One spacing for a whole cohort: the smallest at which every volume fits, and how much a smaller one would crop.

Where each volume is brought to the smallest spacing at which that volume fits, all of them fill the network's input, and
how large they are is lost: often the very thing that the label is about. With one common spacing a large heart stays larger
than a small one.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainables.config import FineTuneConfig
from trainables.data.manifest import Manifest
from trainables.data.scans import read_header
from trainables.data.storage import url_of
from trainables.data.threads import in_threads

MOST = 0.95
"""Share of the volumes that the smaller of the two spacings leaves whole."""

WORTH_TELLING = 1.1
"""Factor between the two spacings from which on the smaller one is shown as a choice."""


@dataclass(frozen=True)
class CommonSpacing:
    """The isotropic spacings, in mm, that suit a cohort."""

    every_mm: float
    """The smallest at which every volume fits."""
    most_mm: float
    """The smallest at which MOST of the volumes fit."""
    volumes: int
    cropped: int
    """Volumes that `most_mm` crops."""
    kept: float
    """The smallest share of its extent that a volume keeps at `most_mm`, along `axis`."""
    axis: str

    def lines(self) -> list[str]:
        """Return the consequences of the spacings, in sentences."""
        lines = [
            f"spacing_mm: {self.every_mm:g} is the smallest at which every volume fits; it is the default of a new study"
        ]
        if self.every_mm > WORTH_TELLING * self.most_mm:
            lines.append(
                f"spacing_mm: {self.most_mm:g} shows more detail and crops {self.cropped} of {self.volumes}, one to "
                f"{self.kept:.0%} of its extent along {self.axis}"
            )
        lines.append(
            "spacing_mm: null scales each volume separately, which hides how large things are"
        )
        return lines


def common_spacing(
    shapes: npt.ArrayLike, spacings_mm: npt.ArrayLike, volume_shape: tuple[int, int, int]
) -> CommonSpacing:
    """Return the common spacings of scans with these shapes and spacings, (N, 3) each, in voxels and mm along (x, y, z).

    Spacings are rounded up to three digits, so that what fits still does.
    """
    extents_mm = np.multiply(shapes, spacings_mm)
    needed = (extents_mm / np.asarray(volume_shape)).max(axis=1)
    every = _rounded_up(float(needed.max()))
    whole = math.ceil(MOST * len(needed) - 1e-9)
    most = min(every, _rounded_up(float(np.sort(needed)[whole - 1])))
    kept = np.minimum(np.asarray(volume_shape) * most / extents_mm, 1)
    return CommonSpacing(
        every_mm=every,
        most_mm=most,
        volumes=len(needed),
        cropped=int((kept < 1).any(axis=1).sum()),
        kept=float(kept.min()),
        axis="xyz"[int(kept.min(axis=0).argmin())],
    )


def spacing_of_table(manifest: Manifest, volume_shape: tuple[int, int, int]) -> CommonSpacing:
    """Return the common spacings of a table's files, from their headers. Raises VolumeError for a bad one."""
    paths = [url_of(path) or path for path in manifest.rows["path"]]
    headers = in_threads(read_header, paths)
    return common_spacing(
        [header.shape for header in headers],
        [header.spacing_mm for header in headers],
        volume_shape,
    )


def with_common_spacing(
    config: FineTuneConfig, manifest: Manifest
) -> tuple[FineTuneConfig, CommonSpacing | None]:
    """Return `config` with the spacing at which every volume of the table fits, and how it came about.

    A config that names a spacing, None included, is returned as it is, with None.
    """
    if "spacing_mm" in config.model_fields_set:
        return config, None
    found = spacing_of_table(manifest, config.volume_shape)
    return config.model_copy(update={"spacing_mm": (found.every_mm,) * 3}), found


def _rounded_up(value: float) -> float:
    """Three digits, never below the value but for rounding in the last bits of it."""
    digits = 2 - math.floor(math.log10(value))
    return float(f"{math.ceil(value * 10**digits * (1 - 1e-9)) / 10**digits:.3g}")
