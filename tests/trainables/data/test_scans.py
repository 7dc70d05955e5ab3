"""Scans: geometry against MONAI, SciPy and torch; number formats; bad files."""

import dataclasses
import gzip
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt

from trainables.config import build_config
from trainables.data import scans
from trainables.data.scans import (
    Recipe,
    Scan,
    VolumeError,
    prepare_scan,
    read_header,
    read_scan,
    resample,
)

Write = Callable[..., Path]


def recipe(**changes: Any) -> Recipe:
    return dataclasses.replace(Recipe.from_config(build_config({"volume_shape": 16})), **changes)


def scan(shape: tuple[int, ...], spacing_mm: tuple[float, float, float], seed: int = 0) -> Scan:
    return Scan(np.random.default_rng(seed).normal(size=(1, *shape)).astype(np.float32), spacing_mm)


def prepared(path: Path, recipe: Recipe) -> np.ndarray:
    return prepare_scan(read_scan(path, recipe.in_channels), recipe, path)


# Geometry --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPS", "PIR", "SAL", "IPR"])
def test_any_orientation_is_read_as_nibabels_closest_canonical(
    write_scan: Write, axes: str
) -> None:
    path = write_scan(voxels=(5, 6, 7), spacing=(1.0, 2.0, 3.0), axes=axes)
    canonical = nib.as_closest_canonical(nib.load(path))
    found = read_scan(path)
    np.testing.assert_array_equal(found.voxels[0], canonical.get_fdata(dtype=np.float32))
    assert found.spacing_mm == pytest.approx(
        [float(value) for value in canonical.header.get_zooms()]
    )
    header = read_header(path)
    assert (header.shape, header.channels, header.oriented) == (canonical.shape, 1, True)


def test_the_same_object_comes_out_the_same_from_every_orientation(write_scan: Write) -> None:
    still = np.random.default_rng(0).normal(size=(8, 10, 12))
    reference = None
    for axes in ("RAS", "LPS", "PIR", "SAL"):
        image = nib.Nifti1Image(still, np.diag([1.5, 1.0, 2.0, 1.0]))
        path = write_scan()
        turned = nib.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
        nib.save(image.as_reoriented(turned), path)
        volume = prepared(path, recipe())
        reference = volume if reference is None else reference
        np.testing.assert_allclose(volume, reference, atol=1e-5)


def test_a_tilted_volume_is_turned_to_its_closest_axes_with_its_own_spacing(
    write_scan: Write,
) -> None:
    tilt = np.deg2rad(20)
    affine = np.eye(4)
    affine[:3, :3] = np.array(
        [[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, -1]]
    ) * [
        1,
        2,
        3,
    ]
    path = write_scan()
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(4, 5, 6)), affine), path)
    found = read_scan(path)
    assert found.spacing_mm == pytest.approx((1, 2, 3))
    np.testing.assert_array_equal(
        found.voxels[0], nib.as_closest_canonical(nib.load(path)).get_fdata(dtype=np.float32)
    )


@pytest.mark.parametrize("spacing_mm", [None, (1.3, 1.3, 1.3)])
def test_a_volume_that_needs_nothing_keeps_every_bit(
    spacing_mm: tuple[float, float, float] | None,
) -> None:
    given = scan((16, 16, 16), (1.3, 1.3, 1.3))
    np.testing.assert_array_equal(resample(given, recipe(spacing_mm=spacing_mm)), given.voxels)


def test_resampling_to_a_finer_spacing_is_monais(write_scan: Write) -> None:
    from monai.data import MetaTensor
    from monai.transforms import Orientation, Spacing

    path = write_scan(voxels=(8, 9, 10), spacing=(2.0, 1.5, 1.0), axes="PIR")
    image = nib.load(path)
    tensor = MetaTensor(image.get_fdata(dtype=np.float32)[None], affine=image.affine)
    oriented = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(tensor)
    monai = Spacing(
        pixdim=(0.5, 1.0, 0.75), mode="bilinear", padding_mode="border", scale_extent=True
    )(oriented)
    ours = resample(read_scan(path), recipe(volume_shape=(64, 64, 64), spacing_mm=(0.5, 1.0, 0.75)))
    assert ours.shape == monai.shape
    np.testing.assert_allclose(ours, monai.numpy(), atol=1e-3)  # values around 100


