"""A search's database: whose it is, where it may lie, who may read it, and trials taken over from another's."""

import math
import sqlite3
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.search import Searcher
from searches import EPOCHS, MIXED, TINY, left_running, make, read, run, suggested

from search_spaces.space import Space
from search_spaces.written import space_from
from trainables.objective import objective_value
from tune_app.driver.optuna_database import STUDY_NAME, SearchError, sqlite_url
from tune_app.driver.searcher import OptunaSearcher


def earlier(folder: Path, space: Space = TINY, **settings: Any) -> Path:
    searcher = make(folder, space, num_trials=6, **settings)
    for number, values in enumerate(
        [[0.5] * 4, [0.9, 0.8], [0.7] * 4, [math.nan], [0.4], [0.6] * 4]
    ):
        searcher.suggest(str(number))
        run(searcher, str(number), values, error=number == 4)
    searcher.close()
    return folder


def test_finished_trials_of_an_earlier_study_are_taken_over_once(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "earlier")
    searcher = make(tmp_path / "new", warm_start_from=[folder], num_trials=3)
    assert searcher.taken_over == (4, {"no finite value": 1})
    expected = [t for t in read(folder).trials if t.number in (0, 1, 2, 5)]
    assert suggested(searcher, "a")["trial"] == "00004", "numbering continues after them"
    for name in "bc":
        searcher.suggest(name)
    assert searcher.suggest("d") == Searcher.FINISHED, "they do not count as trials of this study"
    found = read(tmp_path / "new").trials
    for one, other in zip(expected, found[:4], strict=True):
        assert (one.params, one.state, one.value) == (other.params, other.state, other.value)
        assert other.user_attrs["from"] == f"{(folder / 'study.db').resolve()}#{one.number}"
    assert found[1].intermediate_values == {2: 0.8}, (
        "the sampler ranks pruned trials by their last epoch"
    )

    (folder / "study.db").unlink()  # it is not needed again
    again = make(tmp_path / "new", warm_start_from=[folder], num_trials=3)
    assert again.taken_over == (0, {})
    assert len(read(tmp_path / "new").trials) == 7


def test_a_start_killed_while_taking_over_does_not_double(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "earlier")
    new = make(tmp_path / "new", warm_start_from=[folder])
    new._database.set_attr("taken over", [])  # as if it had been killed before the study was marked
    with sqlite3.connect(tmp_path / "new" / "study.db") as db:
        (trial,) = db.execute("SELECT trial_id FROM trials WHERE number = 3").fetchone()
        for table in ("trials", "trial_params", "trial_values", "trial_user_attributes"):
            db.execute(f"DELETE FROM {table} WHERE trial_id = ?", [trial])
    assert make(tmp_path / "new", warm_start_from=[folder]).taken_over.added == 1
    assert [trial.user_attrs["from"][-1] for trial in read(tmp_path / "new").trials] == [
        "0",
        "1",
        "2",
        "5",
    ]


@pytest.mark.parametrize(
    ("space", "settings", "reason"),
    [
        (
            {"search": {"dropout": {"low": 0.79, "high": 0.8}, "s": {"low": 1, "high": 30}}},
            {},
            "is not in 0.79 to 0.8",
        ),
        ({"search": {"s": {"low": 1, "high": 30}}}, {}, "the space holds 0.4"),
        ({**TINY.to_mapping(), "fixed": {"depth": 10}}, {}, "depth=50, the space holds 10"),
        (TINY.to_mapping(), {"epochs": 8}, "epochs=4, the space holds 8"),
        (TINY.to_mapping(), {"identity": {"cohort": "b"}}, "another cohort"),
    ],
)
def test_earlier_trials_that_could_not_be_of_this_study_are_left_out(
    tmp_path: Path, space: dict[str, Any], settings: dict[str, Any], reason: str
) -> None:
    folder = earlier(tmp_path / "earlier", identity={"cohort": "a"})
    searcher = make(
        tmp_path / "new",
        space_from(space),
        **{"identity": {"cohort": "a"}, "warm_start_from": [folder]} | settings,
    )
    assert searcher.taken_over.added == 0
    assert any(reason in text for text in searcher.taken_over.left_out)
    assert read(tmp_path / "new").trials == []


def test_another_space_with_the_same_meaning_takes_trials_over(tmp_path: Path) -> None:
    folder = earlier(
        tmp_path / "earlier", space_from({"search": {"ema_decay": {"low": 0.9, "high": 0.999}}})
    )
    other = space_from(
        {"search": {"one_minus_ema_decay": {"low": 1e-4, "high": 0.2, "log": True}, "s": [10, 15]}}
    )
    searcher = make(tmp_path / "new", other, warm_start_from=[folder])
    assert searcher.taken_over.added == 4
    assert searcher.study.trials[0].params["s"] == 15, "the default, which the earlier study held"


def test_an_earlier_study_is_only_read(tmp_path: Path) -> None:
    folder = earlier(tmp_path / "earlier")
    content = (folder / "study.db").read_bytes()
    folder.chmod(0o500)
    try:
        make(tmp_path / "new", warm_start_from=[folder])
    finally:
        folder.chmod(0o700)
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    assert (folder / "study.db").read_bytes() == content


