"""Contents of a folder: every volume gets a row, or a line on how to convert it, whatever its name is."""

import gzip
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from trainables.data.formats import FoundScan, foreign_format, head_of, is_nifti, scans_below
from trainables.data.scans import VolumeError, read_scan

Write = Callable[..., Path]

ANALYZE = nib.AnalyzeImage(np.zeros((4, 4, 4), np.int16), np.eye(4))
MGH = nib.MGHImage(np.zeros((4, 4, 4), np.float32), np.eye(4))
FOREIGN = {
    "a.dcm": (bytes(128) + b"DICM" + bytes(20), "dcm2niix"),
    "IM0001": (bytes(128) + b"DICM" + bytes(20), "dcm2niix"),
    "a.mha": (b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\n", "SimpleITK"),
    "a.mhd": (b"NDims = 3\nObjectType = Image\n", "SimpleITK"),
    "a.nrrd": (b"NRRD0004\ntype: float\n", "SimpleITK"),
    "a.mgz": (gzip.compress(MGH.to_bytes(), mtime=0), "mri_convert"),
    "a.mnc": (b"\x89HDF\r\n\x1a\n" + bytes(20), "mnc2nii"),
    "a.hdr": (ANALYZE.header.binaryblock, "which side is left"),
    "pair.hdr": (nib.nifti1.Nifti1PairHeader().binaryblock, "nib.save(nib.load(OLD), NEW)"),
    "pair2.hdr": (nib.nifti2.Nifti2PairHeader().binaryblock, "nib.save(nib.load(OLD), NEW)"),
    "a.nii.bz2": (b"BZh91AY&SY", "unpack it"),
}


@pytest.mark.parametrize(("name", "content", "advice"), [(n, *rest) for n, rest in FOREIGN.items()])
def test_a_format_that_is_not_read_is_told_with_how_to_convert_it(
    tmp_path: Path, name: str, content: bytes, advice: str
) -> None:
    """In a folder, and where a table or a command names the file itself."""
    file = tmp_path / "folder" / name
    file.parent.mkdir()
    file.write_bytes(content)
    (found,), notes = scans_below(file.parent)
    assert found.problem is not None
    assert advice in found.problem
    assert notes == []
    with pytest.raises(VolumeError, match=re.escape(advice)):
        read_scan(file)


def test_the_advice_for_a_nifti_in_two_files_makes_one_that_is_read(tmp_path: Path) -> None:
    voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Pair(voxels, np.diag([1.0, 2.0, 3.0, 1.0])), tmp_path / "pair.hdr")
    nib.save(nib.load(tmp_path / "pair.hdr"), tmp_path / "one.nii.gz")
    scan = read_scan(tmp_path / "one.nii.gz")
    assert np.array_equal(scan.voxels[0], voxels)


def test_a_dicom_series_has_one_line(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"IM{number:04d}").write_bytes(bytes(128) + b"DICM")
    (found,), _ = scans_below(tmp_path)
    assert found.path == tmp_path
    assert found.problem is not None
    assert "IM0000 is DICOM" in found.problem


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_what_nibabel_writes_is_nifti_and_no_other_format(
    write_scan: Write, kind: type, tmp_path: Path
) -> None:
    for name in ("a.nii", "a.nii.gz"):
        head = head_of(write_scan(name, kind=kind))
        assert is_nifti(head)
        assert foreign_format(head) is None
    swapped = nib.Nifti1Header(endianness=">")
    assert is_nifti(swapped.binaryblock)


def test_folders_are_searched_through_links_and_in_any_case(
    write_scan: Write, tmp_path: Path
) -> None:
    """Linked folders, capitals, other names, links that lead nowhere; loops end; nothing is left out without a word."""
    for name in ("B.NII.GZ", "a.nii", "deep/c.Nii"):
        written = write_scan(f"in/{name.lower()}")
        written.rename(tmp_path / "in" / name)
    write_scan("in/named.nii").rename(tmp_path / "in" / "named.img")
    write_scan("elsewhere/d.nii.gz")
    root = tmp_path / "in"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "deep" / "loop").symlink_to(root)
    (root / "gone.nii.gz").symlink_to("/no/such/annex/object")
    (root / ".hidden.nii").write_bytes(b"")
    (root / "notes.txt").write_text("x")
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "pipe.nii")
    found, (note,) = scans_below(root)
    names = [str(one.path.relative_to(root)) for one in found]
    assert names == [
        "B.NII.GZ",
        "a.nii",
        "deep/c.Nii",
        "gone.nii.gz",
        "linked/d.nii.gz",
        "named.img",
        "pipe.nii",
    ]
    assert {one.path.name: one.problem for one in found if one.problem} == {
        "gone.nii.gz": (
            "a link to a file that is not here: fetch it (`datalad get`, `git annex get`) or copy it"
        )
    }
    assert "hidden 1" in note
    assert ".txt 1" in note
    assert f"a link to {root}, whose scans are listed there 1" in note


def test_a_folder_that_cannot_be_read_has_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    listed = Path.iterdir

    def refused(self: Path) -> object:
        if self.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", refused)  # root may read everything
    found, _ = scans_below(tmp_path)
    assert found == [FoundScan(tmp_path / "closed", "cannot be read: Permission denied")]


def test_bytes_that_are_nothing_are_nothing() -> None:
    for head in (
        b"",
        b"\0" * 600,
        b"path,label,subject\n",
        struct.pack("<i", 348),
        b"# Comment = x",
    ):
        assert not is_nifti(head)
        assert foreign_format(head) is None