def test_resampling_to_a_finer_spacing_is_scipys() -> None:
    from scipy.ndimage import affine_transform

    given = scan((7, 8, 9), (1.2, 1.0, 0.9))
    ours = resample(given, recipe(volume_shape=(64, 64, 64), spacing_mm=(0.6, 0.7, 0.9)))
    ratios = np.array([0.6, 0.7, 0.9]) / given.spacing_mm
    starts = (np.array(given.voxels.shape[1:]) - 1) / 2 - (
        np.array(ours.shape[1:]) - 1
    ) / 2 * ratios
    theirs = affine_transform(
        given.voxels[0], ratios, starts, ours.shape[1:], order=1, mode="nearest"
    )
    np.testing.assert_allclose(ours[0], theirs, atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(20, 10), (30, 12), (25, 10)])
def test_resampling_to_a_coarser_spacing_is_torchs_antialiased_one(old: int, new: int) -> None:
    from torch import from_numpy
    from torch.nn.functional import interpolate

    given = scan((old, old, 6), (1.0, 1.0, 1.0))
    ours = resample(
        given, recipe(volume_shape=(64, 64, 64), spacing_mm=(old / new, old / new, 1.0))
    )
    slices = from_numpy(given.voxels[0]).permute(2, 0, 1)[:, None]
    theirs = interpolate(
        slices, size=(new, new), mode="bilinear", antialias=True, align_corners=False
    )
    np.testing.assert_allclose(ours[0], theirs[:, 0].permute(1, 2, 0).numpy(), atol=1e-5)


def test_a_strong_reduction_averages_instead_of_skipping() -> None:
    """Plain trilinear from 64 to 8 voxels would read an eighth of the voxels an axis and keep all of their noise."""
    given = scan((64, 64, 64), (1.0, 1.0, 1.0))
    assert resample(given, recipe(volume_shape=(8, 8, 8))).std() < 0.1


@pytest.mark.parametrize("shape", [(16, 16, 16), (15, 20, 17), (21, 9, 16), (5, 6, 33)])
@pytest.mark.parametrize("wanted", [(16, 16, 16), (17, 8, 9)])
def test_crop_and_pad_are_monais(
    write_scan: Write, shape: tuple[int, int, int], wanted: tuple[int, int, int]
) -> None:
    from monai.transforms import ResizeWithPadOrCrop

    path = write_scan(voxels=shape)
    plain = recipe(
        volume_shape=wanted,
        spacing_mm=(1.0, 1.0, 1.0),
        intensity="window",
        window_low=-500,
        window_high=500,
    )
    border = float(resample(read_scan(path), plain).min())
    monai = ResizeWithPadOrCrop(wanted, mode="constant", value=border)(
        read_scan(path).voxels
    ).numpy()
    np.testing.assert_allclose(prepared(path, plain), monai / 500, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 30, 40), (64, 12, 9), (8, 8, 8)])
def test_without_a_spacing_the_whole_volume_fits_and_touches_two_sides(
    shape: tuple[int, int, int],
) -> None:
    spacing_mm = (1.0, 0.8, 2.5)
    inside = resample(scan(shape, spacing_mm), recipe())
    assert max(inside.shape[1:]) == 16
    extents = np.multiply(shape, spacing_mm)
    np.testing.assert_allclose(inside.shape[1:], (extents / extents.max() * 16).clip(1), atol=0.5)


