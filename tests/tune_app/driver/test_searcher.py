"""The searcher against Optuna itself: Optuna reads its records back, and Optuna draws the same samples again."""

import hashlib
import math
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import ray.cloudpickle
import sqlalchemy
from optuna.trial import TrialState
from ray.tune.search import Searcher
from ray.tune.search.concurrency_limiter import ConcurrencyLimiter
from sqlalchemy.pool import NullPool

from search_spaces.fixes import all_fixes, baseline
from search_spaces.space import Space, SpaceError
from search_spaces.spaces import SPACES
from search_spaces.written import space_from
from trainables.config import build_config
from trainables.objective import objective_value
from tune_app.driver.optuna_database import STUDY_NAME, Database, SearchError, sqlite_url
from tune_app.driver.searcher import EndState, OptunaSearcher, trial_name
from tune_app.study import surrogate
from tune_app.study.prior import shipped_prior

ROOT = Path(__file__).parents[3]
EPOCHS = 4
TINY = space_from(
    {"search": {"dropout": {"low": 0.0, "high": 0.8}, "s": {"low": 1, "high": 30, "log": True}}}
)
MIXED = space_from(
    {
        "search": {
            "loss": ["ldam", "cross_entropy", "focal"],
            "max_m": {"low": 0.1, "high": 0.5},
            "focal_gamma": {"low": 1, "high": 5},
            "dropout": {"low": 0, "high": 0.8, "step": 0.1},
            "gradient_accumulation_steps": {"low": 1, "high": 4},
        }
    }
)


def make(folder: str | Path, space: Space = TINY, **settings: Any) -> OptunaSearcher:
    arguments: dict[str, Any] = {
        "epochs": EPOCHS,
        "num_trials": 12,
        "objective": objective_value,
        "warm_start": (),
    } | settings
    return OptunaSearcher(space, storage=Path(folder) / "study.db", **arguments)


def read(folder: Path) -> optuna.Study:
    """The study as any other program reads it."""
    url = sqlite_url(Path(folder) / "study.db")
    storage = optuna.storages.RDBStorage(
        url, engine_kwargs={"poolclass": NullPool}
    )  # holds no connection open
    return optuna.load_study(study_name=STUDY_NAME, storage=storage)


def suggested(searcher: OptunaSearcher, name: str) -> dict[str, Any]:
    suggestion = searcher.suggest(name)
    assert isinstance(suggestion, dict), suggestion
    return suggestion


def row(epoch: int, value: float) -> dict[str, Any]:
    return {"epoch": epoch, "val_auc": value, "training_iteration": 99}


def run(searcher: OptunaSearcher, name: str, values: Sequence[float], **end: Any) -> None:
    """Report `values` epoch by epoch and end the trial as Ray does: the result it ends with comes with its end only."""
    results = [row(epoch, value) for epoch, value in enumerate(values, 1)]
    for result in results[:-1]:
        searcher.on_trial_result(name, result)
    searcher.on_trial_complete(name, **{"result": results[-1] if results else None} | end)


# ---- states and values ----


