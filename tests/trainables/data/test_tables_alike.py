"""One reader of tables: whatever a table looks like, a study and a prediction find the same scans and labels in it."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_storage import put_folder

from trainables.data import table_file
from trainables.data.manifest import read_manifest
from trainables.data.table_file import ManifestError, read_records
from tune_app.models.predict import find_scans

Write = Callable[..., Path]


@pytest.fixture
def folder(write_scan: Write, tmp_path: Path) -> Path:
    for row in range(4):
        write_scan(f"{row}.nii.gz", seed=row)
    return tmp_path


ROWS = [f"{row}.nii.gz,{row % 2},s{row}" for row in range(4)]
PLAIN = "path,label,subject\n" + "\n".join(ROWS) + "\n"
TABLES = {
    "plain": ("t.csv", PLAIN),
    "name of its own": ("table.txt", PLAIN),
    "no suffix": ("table", PLAIN),
    "spaces": ("t.csv", PLAIN.replace(",", " , ")),
    "empty last row": ("t.csv", PLAIN + ",,\n\n   \n"),
    "trailing commas": ("t.csv", PLAIN.replace("\n", ",\n")),
    "trailing comma in one row": ("t.csv", PLAIN.replace("s2\n", "s2,\n")),
    "byte order mark, Windows line ends": ("t.csv", "\ufeff" + PLAIN.replace("\n", "\r\n")),
    "quoted": ("t.csv", PLAIN.replace("0.nii.gz", '"0.nii.gz"')),
    "labels as 1.0": ("t.csv", PLAIN.replace(",1,", ",1.0,")),
}


@pytest.mark.parametrize(("name", "text"), TABLES.values(), ids=TABLES)
def test_a_table_is_the_same_to_a_study_and_to_a_prediction(
    folder: Path, name: str, text: str
) -> None:
    table = folder / name
    table.write_text(text)
    rows = read_manifest(table).rows
    found = find_scans([table], 2)
    assert [one.problem for one in found] == [None] * 4
    assert [one.path for one in found] == rows["path"].tolist()
    assert rows["path"].tolist() == [str(folder / f"{row}.nii.gz") for row in range(4)]
    assert [one.label for one in found] == rows["label"].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t"])
def test_parquet_is_known_by_its_content(folder: Path, name: str) -> None:
    frame = pd.DataFrame(
        {
            " path": [f"{row}.nii.gz" for row in range(4)],
            "label": [0, 1, None, 1],  # floats, as soon as one is missing
            "subject": list("abcd"),
        }
    )
    frame.to_parquet(folder / name)
    found = find_scans([folder / name], 2)
    assert [Path(one.path).name for one in found] == [f"{row}.nii.gz" for row in range(4)]
    assert [one.label for one in found] == [0, 1, None, 1]
    with pytest.raises(ManifestError, match="label is missing"):
        read_manifest(folder / name)


def test_rows_that_are_urls_stay_urls(folder: Path, bucket: str) -> None:
    table = folder / "t.csv"
    table.write_text(f"path,label,subject\n{bucket}/a.nii.gz,0,a\n{bucket}/b.nii.gz,1,b\n")
    urls = [f"{bucket}/a.nii.gz", f"{bucket}/b.nii.gz"]
    assert [one.path for one in find_scans([table], 2)] == urls
    assert read_manifest(table).rows["path"].tolist() == urls


def test_tables_and_folders_in_object_storage_are_found(folder: Path, bucket: str) -> None:
    (folder / "table.txt").write_text(PLAIN)
    put_folder(bucket, folder)
    scans = [f"{bucket}/{row}.nii.gz" for row in range(4)]
    assert [one.path for one in find_scans([Path(f"{bucket}/table.txt")], 2)] == scans
    assert [one.path for one in find_scans([Path(bucket)], 2)] == scans
    (none,) = find_scans([Path(f"{bucket}/none")], 2)
    assert none.problem == "no such object, and no scan below"


def test_a_pipe_named_as_a_table_is_refused_unopened(folder: Path) -> None:
    os.mkfifo(folder / "t.csv")
    (found,) = find_scans([folder / "t.csv"], 2)
    assert (found.path, found.problem) == (str(folder / "t.csv"), None)  # reading reports why
    with pytest.raises(ManifestError, match="this is a folder or device"):
        read_manifest(folder / "t.csv")


def bomb(path: Path, rows: int, length: int) -> Path:
    """A small Parquet file of many rows: one text, and a number for each row."""
    places = pa.array([0] * rows, pa.int32())
    columns = {
        name: pa.DictionaryArray.from_arrays(places, ["x" * length]) for name in ("path", "subject")
    }
    pq.write_table(pa.table({**columns, "label": [0] * rows}), path, store_schema=False)
    return path


def test_a_small_file_of_many_rows_is_refused_before_it_is_unpacked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = bomb(folder / "t.parquet", rows=3_000_000, length=1)
    assert table.stat().st_size < 100_000
    (found,) = find_scans([table], 2)
    assert found.problem == ("not a table that can be read: 3000000 rows, at most 1000000 are read")
    monkeypatch.setattr(table_file, "MAX_TABLE_BYTES", 2**20)
    with pytest.raises(ManifestError, match="MiB, at most 1 are read"):
        read_records(bomb(folder / "long.parquet", rows=50_000, length=10_000))


def test_a_file_of_line_ends_alone_is_not_held(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_file, "MAX_ROWS", 100)
    (folder / "t.csv").write_text("path\n" + "\n" * 200)
    with pytest.raises(ManifestError, match="more than 100 rows"):
        read_records(folder / "t.csv")


def test_a_row_of_another_width_has_its_own_line(folder: Path) -> None:
    table = folder / "t.csv"
    table.write_text(PLAIN.replace("1.nii.gz,1,s1", "1.nii.gz,1"))
    found = find_scans([table], 2)
    assert [one.problem for one in found] == [None, "2 cells, the header has 3", None, None]
    with pytest.raises(ManifestError, match=r"row 2 .*: 2 cells, the header has 3"):
        read_manifest(table)


def test_labels_that_are_no_classes_are_told(folder: Path) -> None:
    table = folder / "t.csv"
    table.write_text(PLAIN.replace(",0,", ",benign,"))
    said: list[str] = []
    assert [one.label for one in find_scans([table], 2, said.append)] == [None, 1, None, 1]
    assert said == [
        f"note: {table}: 2 labels are not evaluated, the first is 'benign': classes are 0 to 1"
    ]
