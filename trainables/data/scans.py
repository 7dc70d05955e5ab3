"""One scan: a NIfTI file, or such an object in object storage -> voxels as the network sees them, and back.

Axes, defined once: a loaded volume is (C, D, H, W) in RAS+. D runs left to right (x), H back to front (y), W feet to
head (z): the file's axes are flipped and permuted to that order and nothing else is transposed, as in MedicalNet and
MONAI. Shapes and spacings are given in the same order (D, H, W), spacings in millimetres. Oblique volumes keep their
grid: they are turned to the closest axes, not resampled to the scanner's.


Nothing here loads torch.
"""

import contextlib
import dataclasses
import gzip
import io
import itertools
import math
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.orientations import apply_orientation, io_orientation
from nibabel.quaternions import quat2mat
from nibabel.spatialimages import HeaderDataError

from trainables.config import FineTuneConfig
from trainables.data.formats import HEAD, foreign_format
from trainables.data.storage import bucket_of, url_of

LARGEST_VALUE = 1000.0
"""Normalised intensities are clipped to +- this: float16 ends at 65,504, and no anatomy is a thousand deviations away."""

MAX_VOXELS = 2**30
"""Voxels of one file, all channels: 1,024 cubed, 4 GiB as float32. Headers that claim more are refused unread."""


class VolumeError(ValueError):
    """A file that cannot be used. `path` names it; `reason` states the value found, the allowed values and the remedy."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"scan {path}: {reason}")

    def __reduce__(self) -> tuple[type["VolumeError"], tuple[Path | str, str]]:
        # The default would pass the joined text, and Ray pickles errors
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class Recipe:
    """How a file becomes a prepared volume; part of a cohort's key. The fields are `FineTuneConfig`'s."""

    volume_shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] | None
    intensity: str
    window_low: float
    window_high: float
    in_channels: int

    @classmethod
    def from_config(cls, config: FineTuneConfig) -> Self:
        """Return the part of `config` that determines a prepared volume."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """Return the recipe that `json.dumps(dataclasses.asdict(recipe))` wrote: JSON knows no tuples."""
        parts: dict[str, Any] = {
            n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()
        }
        return cls(**parts)


@dataclass(frozen=True)
class ScanHeader:
    """The content of a NIfTI header, checked against the size of its file."""

    shape: tuple[int, int, int]
    """Voxels (D, H, W), RAS+."""
    channels: int
    """1 for a 3D file, else the size of the fourth dimension (or of the fifth, where the fourth is 1)."""
    spacing_mm: tuple[float, float, float]
    """Spacing (D, H, W), RAS+."""
    oriented: bool
    """Whether the file states an orientation (sform or qform code above 0); if not, LAS is assumed, by the standard."""
    orientation: np.ndarray
    """nibabel's orientation array: for each of the file's axes the RAS+ axis it becomes, and 1 or -1."""
    file_shape: tuple[int, ...]
    """Voxels as stored: x, y, z, and the channels of a file that has several."""
    dtype: np.dtype
    offset: int
    """Bytes before the first voxel."""
    slope: float
    inter: float


@dataclass(frozen=True)
class Scan:
    """A volume as it is in its file: in RAS+ and scaled by the header's slope and intercept, otherwise untouched."""

    voxels: np.ndarray
    """(C, D, H, W) float32, finite, not constant."""
    spacing_mm: tuple[float, float, float]


# One volume ------------------------------------------------------------------------------------------------------------


def prepare_scan(scan: Scan, recipe: Recipe, path: Path | str) -> np.ndarray:
    """Return the prepared volume of a scan: (C, D, H, W) float32, RAS+, of `recipe.volume_shape`.

    Resampled, cropped, normalised over the voxels that are left, clipped to +-1000 and only then padded, with the
    smallest value of the channel: the border looks like background and is not in the statistics.
    Raises VolumeError, with `path` in its message.
    """
    with naming(path):
        return _padded(_normalised(resample(scan, recipe), recipe), recipe.volume_shape)