def test_memory_stays_that_of_the_file_however_fine_the_spacing() -> None:
    given = scan((20, 20, 20), (1.0, 1.0, 1.0))
    tracemalloc.start()
    assert resample(given, recipe(spacing_mm=(1e-9, 1e-9, 1e-9))).shape == (1, 16, 16, 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


# Intensities -----------------------------------------------------------------------------------------------------------


def test_zscore_counts_the_volume_and_not_its_padding(write_scan: Write) -> None:
    path = write_scan(voxels=(16, 16, 6))
    volume = prepared(path, recipe(spacing_mm=(1.0, 1.0, 1.0)))
    inside, border = volume[..., 5:11], np.delete(volume, np.s_[5:11], axis=3)
    assert inside.mean() == pytest.approx(0, abs=1e-5)
    assert inside.std() == pytest.approx(1, abs=1e-5)
    assert border.size
    assert (border == inside.min()).all()


def test_zscore_nonzero_counts_voxels_above_zero(write_scan: Write) -> None:
    voxels = np.random.default_rng(0).normal(0, 30, (16, 16, 16))
    volume = prepared(write_scan(voxels=voxels), recipe(intensity="zscore_nonzero"))
    stored = voxels.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(
        volume[0], (stored - stored[stored > 0].mean()) / stored[stored > 0].std(), atol=1e-5
    )


def test_window_clips_and_scales_to_plus_minus_one(write_scan: Write) -> None:
    voxels = np.linspace(-2000, 2000, 16**3).reshape(16, 16, 16)
    volume = prepared(
        write_scan(voxels=voxels), recipe(intensity="window", window_low=-1000, window_high=400)
    )
    np.testing.assert_allclose(volume[0], (voxels.clip(-1000, 400) + 300) / 700, atol=1e-5)


def test_each_channel_is_normalised_by_itself(write_scan: Write) -> None:
    voxels = np.random.default_rng(0).normal(size=(16, 16, 10, 2)) * [1, 500] + [0, 9000]
    volume = prepared(
        write_scan(voxels=voxels, axes="LPS"), recipe(in_channels=2, spacing_mm=(1.0, 1.0, 1.0))
    )
    assert volume.shape == (2, 16, 16, 16)
    for channel in volume:
        assert channel[..., 3:13].std() == pytest.approx(1, abs=1e-5)
        assert channel[0, 0, 0] == channel.min()


@pytest.mark.parametrize("intensity", ["zscore", "zscore_nonzero", "window"])
def test_the_wildest_values_stay_finite_in_float16(write_scan: Write, intensity: str) -> None:
    voxels = np.random.default_rng(0).normal(1, 1e-3, (130, 130, 130))
    voxels[0, 0, 0], voxels[1, 1, 1] = 3e38, -3e38
    path = write_scan("scan.nii", voxels)
    wild = prepared(
        path, recipe(volume_shape=(130, 130, 130), intensity=intensity, window_high=1e38)
    )
    assert np.isfinite(wild.astype(np.float16)).all()
    assert np.abs(wild).max() <= 1000


# Formats ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, ">i2", ">f4"]
)
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_every_number_format_gives_nibabels_values(
    write_scan: Write, kind: Any, dtype: Any
) -> None:
    image = nib.load(write_scan("plain.nii", kind=kind))
    header = image.header.as_byteswapped(">" if str(dtype).startswith(">") else "<")
    header.set_data_dtype(np.dtype(dtype))
    path = write_scan()
    nib.save(kind(image.get_fdata(), image.affine, header), path)
    np.testing.assert_allclose(
        read_scan(path).voxels[0], nib.load(path).get_fdata(), rtol=1e-6, atol=1e-4
    )


def test_slope_and_intercept_are_applied_where_they_cancel_too(write_scan: Write) -> None:
    stored = np.arange(2**30, 2**30 + 6**3, dtype=np.int32).reshape(6, 6, 6)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(1, -(2.0**30))
    path = write_scan()
    nib.save(image, path)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[352:] = stored.tobytes(
        order="F"
    )  # nibabel rescales on writing: put the very integers there
    raw[112:120] = np.array([1, -(2.0**30)], dtype="<f4").tobytes()
    path.write_bytes(gzip.compress(raw))
    np.testing.assert_array_equal(read_scan(path).voxels[0], np.arange(6**3).reshape(6, 6, 6))


def test_gzip_is_told_by_content_and_not_by_name(write_scan: Write, tmp_path: Path) -> None:
    plain, zipped = write_scan("a.nii"), write_scan("b.nii.gz")
    swapped = [plain.rename(tmp_path / "c.nii.gz"), zipped.rename(tmp_path / "d.nii")]
    np.testing.assert_array_equal(read_scan(swapped[0]).voxels, read_scan(swapped[1]).voxels)


def test_spacings_in_micrometres_are_read_as_millimetres(write_scan: Write) -> None:
    path = write_scan(spacing=(500.0, 500.0, 250.0))
    image = nib.load(path)
    image.header.set_xyzt_units("micron")
    nib.save(image, path)
    assert read_header(path).spacing_mm == pytest.approx((0.5, 0.5, 0.25))


@pytest.mark.parametrize("shape", [(5, 6, 7, 1), (5, 6, 7, 1, 1)])
def test_dimensions_of_one_behind_the_third_are_dropped(
    write_scan: Write, shape: tuple[int, ...]
) -> None:
    assert read_scan(write_scan(voxels=shape)).voxels.shape == (1, 5, 6, 7)


