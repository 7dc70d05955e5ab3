"""Tables: every problem of every row at once; splits that no subject straddles."""

import contextlib
import gzip
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from trainables.config import FineTuneConfig, build_config
from trainables.data import table_file
from trainables.data.folds import few_of_a_class, split_rows, thin_folds
from trainables.data.manifest import Manifest, read_manifest
from trainables.data.manifest_check import check_manifest
from trainables.data.storage import DATA_ROOTS
from trainables.data.table_file import ManifestError

Write = Callable[..., Path]


@pytest.fixture
def write_table(tmp_path: Path) -> Callable[..., Path]:
    """Write a table and an (empty) file for each scan it names; rows are `label,subject` and more, after the path."""

    def write(
        rows: list[str],
        header: str = "path,label,subject",
        name: str = "table.csv",
        files: bool = True,
    ) -> Path:
        lines = [header]
        for number, row in enumerate(rows, 1):
            scan = f"{number:04d}.nii.gz"
            if files:
                (tmp_path / scan).touch()
            lines.append(f"{scan},{row}")
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return write


def problems_of(table: Path, num_classes: int = 2) -> list[str]:
    with pytest.raises(ManifestError) as refusal:
        read_manifest(table, num_classes)
    assert str(refusal.value) == "\n".join(refusal.value.problems)
    return refusal.value.problems


GOOD = [f"{number % 2},s{number}" for number in range(8)]


# Rows ------------------------------------------------------------------------------------------------------------------


def test_a_table_becomes_rows_with_absolute_paths(
    write_table: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table([*GOOD, "1.0, 007 "])
    monkeypatch.chdir(tmp_path)
    manifest = read_manifest(Path("table.csv"))
    assert manifest.table == str(tmp_path / "table.csv")
    assert list(manifest.rows.columns) == ["path", "label", "subject", "split", "fold"]
    assert manifest.rows["path"].tolist() == [
        str(tmp_path / f"{number:04d}.nii.gz") for number in range(1, 10)
    ]
    assert manifest.rows["label"].tolist() == [0, 1] * 4 + [1]
    assert manifest.rows["label"].dtype == np.int64
    assert manifest.rows["subject"].tolist() == [f"s{number}" for number in range(8)] + ["007"]
    assert manifest.rows["split"].tolist() == [None] * 9
    assert manifest.rows["fold"].isna().all()


def test_absolute_paths_other_columns_and_blank_lines_are_fine(
    write_table: Write, tmp_path: Path
) -> None:
    table = write_table([])
    scans = [tmp_path / "a, b" / f"{name}.nii" for name in ("ü", "y")]
    scans[0].parent.mkdir()
    for scan in scans:
        scan.touch()
    table.write_text(
        f'age,label,path,subject\n40,0,"{scans[0]}",a\n\n,1,"{scans[1]}",b\n', encoding="utf-8-sig"
    )
    assert read_manifest(table).rows["path"].tolist() == [str(scan) for scan in scans]


def test_parquet_and_csv_give_the_same_rows(write_table: Write, tmp_path: Path) -> None:
    table = write_table(
        [f"{row},train" if n < 4 else f"{row},val" for n, row in enumerate(GOOD)],
        "path,label,subject,split",
    )
    extra: list[Any] = [{"a": [1]}] * 8
    frame = pd.read_csv(table).assign(label=lambda rows: rows["label"].astype(float), extra=extra)
    frame.to_parquet(tmp_path / "table.parquet")
    frame.to_parquet(tmp_path / "misnamed.csv")
    for other in ("table.parquet", "misnamed.csv"):
        pd.testing.assert_frame_equal(
            read_manifest(tmp_path / other).rows, read_manifest(table).rows
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("2,s", "label '2': a whole number from 0 to 1 is needed (num_classes=2)"),
        ("-1,s", "label '-1': a whole number from 0"),
        ("0.5,s", "label '0.5': a whole number from 0"),
        ("sick,s", "label 'sick': a whole number from 0"),
        ("1_0,s", "label '1_0'"),
        ("\N{ARABIC-INDIC DIGIT ONE},s", "label '\N{ARABIC-INDIC DIGIT ONE}'"),
        ("1e0,s", "label '1e0'"),
        (f"{'9' * 5000},s", f"label '{'9' * 60}...{'9' * 57}'"),
        (",s", "label is missing: a whole number from 0 to 1"),
        ("nan,s", "label 'nan'"),
        ("True,s", "label 'True'"),
        ("1,", "no subject: name the person that the volume shows"),
        ("1,  ", "no subject"),
        ("1", "2 cells, the header has 3"),
        ("1,s,more", "4 cells, the header has 3: quote a cell that contains a comma"),
    ],
)
def test_a_bad_cell_is_told_with_its_row_and_scan(
    write_table: Write, row: str, message: str
) -> None:
    found = problems_of(write_table([*GOOD, row]))
    assert found[0].startswith(f"row 9 (scan 0009.nii.gz): {message}")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none.nii.gz", "row 9 (scan none.nii.gz): no such file below {folder}"),
        ("/nowhere/none.nii.gz", "row 9 (scan /nowhere/none.nii.gz): no such file"),
        ("", "row 9: no path"),
        ("folder", "row 9 (scan folder): a folder, a .nii or .nii.gz file is needed"),
        ("pipe", "row 9 (scan pipe): a pipe or device, a .nii"),
        ("loop", "row 9 (scan loop): no file that can be read: Too many levels of symbolic links"),
        (
            "x" * 5000,
            f"row 9 (scan {'x' * 60}...{'x' * 57}): no file that can be read: File name too long",
        ),
        ("a\x1b[31mred", r"row 9 (scan a\x1b[31mred): no such file"),
        (
            "0001.nii.gz",
            "row 9 (scan 0001.nii.gz): the same file as row 1 (scan 0001.nii.gz): keep one of the rows",
        ),
        ("folder/../0001.nii.gz", "row 9 (scan folder/../0001.nii.gz): the same file as row 1"),
        ("link", "row 9 (scan link): the same file as row 2 (scan 0002.nii.gz)"),
    ],
)
def test_a_bad_path_is_told(write_table: Write, tmp_path: Path, path: str, message: str) -> None:
    table = write_table(GOOD)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "link").symlink_to("0002.nii.gz")
    table.write_text(table.read_text() + f"{path},1,s9\n")
    (found,) = problems_of(table)
    assert found.startswith(message.format(folder=tmp_path))


