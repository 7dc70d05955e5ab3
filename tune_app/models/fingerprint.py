"""Ranges of the training volumes' intensities, small enough for model.json, and notes on volumes outside them.

A network scores whatever has the right shape: a model of CT scored brain MR, and a segmentation mask, without a word.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from trainables.data.intensity import Kind, intensity_of
from trainables.data.scans import Recipe, read_scan
from tune_app.results.calibration import Array

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
"""Of a prepared volume's voxels above its background."""

READ_AGAIN = 32
"""Training files whose kind is looked at, evenly spaced over the table."""

FLOOR = 0.1
"""Least width of a training range, as a share of the whole range of values: of few volumes it would have none."""

WIDTHS = 1.0
"""Widths of the training range beyond its ends from which on a volume is noted."""


class Fingerprint(BaseModel):
    """Ranges over the training volumes, after preparation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: tuple[float, ...]
    """Lowest value of each of QUANTILES."""
    high: tuple[float, ...]
    background_low: float
    """Smallest share of voxels at a volume's lowest value: air, padding, or values that a window clipped."""
    background_high: float
    kinds: tuple[Kind, ...]
    """Kinds of the training files, by their values before preparation."""

    def notes_on(self, volume: Array) -> list[str]:
        """Return how a prepared volume (C, D, H, W) differs from all training volumes."""
        background, quantiles = _measured(volume)
        low, high = np.array(self.low), np.array(self.high)
        width = np.maximum(high - low, FLOOR * (high.max() - low.min()))
        beyond = np.maximum(low - quantiles, quantiles - high) / width
        notes = []
        if beyond.max() > WIDTHS:
            worst = int(beyond.argmax())
            notes.append(
                f"intensity: its {QUANTILES[worst]:.0%} quantile after preparation is {quantiles[worst]:.3g}, in training "
                f"{low[worst]:.3g} to {high[worst]:.3g}: is it this kind of scan?"
            )
        share = max(self.background_high - self.background_low, FLOOR)
        away = max(self.background_low - background, background - self.background_high) / share
        if away > WIDTHS:
            notes.append(
                f"background: {background:.0%} of its voxels, in training {self.background_low:.0%} to "
                f"{self.background_high:.0%}"
            )
        return notes

    def problems_of(self, kind: Kind) -> list[str]:
        """Return why a file whose values are of this kind is refused: a mask where no training file was one."""
        if kind == "mask" and "mask" not in self.kinds:
            return [
                "it holds few whole numbers, as a mask does, and no training file does: give the scan itself"
            ]
        return []

    def kind_notes(self, kind: Kind) -> list[str]:
        """Return that a file is of another kind than those that were trained on."""
        if kind in ("unknown", "mask") or kind in self.kinds or "unknown" in self.kinds:
            return []
        return [f"intensity: by its values {kind}, the training files are {', '.join(self.kinds)}"]


def fingerprint(volumes: Iterable[Array], kinds: Iterable[Kind]) -> Fingerprint:
    """Return the fingerprint of prepared volumes (C, D, H, W), and of the kinds of their files."""
    measured = [_measured(volume) for volume in volumes]
    quantiles = np.array([each for _, each in measured])
    shares = [share for share, _ in measured]
    return Fingerprint(
        low=tuple(float(f"{value:.6g}") for value in quantiles.min(axis=0)),
        high=tuple(float(f"{value:.6g}") for value in quantiles.max(axis=0)),
        background_low=min(shares),
        background_high=max(shares),
        kinds=tuple(sorted(set(kinds))),
    )


def kinds_of(paths: Sequence[Path | str], recipe: Recipe) -> list[Kind]:
    """Return what some of the files hold, by their values. Raises VolumeError."""
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(READ_AGAIN, len(paths))).astype(int))
    return [
        intensity_of(read_scan(paths[place], recipe.in_channels).voxels, recipe).kind
        for place in chosen
    ]


def _measured(volume: Array) -> tuple[float, Array]:
    """The share of voxels at the lowest value, and the quantiles of the others."""
    values = np.asarray(volume, dtype=np.float32).reshape(-1)
    above = values[values > values.min() + 1e-3 * (values.max() - values.min())]
    counted = above if above.size else values
    return 1 - above.size / values.size, np.quantile(counted, QUANTILES)
