"""Files of volumes by name and content: the readable ones, those to convert first, and all of them below a folder."""

import gzip
import os
import stat
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SCAN_SUFFIXES = (".nii", ".nii.gz")
"""Names of scans end so, in capitals or not."""
HEAD = 540
"""Bytes from which the format of a file is known: the longest NIfTI header."""
NO_CONTENT = (
    "a link to a file that is not here: fetch it (`datalad get`, `git annex get`) or copy it"
)

_WITH_SIMPLEITK = (
    "convert it to .nii.gz, for example with SimpleITK: `sitk.WriteImage(sitk.ReadImage(OLD), NEW)`"
)
_COMPRESSED = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
}


@dataclass(frozen=True)
class Foreign:
    """A format of volumes that is not read, and how to convert it; as text, both."""

    name: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.advice}"


def has_scan_name(name: str) -> bool:
    """Return whether a file of this name is a scan: .nii or .nii.gz, in capitals or not."""
    return name.lower().endswith(SCAN_SUFFIXES)


def is_nifti(head: bytes) -> bool:
    """Return whether a single NIfTI file begins with `head`, either byte order, NIfTI-1 or NIfTI-2."""
    first = head[:4]
    sizes = {struct.pack(f"{order}i", size): size for order in "<>" for size in (348, 540)}
    size = sizes.get(first)
    magic = {348: head[344:347], 540: head[4:7]}.get(size or 0)
    return magic in (b"n+1", b"n+2")


def foreign_format(head: bytes) -> Foreign | None:
    """Return the format of a file that begins with `head` and how to convert it; None for NIfTI and unknown formats.

    Recognised: DICOM, MetaImage, NRRD, MINC, MGH, Analyze, NIfTI in two files, and archives other than gzip.
    """
    if head[128:132] == b"DICM":
        return Foreign(
            "DICOM",
            "convert the whole series to one .nii.gz, for example with `dcm2niix FOLDER`",
        )
    if head.startswith(b"NRRD"):
        return Foreign("NRRD", _WITH_SIMPLEITK)
    first_line = head[:64].lstrip().split(b"=", 1)[0].strip()
    if first_line in (b"ObjectType", b"NDims", b"Comment", b"ObjectSubType") and b"=" in head:
        return Foreign("MetaImage (.mha, .mhd)", _WITH_SIMPLEITK)
    if head.startswith((b"\x89HDF\r\n", b"CDF\x01", b"CDF\x02")):
        return Foreign("MINC, HDF5 or NetCDF", "convert a MINC volume with `mnc2nii OLD NEW`")
    if (
        head[:4] == b"\0\0\0\1"
        and len(head) >= 28
        and max(struct.unpack(">4i", head[4:20])) < 2**15
    ):
        return Foreign(
            "MGH (.mgh, .mgz)", "convert it with FreeSurfer, `mri_convert OLD NEW.nii.gz`"
        )
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        return Foreign(
            "half of a .hdr and .img pair, a NIfTI in two files",
            "write it as one, for example with nibabel: `nib.save(nib.load(OLD), NEW)`, NEW ending in .nii.gz",
        )
    if head[:4] in (struct.pack("<i", 348), struct.pack(">i", 348)) and head[344:348] == b"\0" * 4:
        return Foreign(
            "Analyze 7.5, which does not store which side is left",
            "convert it with a program that knows where it is from",
        )
    packed = next((name for start, name in _COMPRESSED.items() if head.startswith(start)), None)
    if packed is None:
        return None
    return Foreign(f"compressed with {packed}", "unpack it, or compress it with gzip")


def head_of(path: Path) -> bytes:
    """Return the first bytes of a regular file, decompressed where it is gzip; none where they cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if head.startswith(b"\x1f\x8b"):
            with gzip.open(path) as stream:
                return stream.read(HEAD)
    except (OSError, EOFError, zlib.error):
        return b""
    return head


@dataclass(frozen=True)
class FoundScan:
    """A scan below a folder, or something there that is in the place of one and cannot be read."""

    path: Path
    problem: str | None = None
    format: str | None = None
    """Name of the foreign format that it is in."""


def scans_below(folder: Path) -> tuple[list[FoundScan], list[str]]:
    """Return the scans below a folder in the order of their names, and notes on the files that were left out.

    Links to folders are followed, each folder is read once. A scan has a scan's name or a NIfTI file's first bytes.
    Other formats of volumes, folders that cannot be read and links that lead nowhere come with their problem; a DICOM
    series has one line. Hidden files and files that are no volumes are left out and counted in the notes.
    """
    found: list[FoundScan] = []
    left_out: Counter[str] = Counter()
    seen: dict[tuple[int, int], Path] = {}
    series: set[Path] = set()
    pending = [folder]
    while pending:
        path = pending.pop()
        if path != folder and path.name.startswith("."):
            left_out["hidden"] += 1
            continue
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                first = seen.setdefault((status.st_dev, status.st_ino), path)
                if first is path:
                    pending += sorted(path.iterdir(), reverse=True)
                else:
                    left_out[f"a link to {first}, whose scans are listed there"] += 1
                continue
        except OSError as error:
            if found_problem := _unreadable(path, error):
                found.append(FoundScan(path, found_problem))
            continue
        if has_scan_name(path.name):
            found.append(FoundScan(path))
            continue
        head = head_of(path) if stat.S_ISREG(status.st_mode) else b""
        foreign = foreign_format(head)
        if is_nifti(head):
            found.append(FoundScan(path))
        elif foreign is not None and head[128:132] == b"DICM":
            if path.parent not in series:
                series.add(path.parent)
                found.append(FoundScan(path.parent, f"{path.name} is {foreign}", foreign.name))
        elif foreign is not None and _may_be_a_volume(path, head):
            found.append(FoundScan(path, str(foreign), foreign.name))
        else:
            left_out[path.suffix.lower() or "no suffix"] += 1
    notes = [f"{name} {count}" for name, count in sorted(left_out.items())]
    told = f"left out below {folder}, no scans: {', '.join(notes)}"
    return found, [told] if notes else []


def _unreadable(path: Path, error: OSError) -> str | None:
    if os.path.islink(path) and isinstance(error, FileNotFoundError):  # noqa: PTH114
        return NO_CONTENT if has_scan_name(path.name) else None
    return f"cannot be read: {error.strerror or error}"


def _may_be_a_volume(path: Path, head: bytes) -> bool:
    """Archives are reported only where their name shows that a scan is inside: any other file may be one."""
    packed = any(head.startswith(start) for start in _COMPRESSED)
    return not packed or ".nii" in path.name.lower()