def read_header(path: Path | str) -> ScanHeader:
    """Return the header of a .nii or .nii.gz file; reads no voxels.

    Accepted are NIfTI-1 and NIfTI-2, either byte order, real numbers, three dimensions or three and channels.
    Raises VolumeError: no single-file NIfTI, spacing not above 0, or more voxels claimed than the file can hold.
    """
    with naming(path), _opened(path) as (stream, size, zipped):
        return _header(stream, size, zipped)


def raw_header(path: Path | str) -> Any:
    """Return the header of a .nii or .nii.gz file as nibabel has it, with all its fields. Raises VolumeError."""
    with naming(path), _opened(path) as (stream, _, _):
        return _fields(stream.read(HEAD))[0]


def read_scan(path: Path | str, in_channels: int = 1) -> Scan:
    """Return the voxels and spacing of a .nii or .nii.gz file; every byte is read, so a cut or damaged file shows.

    Raises VolumeError: what `read_header` refuses, too few bytes, a wrong checksum, another number of channels,
    voxels that are not finite, or a volume whose voxels are all the same.
    """
    with naming(path), _opened(path) as (stream, size, zipped):
        header = _header(stream, size, zipped)
        if header.channels != in_channels:
            raise _Refused(
                f"shape {_times(header.file_shape)}, {header.channels} channel(s), in_channels={in_channels}: "
                "give one file per channel set, or change in_channels"
            )
        stream.seek(header.offset)
        wanted = math.prod(header.file_shape) * header.dtype.itemsize
        data = stream.read(wanted)
        if len(data) < wanted:
            raise _Refused(
                f"truncated: {len(data)} of {wanted} voxel bytes are there; copy it again"
            )
        _read_to_end(stream)  # a gzip checksum is compared only there
    raw = np.frombuffer(data, header.dtype).reshape(header.file_shape, order="F")
    with naming(path):
        return Scan(_canonical(raw, header), header.spacing_mm)