def test_an_earlier_study_must_be_there_and_another_one(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match=r"no earlier study here: .*nowhere/study.db is missing"):
        make(tmp_path, warm_start_from=[tmp_path / "nowhere"])
    with pytest.raises(SearchError, match="cannot be warm-started from itself"):
        make(tmp_path, warm_start_from=[tmp_path])
    (tmp_path / "other").mkdir()
    optuna.create_study(storage=sqlite_url(tmp_path / "other" / "study.db"), study_name="someone's")
    with pytest.raises(SearchError, match="holds no study 'medtune'"):
        make(tmp_path, warm_start_from=[tmp_path / "other"])


def test_a_study_is_only_continued_by_its_own_search(tmp_path: Path) -> None:
    make(tmp_path, identity={"cohort": "a"}).suggest("a")
    make(tmp_path, identity={"cohort": "a"}, sampler="random", seed=9, num_trials=50)
    for changed in ({"space": MIXED}, {"epochs": 5}, {"identity": {"cohort": "b"}}):
        with pytest.raises(
            SearchError, match=f"holds the trials of another search: {next(iter(changed))} differ"
        ):
            make(tmp_path, **{"identity": {"cohort": "a"}} | changed)


def test_a_space_whose_texts_another_version_words_otherwise_is_the_same(tmp_path: Path) -> None:
    worded = TINY.to_mapping() | {"title": "as an earlier version had it", "notes": ["a note"]}
    worded["search"] = {name: {**axis, "why": "so"} for name, axis in worded["search"].items()}
    make(tmp_path, space=space_from(worded)).suggest("a")
    make(tmp_path)
    wider = worded | {"search": worded["search"] | {"s": {"low": 1, "high": 40, "log": True}}}
    with pytest.raises(SearchError, match="another search: space differ"):
        make(tmp_path, space=space_from(wider))


def test_trials_of_other_programs_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    study = read(tmp_path)
    study.enqueue_trial({"dropout": 0.1})
    with pytest.raises(SearchError, match="trial 0 was queued by another program"):
        make(tmp_path)
    optuna.create_study(storage=sqlite_url(tmp_path / "foreign.db"), study_name=STUDY_NAME).ask()
    with pytest.raises(SearchError, match="holds the trials of another search"):
        OptunaSearcher(
            TINY, epochs=4, num_trials=1, objective=objective_value, storage=tmp_path / "foreign.db"
        )


def test_two_drivers_on_one_study_are_noticed(tmp_path: Path) -> None:
    one, two = make(tmp_path), make(tmp_path)
    one.suggest("a")
    with pytest.raises(SearchError, match="another process adds trials to this study"):
        two.suggest("a")


def test_two_drivers_that_write_a_trial_at_the_same_moment_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make(tmp_path), make(tmp_path)
    write = optuna.storages.RDBStorage.create_new_trial

    def after_the_other(*arguments: Any) -> Any:
        monkeypatch.undo()
        one.suggest("a")  # two has looked already, and found no such trial
        return write(*arguments)

    monkeypatch.setattr(optuna.storages.RDBStorage, "create_new_trial", after_the_other)
    with pytest.raises(SearchError, match="another process adds trials to this study"):
        two.suggest("a")
    assert left_running(make(tmp_path)) == [0, 1]  # neither is lost


@pytest.mark.parametrize("name", ["a b#c", "50 %", "what?", "{x}", "ü", "it's;--"])
def test_folders_may_have_any_name(tmp_path: Path, name: str) -> None:
    searcher = make(tmp_path / name)
    searcher.suggest("a")
    searcher.close()
    assert [path.name for path in (tmp_path / name).iterdir()] == ["study.db"]
    assert len(read(tmp_path / name).trials) == 1
    assert make(tmp_path / "new", warm_start_from=[tmp_path / name]).taken_over.added == 0


def test_a_closed_study_is_one_plain_file_and_an_open_one_can_be_read(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("a")
    assert len(read(tmp_path).trials) == 1
    assert {path.name for path in tmp_path.iterdir()} > {"study.db"}
    searcher.close()
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]
    with sqlite3.connect(tmp_path / "study.db") as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_reader_does_not_stop_the_search(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("a")
    with sqlite3.connect(tmp_path / "study.db") as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM trials").fetchone() == (1,)
        run(searcher, "a", [0.5] * EPOCHS)
        searcher.suggest("b")
        assert reader.execute("SELECT count(*) FROM trials").fetchone() == (1,)
        searcher.close()
    assert len(read(tmp_path).trials) == 2


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("study.db", "storage 'study.db' is no database URL: write sqlite:///FILE"),
        (
            "postgresql://me:secret@127.0.0.1:1/db",
            r"^postgresql://me:\*\*\*@127.0.0.1:1/db cannot be opened as an Optuna study",
        ),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(
    storage: str, message: str
) -> None:
    with pytest.raises(SearchError, match=message) as error:
        OptunaSearcher(TINY, epochs=4, num_trials=1, objective=objective_value, storage=storage)
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text(
        "no database, but some text that is long enough to be read as one " * 3
    )
    with pytest.raises(
        SearchError, match=r"study.db cannot be opened as an Optuna study: file is not a database"
    ):
        make(tmp_path)