@pytest.mark.parametrize("shape", [(5, 6, 7, 3), (5, 6, 7, 1, 3)])
def test_channels_come_last_in_the_file_and_first_in_memory(
    write_scan: Write, shape: tuple[int, ...]
) -> None:
    path = write_scan(voxels=shape)
    voxels = np.squeeze(nib.load(path).get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(read_scan(path, in_channels=3).voxels, np.moveaxis(voxels, 3, 0))


def test_a_file_without_orientation_is_read_as_the_format_says(write_scan: Write) -> None:
    path = write_scan()
    image = nib.load(path)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, path)
    assert not read_header(path).oriented
    np.testing.assert_array_equal(
        read_scan(path).voxels[0], nib.as_closest_canonical(nib.load(path)).get_fdata()
    )


# Bad files -------------------------------------------------------------------------------------------------------------


def changed(at: int, value: Any, dtype: str) -> Callable[[Path], None]:
    """Overwrite a field of the (unzipped) header, as no library would."""

    def change(path: Path) -> None:
        raw = bytearray(gzip.decompress(path.read_bytes()))
        data = np.array(value, dtype=dtype).tobytes()
        raw[at : at + len(data)] = data
        path.write_bytes(gzip.compress(raw))

    return change


def without_sform(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """Leave the orientation to the qform and the spacing to pixdim: with a sform nothing reads them."""

    def change(path: Path) -> None:
        for one in (changed(254, 0, "<i2"), *changes):
            one(path)

    return change


def unzipped(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(path: Path) -> None:
        change(path)
        path.write_bytes(gzip.decompress(path.read_bytes()))

    return both


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(change(path.read_bytes())), None)[1]


def noisy(shape: tuple[int, ...], **values: float) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        voxels = np.random.default_rng(0).normal(size=shape)
        for name, value in values.items():
            voxels.flat[int(name.removeprefix("at"))] = value
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)

    return change


def constant(value: float) -> Callable[[Path], None]:
    return lambda path: nib.save(
        nib.Nifti1Image(np.full((9, 10, 11), float(value)), np.eye(4)), path
    )


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def colour(path: Path) -> None:
    voxels = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)


