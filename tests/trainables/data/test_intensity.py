"""The kind of intensities that a scan is taken to have, and the notice where preparation does not suit them."""

from typing import Any

import numpy as np
import pytest

from trainables.config import build_config
from trainables.data.intensity import intensity_lines, intensity_of
from trainables.data.scans import Recipe

RNG = np.random.default_rng(0)
SHAPE = (1, 24, 24, 24)


def ct() -> Any:
    voxels = np.where(RNG.random(SHAPE) < 0.4, -900, 40) + RNG.normal(0, 20, SHAPE)
    return voxels.round().astype(np.float32)


def mr() -> Any:
    head = np.where(RNG.random(SHAPE) < 0.5, 0, RNG.gamma(4, 90, SHAPE))
    return head.round().astype(np.float32)


def mask() -> Any:
    return (RNG.random(SHAPE) < 0.1).astype(np.float32) * 3


def recipe(**settings: Any) -> Recipe:
    return Recipe.from_config(build_config({"volume_shape": 24} | settings))


@pytest.mark.parametrize(
    ("voxels", "kind"),
    [
        (ct(), "CT in HU"),
        (mr(), "MR or other positive values"),
        (mask(), "mask"),
        ((mr() - 180) / 220, "already normalised"),
        (RNG.random(SHAPE), "already normalised"),
        (2 * RNG.random(SHAPE) - 1, "already normalised"),
        (RNG.normal(40, 20, SHAPE).round(), "unknown"),  # soft tissue alone, or anything
        (RNG.integers(0, 256, SHAPE).astype(float), "MR or other positive values"),
    ],
)
def test_values_are_taken_for_what_they_look_like(voxels: Any, kind: str) -> None:
    found = intensity_of(voxels.astype(np.float32), recipe())
    assert found.kind == kind
    assert (found.low, found.high) == (
        float(np.float32(voxels.min())),
        float(np.float32(voxels.max())),
    )


def lines(scans: list[Any], **settings: Any) -> list[str]:
    made = recipe(**settings)
    found = [intensity_of(scan, made) for scan in scans]
    return intensity_lines(found, [f"row {n}" for n in range(1, len(scans) + 1)], made)


def test_a_cohort_of_one_kind_is_one_line() -> None:
    (told,) = lines([ct(), ct()])
    assert told.startswith("intensity: values -9")
    assert "by their values 2 CT in HU; prepared to mean 0 and deviation 1 over all voxels" in told
    assert len(lines([ct()], intensity="window")) == 1


def test_a_mask_and_a_scan_of_another_kind_are_named() -> None:
    told = lines([ct(), mask(), ct(), mr()])
    assert any("1 of 4 scans hold few whole numbers, as masks do: row 2: is it" in t for t in told)
    assert any("several kinds; MR or other positive values: row 4" in t for t in told)


def test_a_window_on_mr_is_said_to_be_for_another_unit_and_to_clip() -> None:
    told = lines([mr() + 300] * 7, intensity="window", window_low=-160, window_high=240)
    assert any(
        "7 of 7 scans have more than half of their voxels outside the window -160 to 240" in t
        and "row 1, row 2, row 3, row 4, row 5 and 2 more" in t
        for t in told
    )
    assert any(
        "meant for Hounsfield units, and 7 of 7 scans do not look like CT" in t for t in told
    )


def test_positive_voxels_alone_leave_air_and_fat_of_ct_out() -> None:
    assert any("leaves out air and fat" in t for t in lines([ct()], intensity="zscore_nonzero"))
    assert len(lines([mr()], intensity="zscore_nonzero")) == 1