def test_optuna_reads_each_end_as_what_it_was(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    curves = {
        "complete": [0.6, 0.7, 0.9, 0.7],
        "stopped": [0.6, 0.5],
        "failed": [0.6],
        "diverged": [0.7, math.nan, math.nan],
        "never a score": [math.nan] * 4,
        "infinite": [math.inf, 0.6, 0.5, 0.6],
        "gone before it began": [],
    }
    handed_out = {name: suggested(searcher, name) for name in curves}
    for name, values in curves.items():
        run(searcher, name, values, **({"error": True} if name == "failed" else {}))

    trials = dict(zip(curves, read(tmp_path).trials, strict=True))
    states = {name: trial.state.name for name, trial in trials.items()}
    assert states == {
        "complete": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL", "diverged": "PRUNED", "never a score": "PRUNED",
        "infinite": "COMPLETE", "gone before it began": "PRUNED",
    }  # fmt: skip
    assert (
        trials["complete"].value
        == objective_value([row(e, v) for e, v in enumerate(curves["complete"], 1)])
        == 0.7
    )
    assert trials["complete"].intermediate_values == {1: 0.6, 2: 0.7, 3: 0.9, 4: 0.7}
    assert trials["stopped"].intermediate_values == {1: 0.6, 2: 0.5}
    assert trials["diverged"].intermediate_values == {1: 0.7}
    assert trials["infinite"].intermediate_values == {2: 0.6, 3: 0.5, 4: 0.6}
    assert trials["never a score"].values is None
    assert (
        trials["never a score"].user_attrs["reason"] == "no finite val_auc to go by after 4 epochs"
    )
    assert trials["failed"].user_attrs["reason"] == "the trial ended with an error"
    for number, name in enumerate(curves):
        assert handed_out[name] == {
            "trial": trial_name(number),
            "overrides": trials[name].user_attrs["overrides"],
        }
        assert (
            TINY.sample_to_overrides(trials[name].params, EPOCHS) == handed_out[name]["overrides"]
        )
        assert build_config(handed_out[name]["overrides"]).epochs == EPOCHS
    assert len(read(tmp_path).trials_dataframe()) == len(curves)


def test_memory_and_database_hold_the_same_study(tmp_path: Path) -> None:
    searcher = make(tmp_path, MIXED)
    for number in range(12):
        searcher.suggest(str(number))
        run(
            searcher,
            str(number),
            [0.5 + number / 100] * (4 if number % 3 else 2),
            error=number == 5,
        )
    in_memory, on_disk = searcher.study.trials, read(tmp_path).trials
    assert len(in_memory) == len(on_disk) == 12
    for ours, theirs in zip(in_memory, on_disk, strict=True):
        for name in ("number", "state", "values", "params", "distributions", "intermediate_values"):
            assert getattr(ours, name) == getattr(theirs, name)


def test_an_epoch_counts_once_and_a_trial_ends_once(tmp_path: Path) -> None:
    searcher = make(tmp_path)
    searcher.suggest("a")
    searcher.on_trial_result("a", row(1, 0.6))
    searcher.on_trial_result("a", row(2, 0.7))
    searcher.on_trial_result(
        "a", row(1, 0.1)
    )  # restarted from its checkpoint, it reports again what may be lost
    searcher.on_trial_result("a", {"pid": 1})
    searcher.on_trial_result("a", {"epoch": 0, "val_auc": 0.9})
    for epoch in (3, 4):
        searcher.on_trial_result("a", row(epoch, 0.8))
    searcher.on_trial_complete("a", row(4, 0.3))
    searcher.on_trial_complete("a", error=True)
    searcher.on_trial_result("a", row(5, 0.9))
    (trial,) = read(tmp_path).trials
    assert trial.state == TrialState.COMPLETE
    assert trial.intermediate_values == {1: 0.6, 2: 0.7, 3: 0.8, 4: 0.8}


def test_reasons_are_kept_with_the_trial(tmp_path: Path) -> None:
    searcher = make(tmp_path, failure="fatal")
    for name in "abc":
        searcher.suggest(name)
    searcher.note(0, "collapsed at epoch 2")
    run(searcher, "a", [0.8, 0.5])
    searcher.on_trial_complete("b", {"epoch": 0, "fatal": "out of memory"})
    run(searcher, "c", [0.8, 0.9, 0.9, 0.9])
    collapsed, fatal, fine = read(tmp_path).trials
    assert (collapsed.state, collapsed.user_attrs["reason"]) == (
        TrialState.PRUNED,
        "collapsed at epoch 2",
    )
    assert (fatal.state, fatal.user_attrs["reason"]) == (TrialState.FAIL, "out of memory")
    assert fatal.intermediate_values == {}
    assert "reason" not in fine.user_attrs


def test_the_study_ends_at_its_number_of_trials_failed_ones_included(tmp_path: Path) -> None:
    searcher = make(tmp_path, num_trials=3)
    for name in "abc":
        searcher.suggest(name)
        run(searcher, name, [0.5], error=True)
    assert searcher.suggest("d") == Searcher.FINISHED
    assert make(tmp_path, num_trials=3).suggest("e") == Searcher.FINISHED
    more = make(tmp_path, num_trials=4)
    assert suggested(more, "e")["trial"] == "00003", (
        "more trials may be asked for later; failed ones are not tried again"
    )
    assert more.suggest("f") == Searcher.FINISHED


def test_a_failed_trial_may_be_tried_again(tmp_path: Path) -> None:
    first = make(tmp_path, num_trials=3)
    suggested = [first.suggest(name) for name in "abc"]
    run(first, "a", [0.6, 0.7], error=True)
    run(first, "b", [0.5] * EPOCHS)
    run(first, "c", [0.4], error=True)
    first.close()

    killed = make(
        tmp_path, num_trials=3, retry=[0]
    )  # before it could write to the record that trial 0 continues
    killed.close()
    settling = make(tmp_path, num_trials=3)
    settling.settle(0, "failed", None, [row(1, 0.6), row(2, 0.7)], reason="lost its node")
    settling.close()
    assert [trial.state.name for trial in read(tmp_path).trials] == ["FAIL", "COMPLETE", "FAIL"]
    assert read(tmp_path).trials[0].user_attrs["reason"] == "lost its node"

    second = make(tmp_path, num_trials=3, retry=[0, 1])  # one that has not failed stays as it is
    assert second.left_running == (0,)
    assert second.failed() == {2: "the trial ended with an error"}
    running = read(tmp_path).trials[0]
    assert (running.state.name, running.datetime_complete) == ("RUNNING", None)
    assert "reason" not in running.user_attrs
    assert running.intermediate_values == {1: 0.6, 2: 0.7}
    assert second.suggest("d") == suggested[0]
    assert second.suggest("e") == Searcher.FINISHED
    run(second, "d", [0.6, 0.7, 0.8, 0.9])
    trial = read(tmp_path).trials[0]
    assert trial.state == TrialState.COMPLETE
    assert trial.value == objective_value(
        [row(e, v) for e, v in enumerate([0.6, 0.7, 0.8, 0.9], 1)]
    )
    assert second.study.trials[0].state == TrialState.COMPLETE


# ---- samples ----


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("space", [TINY, MIXED], ids=["plain", "conditional"])
def test_tpe_draws_what_optunas_own_sampler_draws(tmp_path: Path, space: Space) -> None:
    searcher = make(tmp_path, space, sampler="tpe", num_trials=40, seed=3)
    rng = random.Random(0)
    for number in range(30):
        searcher.suggest(str(number))
        if number % 7:  # the others stay running: the constant liar sees them
            run(searcher, str(number), [rng.random() for _ in range(rng.choice([2, 4]))])
    trials = searcher.study.trials
    theirs = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence([3, 30]).generate_state(1)[0]),
            multivariate=True, constant_liar=True, group=space.conditional,
        ),
    )  # fmt: skip
    theirs.add_trials(trials)
    trial = theirs.ask()
    space.sample(lambda parameter: trial._suggest(parameter.name, parameter.distribution), EPOCHS)
    searcher.suggest("30")
    assert searcher.study.trials[30].params == trial.params


