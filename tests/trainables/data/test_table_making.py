"""A folder and a label sheet become a table: every layout on disk, guesses reported, nothing lost without a line."""

import csv
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import openpyxl
import pytest

from trainables.data.manifest import read_manifest
from trainables.data.table_file import ManifestError
from trainables.data.table_making import JoinOptions, join_table, read_sheet, write_table


@pytest.fixture
def scan_at(tmp_path: Path) -> Callable[..., Path]:
    def write(*names: str) -> Path:
        for name in names:
            path = tmp_path / "scans" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)), path)
        return tmp_path / "scans"

    return write


def sheet_at(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    if path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(path)
    elif path.suffix == ".json":
        header, *body = rows
        path.write_text(json.dumps([dict(zip(header, row, strict=True)) for row in body]))
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        with path.open("w", newline="") as stream:
            csv.writer(stream, delimiter=delimiter).writerows(rows)
    return path


ROWS = [
    ["patient", "image", "diagnosis"],
    ["p1", "a.nii.gz", "benign"],
    ["p1", "b.nii.gz", "benign"],
    ["p2", "c.nii.gz", "malignant"],
    ["p3", "d.nii.gz", "malignant"],
]


@pytest.mark.parametrize("kind", ["csv", "tsv", "xlsx", "json"])
def test_every_kind_of_sheet_gives_the_same_table_and_it_can_be_read(
    scan_at: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    scans = scan_at("a.nii.gz", "b.nii.gz", "sub/c.nii.gz", "d.nii.gz")
    labels = sheet_at(tmp_path / f"labels.{kind}", ROWS)
    joined = join_table(scans, labels, JoinOptions())
    table = tmp_path / "table.csv"
    write_table(joined, table)
    assert table.read_text().splitlines() == [
        "path,label,subject,class",
        "scans/a.nii.gz,0,p1,benign",
        "scans/b.nii.gz,0,p1,benign",
        "scans/d.nii.gz,1,p3,malignant",
        "scans/sub/c.nii.gz,1,p2,malignant",
    ]
    assert read_manifest(table).rows["label"].tolist() == [0, 0, 1, 1]
    shown = "\n".join(joined.lines)
    assert "id: column 'image'" in shown
    assert "label: column 'diagnosis'" in shown
    assert "0 = benign (2), 1 = malignant (2)" in shown
    assert "subject: column 'patient', 3 subjects" in shown


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["sub-01/anat/sub-01_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz"], ["sub-01", "sub-02"]),
        (["case_001_0000.nii.gz", "case_002_0000.nii.gz"], ["case_001", "case_002"]),
        (["0001.nii.gz", "0002.nii.gz"], ["1", "2"]),  # Excel drops leading zeros
        (["p1/scan.nii", "p2/scan.nii"], ["p1", "p2"]),
        (["A.NII.GZ", "b.nii"], ["a", "B"]),
    ],
    ids=["bids", "nnunet", "numbers", "folders", "case"],
)
def test_ids_match_scans_in_the_layouts_that_people_have(
    scan_at: Callable[..., Path], tmp_path: Path, names: list[str], ids: list[str]
) -> None:
    scans = scan_at(*[name.lower() if name == "A.NII.GZ" else name for name in names])
    if "A.NII.GZ" in names:
        (scans / "a.nii.gz").rename(scans / "A.NII.GZ")
    labels = sheet_at(tmp_path / "l.csv", [["key", "y"], *zip(ids, "01", strict=True)])
    joined = join_table(scans, labels, JoinOptions(subject="key"))
    assert [row["label"] for row in joined.rows] == ["0", "1"]


def test_scans_without_labels_and_labels_without_scans_are_reported(
    scan_at: Callable[..., Path], tmp_path: Path
) -> None:
    scans = scan_at("a.nii.gz", "b.nii.gz", "c.nii.gz", "x.nii.gz")
    rows = [["scan", "label"], ["a", "0"], ["b", "1"], ["c", ""], ["gone", "1"]]
    labels = sheet_at(tmp_path / "l.csv", rows)
    joined = join_table(scans, labels, JoinOptions(one_subject_per_scan=True))
    assert len(joined.rows) == 2
    assert "1 scans without a row: x.nii.gz" in joined.lines
    assert "1 scans with an empty label: c.nii.gz" in joined.lines
    assert "1 rows without a scan: gone" in joined.lines


