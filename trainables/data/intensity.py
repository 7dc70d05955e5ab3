"""The kind of numbers in a scan: Hounsfield units, MR, a mask, or already normalised; and how preparation changes them.

Inferred from the values alone, since NIfTI has no field for it. It is a guess, and reported as one.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trainables.data.scans import Recipe

Kind = Literal["CT in HU", "MR or other positive values", "mask", "already normalised", "unknown"]

SAMPLED = 200_000
"""Voxels of a scan that are looked at, evenly spaced."""

MASK_VALUES = 32
"""Up to this number of distinct whole numbers a scan counts as a mask, each number a label."""

AIR_HU = -150.0
"""Fat has -100 HU, lung and air less; nothing that MR or ultrasound stores is below."""

MOSTLY_CLIPPED = 0.5
"""Share of the voxels outside a window from which on it counts as the wrong window for a scan."""

SHOWN_ROWS = 5


@dataclass(frozen=True)
class Intensity:
    """The values of one scan."""

    kind: Kind
    low: float
    high: float
    clipped: float
    """Share of the voxels outside the recipe's window; 0 without one."""


def intensity_of(voxels: np.ndarray, recipe: Recipe) -> Intensity:
    """Return the kind of values in a scan (C, D, H, W), as far as the values show it."""
    values = voxels.reshape(-1)
    sample = values[:: max(1, values.size // SAMPLED)].astype(np.float64)
    clipped = 0.0
    if recipe.intensity == "window":
        clipped = float(((sample < recipe.window_low) | (sample > recipe.window_high)).mean())
    return Intensity(_kind(sample), float(values.min()), float(values.max()), clipped)


def _kind(sample: np.ndarray) -> Kind:
    low, high = float(sample.min()), float(sample.max())
    whole = bool((sample == np.round(sample)).all())
    if whole and low >= 0 and len(np.unique(sample)) <= MASK_VALUES:
        return "mask"
    if low <= AIR_HU:
        return "CT in HU"
    if -20 < low < 0 < high < 100 and abs(sample.mean()) < 0.2 and 0.5 < sample.std() < 2:
        return "already normalised"
    if not whole and low >= -1.001 and high <= 1.001:
        return "already normalised"
    return "MR or other positive values" if low >= 0 else "unknown"


def intensity_lines(found: Sequence[Intensity], names: Sequence[str], recipe: Recipe) -> list[str]:
    """Return lines on the intensities of a table's scans: their kind, their preparation, and suspected errors.

    `names`: what each scan is called in a message.
    """
    named: dict[Kind, list[str]] = defaultdict(list)
    for one, name in zip(found, names, strict=True):
        named[one.kind].append(name)
    counts = Counter({kind: len(those) for kind, those in named.items()})
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    low, high = min(one.low for one in found), max(one.high for one in found)
    lines = [f"intensity: values {low:g} to {high:g}; by their values {kinds}; {_done(recipe)}"]
    if masks := named["mask"]:
        lines.append(
            f"{len(masks)} of {len(found)} scans hold few whole numbers, as masks do: {_some(masks)}: is it the scan itself?"
        )
    others = [kind for kind in counts if kind not in ("mask", "unknown")]
    if len(others) > 1:
        rarest = min(others, key=counts.__getitem__)
        lines.append(f"the scans are of several kinds; {rarest}: {_some(named[rarest])}")
    if recipe.intensity == "window":
        return lines + _window_lines(found, names, recipe)
    return lines + _background_lines(counts["CT in HU"], recipe)


def _background_lines(in_hu: int, recipe: Recipe) -> list[str]:
    if recipe.intensity != "zscore_nonzero" or not in_hu:
        return []
    return [
        f"intensity=zscore_nonzero takes mean and deviation over voxels > 0: in {in_hu} scans in HU that "
        "leaves out air and fat; use intensity=window, or zscore"
    ]


def _window_lines(found: Sequence[Intensity], names: Sequence[str], recipe: Recipe) -> list[str]:
    lines = []
    window = f"the window {recipe.window_low:g} to {recipe.window_high:g}"
    mostly = [name for one, name in zip(found, names, strict=True) if one.clipped > MOSTLY_CLIPPED]
    if mostly:
        lines.append(
            f"{len(mostly)} of {len(found)} scans have more than half of their voxels outside {window}, where all are alike: "
            f"{_some(mostly)}"
        )
    foreign = [one for one in found if one.kind not in ("CT in HU", "unknown")]
    if foreign:
        lines.append(
            f"{window} is meant for Hounsfield units, and {len(foreign)} of {len(found)} scans do not look like CT in HU: "
            "use intensity=zscore for them, or the window of their own units"
        )
    return lines


def _done(recipe: Recipe) -> str:
    return {
        "zscore": "prepared to mean 0 and deviation 1 over all voxels of each scan",
        "zscore_nonzero": "prepared to mean 0 and deviation 1 over the voxels > 0 of each scan",
        "window": f"clipped to {recipe.window_low:g} to {recipe.window_high:g} and scaled to -1 to 1",
    }[recipe.intensity]


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN_ROWS])
    return shown + (f" and {len(names) - SHOWN_ROWS} more" if len(names) > SHOWN_ROWS else "")