def test_nothing_outside_the_given_folders_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by an absolute path, by `..` or by a link; whether such a file exists is not shown either."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.nii").write_bytes(b"")
    (inside / "file.nii").symlink_to(outside / "a.nii")
    (inside / "folder").symlink_to(outside)
    paths = ["a.nii", str(outside / "a.nii"), str(outside / "missing.nii"), "../outside/a.nii"]
    paths += ["file.nii", "folder/a.nii", "s3://other/a.nii", "s3://bucket/../other/a.nii"]
    lines = [f"{path},{row % 2},s{row}\n" for row, path in enumerate(paths)]
    for folder in (inside, outside):
        (folder / "table.csv").write_text("path,label,subject\n" + "".join(lines))
    monkeypatch.setenv(DATA_ROOTS, f"{inside}\ns3://bucket/cohort")
    with pytest.raises(ManifestError) as caught:
        read_manifest(inside / "table.csv")
    (told,) = caught.value.problems
    assert told.startswith(f"rows 2-8 (7, first scan {outside / 'a.nii'}): outside the folders")
    with pytest.raises(ManifestError, match="outside the folders") as caught:
        read_manifest(outside / "table.csv")
    assert len(caught.value.problems) == 1


def test_a_name_with_a_nul_in_a_parquet_table_is_told(tmp_path: Path) -> None:
    pd.DataFrame({"path": ["a\0b"], "label": [0], "subject": [3]}).to_parquet(
        tmp_path / "t.parquet"
    )
    assert problems_of(tmp_path / "t.parquet")[0].startswith(
        r"row 1 (scan a\x00b): no file that can be read: embedded null"
    )


def test_every_problem_of_every_row_is_told_at_once(write_table: Write, tmp_path: Path) -> None:
    table = write_table(
        ["0,a,train,0", "7,b,train,0", "1,,val,1", "x,a,val,x", "1,c,valid,99", "0,d,,0"],
        header="path,label,subject,split,fold",
    )
    (tmp_path / "0001.nii.gz").unlink()
    (tmp_path / "0004.nii.gz").unlink()
    found = problems_of(table)
    assert [line.split(": ")[0] for line in found[:8]] == [
        f"row {row} (scan 000{row}.nii.gz)" for row in (1, 2, 3, 4, 4, 4, 5, 5)
    ]
    assert found[8:] == [
        "row 6 (scan 0006.nii.gz): no split, other rows have one: train, val or test",
        "subject 'a' is in train (row 1) and in val (row 4): all volumes of a subject belong on one side",
    ]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "path,label,patient",
            "no column 'subject'; the columns are path, label, patient. It is the person that each volume shows.",
        ),
        ("path,label,Subject", "no column 'subject' (is it 'Subject'? rename that)"),
        ("path,label,subjects", "no column 'subject' (is it 'subjects'? rename that)"),
        ("path,class,subject", "no column 'label'; the columns are path, class, subject"),
        ("scan,label,subject", "no column 'path'"),
        ("path;label;subject", "Columns must be separated by commas"),
        ("path,label,subject,subject", "column 'subject' is there twice: remove one"),
    ],
)
def test_a_missing_column_is_told_with_what_it_is_for(
    write_table: Write, header: str, message: str
) -> None:
    assert any(message in line for line in problems_of(write_table(GOOD, header)))