@pytest.mark.parametrize("sampler", ["model", "tpe", "random", "qmc", "gp"])
@pytest.mark.parametrize(
    "space", [TINY, MIXED, SPACES["wide"]], ids=["plain", "conditional", "wide"]
)
def test_every_sampler_draws_valid_configs(tmp_path: Path, sampler: str, space: Space) -> None:
    searcher = make(tmp_path, space, sampler=sampler, num_trials=14)
    for number in range(14):
        build_config(suggested(searcher, str(number))["overrides"])
        run(searcher, str(number), [0.5 + 0.01 * number] * EPOCHS)
    trials = read(tmp_path).trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    for trial in trials:
        loss = trial.params.get("loss", "ldam")
        assert ("focal_gamma" in trial.params) == (loss == "focal")
        assert ("max_m" in trial.params) == (loss == "ldam" and space is not TINY)
    if space is TINY:
        assert len({trial.params["dropout"] for trial in trials}) == 14


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc"])
def test_a_seed_repeats_a_search_and_another_does_not(tmp_path: Path, sampler: str) -> None:
    def drawn(folder: str, seed: int) -> list[dict[str, Any]]:
        searcher = make(tmp_path / folder, MIXED, sampler=sampler, seed=seed)
        for number in range(12):
            searcher.suggest(str(number))
            run(searcher, str(number), [0.5 + 0.03 * number] * EPOCHS)
        return [trial.params for trial in searcher.study.trials]

    assert drawn("a", 1) == drawn("b", 1)
    assert drawn("c", 2) != drawn("a2", 1)


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_a_restarted_search_never_draws_the_same_again(tmp_path: Path, sampler: str) -> None:
    for number in range(8):
        searcher = make(tmp_path / "often", sampler=sampler, seed=1)
        searcher.suggest(str(number))
        run(searcher, str(number), [0.5] * EPOCHS)
    searcher = make(tmp_path / "once", sampler=sampler, seed=1)
    for number in range(8):
        searcher.suggest(str(number))
        run(searcher, str(number), [0.5] * EPOCHS)
    often, once = (
        [trial.params for trial in read(tmp_path / name).trials] for name in ("often", "once")
    )
    assert often == once
    assert len({params["dropout"] for params in often}) == 8
    if (
        sampler == "qmc"
    ):  # a scrambled Sobol sequence puts one of the first eight points into each eighth, in each axis
        assert sorted(int(params["dropout"] / 0.1) for params in often) == list(range(8))