BAD_FILES = {
    "missing": (Path.unlink, "cannot be read: No such file or directory"),
    "a loop of links": (loop, "cannot be read: Too many levels of symbolic links"),
    "a pipe": (pipe, "a folder, pipe or device"),
    "a folder": (lambda path: (path.unlink(), path.mkdir())[0], "a folder, pipe or device"),
    "no bytes": (rewritten(lambda data: b""), "empty: no bytes"),
    "ten bytes": (rewritten(lambda data: data[:10]), "gzip stream ends early"),
    "text": (rewritten(lambda data: b"path,label,subject\n" * 99), "not a NIfTI file"),
    "zipped text": (rewritten(lambda data: gzip.compress(b"no scan" * 99)), "not a NIfTI file"),
    "half of the bytes": (
        rewritten(lambda data: data[: len(data) // 2]),
        "truncated: its gzip stream ends early",
    ),
    "half of the voxels": (
        rewritten(lambda data: gzip.compress(gzip.decompress(data)[:2000])),
        "truncated: 1648 of 3960 voxel bytes",
    ),
    "half, not zipped": (
        rewritten(lambda data: gzip.decompress(data)[:2000]),
        "the file holds 1.953 KiB; copy it again",
    ),
    "only a header": (
        rewritten(lambda data: gzip.compress(gzip.decompress(data)[:348])),
        "truncated",
    ),
    "a broken checksum": (
        rewritten(lambda data: data[:-8] + b"\1\2\3\4" + data[-4:]),
        "damaged gzip (CRC check failed",
    ),
    "a broken byte": (
        rewritten(lambda data: data[:99] + bytes([data[99] ^ 255]) + data[100:]),
        "damaged gzip",
    ),
    "the start of a gzip": (
        rewritten(lambda data: b"\x1f\x8b" + gzip.decompress(data)),
        "damaged gzip",
    ),
    "4D": (noisy((5, 6, 7, 8)), "shape 5x6x7x8, 8 channel(s), in_channels=1"),
    "5D": (noisy((5, 6, 7, 2, 3)), "shape 5x6x7x2x3: three dimensions"),
    "an image": (noisy((50, 60)), "shape 50x60: a volume of at least 2 voxels a side is needed"),
    "a single slice": (noisy((50, 60, 1)), "shape 50x60x1: a volume of at least 2 voxels a side"),
    "NaN": (
        noisy((5, 6, 7), at43=np.nan, at44=np.inf),
        "2 of 210 voxels are not finite in float32 (the first at (1, 0, 1)",
    ),
    "too large for float32": (
        noisy((5, 6, 7), at0=1e300),
        "1 of 210 voxels are not finite in float32",
    ),
    "all zero": (constant(0), "constant: every voxel is 0"),
    "all 0.1": (constant(0.1), "constant: every voxel is 0.1"),
    "spacing 0": (
        without_sform(changed(80, [0, 1, 1], "<f4")),
        "spacing (0, 1, 1) mm, every value must be finite and > 0: fix the header",
    ),
    "spacing below 0": (without_sform(changed(80, [1, -1, 1], "<f4")), "spacing (1, -1, 1) mm"),
    "spacing NaN": (without_sform(changed(80, [1, 1, np.nan], "<f4")), "spacing (1, 1, nan) mm"),
    "spacing 0 in the affine": (changed(280, [0, 0, 0, 0], "<f4"), "spacing (0, 1, 1) mm"),
    "a flat affine": (changed(280, [1, 1, 0, 0] * 2, "<f4"), "maps the volume onto a plane"),
    "no rotation": (
        without_sform(changed(252, 1, "<i2"), changed(256, [9, 9, 9], "<f4")),
        "no valid orientation",
    ),
    "terabytes, zipped": (
        changed(40, [3, 30000, 30000, 30000], "<i2"),
        "the header claims 30000x30000x30000 voxels, 98.23 TiB",
    ),
    "terabytes": (
        unzipped(changed(40, [3, 30000, 30000, 30000], "<i2")),
        "98.23 TiB, the file holds 4.211 KiB",
    ),
    "a far first voxel": (changed(108, 1e30, "<f4"), "vox_offset 1e+30"),
    "a far first voxel within bounds": (changed(108, 9e8, "<f4"), "truncated, or a wrong header"),
    "a first voxel before the file": (changed(108, -4, "<f4"), "vox_offset -4: voxels cannot"),
    "no number as first voxel": (changed(108, np.nan, "<f4"), "vox_offset nan"),
    "no dimensions": (changed(40, [0], "<i2"), "1 to 7 dimensions"),
    "ninety dimensions": (changed(40, [90], "<i2"), "1 to 7 dimensions"),
    "a side below 0": (changed(40, [3, -5], "<i2"), "of at least one voxel"),
    "an unknown number format": (
        changed(70, 4711, "<i2"),
        "datatype code 4711: voxels must be integers or real numbers",
    ),
    "complex numbers": (changed(70, 32, "<i2"), "datatype code 32"),
    "colours": (colour, "datatype code 128"),
    "a slope with no intercept": (changed(112, [2, np.inf], "<f4"), "scl_slope, scl_inter"),
    "half of a pair": (changed(344, list(b"ni1\0"), "u1"), "half of a .hdr and .img pair"),
    "another magic": (changed(344, list(b"abc\0"), "u1"), "magic b'abc'"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_by_name_with_what_arrived(
    write_scan: Write, spoil: Callable[[Path], None], message: str
) -> None:
    path = write_scan("0042.nii.gz")
    spoil(path)
    tracemalloc.start()
    with pytest.raises(VolumeError) as refusal:
        prepared(path, recipe())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"scan {path}: " in str(refusal.value)
    assert message in refusal.value.reason
    assert peak < 2**25, "a header's claim must not be believed before it is checked"


SOUND_HEADERS = {
    "vox_offset 0": changed(108, 0, "<f4"),
    "vox_offset 348": changed(108, 348, "<f4"),
    "pixdim 0 next to a sform": changed(80, [0, 0, 0], "<f4"),
    "pixdim below 0 next to a sform": changed(80, [-1, -2, -3], "<f4"),
    "pixdim NaN next to a sform": changed(80, [np.nan] * 3, "<f4"),
    "a bad quaternion next to a sform": changed(252, [1], "<i2"),
}


@pytest.mark.parametrize("change", SOUND_HEADERS.values(), ids=SOUND_HEADERS)
def test_a_header_that_is_sound_by_the_standards_defaults_is_read(
    write_scan: Write, change: Callable[[Path], None]
) -> None:
    path = write_scan(spacing=(1.0, 2.0, 3.0), axes="LPS")
    before = read_scan(path)
    change(path)
    after = read_scan(path)
    assert after.spacing_mm == before.spacing_mm == (1.0, 2.0, 3.0)
    np.testing.assert_array_equal(after.voxels, before.voxels)


@pytest.mark.parametrize("qfac", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("turn", [0.0, 0.3, np.pi / 2, np.pi])
def test_a_qform_is_read_as_nibabel_reads_it(write_scan: Write, qfac: float, turn: float) -> None:
    """qfac 0 counts as 1; nibabel is the oracle for the other two."""
    path = write_scan("a.nii.gz", spacing=(1.0, 2.0, 3.0))
    axis = np.array([0.6, 0.0, 0.8]) * np.sin(turn / 2)
    without_sform(
        changed(252, 1, "<i2"),
        changed(256, axis, "<f4"),
        changed(76, [qfac, 1, 2, 3], "<f4"),
    )(path)
    header = read_header(path)
    oracle = nib.load(path).header
    oracle["pixdim"][0] = qfac or 1.0
    expected = nib.orientations.io_orientation(oracle.get_qform())
    np.testing.assert_array_equal(header.orientation, expected)
    by_axis = [expected[:, 0].tolist().index(place) for place in range(3)]
    np.testing.assert_allclose(header.spacing_mm, [(1.0, 2.0, 3.0)[axis] for axis in by_axis])


@pytest.mark.parametrize("excess", [3.8e-7, 1e-6, 5e-6])
def test_a_quaternion_rounded_to_float32_is_a_rotation(write_scan: Write, excess: float) -> None:
    """nibabel refuses it: `w2 should be positive, but is -3.8e-07`."""
    path = write_scan("a.nii.gz", spacing=(1.0, 2.0, 3.0))
    without_sform(changed(252, 1, "<i2"), changed(256, [0, 0, np.sqrt(1 + excess)], "<f4"))(path)
    with pytest.raises(ValueError, match="w2 should be positive"):
        nib.load(path)
    header = read_header(path)
    assert header.spacing_mm == (1.0, 2.0, 3.0)
    np.testing.assert_array_equal(header.orientation, [[0, -1], [1, -1], [2, 1]])  # half a turn


def test_more_than_the_largest_volume_is_refused_even_if_the_bytes_may_be_there(
    write_scan: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scans, "MAX_VOXELS", 900)
    with pytest.raises(VolumeError, match="at most 900 voxels are read: downsample or crop it"):
        read_scan(write_scan())


@pytest.mark.parametrize(
    ("intensity", "voxels", "message"),
    [
        (
            "zscore_nonzero",
            np.where(np.arange(16**3) % 2, 255, 0),
            "every voxel that counts is 255 .*use intensity=zscore",
        ),
        ("zscore_nonzero", -np.arange(1, 16**3 + 1), "no voxel is > 0"),
        (
            "window",
            np.arange(16**3) + 5000,
            "values 5000 to 9095 are all one value in the window -1000 to 400",
        ),
    ],
)
def test_an_intensity_rule_that_leaves_a_constant_is_refused(
    write_scan: Write, intensity: str, voxels: np.ndarray, message: str
) -> None:
    path = write_scan(voxels=voxels.reshape(16, 16, 16))
    with pytest.raises(VolumeError, match=message):
        prepared(path, recipe(intensity=intensity))


def test_a_volume_that_is_constant_where_it_is_cropped_is_refused(write_scan: Write) -> None:
    voxels = np.zeros((40, 40, 40))
    voxels[0] = 1
    with pytest.raises(
        VolumeError,
        match="every voxel that counts is 0 where it was cropped, zscore needs several values: drop the row",
    ):
        prepared(write_scan(voxels=voxels), recipe(spacing_mm=(1.0, 1.0, 1.0)))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    patches=st.lists(
        st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4
    ),
    cut=st.integers(0, 1500),
    zipped=st.booleans(),
    version=st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
)
def test_a_mangled_file_is_read_or_refused_and_nothing_else(
    tmp_path: Path, patches: list[tuple[int, bytes]], cut: int, zipped: bool, version: Any
) -> None:
    voxels = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    raw = bytearray(version(voxels, np.eye(4)).to_bytes())
    for at, data in patches:
        raw[at : at + len(data)] = data
    path = tmp_path / "mangled.nii"
    content = bytes(raw[: max(0, len(raw) - cut)] if cut < 300 else raw)
    path.write_bytes(gzip.compress(content, 1) if zipped else content)
    try:
        volume = prepared(path, recipe(volume_shape=(8, 8, 8)))
    except VolumeError:
        return
    assert volume.shape == (1, 8, 8, 8)
    assert np.isfinite(volume).all()