def test_a_missing_column_hides_no_problem_of_the_others(write_table: Write) -> None:
    found = problems_of(write_table(["5,s", *GOOD], "path,label,patient"))
    assert "no column 'subject'" in found[0]
    assert "every volume is of another subject, give each row another value" in found[0]
    assert found[1].startswith("row 1 (scan 0001.nii.gz): label '5'")
    assert len(found) == 2


# The table's file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty: a header and rows are needed"),
        (b"\n\n , ,\n", "empty: a header"),
        (b"path,label,subject\n", "no rows; a row a volume is needed"),
        (b"path,label,subject\n\n,,\n", "no rows"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a binary file: CSV or Parquet is needed"),
        (
            gzip.compress(b"path,label,subject\n", mtime=0),
            "is compressed: CSV or Parquet is needed; unpack it",
        ),
        (b"ARROW1\0\0", "is a Feather (Arrow) file: CSV or Parquet is needed"),
        (b"PK\x03\x04\x14\0\x06\0", "looks like a spreadsheet: export it as CSV"),
        ("path,label".encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b"path,label,subject\na,0,M\xfcller\n", "line 2 is not UTF-8 text"),
        (b'path,label,subject\n"a,0,b\n', "not a CSV table: unexpected end of data"),
        (
            b"path,label,subject\n" + b"a" * 200_000,
            "not a CSV table: field larger than field limit",
        ),
        (b"PAR1 and no more", "not a Parquet table: "),
        (b"PAR1PAR1", "not a Parquet table: "),
    ],
)
def test_a_file_that_is_no_table_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    table = tmp_path / "table.csv"
    table.write_bytes(content)
    assert message in problems_of(table)[-1]


def test_a_cut_parquet_table_is_told(write_table: Write, tmp_path: Path) -> None:
    pd.read_csv(write_table(GOOD)).to_parquet(tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    for keep in (10, len(content) // 2, len(content) - 1):
        (tmp_path / "t.parquet").write_bytes(content[:keep])
        assert "not a Parquet table" in problems_of(tmp_path / "t.parquet")[0]


def test_a_table_that_is_missing_a_folder_a_pipe_or_huge_is_told(
    write_table: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no such file" in problems_of(tmp_path / "none.csv")[0]
    assert "this is a folder or device" in problems_of(tmp_path)[0]
    assert "this is a folder or device" in problems_of(tmp_path / "pipe")[0]
    table = write_table(GOOD)
    pd.read_csv(table).to_parquet(tmp_path / "t.parquet")
    monkeypatch.setattr(table_file, "MAX_ROWS", 5)
    assert "more than 5 rows, at most 5 are read" in problems_of(table)[0]
    assert "8 rows, at most 5 are read" in problems_of(tmp_path / "t.parquet")[0]
    monkeypatch.setattr(table_file, "MAX_TABLE_BYTES", 10)
    assert "is it the table?" in problems_of(table)[0]


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: f"path,label,subject\n{text}".encode())
)
def test_any_bytes_are_a_table_or_told(tmp_path: Path, content: bytes) -> None:
    table = tmp_path / "any.csv"
    table.write_bytes(content)
    assert problems_of(table)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    patches=st.lists(
        st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=4)), min_size=1, max_size=5
    )
)
def test_a_mangled_parquet_table_is_read_or_told(
    write_table: Write, tmp_path: Path, patches: list[tuple[int, bytes]]
) -> None:
    file = tmp_path / "mangled.parquet"
    pd.read_csv(write_table(GOOD)).to_parquet(file, compression=None)
    raw = bytearray(file.read_bytes())
    for at, data in patches:
        start = 4 + at % (len(raw) - 8)
        raw[start : start + len(data)] = data
    file.write_bytes(raw)
    with contextlib.suppress(ManifestError):
        assert len(read_manifest(file).rows) == 8