def resample(scan: Scan, recipe: Recipe) -> np.ndarray:
    """Return the scan at the recipe's spacing, its middle cropped to at most `volume_shape`: (C, d, h, w), not padded.

    Trilinear on a grid that shares its centre with the volume; where voxels get larger the triangle is widened by the
    same factor (as Pillow and torch's `antialias=True` do), so nothing between the new voxels is skipped. One small
    matrix an axis does both, for the cropped part only: however fine the target spacing, memory stays that of the
    file. An axis that keeps its spacing keeps its values, bit for bit. Beyond the edge the outermost voxel is repeated.
    """
    voxels = scan.voxels
    spacing_mm = target_spacing(voxels.shape[1:], scan.spacing_mm, recipe)
    for axis, (old_mm, new_mm, wanted) in enumerate(
        zip(scan.spacing_mm, spacing_mm, recipe.volume_shape, strict=True), 1
    ):
        ratio = min(max(new_mm / old_mm, 1e-9), 1e9)  # beyond, nothing but overflow is different
        # headers hold float32: over 500 voxels this shifts by a twentieth of one at most
        if abs(ratio - 1) < 1e-4:
            start = max(0, voxels.shape[axis] // 2 - wanted // 2)
            voxels = voxels[(slice(None),) * axis + (slice(start, start + wanted),)]
        else:
            voxels = _along(voxels, axis, _axis_weights(voxels.shape[axis], wanted, ratio))
    return np.ascontiguousarray(voxels)


def target_spacing(
    shape: Sequence[int], spacing_mm: Sequence[float], recipe: Recipe
) -> tuple[float, float, float]:
    """Return the spacing (D, H, W) in mm to which the recipe brings a scan of this shape and spacing."""
    if recipe.spacing_mm is not None:
        return recipe.spacing_mm
    extents_mm = np.multiply(shape, spacing_mm)
    return (float((extents_mm / recipe.volume_shape).max()),) * 3


def kept_shares(
    shapes: npt.ArrayLike,
    spacings_mm: npt.ArrayLike,
    targets_mm: npt.ArrayLike,
    volume_shape: Sequence[int],
) -> npt.NDArray[np.float64]:
    """Return the share of its extent that a scan keeps along each axis when brought to `targets_mm` and cropped.

    Arguments are (3,) for one scan or (N, 3), as is the answer; 1 where nothing is cropped.
    """
    voxels = np.maximum(np.round(np.multiply(shapes, spacings_mm) / np.asarray(targets_mm)), 1)
    kept: npt.NDArray[np.float64] = np.minimum(np.asarray(volume_shape) / voxels, 1)
    return kept


def _axis_weights(old: int, wanted: int, ratio: float) -> np.ndarray:
    """Matrix (new, old) that resamples one axis of `old` voxels to voxels `ratio` times as large, at most `wanted`."""
    whole = max(1, round(old / ratio))  # voxels before cropping
    start = max(0, whole // 2 - wanted // 2)  # MONAI's centred crop
    # From the centre, in new voxels
    new = np.arange(min(wanted, whole)) + (start - (whole - 1) / 2)
    distances = np.arange(old)[None, :] - (new * ratio + (old - 1) / 2)[:, None]
    weights = np.maximum(0, 1 - np.abs(distances) / max(1.0, ratio))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _along(voxels: np.ndarray, axis: int, weights: np.ndarray) -> np.ndarray:
    before, after = voxels.shape[:axis], voxels.shape[axis + 1 :]
    stacked = np.ascontiguousarray(voxels).reshape(
        math.prod(before), voxels.shape[axis], math.prod(after)
    )
    result = np.matmul(weights, stacked) if after else stacked[:, :, 0] @ weights.T
    return result.reshape(*before, len(weights), *after)


def _normalised(voxels: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Intensities by the recipe, channel by channel, in +-LARGEST_VALUE; refuses a channel that becomes constant."""
    result = np.empty_like(voxels)
    for channel, values in enumerate(voxels):
        which = f"channel {channel}: " if len(voxels) > 1 else ""
        wide = values.astype(np.float64)
        if recipe.intensity == "window":
            low, high = recipe.window_low, recipe.window_high
            scaled = (wide.clip(low, high) - low) / (high - low) * 2 - 1
            if _is_flat(scaled):
                raise _Refused(
                    f"{which}values {wide.min():g} to {wide.max():g} are all one value in the window {low:g} to {high:g}: "
                    "set window_low and window_high for this cohort, or use intensity=zscore"
                )
        else:
            counted = wide[wide > 0] if recipe.intensity == "zscore_nonzero" else wide.ravel()
            if not counted.size or _is_flat(counted):
                same = (
                    f"every voxel that counts is {counted[0]:g}"
                    if counted.size
                    else "no voxel is > 0"
                )
                advice = (
                    "drop the row" if recipe.intensity == "zscore" else "or use intensity=zscore"
                )
                raise _Refused(
                    f"{which}{same} where it was cropped, {recipe.intensity} needs several values: {advice}"
                )
            scaled = (wide - counted.mean()) / counted.std()
        result[channel] = scaled.clip(-LARGEST_VALUE, LARGEST_VALUE)
    return result


def _is_flat(values: np.ndarray) -> bool:
    """Whether the values differ by no more than resampling a constant in float32 would make them."""
    low, high = float(values.min()), float(values.max())
    return high - low <= 1e-6 * max(abs(low), abs(high))


def _padded(voxels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    if voxels.shape[1:] == shape:
        return voxels
    padded = np.empty((len(voxels), *shape), dtype=np.float32)
    inside = tuple(
        slice((full - part) // 2, (full - part) // 2 + part)
        for full, part in zip(shape, voxels.shape[1:], strict=True)
    )
    for channel, values in enumerate(voxels):
        padded[channel] = values.min()
        padded[channel][inside] = values
    return padded


# Reading NIfTI ---------------------------------------------------------------------------------------------------------


HEADER_KINDS = ((348, nib.Nifti1Header, b"n+1"), (540, nib.Nifti2Header, b"n+2"))
"""Length, which is also the first number of the header, class, and magic of a single file."""


NO_OBJECT = "no such object: copy it there, or drop the row"


class _Refused(ValueError):
    """A reason without the file's name; `_named` adds it."""


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Turn whatever a bad file raises into a VolumeError that names it."""
    try:
        yield
    except _Refused as error:
        raise VolumeError(path, str(error)) from None
    except EOFError:
        raise VolumeError(path, "truncated: its gzip stream ends early; copy it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise VolumeError(path, f"damaged gzip ({error}); copy it again") from None
    except MemoryError:
        raise VolumeError(path, "does not fit into memory: downsample or crop it") from None
    except OSError as error:
        raise VolumeError(path, f"cannot be read: {error.strerror or error}") from None


@contextlib.contextmanager
def open_bytes(path: Path | str) -> Iterator[tuple[io.BufferedReader, int]]:
    """Open a file or a URL's object as it is: gives the stream, and the size. Inside `naming`."""
    if "\0" in str(path):
        raise _Refused("no file has such a name")
    if (url := url_of(path)) is not None:
        bucket, name = bucket_of(url)
        try:
            with bucket.opened(name) as opened:
                yield opened
        except FileNotFoundError:
            raise _Refused(NO_OBJECT) from None
        return
    found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise _Refused("a folder, pipe or device: a .nii or .nii.gz file is needed")
    with Path(path).open("rb") as file:
        yield file, found.st_size


def stamp(path: Path | str) -> tuple[int, ...]:
    """Return size, time of the last write and of the last change (which no copy can set back), in ns. Inside `naming`.

    An object has one time, of its writing.
    """
    if (url := url_of(path)) is not None:
        bucket, name = bucket_of(url)
        if (found := bucket.stamp(name)) is None:
            raise _Refused(NO_OBJECT)
        size, written = found
        return size, written, written
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[tuple[IO[bytes], int, bool]]:
    """Open a file, decompressing it when its first bytes are gzip's: gives the stream, the file's size, and whether."""
    with open_bytes(path) as (file, size):
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if zipped:
            with gzip.open(file) as stream:
                yield stream, size, True  # type: ignore[misc]
        else:
            yield file, size, False


def _header(stream: IO[bytes], size: int, zipped: bool) -> ScanHeader:
    fields, length = _fields(stream.read(HEAD))
    shape = _shape([int(number) for number in fields["dim"]])
    try:
        dtype = fields.get_data_dtype()
    except (KeyError, HeaderDataError):
        dtype = np.dtype(np.void)
    if dtype.kind not in "iuf":
        raise _Refused(
            f"datatype code {int(fields['datatype'])}: voxels must be integers or real numbers; convert it"
        )
    # The standard: an offset below the header's end, as the 0 of many writers, means right behind the header.
    offset = float(fields["vox_offset"])
    offset = length + 4 if 0 <= offset < length + 4 else offset
    if not length + 4 <= offset < MAX_VOXELS:
        raise _Refused(
            f"vox_offset {offset:g}: voxels cannot start before byte {length + 4}; write the file again"
        )
    _check_size(shape, dtype.itemsize, int(offset), size, zipped)
    spacing, orientation = _geometry(fields)
    try:
        slope, inter = fields.get_slope_inter()
    except HeaderDataError as error:
        raise _Refused(f"scl_slope, scl_inter: {error}; write the file again") from None
    file_axes = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]
    return ScanHeader(
        shape=(shape[file_axes[0]], shape[file_axes[1]], shape[file_axes[2]]),
        channels=math.prod(shape[3:]),
        spacing_mm=(spacing[file_axes[0]], spacing[file_axes[1]], spacing[file_axes[2]]),
        oriented=bool(fields["sform_code"] > 0 or fields["qform_code"] > 0),
        orientation=orientation,
        file_shape=shape,
        dtype=dtype,
        offset=int(offset),
        slope=1.0 if slope is None else slope,
        inter=0.0 if inter is None else inter,
    )


def _fields(block: bytes) -> tuple[Any, int]:
    """nibabel's header of a file that starts with `block`, and its length, which determines byte order and version."""
    if not block:
        raise _Refused("empty: no bytes; copy it again")
    for endianness, (length, kind, magic) in itertools.product("<>", HEADER_KINDS):
        if len(block) < length or np.frombuffer(block, f"{endianness}i4", 1)[0] != length:
            continue
        # Without nibabel's own check: it would set a spacing of 0 to 1 and drop a minus sign without a word.
        fields = kind(block[:length], endianness=endianness, check=False)
        found = fields["magic"].item()
        if found.startswith(magic):
            return fields, length
        if foreign := foreign_format(block):
            raise _Refused(str(foreign))
        raise _Refused(
            f"magic {found!r}: a single NIfTI file has {magic.decode()!r}; convert it to .nii.gz"
        )
    if foreign := foreign_format(block):
        raise _Refused(str(foreign))
    raise _Refused(
        "not a NIfTI file, or cut within its header: convert it to .nii.gz, or copy it again"
    )


def _shape(dim: list[int]) -> tuple[int, ...]:
    """The file's shape: three sides, and the channels where there are any; dimensions of size 1 behind z are dropped."""
    count, sides = dim[0], dim[1:]
    if not 1 <= count <= 7 or min(sides[:count]) < 1:
        raise _Refused(
            f"dim {dim}: 1 to 7 dimensions of at least one voxel are allowed; write the file again"
        )
    if count < 3 or min(sides[:3]) < 2:
        raise _Refused(
            f"shape {_times(sides[:count])}: a volume of at least 2 voxels a side is needed, not an image"
        )
    more = [side for side in sides[3:count] if side > 1]
    if len(more) > 1:
        raise _Refused(
            f"shape {_times(sides[:count])}: three dimensions, or three and channels, are allowed; split it"
        )
    return (*sides[:3], *more)


def _check_size(
    shape: tuple[int, ...], itemsize: int, offset: int, size: int, zipped: bool
) -> None:
    """Refuse a header that claims more than there is, before anything is allocated for it."""
    voxels = math.prod(shape)
    claimed = offset + voxels * itemsize
    says = f"the header claims {_times(shape)} voxels, {bytes_text(claimed)}"
    most = 1032 * size if zipped else size  # deflate cannot do better than 1032 : 1
    if claimed > most:
        holds = f"the file holds {bytes_text(size)}" + (" compressed" if zipped else "")
        raise _Refused(f"truncated, or a wrong header: {says}, {holds}; copy it again")
    if voxels > MAX_VOXELS:
        raise _Refused(f"{says}, at most {MAX_VOXELS} voxels are read: downsample or crop it")


def _geometry(fields: Any) -> tuple[list[float], np.ndarray]:
    """Spacing in mm of the file's three axes, and their orientation; the affine's where there is one, as in nibabel.

    `pixdim` is read only where the standard reads it, which is where no sform is given; a sound sform stands alone. Of
    a quaternion, rounding to float32 may leave b, c and d a little longer than 1, and qfac 0 means 1.
    """
    if fields["sform_code"] > 0:
        affine = np.asarray(fields.get_sform(), dtype=np.float64)
    else:
        stated = tuple(float(value) for value in fields["pixdim"][1:4])
        if not all(math.isfinite(value) and value > 0 for value in stated):
            raise _bad_spacing(stated)
        if fields["qform_code"] > 0:
            affine = _from_quaternion(fields)
        else:
            affine = np.asarray(fields.get_best_affine(), dtype=np.float64)
    # Metres, micrometres; the rest is mm
    unit = {1: 1000.0, 3: 0.001}.get(int(fields["xyzt_units"]) & 7, 1.0)
    with np.errstate(all="ignore"):
        spacing = [float(value) * unit for value in np.sqrt((affine[:3, :3] ** 2).sum(axis=0))]
    if not all(math.isfinite(value) and value > 0 for value in spacing):
        raise _bad_spacing(spacing)
    if np.linalg.matrix_rank(affine[:3, :3] * unit / spacing, tol=1e-3) < 3:
        raise _Refused(
            "an affine that maps the volume onto a plane: fix the header or drop the row"
        )
    return spacing, io_orientation(affine)


QUATERNION_ROUNDING = 1e-5
"""By how much b*b + c*c + d*d may exceed 1: a hundred float32 roundings; writers work in float32, and round again."""


def _from_quaternion(fields: Any) -> np.ndarray:
    """Affine of the qform: NIfTI-1's METHOD 2, with the standard's defaults. Raises _Refused for no rotation."""
    vector = np.array([float(fields[f"quatern_{name}"]) for name in "bcd"])
    square = float((vector**2).sum())
    if not square <= 1 + QUATERNION_ROUNDING:  # NaN, too
        raise _Refused(
            f"no valid orientation (quaternion {', '.join(f'{part:g}' for part in vector)} is no rotation): "
            "fix the header or drop the row"
        )
    vector = vector / math.sqrt(square) if square > 1 else vector
    a = math.sqrt(max(0.0, 1 - square))
    qfac = -1.0 if float(fields["pixdim"][0]) < 0 else 1.0
    spacing = np.asarray(fields["pixdim"][1:4], dtype=np.float64) * (1.0, 1.0, qfac)
    affine = np.eye(4)
    affine[:3, :3] = quat2mat([a, *vector]) * spacing
    affine[:3, 3] = [float(fields[f"qoffset_{name}"]) for name in "xyz"]
    return affine


def _bad_spacing(spacing: Sequence[float]) -> _Refused:
    numbers = ", ".join(f"{value:g}" for value in spacing)
    return _Refused(
        f"spacing ({numbers}) mm, every value must be finite and > 0: fix the header or drop the row"
    )


def _read_to_end(stream: IO[bytes]) -> None:
    for _ in range(64):
        if not stream.read(2**20):
            return
    raise _Refused(
        "continues for more than 64 MiB after its last voxel, unlike its header: write it again"
    )


def _canonical(raw: np.ndarray, header: ScanHeader) -> np.ndarray:
    """Stored numbers -> (C, D, H, W) float32 in RAS+, scaled, finite, not constant."""
    turned = apply_orientation(raw, header.orientation)  # a view
    turned = turned[None] if turned.ndim == 3 else np.moveaxis(turned, 3, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        if (header.slope, header.inter) != (1.0, 0.0):
            # In float64 where float32 cannot hold the stored integers: slope and intercept may cancel.
            turned = (
                turned.astype(np.result_type(turned.dtype, np.float32)) * header.slope
                + header.inter
            )
        voxels = np.ascontiguousarray(turned, dtype=np.float32)
    low, high = voxels.min(), voxels.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = ~np.isfinite(voxels)
        first = tuple(int(i) for i in np.argwhere(bad)[0][1:])
        raise _Refused(
            f"{int(bad.sum())} of {voxels.size} voxels are not finite in float32 (the first at {first}, RAS+): "
            "mask or drop them"
        )
    if _is_flat(voxels):
        raise _Refused(
            f"constant: every voxel is {low:g}, there is nothing to learn from; drop the row"
        )
    return voxels


def _times(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def bytes_text(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


# Writing NIfTI ---------------------------------------------------------------------------------------------------------


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray, *, dtype: Any = None) -> None:
    """Write voxels (x, y, z) with their affine in mm to a .nii.gz file: the same bytes each time, so cohorts are found again.

    dtype: of the stored values; floats stored as integers get a slope and intercept that use the whole range.
    """
    image = nib.Nifti1Image(voxels, affine, dtype=dtype or voxels.dtype)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
