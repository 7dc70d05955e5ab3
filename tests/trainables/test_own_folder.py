"""Nothing is removed that the program has not made."""

from collections.abc import Callable
from pathlib import Path

import pytest

from trainables.checkpoints import sweep_temporaries
from trainables.own_folder import MARKER, fresh_own, is_own, mark_own, remove_own


def foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.docx").write_text("three years")


def of_another_purpose(folder: Path) -> None:
    mark_own(folder, "something else")
    (folder / "thesis.docx").write_text("three years")


def link_to_own(folder: Path) -> None:
    target = folder.with_name("elsewhere")
    mark_own(target, "a test")
    (target / "thesis.docx").write_text("three years")
    folder.symlink_to(target)


def binary_marker(folder: Path) -> None:
    foreign(folder)
    (folder / MARKER).write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("make", [foreign, of_another_purpose, link_to_own, binary_marker])
def test_a_folder_of_somebody_else_is_left(tmp_path: Path, make: Callable[[Path], None]) -> None:
    folder = tmp_path / "folder"
    make(folder)
    assert not is_own(folder, "a test")
    assert not remove_own(folder, "a test")
    assert (folder / "thesis.docx").read_text() == "three years"
    aside = fresh_own(folder, "a test")
    assert aside is not None
    assert (aside / "thesis.docx").read_text() == "three years"
    assert [path.name for path in folder.iterdir()] == [MARKER]


def test_an_own_folder_is_made_anew_and_removed_with_all_below_it(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "folder"
    assert fresh_own(folder, "a test") is None
    (folder / "sub").mkdir()
    (folder / "sub" / "file").touch()
    outside = tmp_path / "outside"
    foreign(outside)
    (folder / "link").symlink_to(outside)
    assert fresh_own(folder, "a test") is None
    assert [path.name for path in folder.iterdir()] == [MARKER]
    (folder / "link").symlink_to(outside)
    assert remove_own(folder, "a test")
    assert not folder.exists()
    assert (outside / "thesis.docx").exists()


def test_a_folder_with_something_in_it_is_not_marked(tmp_path: Path) -> None:
    foreign(tmp_path / "folder")
    with pytest.raises(FileExistsError, match="did not write"):
        mark_own(tmp_path / "folder", "a test")


def test_only_names_of_our_writers_count_as_left_behind(tmp_path: Path) -> None:
    ours = [tmp_path / ".study.json.4711.tmp", tmp_path / ".trial.json.12.tmp"]
    theirs = [
        tmp_path / ".vimrc.old.tmp",
        tmp_path / ".notes.tmp",
        tmp_path / "study.json.4711.tmp",
    ]
    for path in [*ours, *theirs]:
        path.touch()
    (tmp_path / ".folder.12.tmp").mkdir()
    assert sweep_temporaries(tmp_path, Path("trial.json")) == 1
    assert sweep_temporaries(tmp_path) == 1
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