# Splits and folds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            "split",
            ["0,a,train", "1,b,train", "0,c,val", "1,b,val"],
            "subject 'b' is in train (row 2) and in val (row 4)",
        ),
        (
            "split",
            ["0,a,train", "1,b,train", "0,c,val", "1,d,val", "0,a,test"],
            "subject 'a' is in train (row 1) and in test (row 5)",
        ),
        (
            "split",
            ["0,a,", "1,b,", "0,a,test"],
            "subject 'a' is in no split (row 1) and in test (row 3)",
        ),
        (
            "split",
            ["0,a,train", "1,b,train", "0,c,val"],
            "split 'val' has no row of class 1 (rows: 1 of class 0; num_classes=2)",
        ),
        (
            "split",
            ["0,a,train", "0,b,train", "0,c,val", "1,d,val"],
            "split 'train' has no row of class 1",
        ),
        ("split", ["0,a,val", "1,b,val"], "split 'train' has no row of class 0, 1 (rows: none"),
        (
            "split",
            ["0,a,test", "1,b,test"],
            "the table, less its test rows, has no row of class 0, 1",
        ),
        ("split", ["0,a,train", "1,b,"], "row 2 (scan 0002.nii.gz): no split, other rows have one"),
        (
            "split",
            ["0,a,Train", "1,b,val"],
            "split 'Train': train, val or test is needed; did you mean 'train'?",
        ),
        ("split", ["0,a,validation", "1,b,val"], "did you mean 'val'?"),
        ("split", ["0,a,holdout", "1,b,val"], "split 'holdout': train, val or test is needed"),
        (
            "fold",
            ["0,a,0", "1,b,0", "0,c,1", "1,a,1"],
            "subject 'a' is in fold 0 (row 1) and in fold 1 (row 4)",
        ),
        (
            "fold",
            ["0,a,0", "1,b,0", "0,c,1", "0,d,1"],
            "the validation part of fold 1 has no row of class 1",
        ),
        (
            "fold",
            ["0,a,0", "1,b,0", "0,c,1", "0,d,1"],
            "the training part of fold 0 has no row of class 1",
        ),
        ("fold", ["0,a,0", "1,b,0"], "every row is in fold 0: two folds or more are needed"),
        ("fold", ["0,a,0", "1,b,2"], "no row is in fold 1: folds are numbered from 0 without gaps"),
        (
            "fold",
            ["0,a,0", "1,b,"],
            "row 2 (scan 0002.nii.gz): no fold, other rows have one: number it, or make it split=test",
        ),
        ("fold", ["0,a,0", "1,b,one"], "fold 'one': a whole number from 0 to 49 is needed"),
        ("fold", ["0,a,0", "1,b,-1"], "fold '-1'"),
        ("fold", ["0,a,0", "1,b,50"], "fold '50'"),
        ("age", ["0,a,1", "0,b,1"], "the table has no row of class 1"),
    ],
)
def test_a_split_that_cannot_be_used_is_told(
    write_table: Write, header: str, rows: list[str], message: str
) -> None:
    assert any(
        message in line for line in problems_of(write_table(rows, f"path,label,subject,{header}"))
    )


def subjects_of(manifest: Manifest, rows: np.ndarray) -> set[str]:
    return set(manifest.rows["subject"].to_numpy()[rows])


def cut(
    manifest: Manifest, fold: int = 0, num_folds: int = 3, cross_validate: bool = False
) -> list[list[int]]:
    split = split_rows(manifest, fold=fold, num_folds=num_folds, cross_validate=cross_validate)
    for part in (split.train, split.val, split.test):
        assert part.dtype == np.int64
        assert part.tolist() == sorted(part.tolist())
    return [split.train.tolist(), split.val.tolist(), split.test.tolist()]


ROWS = [f"{number % 2},s{number // 2}" for number in range(12)]


def test_the_tables_own_split_decides_whatever_the_fold(write_table: Write) -> None:
    words = ["train"] * 6 + ["val"] * 4 + ["test"] * 2
    manifest = read_manifest(
        write_table(
            [f"{row},{w}" for row, w in zip(ROWS, words, strict=True)], "path,label,subject,split"
        )
    )
    for fold in (0, 7):
        assert cut(manifest, fold) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]


def test_cross_validation_folds_train_and_val_together_and_never_touches_test(
    write_table: Write,
) -> None:
    words = ["train"] * 6 + ["val"] * 4 + ["test"] * 2
    manifest = read_manifest(
        write_table(
            [f"{row},{w}" for row, w in zip(ROWS, words, strict=True)], "path,label,subject,split"
        )
    )
    parts = [cut(manifest, fold, cross_validate=True) for fold in range(3)]
    assert sorted(row for _, val, _ in parts for row in val) == list(range(10))
    for train, val, test in parts:
        assert sorted(train + val) == list(range(10))
        assert test == [10, 11]


@pytest.mark.parametrize("words", [["train"] * 10 + ["test"] * 2, [""] * 10 + ["test"] * 2])
def test_a_table_with_test_rows_and_no_val_rows_is_folded(
    write_table: Write, words: list[str]
) -> None:
    manifest = read_manifest(
        write_table(
            [f"{row},{w}" for row, w in zip(ROWS, words, strict=True)], "path,label,subject,split"
        )
    )
    train, val, test = cut(manifest, fold=1)
    assert sorted(train + val) == list(range(10))
    assert test == [10, 11]


def test_the_tables_own_folds_come_before_ours(write_table: Write) -> None:
    rows = [
        f"{row},{'test' if n > 9 else ''},{'' if n > 9 else n // 2 % 2}"
        for n, row in enumerate(ROWS)
    ]
    manifest = read_manifest(write_table(rows, "path,label,subject,split,fold"))
    assert cut(manifest, 1) == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7], [10, 11]]
    with pytest.raises(
        ManifestError, match="fold=2: the table's fold column has 0, 1; choose one of them"
    ):
        cut(manifest, 2)