# ---- a killed search ----


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
    for number in searcher.left_running:
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
import os, random, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_searcher as tests

def child(session):
    training = tests.Training()
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
    code = KILLED_FOR_REAL.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), log=str(log)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=200
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
    first.suggest("b")
    rows = [row(1, 0.6), row(2, math.nan), row(3, 0.8)]
    for result in rows[:2]:
        first.on_trial_result("a", result)
    second = make(tmp_path, rows={0: rows})  # the third row was written, but not reported
    assert list(second.left_running) == [0, 1]
    assert second.suggest("x") == suggestion
    assert list(second.left_running) == [1]
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
    assert second.left_running == ()
    with pytest.raises(
        SearchError, match=r"study.db has no trial 00005, which is recorded as failed"
    ):
        second.settle(5, "failed")
    second.suggest("f")
    with pytest.raises(SearchError, match="runs in this session"):
        second.settle(5, "failed")


# ---- warm starts ----


def test_warm_starts_are_asked_for_once_ever(tmp_path: Path) -> None:
    space = SPACES["collapse"]
    first = make(tmp_path, space, warm_start=None, epochs=60)
    before = suggested(first, "a")
    assert build_config(before["overrides"]) == build_config(baseline())
    # Killed here: `before` is running, `after` was never asked for.
    second = make(tmp_path, space, warm_start=None, epochs=60)
    assert second.suggest("a") == before
    second.suggest("b")
    third = make(tmp_path, space, warm_start=None, epochs=60)
    for name in "abcd":
        third.suggest(name)
    points = [trial.user_attrs.get("point") for trial in read(tmp_path).trials]
    assert points == ["before", "after", None, None]
    assert third.warm_start_left_out == {"defaults": ["the same point as 'after' in this space"]}


def test_warm_starts_are_the_documented_settings_by_default(tmp_path: Path) -> None:
    searcher = make(tmp_path, SPACES["documented"], warm_start=None, epochs=60)
    before, after, drawn = (suggested(searcher, name)["overrides"] for name in "abc")
    assert {
        **baseline(),
        "head": "cosine",
        "ema_warmup": True,
        "ema_buffers": "averaged",
    }.items() >= {key: value for key, value in before.items() if key != "epochs"}.items()
    assert build_config(after) == build_config(all_fixes())
    assert drawn != after


def test_a_warm_start_asked_for_by_name_must_lie_in_the_space(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"warm start 'before': max_m=0.3 is not in 0.15 to 0.25"):
        make(tmp_path, SPACES["narrow"], warm_start=["before"])
    assert make(tmp_path, SPACES["narrow"], warm_start=None).warm_start_left_out["before"]


# ---- earlier studies ----


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


# ---- the database ----


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


def test_a_space_that_does_not_fit_the_length_is_refused(tmp_path: Path) -> None:
    space = space_from({"search": {"freeze_backbone_epochs": {"low": 0, "high": 20}}})
    with pytest.raises(SpaceError, match="freeze_backbone_epochs=20 must be at most epochs=4"):
        make(tmp_path, space)
    with pytest.raises(
        SearchError, match="unknown sampler 'cmaes': one of model, tpe, random, qmc, gp"
    ):
        make(tmp_path, sampler="cmaes")


