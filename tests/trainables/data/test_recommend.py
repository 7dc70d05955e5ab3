"""Recommended preprocessing: shape, spacing and intensity of a cohort, each with a reason that holds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from trainables.data.recommend import LARGEST_SIDE, recommend, values_of


def advice(
    shapes: Sequence[tuple[int, int, int]],
    spacings: Sequence[tuple[float, float, float]],
    voxels: Sequence[np.ndarray],
    **kept: Any,
) -> dict[str, Any]:
    found = recommend(shapes, spacings, [values_of(one) for one in voxels], **kept)
    assert all(one.reason for one in found)
    return {one.name: one.value for one in found}


def ct(shape: tuple[int, int, int] = (20, 20, 20), seed: int = 0) -> np.ndarray:
    """Air around a body of 40 HU with a standard deviation of 20."""
    rng = np.random.default_rng(seed)
    voxels = np.full((1, *shape), -1000.0, dtype=np.float32)
    inside = tuple(slice(side // 8, side - side // 8) for side in shape)
    body = rng.normal(40, 20, size=voxels[0][inside].shape)
    voxels[0][inside] = np.round(body)
    return voxels


def mr(background: float, shape: tuple[int, int, int] = (20, 20, 20), seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    voxels = rng.uniform(50, 900, size=(1, *shape)).astype(np.float32)
    voxels[:, : round(background * shape[0])] = 0
    return voxels


def test_ct_gets_a_window_around_what_is_in_the_middle() -> None:
    found = advice([(20,) * 3] * 3, [(1.0,) * 3] * 3, [ct(seed=seed) for seed in range(3)])
    assert found["intensity"] == "window"
    expected = np.percentile(np.random.default_rng(9).normal(40, 20, 100_000), (1, 99))
    assert found["window_low"] == pytest.approx(expected[0], abs=10)
    assert found["window_high"] == pytest.approx(expected[1], abs=10)


@pytest.mark.parametrize(("background", "expected"), [(0.0, "zscore"), (0.5, "zscore_nonzero")])
def test_mr_gets_a_z_score_and_a_background_of_zeros_stays_out(
    background: float, expected: str
) -> None:
    assert advice([(20,) * 3], [(1.0,) * 3], [mr(background)])["intensity"] == expected


def test_scans_of_several_kinds_get_what_is_safe_for_all() -> None:
    found = advice([(20,) * 3] * 2, [(1.0,) * 3] * 2, [ct(), mr(0.0)])
    assert found["intensity"] == "zscore"
    assert "window_low" not in found


def test_small_scans_keep_their_detail_and_their_form() -> None:
    found = advice([(28, 40, 17)], [(1.0, 1.0, 1.0)], [mr(0.0)])
    assert found["volume_shape"] == (32, 40, 24)
    assert found["spacing_mm"] == 1.0


def test_large_scans_are_brought_to_what_a_search_can_afford_and_fit() -> None:
    shapes, spacings = [(512, 512, 100), (400, 400, 80)], [(0.7, 0.7, 3.0), (0.7, 0.7, 3.0)]
    found = advice(shapes, spacings, [ct(), ct()])
    assert max(found["volume_shape"]) == LARGEST_SIDE
    extents_mm = np.multiply(shapes, spacings)
    assert (extents_mm / found["spacing_mm"] <= np.asarray(found["volume_shape"]) + 1e-6).all()


def test_a_shape_that_is_given_stays_and_decides_the_spacing() -> None:
    found = advice([(64, 64, 64)], [(1.0, 1.0, 1.0)], [mr(0.0)], volume_shape=(32, 32, 32))
    assert "volume_shape" not in found
    assert found["spacing_mm"] == 2.0


def test_no_scan_is_an_error() -> None:
    with pytest.raises(ValueError, match="no scan"):
        recommend([], [], [])