def test_folds_and_a_split_together_follow_cross_validate(write_table: Write) -> None:
    rows = [f"{row},{'val' if n > 7 else 'train'},{n // 2 % 2}" for n, row in enumerate(ROWS)]
    manifest = read_manifest(write_table(rows, "path,label,subject,split,fold"))
    assert cut(manifest, 1)[1] == [8, 9, 10, 11]
    assert cut(manifest, 1, cross_validate=True)[1] == [2, 3, 6, 7, 10, 11]


def test_folds_do_not_depend_on_the_order_of_the_rows(write_table: Write) -> None:
    rng = np.random.default_rng(0)
    manifest = read_manifest(
        write_table([f"{rng.integers(2)},s{rng.integers(20)}" for _ in range(60)])
    )
    shuffled = Manifest(
        manifest.table, manifest.rows.sample(frac=1, random_state=1).reset_index(drop=True), 2
    )
    for fold in range(3):
        one, other = (
            {name: set(m.rows["path"][getattr(split, name)]) for name in ("train", "val")}
            for m in (manifest, shuffled)
            for split in [split_rows(m, fold=fold, num_folds=3, cross_validate=False)]
        )
        assert one == other


@pytest.mark.parametrize("positive", [3, 4])
def test_too_few_subjects_of_a_class_for_the_folds_are_told_with_the_most_there_can_be(
    write_table: Write, positive: int
) -> None:
    manifest = read_manifest(write_table([f"{int(n < positive)},s{n}" for n in range(30)]))
    with pytest.raises(
        ManifestError, match=f"num_folds=5: class 1 has {positive} .* lower num_folds to {positive}"
    ):
        cut(manifest, num_folds=5)
    assert cut(manifest, num_folds=positive)


def test_a_fold_that_is_not_there_is_told(write_table: Write) -> None:
    with pytest.raises(ManifestError, match="fold=3: there are folds 0 to 2"):
        cut(read_manifest(write_table(ROWS)), fold=3)


def test_folds_keep_the_share_of_classes(write_table: Write) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(300) < 0.2).astype(int)
    rows = [f"{label},s{n}" for n, label in enumerate(labels) for _ in range(rng.integers(1, 4))]
    manifest = read_manifest(write_table(rows))
    shares = [manifest.rows["label"][cut(manifest, fold, 5)[1]].mean() for fold in range(5)]
    assert max(shares) - min(shares) < 0.03


@st.composite
def tables(draw: Any) -> pd.DataFrame:
    count = draw(st.integers(4, 40))
    labels = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    subjects = draw(st.lists(st.integers(0, 15), min_size=count, max_size=count))
    test = draw(st.sets(st.integers(0, 15), max_size=4))
    return pd.DataFrame(
        {
            "path": [f"/{row}.nii" for row in range(count)],
            "label": labels,
            "subject": [f"s{subject}" for subject in subjects],
            "split": pd.Series(
                ["test" if subject in test else None for subject in subjects], dtype=object
            ),
            "fold": pd.Series([None] * count, dtype="Int64"),
        }
    )


@settings(max_examples=60, deadline=None)
@given(rows=tables(), num_folds=st.integers(2, 5), classes=st.integers(2, 3))
def test_no_subject_is_ever_on_two_sides(rows: pd.DataFrame, num_folds: int, classes: int) -> None:
    rows = rows.assign(label=rows["label"] % classes)
    manifest = Manifest("/table.csv", rows, classes)
    pool = rows[rows["split"] != "test"]
    enough = all(
        pool[pool["label"] == label]["subject"].nunique() >= num_folds for label in range(classes)
    )
    if not enough:
        with pytest.raises(ManifestError, match=f"num_folds={num_folds}: class"):
            cut(manifest, 0, num_folds)
        return
    try:
        parts = [cut(manifest, fold, num_folds) for fold in range(num_folds)]
    except ManifestError:
        assume(False)  # a subject with volumes of every class may make it impossible
    for train, val, test in parts:
        assert sorted(train + val + test) == list(range(len(rows)))
        sides = [subjects_of(manifest, np.array(part, dtype=int)) for part in (train, val, test)]
        assert sum(map(len, sides)) == len(set.union(*sides))
        assert set(rows["label"][train]) == set(rows["label"][val]) == set(range(classes))
        assert all(rows["split"][row] == "test" for row in test)
    assert sorted(row for _, val, _ in parts for row in val) == pool.index.tolist()


def test_the_import_of_adrenalmnist_keeps_its_official_counts(
    adrenal_archive: Path, tmp_path: Path
) -> None:
    with np.load(adrenal_archive, allow_pickle=False) as arrays:
        labels = {split: arrays[f"{split}_labels"].ravel() for split in ("train", "val", "test")}
    rows = pd.DataFrame(
        [
            (f"/{split}{n}", y, f"{split}{n}", split)
            for split in labels
            for n, y in enumerate(labels[split])
        ]
    )
    rows.columns = pd.Index(["path", "label", "subject", "split"])
    manifest = Manifest(
        str(tmp_path), rows.assign(fold=pd.Series([None] * len(rows), dtype="Int64")), 2
    )
    train, val, test = cut(manifest)
    assert [np.bincount(rows["label"][part]).tolist() for part in (train, val, test)] == [
        [929, 259],
        [76, 22],
        [229, 69],
    ]


