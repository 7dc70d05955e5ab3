"""JSON of ours in a folder from elsewhere: nothing in its place hangs, fills the memory or ends in a traceback."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trainables.data.json_files import parse_json, read_json, regular_bytes
from trainables.data.volumes import CohortError, open_cohort
from tune_app.compare.test_record import read_test_record
from tune_app.models.folder import ModelError, ModelFiles, parse_info
from tune_app.study.errors import SpecError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import StudyDamageError, read_record, read_rows

DEEP = "[" * 200_000


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def deep(path: Path) -> None:
    path.write_text(DEEP)


INSTEAD = [pipe, endless, deep]


@pytest.mark.parametrize("instead", INSTEAD)
def test_what_stands_in_the_place_of_json_is_an_error_of_its_file(
    tmp_path: Path, instead: Callable[[Path], None]
) -> None:
    instead(tmp_path / "x.json")
    with pytest.raises((OSError, ValueError)):
        read_json(tmp_path / "x.json")


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(11))
    assert regular_bytes(tmp_path / "x", 11) == bytes(11)
    with pytest.raises(OSError, match="larger than the 10 bytes"):
        regular_bytes(tmp_path / "x", 10)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(DEEP)


@pytest.mark.parametrize("instead", [pipe, endless])
@pytest.mark.parametrize("name", ["SHA256SUMS", "model.json"])
def test_a_model_folder_from_a_stranger_is_refused(
    tmp_path: Path, name: str, instead: Callable[[Path], None]
) -> None:
    files = ModelFiles(tmp_path)
    files.info.write_text("{}")
    files.write_sums()
    (tmp_path / name).unlink()
    instead(tmp_path / name)
    with pytest.raises(ModelError, match="a pipe, device or folder, a regular file is needed"):
        files.read_all()


def test_a_model_of_brackets_is_refused(tmp_path: Path) -> None:
    ModelFiles(tmp_path).info.write_text(DEEP)
    ModelFiles(tmp_path).write_sums()
    contents, _ = ModelFiles(tmp_path).read_all()
    with pytest.raises(ModelError, match="nested too deeply"):
        parse_info(tmp_path, contents)


@pytest.mark.parametrize("instead", INSTEAD)
def test_every_reader_of_ours_tells_the_file(
    tmp_path: Path, instead: Callable[[Path], None]
) -> None:
    for name in ("study.json", "cohort.json", "test.json", "trial.json"):
        instead(tmp_path / name)
    with pytest.raises(SpecError, match=r"study\.json: damaged"):
        StudyFiles(tmp_path).read()
    with pytest.raises(CohortError, match="damaged"):
        open_cohort(tmp_path)
    with pytest.raises(StudyDamageError, match=r"trial\.json: not JSON"):
        read_record(tmp_path / "trial.json")
    if instead is deep:
        with pytest.raises(SpecError, match=r"test\.json: damaged"):
            read_test_record(tmp_path / "test.json")
        (tmp_path / "rows.jsonl").write_text(f"{DEEP}\n")
        with pytest.raises(StudyDamageError, match=r"rows\.jsonl:1: not a JSON row"):
            read_rows(tmp_path / "rows.jsonl")
