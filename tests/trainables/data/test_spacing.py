"""The spacing that suits a whole cohort, and the differences in size that it keeps and a spacing per volume loses."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trainables.config import build_config
from trainables.data.manifest import read_manifest
from trainables.data.scans import Recipe, prepare_scan, read_scan
from trainables.data.spacing import common_spacing, spacing_of_table, with_common_spacing

Write = Callable[..., Path]


def test_every_volume_fits_at_the_common_spacing_and_at_no_smaller_one() -> None:
    rng = np.random.default_rng(0)
    shapes = rng.integers(20, 200, (300, 3))
    spacings = rng.uniform(0.3, 5, (300, 3))
    shape = (96, 64, 80)
    found = common_spacing(shapes, spacings, shape)
    voxels = shapes * spacings / found.every_mm
    assert (voxels <= np.array(shape) * (1 + 1e-9)).all()
    finer = found.every_mm / 1.01  # three digits are rounded up by less than one in a hundred
    assert (shapes * spacings / finer > np.array(shape)).any()


def test_the_smaller_spacing_crops_a_twentieth_and_says_how_much() -> None:
    shapes = np.full((100, 3), 100)
    spacings = np.ones((100, 3))
    spacings[:4, 2] = 3.0  # four long scans
    spacings[4, 2] = 2.0
    found = common_spacing(shapes, spacings, (100, 100, 100))
    assert (found.every_mm, found.most_mm, found.cropped, found.axis) == (3.0, 1.0, 5, "z")
    assert found.kept == pytest.approx(1 / 3)
    assert found.lines() == [
        "spacing_mm: 3 is the smallest at which every volume fits; it is the default of a new study",
        "spacing_mm: 1 shows more detail and crops 5 of 100, one to 33% of its extent along z",
        "spacing_mm: null scales each volume separately, which hides how large things are",
    ]
    alike = common_spacing(shapes[5:], spacings[5:], (100, 100, 100))
    assert (alike.every_mm, alike.most_mm, alike.cropped, len(alike.lines())) == (1.0, 1.0, 0, 2)


@pytest.fixture
def balls(write_scan: Write, tmp_path: Path) -> Path:
    """Bright cubes of 8 and of 16 voxels, each filling half of its own scan's width: they differ in size alone."""
    lines = ["path,label,subject"]
    for row, side in enumerate((16, 32)):
        voxels = np.random.default_rng(row).normal(0, 1, (side,) * 3)
        inside = slice(side // 4, side - side // 4)
        voxels[inside, inside, inside] += 100
        write_scan(f"{row}.nii.gz", voxels)
        lines.append(f"{row}.nii.gz,{row},s{row}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "table.csv"


def test_size_is_kept_by_a_common_spacing_and_lost_by_one_for_each_volume(balls: Path) -> None:
    manifest = read_manifest(balls)
    config = build_config({"volume_shape": 32})
    common, found = with_common_spacing(config, manifest)
    assert found == spacing_of_table(manifest, (32, 32, 32))
    assert common.spacing_mm == (1.0, 1.0, 1.0)

    def bright(recipe: Recipe) -> list[float]:
        volumes = [prepare_scan(read_scan(path), recipe, path) for path in manifest.rows["path"]]
        return [float((volume > volume.mean() + volume.std()).mean()) for volume in volumes]

    small, large = bright(Recipe.from_config(common))
    assert large / small == pytest.approx(8, rel=0.05)
    small, large = bright(Recipe.from_config(config))
    assert large / small == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("given", [None, 2.0])
def test_a_spacing_that_is_named_is_kept_none_included(balls: Path, given: float | None) -> None:
    config = build_config({"spacing_mm": given})
    assert with_common_spacing(config, read_manifest(balls)) == (config, None)