# The deep check --------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_table(write_scan: Write, tmp_path: Path) -> Path:
    lines = ["path,label,subject"]
    for row in range(8):
        write_scan(f"{row}.nii.gz", (9, 10, 8 + row), seed=row, spacing=(1.0, 1.0, 2.0))
        lines.append(f"{row}.nii.gz,{row % 2},s{row}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "table.csv"


def small(**changes: Any) -> FineTuneConfig:
    return build_config({"volume_shape": 8, "num_folds": 2} | changes)


def test_a_good_table_is_told_in_a_few_sentences(real_table: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = check_manifest(
        real_table, 2, small(), progress=lambda done, total: seen.append((done, total))
    )
    assert report.problems == []
    assert report.manifest is not None
    assert len(report.manifest.rows) == 8
    told, (intensity, *rest) = report.lines()[:5], report.lines()[5:]
    assert told == [
        "8 volumes of 8 subjects; class 0: 4, class 1: 4",
        "voxels 9 x 10 x 8 to 9 x 10 x 15, spacing 1 x 1 x 2 mm (x, y, z: left-right, back-front, feet-head)",
        "prepared: 8 x 8 x 8 voxels of 3.75 x 3.75 x 3.75 mm; none is cropped",
        "spacing_mm: 3.75 is the smallest at which every volume fits; it is the default of a new study",
        "spacing_mm: null scales each volume separately, which hides how large things are",
    ]
    few = thin_folds(report.manifest, small(), all_folds=True)
    assert few, "4 of each class are few for any fold"
    assert rest == few
    assert intensity.startswith("intensity: values ")
    assert "prepared to mean 0 and deviation 1 over all voxels of each scan" in intensity
    each = check_manifest(real_table, 2, small(spacing_mm=None)).lines()[2]
    assert each == (
        "prepared: 8 x 8 x 8 voxels of 2 x 2 x 2 to 3.75 x 3.75 x 3.75 mm; none is cropped"
    )
    assert seen == [(done, 8) for done in range(1, 9)]


def test_what_a_spacing_cuts_off_is_told_with_its_axis(real_table: Path) -> None:
    """1 mm: 15 slices of 2 mm become 30, of which 24 stay."""
    prepared = check_manifest(real_table, 2, small(volume_shape=(9, 10, 24), spacing_mm=1)).lines()[
        2
    ]
    assert prepared == (
        "prepared: 9 x 10 x 24 voxels of 1 x 1 x 1 mm; 3 of 8 are cropped, one to 80% of its extent along z"
    )


def test_the_same_problem_in_many_rows_is_one_line(real_table: Path) -> None:
    header, *rows = real_table.read_text().splitlines()
    path, label, subject = (header.split(",").index(name) for name in ("path", "label", "subject"))
    cells = [row.split(",") for row in rows]
    written = [
        [row[path], str(int(row[label]) + 1), row[subject], "training" if n else "train"]
        for n, row in enumerate(cells)
    ]
    real_table.write_text("\n".join(["path,label,subject,split", *map(",".join, written)]))
    twos = [number for number, row in enumerate(written, 1) if row[1] == "2"]
    first, labels, splits = check_manifest(real_table, 2, small()).problems
    assert (
        first
        == "labels begin at 1, up to 2; classes are counted from 0: subtract 1 from every label"
    )
    assert labels.endswith(
        "(4, first scan 1.nii.gz): label '2': a whole number from 0 to 1 is needed (num_classes=2)"
    )
    assert sorted(map(int, re.findall(r"\d+", labels.split("(")[0]))) == twos
    assert (
        splits
        == "rows 2-8 (7, first scan 1.nii.gz): split 'training': train, val or test is needed; did you mean 'train'?"
    )


def test_a_class_is_not_missed_in_rows_whose_split_is_unknown(real_table: Path) -> None:
    """num_classes=1, which is not possible, is not advised either."""
    header, *rows = real_table.read_text().splitlines()
    real_table.write_text("\n".join([f"{header},split", *(f"{row},training" for row in rows)]))
    (problem,) = check_manifest(real_table, 2, small()).problems
    assert "did you mean 'train'" in problem
    label = header.split(",").index("label")
    zeros = [
        ",".join(["0" if n == label else cell for n, cell in enumerate(row.split(","))])
        for row in rows
    ]
    real_table.write_text("\n".join([header, *zeros]))
    (problem,) = check_manifest(real_table, 2, small()).problems
    assert (
        problem
        == "the table has no row of class 1 (rows: 8 of class 0; num_classes=2): move or add rows"
    )


def test_splits_and_folds_are_among_the_sentences(real_table: Path) -> None:
    lines = real_table.read_text().splitlines()
    split = [
        f"{line},{'train' if n < 4 else 'val'},{n // 2 % 2}" for n, line in enumerate(lines[1:])
    ]
    real_table.write_text("\n".join([f"{lines[0]},split,fold", *split]))
    assert check_manifest(real_table, 2, small()).lines()[1:3] == [
        "split: train 4, val 4",
        "folds: 0: 4, 1: 4",
    ]


def test_problems_of_cells_and_of_voxels_are_told_together(
    real_table: Path, write_scan: Write
) -> None:
    folder = real_table.parent
    (folder / "0.nii.gz").write_bytes((folder / "0.nii.gz").read_bytes()[:600])
    write_scan("1.nii.gz", (5, 6, 7, 4))
    nan = np.random.default_rng(0).normal(size=(5, 6, 7))
    nan[1, 2, 3] = np.nan
    write_scan("2.nii.gz", nan)
    write_scan("3.nii.gz", np.ones((5, 6, 7)))
    real_table.write_text(
        real_table.read_text().replace("4.nii.gz,0", "4.nii.gz,9") + "gone.nii.gz,0,s9\n"
    )
    report = check_manifest(real_table, 2, small())
    assert report.manifest is None
    expected = {
        "row 5 (scan 4.nii.gz): label '9'": "(num_classes=2)",
        "row 9 (scan gone.nii.gz): no such file": "",
        "row 1 (scan 0.nii.gz): truncated": "copy it again",
        "row 2 (scan 1.nii.gz): shape 5x6x7x4, 4 channel(s), in_channels=1": "",
        "row 3 (scan 2.nii.gz): 1 of 210 voxels are not finite": "mask or drop them",
        "row 4 (scan 3.nii.gz): constant: every voxel is 1": "drop the row",
    }
    assert len(report.problems) == len(expected)
    for problem, (start, end) in zip(report.problems, expected.items(), strict=True):
        assert problem.startswith(start)
        assert problem.endswith(end)


def test_the_same_voxels_under_two_subjects_are_a_leak_whatever_the_header(
    real_table: Path,
) -> None:
    folder = real_table.parent
    image = nib.load(folder / "1.nii.gz")
    nib.save(
        nib.Nifti2Image(image.get_fdata(dtype=np.float32)[::-1], np.diag([-3.0, 3, 3, 1])),
        folder / "6.nii",
    )
    real_table.write_text(real_table.read_text().replace("6.nii.gz", "6.nii"))
    (problem,) = check_manifest(real_table, 2, small()).problems
    assert problem.startswith(
        "row 7 (scan 6.nii): the same voxels as row 2 (scan 1.nii.gz), but the subjects are 's6' and 's1'"
    )


def test_the_same_voxels_under_one_subject_are_told_too(real_table: Path) -> None:
    (real_table.parent / "3.nii.gz").write_bytes((real_table.parent / "1.nii.gz").read_bytes())
    real_table.write_text(real_table.read_text().replace("s3", "s1"))
    (problem,) = check_manifest(real_table, 2, small()).problems
    assert (
        problem
        == "row 4 (scan 3.nii.gz): the same voxels as row 2 (scan 1.nii.gz): keep one of the rows"
    )


def test_the_config_decides_what_a_good_volume_and_a_good_fold_is(real_table: Path) -> None:
    assert (
        "window 1000 to 2000"
        in check_manifest(
            real_table, 2, small(intensity="window", window_low=1000, window_high=2000)
        ).problems[0]
    )
    assert "4 subject(s)" in check_manifest(real_table, 2, small(num_folds=5)).problems[0]
    assert (
        "1 channel(s), in_channels=2"
        in check_manifest(real_table, 2, small(in_channels=2)).problems[0]
    )


def test_files_without_an_orientation_are_noticed_and_stop_nothing(real_table: Path) -> None:
    path = real_table.parent / "0.nii.gz"
    image = nib.load(path)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, path)
    report = check_manifest(real_table, 2, small())
    assert report.problems == []
    said = "1 of 8 files state no orientation: LAS is assumed, as the format defines"
    assert said in report.lines()


def test_a_deep_check_of_no_table_raises(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        check_manifest(tmp_path / "none.csv", 2, small())


def test_a_manifest_error_survives_the_way_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(ManifestError(["one", "two"])))
    assert (copy.problems, str(copy)) == (["one", "two"], "one\ntwo")


def test_a_file_that_is_no_table_is_not_quoted(tmp_path: Path) -> None:
    table = tmp_path / "shadow"
    table.write_text("root:$6$secret:19000:0:99999:7:::\ndaemon:*:19000:0:99999:7:::\n")
    with pytest.raises(ManifestError, match="names none of path, label and subject") as refused:
        read_manifest(table)
    assert "secret" not in str(refused.value)
    assert "root" not in str(refused.value)


PEOPLE = ["001", "1", "sub-A", "Sub-a", "Jos\u00e9", "Jose\u0301", "x 7", "x_07", "P1", "P2"]


def test_subjects_that_may_be_one_person_are_noticed_in_pairs(
    write_scan: Callable[..., Path], tmp_path: Path
) -> None:
    rows = ["path,label,subject"]
    for row, subject in enumerate(PEOPLE):
        write_scan(f"{row}.nii.gz", seed=row)
        rows.append(f"{row}.nii.gz,{row // 2 % 2},{subject}")
    (tmp_path / "table.csv").write_text("\n".join(rows), encoding="utf-8")
    report = check_manifest(tmp_path / "table.csv", 2, small())
    assert report.problems == []
    start = "4 subjects may be one person under several names"
    (notice,) = [one for one in report.notices if one.startswith(start)]
    for pair in (
        "'001' (row 1) and '1' (row 2)",
        "'sub-A' (row 3) and 'Sub-a' (row 4)",
        r"'Jos\xe9' (row 5)",
        r"'Jose\u0301' (row 6)",
        "'x 7' (row 7) and 'x_07' (row 8)",
    ):
        assert pair in notice, notice
    assert "P1" not in notice


def test_a_fold_with_few_volumes_of_a_class_is_told_by_name(
    write_table: Write,
) -> None:
    table = write_table([f"{int(n < 12)},s{n}" for n in range(40)])
    manifest = read_manifest(table)
    told = thin_folds(manifest, build_config({"num_folds": 5}), all_folds=True)
    assert [line.split(":")[0] for line in told] == [f"fold {fold}" for fold in range(5)]
    assert all(re.search(r"only [23] subjects of class 1 to validate on", line) for line in told)
    assert len(thin_folds(manifest, build_config({"num_folds": 5, "fold": 3}))) == 1
    assert thin_folds(manifest, build_config({"num_folds": 2}), all_folds=True) == []


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ([36, 4], "only 4 subjects of class 1"),
        ([0, 9], "only 0 subjects of class 0"),
        ([5, 5], None),
        ([3, 30, 4], "only 3 subjects of class 0, 4 subjects of class 2"),
    ],
)
def test_five_volumes_of_a_class_are_the_fewest(counts: list[int], told: str | None) -> None:
    found = few_of_a_class(counts)
    assert found is None if told is None else found is not None and told in found