@pytest.mark.parametrize(
    ("labels", "options", "expected"),
    [
        (["yes", "no", "yes"], {}, ["1", "0", "1"]),
        (["tumour", "cyst", "vessel"], {"positive": "tumour"}, ["1", "0", "0"]),
        (["1", "2", "2"], {}, ["0", "1", "1"]),
        (["10", "9", "9"], {}, ["1", "0", "0"]),  # by value, not by text
        (["II", "I", "III"], {"classes": {"I": 0, "II": 0, "III": 1}}, ["0", "0", "1"]),
    ],
)
def test_words_and_numbers_become_classes(
    scan_at: Callable[..., Path],
    tmp_path: Path,
    labels: list[str],
    options: dict[str, Any],
    expected: list[str],
) -> None:
    scans = scan_at("a.nii", "b.nii", "c.nii")
    sheet = sheet_at(tmp_path / "l.csv", [["scan", "label"], *zip("abc", labels, strict=True)])
    joined = join_table(scans, sheet, JoinOptions(one_subject_per_scan=True, **options))
    assert [row["label"] for row in joined.rows] == expected


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([["scan", "label"], ["a", "1.5"], ["b", "2.7"]], {}, "look like a measurement"),
        ([["scan", "label"], ["a", "x"], ["b", "x"]], {}, "two classes are needed"),
        ([["scan", "label"], ["a", "0"], ["b", "1"]], {"one_subject_per_scan": False}, "whose"),
        ([["scan", "label"], ["q", "0"], ["r", "1"]], {}, "no column names the scans"),
        ([["scan", "grade", "kind"], ["a", "0", "1"], ["b", "1", "0"]], {}, "grade, kind could be"),
        (
            [["scan", "label"], ["a", "0"], ["b", "1"]],
            {"label_column": "lable"},
            "no column 'lable'",
        ),
        ([["scan", "label"], ["a", "0"], ["b", "1"]], {"positive": "2"}, "the labels are 0, 1"),
        ([["scan", "label"], ["a", "0"], ["a", "1"]], {}, "2 different rows"),
        ([["scan", "label"], ["a", "0"], ["b", "1"]], {"classes": {"0": 0}}, "no class for 1"),
    ],
)
def test_what_cannot_be_joined_is_refused_with_the_reason(
    scan_at: Callable[..., Path],
    tmp_path: Path,
    rows: list[list[str]],
    options: dict[str, Any],
    message: str,
) -> None:
    scans = scan_at("a.nii", "b.nii")
    options = {"one_subject_per_scan": True} | options
    with pytest.raises(ManifestError, match=message):
        join_table(scans, sheet_at(tmp_path / "l.csv", rows), JoinOptions(**options))


def test_a_subject_pattern_groups_scans_and_must_be_found_in_all(
    scan_at: Callable[..., Path], tmp_path: Path
) -> None:
    scans = scan_at("anna_1.nii", "anna_2.nii", "bert_1.nii")
    rows = [["scan", "label"], ["anna_1", "0"], ["anna_2", "0"], ["bert_1", "1"]]
    sheet = sheet_at(tmp_path / "l.csv", rows)
    joined = join_table(scans, sheet, JoinOptions(subject=r"^([a-z]+)_"))
    assert [row["subject"] for row in joined.rows] == ["anna", "anna", "bert"]
    with pytest.raises(ManifestError, match=r"not found in bert_1\.nii"):
        join_table(scans, sheet, JoinOptions(subject=r"^(anna)"))


def test_a_datalist_of_monai_keeps_its_split(scan_at: Callable[..., Path], tmp_path: Path) -> None:
    scans = scan_at("a.nii", "b.nii", "c.nii", "d.nii")
    lists = {"training": "ab", "validation": "cd"}
    content = {
        name: [{"image": f"./{letter}.nii", "label": number} for number, letter in enumerate(those)]
        for name, those in lists.items()
    }
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps(content))
    joined = join_table(scans, path, JoinOptions(one_subject_per_scan=True))
    assert [row["split"] for row in joined.rows] == ["train", "train", "val", "val"]


def test_segmentation_labels_are_not_taken_for_classes(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}))
    with pytest.raises(ManifestError, match="segmentation files"):
        read_sheet(path)


def test_a_folder_of_another_format_says_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nrrd").write_bytes(b"NRRD0004")
    (tmp_path / "scans" / "IM0001").write_bytes(bytes(128) + b"DICM")
    sheet = sheet_at(tmp_path / "l.csv", [["scan", "label"], ["a", "0"]])
    with pytest.raises(ManifestError, match=r"1 NRRD files.*1 DICOM|1 DICOM files.*1 NRRD"):
        join_table(tmp_path / "scans", sheet, JoinOptions())


def test_linked_folders_are_followed_and_loops_end(
    scan_at: Callable[..., Path], tmp_path: Path
) -> None:
    scans = scan_at("a.nii")
    other = tmp_path / "elsewhere"
    other.mkdir()
    shutil.copy(scans / "a.nii", other / "b.nii")
    (scans / "linked").symlink_to(other)
    (scans / "loop").symlink_to(scans)
    sheet = sheet_at(tmp_path / "l.csv", [["scan", "label"], ["a", "0"], ["b", "1"]])
    joined = join_table(scans, sheet, JoinOptions(one_subject_per_scan=True))
    assert [row["path"].split("/")[-1] for row in joined.rows] == ["a.nii", "b.nii"]


def test_an_existing_table_is_kept(scan_at: Callable[..., Path], tmp_path: Path) -> None:
    scans = scan_at("a.nii.gz", "b.nii.gz", "c.nii.gz", "d.nii.gz")
    joined = join_table(scans, sheet_at(tmp_path / "l.csv", ROWS), JoinOptions())
    (tmp_path / "table.csv").write_text("precious")
    with pytest.raises(ManifestError, match="--force"):
        write_table(joined, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == "precious"


def test_a_pipe_or_a_thousand_brackets_are_no_label_sheet(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(ManifestError, match="a regular file is needed"):
        read_sheet(tmp_path / "labels.csv")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(ManifestError, match="nested too deeply"):
        read_sheet(tmp_path / "deep.json")