def test_optuna_says_nothing_on_the_console(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    searcher = make(tmp_path, MIXED, sampler="gp")
    for number in range(12):
        searcher.suggest(str(number))
        run(searcher, str(number), [0.5 + number / 100] * EPOCHS)
    assert capfd.readouterr() == ("", "")


# ---- under Ray ----


def test_tune_can_pickle_and_limit_it(tmp_path: Path) -> None:
    searcher = make(tmp_path, objective=lambda rows: rows[-1]["val_auc"])
    ray.cloudpickle.dumps(searcher)
    limited = ConcurrencyLimiter(searcher, max_concurrent=1)
    assert limited.suggest("a")["trial"] == "00000"
    assert limited.suggest("b") is None
    limited.on_trial_complete("a", row(EPOCHS, 0.5))
    assert limited.suggest("b")["trial"] == "00001"
    limited.searcher.save_to_dir(str(tmp_path))
    assert not list(tmp_path.glob("searcher-state*"))


@pytest.mark.ray
@pytest.mark.slow
def test_ray_runs_a_search_with_stopped_and_failed_trials_and_resumes_it(tmp_path: Path) -> None:
    from ray import tune

    def train(config: dict[str, Any]) -> None:
        number = int(config["trial"])
        for epoch in range(1, EPOCHS + 1):
            if number == 3 and epoch == 2:
                raise RuntimeError("out of luck")
            tune.report(
                {"epoch": epoch, "val_auc": math.nan if number == 2 else 0.5 + number / 100}
            )

    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
    try:
        for session, num_trials in enumerate((4, 6)):
            searcher = make(tmp_path, MIXED, num_trials=num_trials)
            tuner = tune.Tuner(
                tune.with_resources(train, {"cpu": 1}),
                tune_config=tune.TuneConfig(
                    search_alg=searcher, num_samples=-1, max_concurrent_trials=2, reuse_actors=True
                ),
                run_config=tune.RunConfig(
                    name=f"session-{session}", storage_path=str(tmp_path / "ray"), verbose=0,
                    stop=lambda name, result: result["epoch"] == 2 and abs(result["val_auc"] - 0.51) < 1e-9,
                ),
            )  # fmt: skip
            tuner.fit()
            searcher.close()
    finally:
        ray.shutdown()
    trials = read(tmp_path).trials
    assert [trial.state.name for trial in trials] == [
        "COMPLETE",
        "PRUNED",
        "PRUNED",
        "FAIL",
        "COMPLETE",
        "COMPLETE",
    ]
    assert trials[1].intermediate_values == {1: 0.51, 2: 0.51}
    assert [trial.value for trial in trials[4:]] == [0.54, 0.55]


def test_the_model_learns_from_trials_that_were_stopped(tmp_path: Path) -> None:
    """Low rates are stopped early with poor values: the next samples avoid them."""
    space = SPACES["documented"]
    searcher = make(tmp_path, space, sampler="model", num_trials=30, seed=1)
    rates = []
    for number in range(30):
        rate = suggested(searcher, str(number))["overrides"]["backbone_lr"]
        rates.append(rate)
        good = rate > 1.5e-4
        run(searcher, str(number), [0.85] * EPOCHS if good else [0.55] * 2)
    assert np.mean(np.array(rates[15:]) > 1.5e-4) > 0.8
    assert np.mean(np.array(rates[:4]) > 1.5e-4) < 0.8


@pytest.mark.parametrize("most", [256, 8])
def test_the_model_asks_for_the_same_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Where it is fitted to all trials that have ended, and where there are more than it is fitted to."""
    monkeypatch.setattr(surrogate, "MOST_OBSERVED", most)
    prior = shipped_prior()
    asked: dict[str, list[Any]] = {}
    for name, restarts in (("whole", ()), ("killed", (4, 9))):
        (tmp_path / name).mkdir()
        searcher = make(tmp_path / name, MIXED, sampler="model", num_trials=14, prior=prior)
        asked[name] = []
        for number in range(14):
            if number in restarts:
                searcher.close()
                searcher = make(tmp_path / name, MIXED, sampler="model", num_trials=14, prior=prior)
            asked[name].append(suggested(searcher, str(number))["overrides"])
            run(searcher, str(number), [0.6 + 0.02 * number] * (EPOCHS if number % 3 else 2))
        searcher.close()
    assert asked["whole"] == asked["killed"]


def test_a_prior_moves_the_first_draws(tmp_path: Path) -> None:
    space = SPACES["documented"]
    rates = {}
    for name, prior in (("with", shipped_prior()), ("without", None)):
        (tmp_path / name).mkdir()
        searcher = make(tmp_path / name, space, sampler="model", prior=prior, num_trials=12)
        rates[name] = [suggested(searcher, str(n))["overrides"]["backbone_lr"] for n in range(12)]
        assert any("prior: false" in note for note in searcher.notes) == (prior is not None)
    assert np.median(rates["with"]) > np.median(rates["without"])
    modelled = [rate for n, rate in enumerate(rates["with"]) if n not in surrogate.UNMODELLED]
    assert min(modelled) > 5e-5
