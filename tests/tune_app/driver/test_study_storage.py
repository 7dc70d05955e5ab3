"""A study's rows, its database and its folder: whichever is newer, shared, moved or gone."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console
from sqlalchemy.pool import NullPool

from search_spaces.written import space_from
from trainables.checkpoints import HURRY, save_state
from trainables.data.storage import Remote, TrialStore
from trainables.objective import objective_value
from tune_app.driver.display import Display
from tune_app.driver.optuna_database import (
    STUDY_NAME,
    Database,
    SearchError,
    own_study_name,
    shared_study_name,
    sqlite_url,
)
from tune_app.driver.place import StudyMovedError, StudyPlace
from tune_app.driver.recorder import Recorder
from tune_app.driver.searcher import OptunaSearcher
from tune_app.driver.session import StudySession
from tune_app.study.files import OPTUNA_STUDY, StudyFiles, append_line
from tune_app.study.rows import read_rows
from tune_app.study.spec import build_spec

SPACE = space_from({"search": {"dropout": {"low": 0.0, "high": 0.8}}})


def searcher(storage: Any, **settings: Any) -> OptunaSearcher:
    usual: dict[str, Any] = {
        "epochs": 4,
        "num_trials": 3,
        "objective": objective_value,
        "warm_start": (),
    }
    return OptunaSearcher(SPACE, storage=storage, **(usual | settings))


def run(search: OptunaSearcher, name: str, values: list[float]) -> str:
    suggestion = search.suggest(name)
    assert isinstance(suggestion, dict), suggestion
    rows = [{"epoch": epoch, "val_auc": value} for epoch, value in enumerate(values, 1)]
    for row in rows[:-1]:
        search.on_trial_result(name, row)
    search.on_trial_complete(name, rows[-1])
    return str(suggestion["trial"])


def trials_of(url: str, name: str) -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": NullPool})
    found: list[optuna.trial.FrozenTrial] = optuna.load_study(
        study_name=name, storage=storage
    ).trials
    return found


# Several studies in one storage ---------------------------------------------------------------------------------------


def test_two_studies_in_one_storage_keep_their_trials(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "shared.db")
    names = [shared_study_name(place) for place in ("/studies/first run", "s3://bucket/second")]
    assert names[0].startswith("medtune-first-run-")
    assert names[1].startswith("medtune-second-")
    assert shared_study_name("/studies/first run") != names[0]
    one, two = (searcher(url, study_name=name) for name in names)
    assert [run(one, "a", [0.6] * 4), run(two, "b", [0.7] * 4), run(one, "c", [0.8] * 4)] == [
        "00000",
        "00000",
        "00001",
    ]
    one.close()
    two.close()
    found = {name: [trial.value for trial in trials_of(url, name)] for name in names}
    assert found == {names[0]: [0.6, 0.8], names[1]: [0.7]}
    assert sorted(optuna.get_all_study_names(url)) == sorted(names)  # what optuna-dashboard lists
    with pytest.raises(SearchError, match=r"holds 2 studies of this program \(medtune-first-run-"):
        Database(url, None, own=False)


def test_an_earlier_study_in_a_shared_storage_is_found_by_its_folder(tmp_path: Path) -> None:
    url, names = sqlite_url(tmp_path / "shared.db"), ["medtune-a-1", "medtune-b-2"]
    for name, value in zip(names, (0.6, 0.7), strict=True):
        earlier = searcher(url, study_name=name, num_trials=1)
        run(earlier, "a", [value] * 4)
        earlier.close()
        folder = tmp_path / name
        folder.mkdir()
        written = {"spec": {"storage": url}, OPTUNA_STUDY: name}
        StudyFiles(folder).write(written)
    later = searcher(
        tmp_path / "study.db", warm_start_from=[tmp_path / name for name in names], num_trials=1
    )
    assert later.taken_over.added == 2
    assert [trial.value for trial in later.study.trials] == [0.6, 0.7]
    later.close()
    again = searcher(
        tmp_path / "study.db", warm_start_from=[tmp_path / name for name in names], num_trials=1
    )
    assert again.taken_over.added == 0
    again.close()


def test_a_study_in_its_own_file_has_its_folders_name_and_is_found_by_folder_and_by_url(
    tmp_path: Path,
) -> None:
    assert own_study_name("/studies/first run/") == "first run"
    assert own_study_name("s3://bucket/second") == "second"
    files = StudyFiles(tmp_path / "first run")
    files.root.mkdir()
    files.write({"spec": {"data": "t.csv", "config": {"epochs": 4}}, OPTUNA_STUDY: "first run"})
    session = StudySession(files.read_spec(), "none", Recorder(files.read_spec(), files), shown())
    earlier = searcher(files.database, study_name=session._study_name(), num_trials=1)
    run(earlier, "a", [0.6] * 4)
    earlier.close()
    url = sqlite_url(files.database)
    assert optuna.get_all_study_names(url) == ["first run"]  # what optuna-dashboard lists
    moved = tmp_path / "moved"
    for place in (files.root, url, moved):
        if place == moved:
            files.root.rename(moved)
        name = f"later {place}".replace("/", "-")
        later = searcher(tmp_path / f"{name}.db", warm_start_from=[place], num_trials=1)
        assert [trial.value for trial in later.study.trials] == [0.6]
        later.close()
    gone = tmp_path / "gone.db"
    searcher(gone, warm_start_from=[moved], num_trials=1).close()
    StudyFiles(moved).database.unlink()
    again = searcher(gone, warm_start_from=[moved], num_trials=1)
    assert (again.taken_over.added, len(again.study.trials)) == (0, 1)
    again.close()


def test_a_study_that_an_earlier_version_kept_in_a_storage_goes_on(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "shared.db")
    before = searcher(url)
    run(before, "a", [0.6] * 4)
    before.close()
    files = StudyFiles(tmp_path / "study")
    files.root.mkdir()
    spec = {"data": "t.csv", "storage": url, "config": {"epochs": 4}, "warm_start": ()}
    files.write({"spec": spec})
    session = StudySession(files.read_spec(), "none", Recorder(files.read_spec(), files), shown())
    assert session._study_name() == STUDY_NAME
    files.write({"spec": spec, OPTUNA_STUDY: "medtune-study-1"})
    assert session._study_name() == "medtune-study-1"
    only = Database(url, None, own=False)
    assert [trial.value for trial in only.found] == [0.6]
    only.close()


# The database is newer than the rows ------------------------------------------------------------------------------------


def test_trials_that_only_the_database_calls_finished_are_reopened(tmp_path: Path) -> None:
    """A copy made while the study ran: two trials had ended by the database, and one of them by the rows."""
    before = searcher(tmp_path / "study.db")
    run(before, "a", [0.6, 0.6, 0.6, 0.6])
    run(before, "b", [0.7, 0.7, 0.7, 0.9])
    before.close()
    rows = {1: [{"epoch": epoch, "val_auc": 0.7} for epoch in (1, 2)]}
    after = searcher(tmp_path / "study.db", rows=rows, ended={0})
    assert after.reopened == [1]
    kept = trials_of(sqlite_url(tmp_path / "study.db"), STUDY_NAME)
    assert [trial.state.name for trial in kept] == ["COMPLETE", "RUNNING"]
    assert kept[1].value is None
    assert kept[1].intermediate_values == {1: 0.7, 2: 0.7}
    assert run(after, "c", [0.7, 0.7, 0.5, 0.5]) == "00001"
    assert run(after, "d", [0.5] * 4) == "00002"
    after.close()
    kept = trials_of(sqlite_url(tmp_path / "study.db"), STUDY_NAME)
    assert [trial.state.name for trial in kept] == ["COMPLETE"] * 3
    assert kept[1].intermediate_values == {1: 0.7, 2: 0.7, 3: 0.5, 4: 0.5}


def shown() -> Display:
    return Display(Console(file=io.StringIO()), num_trials=3, epochs=4)


def test_records_that_are_newer_than_the_rows_are_reopened_and_told(
    write_study: Callable[..., Path],
) -> None:
    root = write_study(variants={"a": {}, "b": {"s": 9}}, epochs=6)
    files = StudyFiles(root)
    kept = [
        line
        for line in files.epochs.read_text().splitlines()
        if json.loads(line)["trial"] == "00000" or json.loads(line)["epoch"] <= 2
    ]
    files.epochs.write_text("\n".join(kept) + "\n")
    spec = files.read_spec()
    recorder = Recorder(spec, files)
    assert recorder.records["00001"]["state"] == "completed"
    display = shown()
    notes: list[str] = []
    display.note = notes.append  # type: ignore[assignment, method-assign]
    session = StudySession(spec, "none", recorder, display)
    session.begin()
    assert recorder.records["00001"]["state"] == "running"
    assert session.searcher.suggest("x")["trial"] == "00001"
    assert "trials 00001 are reopened: they are recorded as finished" in notes[0]
    there = {(row["trial"], row["epoch"]) for row in read_rows(files.epochs)}
    assert {(row["trial"], row["epoch"]) for row in read_rows(files.decisions)} == there
    again = StudySession(spec, "none", Recorder(spec, files), shown())
    again.begin()
    assert again.searcher.suggest("x")["trial"] == "00001"


def test_a_driver_waits_for_checkpoints_where_its_study_is(
    write_study: Callable[..., Path], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune_app.driver.session.LOOK_S", 0.0)
    files = StudyFiles(write_study(variants={"a": {}, "b": {"s": 9}}, epochs=6, unfinished=1))
    spec, trial = files.read_spec(), files.trial("00001")
    here = StudySession(spec, "none", Recorder(spec, files), shown())
    there = StudySession(spec, "none", Recorder(spec, files), shown(), storage=bucket)
    assert here.saved() is there.saved() is True, "nothing was asked"
    files.hurry.touch()
    Remote(bucket).write(HURRY, b"{}")
    assert here.saved() is there.saved() is False
    trial.checkpoint.write_bytes(b"weights")
    assert (here.saved(), there.saved()) == (True, False)
    TrialStore(bucket, "00001", trial).keep()
    assert there.saved()


# A folder that is moved while its driver runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_was_moved_or_replaced_stops_the_driver(
    tmp_path: Path, replaced: bool
) -> None:
    root = tmp_path / "study"
    root.mkdir()
    place = StudyPlace(root)
    place.check()
    root.rename(tmp_path / "moved")
    if replaced:
        root.mkdir()
    with pytest.raises(StudyMovedError, match="was moved or removed while it ran"):
        place.check()
    if not replaced:
        with pytest.raises(FileNotFoundError):  # a late row does not make a second study either
            append_line(StudyFiles(root).epochs, {"trial": "00000", "epoch": 1})
        assert not root.exists()


def test_nothing_is_written_where_the_folder_was_and_what_fails_there_is_told(
    tmp_path: Path,
) -> None:
    root = tmp_path / "study"
    files = StudyFiles(root)
    trial = files.trial("00000")
    trial.folder.mkdir(parents=True)
    spec = build_spec({"data": "t.csv", "config": {"epochs": 4}})
    recorder, place = Recorder(spec, files), StudyPlace(root)
    recorder.began("00000", {}, None)
    recorder.flush()
    root.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        save_state(trial.checkpoint, {}, trial.folder)
    with pytest.raises(StudyMovedError, match="medtune resume FOLDER"), place.blamed():
        recorder.ended("00000", "failed", "a reason")
    assert not root.exists()
    recorder.close()
    (tmp_path / "moved").rename(root)
    with pytest.raises(FileNotFoundError), place.blamed():
        (root / "missing").read_text()


def test_a_database_that_was_removed_is_told_at_the_end(tmp_path: Path) -> None:
    files = StudyFiles(tmp_path)
    place = StudyPlace(tmp_path)
    search = searcher(files.database)
    run(search, "a", [0.6] * 4)
    files.database.unlink()
    search.close()
    with pytest.raises(StudyMovedError, match=r"study\.db: was removed while the study ran"):
        place.check(files.database)
