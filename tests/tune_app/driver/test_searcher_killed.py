"""A search killed at any moment, and opened again: no trial is lost, doubled or decided otherwise."""

import hashlib
import math
import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState
from ray.tune.search import Searcher
from searches import EPOCHS, MIXED, TINY, left_running, make, read, row, run

from search_spaces.space import Space
from trainables.objective import objective_value
from tune_app.driver.optuna_database import STUDY_NAME, Database, SearchError, sqlite_url
from tune_app.driver.searcher import EndState, OptunaSearcher, trial_name

ROOT = Path(__file__).parents[3]


class Training:
    """Trials that train: the curve follows from the overrides, and progress survives the search as checkpoints do."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []  # as epochs.jsonl has them

    def value(self, overrides: dict[str, Any], epoch: int) -> float:
        digest = hashlib.sha256(repr((sorted(overrides.items()), epoch)).encode()).digest()
        value = 0.5 + digest[0] / 600 - overrides["dropout"] / 4 + epoch / 100
        return math.nan if digest[1] < 12 else value


class KilledError(Exception):
    pass


def drive(searcher: OptunaSearcher, training: Training, concurrency: int, budget: int) -> None:
    """One session: Ray's events in an order that depends on the trials alone, so that any two searches compare.

    Raises KilledError when `budget` events have happened; a trial is stopped at epoch 2 if it is below 0.6 there.
    """
    running: dict[str, Any] = {}

    def event() -> None:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise KilledError

    finished = False
    while running or not finished:
        while len(running) < concurrency and not finished:
            name = f"ray-{len(training.rows)}-{len(running)}-{random.random()}"
            suggestion = searcher.suggest(name)
            finished = suggestion == Searcher.FINISHED
            if not finished:
                running[name] = suggestion
            event()
        if not running:
            break
        name = min(
            running,
            key=lambda name: (training.done.get(running[name]["trial"], 0), running[name]["trial"]),
        )
        trial, overrides = running[name]["trial"], running[name]["overrides"]
        epoch = training.done.get(trial, 0) + 1
        if epoch > EPOCHS:
            # Killed between its last row and its end: it has nothing left to do.
            searcher.on_trial_complete(name, None)
            del running[name]
            event()
            continue
        result = row(epoch, training.value(overrides, epoch))
        training.done[trial] = epoch
        training.rows.append({"trial": trial, **result})
        event()
        if (epoch == 2 and not result["val_auc"] >= 0.6) or epoch == EPOCHS:
            searcher.on_trial_complete(name, result, error=int(trial) % 11 == 10)
            del running[name]
        else:
            searcher.on_trial_result(name, result)
        event()


def reopened(folder: Path, training: Training, space: Space, **settings: Any) -> OptunaSearcher:
    """A searcher as the driver makes it at each start."""
    rows: dict[int, list[Any]] = {}
    for line in training.rows:
        rows.setdefault(int(line["trial"]), []).append(line)
    searcher = make(folder, space, rows=rows, **settings)
    for number in left_running(searcher):
        last = rows[number][-1] if number in rows else row(0, 0)
        if (last["epoch"] == 2 and not last["val_auc"] >= 0.6) or last["epoch"] == EPOCHS:
            # The policy, replayed over the rows, had ended it.
            failed = number % 11 == 10
            state: EndState
            state = "failed" if failed else "completed" if last["epoch"] == EPOCHS else "stopped"
            searcher.settle(number, state, objective_value(rows[number]), rows[number])
    return searcher


@pytest.mark.parametrize(
    ("sampler", "space"),
    [("tpe", TINY), ("tpe", MIXED), ("qmc", MIXED)],
    ids=["tpe", "tpe conditional", "qmc conditional"],
)
def test_a_search_killed_at_random_moments_makes_the_decisions_of_one_never_killed(
    tmp_path: Path, sampler: str, space: Space
) -> None:
    settings = {"sampler": sampler, "num_trials": 24, "seed": 5, "warm_start": None}
    whole = Training()
    drive(make(tmp_path / "whole", space, **settings), whole, 3, 10**6)
    killed, rng, kills = Training(), random.Random(7), 0
    while True:
        try:
            drive(
                reopened(tmp_path / "killed", killed, space, **settings),
                killed,
                3,
                rng.randint(1, 16),
            )
            break
        except KilledError:
            kills += 1
    assert kills >= 20
    expected, found = read(tmp_path / "whole").trials, read(tmp_path / "killed").trials
    assert len(expected) == len(found) == 24
    for one, other in zip(expected, found, strict=True):
        for name in ("number", "state", "values", "params", "intermediate_values", "user_attrs"):
            assert getattr(one, name) == getattr(other, name), (
                f"{name} of trial {one.number} after {kills} kills"
            )
    assert {trial.state for trial in found} == {
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
    }
    assert whole.rows == killed.rows


KILLED_FOR_REAL = """
import os, random, signal
import searches as tests