def labelled(folder: Path, labels: list[str]) -> list[str]:
    lines = ["path,label,subject"]
    for row, label in enumerate(labels):
        (folder / f"{row}.nii").touch()
        lines.append(f"{row}.nii,{label},s{row}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder / "table.csv")
    return caught.value.problems


def test_words_as_labels_are_said_to_be_words_before_any_row(tmp_path: Path) -> None:
    """A kilobyte and a half of row numbers came before the reason."""
    problems = labelled(tmp_path, ["benign", "malignant", "benign"] * 100)
    assert problems[0] == (
        "labels are words ('benign' 200, 'malignant' 100 rows): give each class a whole number from 0, the positive one of "
        "two classes 1, in the table, in the study file (`classes: {benign: 0, malignant: 1}`), or with "
        "`--set classes=benign=0,malignant=1`"
    )
    assert max(map(len, problems)) < 300
    assert any(
        line.startswith("rows 1, 3-4, 6-7, ") and ", ..., 300 (" in line for line in problems
    )


def test_measurements_as_labels_are_said_to_be_measurements(tmp_path: Path) -> None:
    """A line for each row, 998 of them, followed the reason."""
    labels = [f"{row * 0.37 + 0.05:.2f}" for row in range(50)]
    assert labelled(tmp_path, [*labels, ""]) == [
        "labels are measurements (50 different values from 0.05 to 18.18): classes are whole numbers from 0; cut the values "
        "into classes first",
        "row 51 (scan 50.nii): label is missing: a whole number from 0 to 1 is needed (num_classes=2)",
    ]


def test_the_same_problem_of_many_scans_is_one_line(write_scan: Write, tmp_path: Path) -> None:
    lines = ["path,label,subject"]
    for row in range(8):
        voxels = np.random.default_rng(row).normal(size=(9, 9, 9, 2))
        write_scan(f"{row}.nii.gz", voxels)
        lines.append(f"{row}.nii.gz,{row % 2},s{row}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    (problem,) = check_manifest(tmp_path / "table.csv", 2, small()).problems
    assert problem.startswith("rows 1-8 (8, first scan 0.nii.gz): shape 9x9x9x2, 2 channel(s)")


def test_a_column_of_masks_is_said_not_to_be_read(real_table: Path) -> None:
    header, *rows = real_table.read_text().splitlines()
    real_table.write_text(
        "\n".join([header + ",Mask", *(f"{row},m.nii.gz" for row in rows)]) + "\n"
    )
    assert any(
        line.startswith("column 'Mask' is not read")
        for line in check_manifest(real_table, 2, small()).lines()
    )