def child(session):
    searcher = tests.make({folder!r}, tests.MIXED, num_trials=16, sampler="random")
    steps = random.Random(session).randint(2, 9)
    for name in range(100):
        suggestion = searcher.suggest(str(name))
        if suggestion == "FINISHED":
            os._exit(0)
        with open({log!r}, "a") as log:
            log.write(suggestion["trial"] + "\\n")
        for epoch in range(1, tests.EPOCHS + 1):
            steps -= 1
            if not steps:
                os.kill(os.getpid(), signal.SIGKILL)
            searcher.on_trial_result(str(name), tests.row(epoch, 0.5))
        searcher.on_trial_complete(str(name), tests.row(tests.EPOCHS, 0.5))
    os._exit(1)

tests.make({folder!r} + "/warm", tests.MIXED).close()  # loads once what each child would load
for session in range(200):
    pid = os.fork()
    if not pid:
        child(session)
    _, status = os.waitpid(pid, 0)
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
print(session)
"""


def test_no_trial_is_lost_or_doubled_when_the_process_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "handed-out"
    code = KILLED_FOR_REAL.format(folder=str(tmp_path), log=str(log))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=env, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10
    trials = read(tmp_path).trials
    assert [trial.number for trial in trials] == list(range(16))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    handed_out = log.read_text().split()
    assert set(handed_out) == {trial_name(number) for number in range(16)}, (
        "no name was handed out that the study lacks"
    )
    with sqlite3.connect(tmp_path / "study.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@contextmanager
def killed_at_write(count: int) -> Iterator[None]:
    """Let `count` transactions that write come through, and fail the next before it is committed, as a kill does."""
    writes, left = set(), count

    def statement(connection: sqlalchemy.Connection, cursor: object, text: str, *_: object) -> None:
        if text.startswith(("INSERT", "UPDATE", "DELETE")):
            writes.add(connection)

    def commit(connection: sqlalchemy.Connection) -> None:
        nonlocal left
        if connection in writes:
            writes.remove(connection)
            left -= 1
            if left < 0:
                raise KilledError

    listeners: dict[str, Any] = {"before_cursor_execute": statement, "commit": commit}
    for event, listener in listeners.items():
        sqlalchemy.event.listen(sqlalchemy.Engine, event, listener)
    try:
        yield
    finally:
        for event, listener in listeners.items():
            sqlalchemy.event.remove(sqlalchemy.Engine, event, listener)


def test_a_retry_killed_at_any_write_loses_no_trial_and_touches_no_other_study(
    tmp_path: Path,
) -> None:
    settings: dict[str, Any] = {"num_trials": 2, "identity": {"objective": "auc"}}
    first = make(tmp_path, **settings)
    for name, failed in (("a", True), ("b", False)):
        first.suggest(name)
        run(first, name, [0.6, 0.7, 0.8, 0.9], error=failed)
    first.close()
    url = sqlite_url(tmp_path / "study.db")
    other = optuna.create_study(storage=url, study_name="someone's")
    other.enqueue_trial({"x": 1})
    failed, complete = read(tmp_path).trials
    content, kills, states = (tmp_path / "study.db").read_bytes(), 0, set()
    while True:
        folder = tmp_path / str(kills)
        folder.mkdir()
        (folder / "study.db").write_bytes(content)
        try:
            with killed_at_write(kills):
                make(folder, **settings, retry=[0]).close()
            break
        except KilledError:
            kills += 1
        half = sqlite_url(folder / "study.db")
        if len(optuna.get_all_study_names(half)) == 3:
            with pytest.raises(SearchError, match="being rewritten: resume it first"):
                Database(half, own=False)
        make(folder, **settings).close()
        assert sorted(optuna.get_all_study_names(half)) == [STUDY_NAME, "someone's"]
        one, two = read(folder).trials
        states.add(one.state)
        assert (one.params, one.intermediate_values) == (failed.params, failed.intermediate_values)
        assert ("reason" in one.user_attrs) == (one.state == TrialState.FAIL)
        assert vars(two) | {"_trial_id": 0} == vars(complete) | {"_trial_id": 0}
        (waiting,) = optuna.load_study(storage=half, study_name="someone's").trials
        assert waiting.state == TrialState.WAITING
    assert kills >= 10
    assert read(folder).metric_names == ["auc"]
    assert read(folder).user_attrs == read(tmp_path).user_attrs | {"study": folder.name}
    assert states == {TrialState.FAIL, TrialState.RUNNING}


def test_a_reason_whose_trial_went_on_is_replaced_at_its_end(tmp_path: Path) -> None:
    killed = make(tmp_path, failure="fatal")
    killed.suggest("a")
    with killed_at_write(1), pytest.raises(KilledError):
        killed.on_trial_complete("a", {"epoch": 0, "fatal": "out of memory"})
    (trial,) = read(tmp_path).trials
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.RUNNING, "out of memory")
    again = make(tmp_path, failure="fatal")
    again.suggest("a")
    run(again, "a", [0.6] * EPOCHS)
    (trial,) = read(tmp_path).trials
    assert (trial.state, trial.user_attrs["reason"]) == (TrialState.COMPLETE, "")


def test_a_trial_left_running_comes_back_under_its_name_with_its_rows(tmp_path: Path) -> None:
    first = make(tmp_path)
    suggestion = first.suggest("a")
    other = first.suggest("b")
    rows = [row(1, 0.6), row(2, math.nan), row(3, 0.8)]
    for result in rows[:2]:
        first.on_trial_result("a", result)
    second = make(tmp_path, rows={0: rows})  # the third row was written, but not reported
    assert left_running(second) == [0, 1]
    assert second.suggest("x") == suggestion
    assert second.suggest("y") == other
    second.on_trial_complete("x", row(4, 0.8))
    trial = read(tmp_path).trials[0]
    assert trial.value == objective_value([*rows, row(4, 0.8)])
    assert trial.intermediate_values == {1: 0.6, 3: 0.8, 4: 0.8}


def test_rows_lost_with_the_power_are_taken_from_the_study(tmp_path: Path) -> None:
    first = make(tmp_path)
    first.suggest("a")
    for epoch in (1, 2, 3):
        first.on_trial_result("a", row(epoch, 0.9))
    second = make(tmp_path)
    second.suggest("x")
    second.on_trial_complete("x", row(4, 0.1))
    assert read(tmp_path).trials[0].value == 0.9


def test_trials_known_to_have_ended_are_settled(tmp_path: Path) -> None:
    first = make(tmp_path)
    for name in "abcde":
        first.suggest(name)
    run(first, "e", [0.5] * EPOCHS)
    second = make(tmp_path)
    second.settle(0, "completed", 0.7, [row(e, 0.7) for e in range(1, 5)])
    second.settle(1, "stopped", 0.6, [row(1, 0.6)], reason="collapsed")
    second.settle(2, "failed", None, [])
    second.settle(3, "completed", math.nan, [row(e, math.nan) for e in range(1, 5)])
    second.settle(4, "failed", None, [])  # the study knows better
    trials = read(tmp_path).trials
    assert [trial.state.name for trial in trials] == [
        "COMPLETE",
        "PRUNED",
        "FAIL",
        "PRUNED",
        "COMPLETE",
    ]
    assert [trial.value for trial in trials] == [0.7, 0.6, None, None, 0.5]
    assert trials[1].user_attrs["reason"] == "collapsed"
    assert left_running(second) == []
    with pytest.raises(
        SearchError, match=r"study.db has no trial 00005, which is recorded as failed"
    ):
        second.settle(5, "failed")
    second.suggest("f")
    with pytest.raises(SearchError, match="runs in this session"):
        second.settle(5, "failed")
