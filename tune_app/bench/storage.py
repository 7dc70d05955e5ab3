"""`medtune bench storage`: the time that a study's trials take to be written, in its database and in Optuna's storages.

The database is Optuna's `RDBStorage` with a write-ahead log; "rdb" is the same without one. All three write the same
trials: seven parameters, a value per epoch, the end with its reason. They take turns.
"""

import statistics
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.distributions import FloatDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from tune_app.bench.search import machine
from tune_app.driver.optuna_database import REASON, Database, quiet_optuna, sqlite_url
from tune_app.results.tables import plain_table

RANGE = FloatDistribution(0.0, 1.0)
PARAMETERS = 7


def bench_storage(
    *, trials: int, epochs: int, turns: int, folder: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return {"machine", "trials", "epochs", "medtune", "rdb", "journal"}: of each side the seconds of every turn.

    Writes below `folder`, which has to be on the file system that studies are on.
    """
    sides: dict[str, Callable[[Path], Callable[[int], None]]] = {
        "medtune": lambda path: _ours(path, epochs),
        "rdb": lambda path: _optunas(RDBStorage(sqlite_url(path)), epochs),
        "journal": lambda path: _optunas(JournalStorage(JournalFileBackend(str(path))), epochs),
    }
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns):
        for side, opened in sides.items():
            with quiet_optuna():
                write = opened(folder / f"{side}-{turn}")
            started = time.perf_counter()
            for number in range(trials):
                write(number)
            seconds[side].append(time.perf_counter() - started)
            say(f"turn {turn + 1}, {side}: {seconds[side][-1]:.2f} s for {trials} trials")
    return {"machine": machine(), "trials": trials, "epochs": epochs, **seconds}


def storage_table(result: dict[str, Any]) -> Table:
    """Return seconds a trial, the ratio to ours, and the share of a trial of one minute."""
    table = plain_table("storage", "s a trial", "ratio", "of a minute", text=["storage"])
    names = {"medtune": "medtune", "rdb": "RDBStorage", "journal": "JournalStorage"}
    own = statistics.median(result["medtune"]) / result["trials"]
    for side, name in names.items():
        a_trial = statistics.median(result[side]) / result["trials"]
        table.add_row(name, f"{a_trial:.4f}", f"{a_trial / own:.1f}", f"{a_trial / 60:.2%}")
    return table


def _trial(number: int) -> FrozenTrial:
    names = [f"parameter_{i}" for i in range(PARAMETERS)]
    return FrozenTrial(
        number=number,
        trial_id=number,
        state=TrialState.RUNNING,
        value=None,
        datetime_start=datetime.now(),
        datetime_complete=None,
        params=dict.fromkeys(names, 0.5),
        distributions=dict.fromkeys(names, RANGE),
        user_attrs={"trial": f"{number:05d}"},
        system_attrs={},
        intermediate_values={},
    )


def _ours(path: Path, epochs: int) -> Callable[[int], None]:
    database = Database(sqlite_url(path))

    def write(number: int) -> None:
        database.create(_trial(number), number)
        for epoch in range(epochs):
            database.report(number, epoch, 0.5)
        database.finish(number, TrialState.COMPLETE, 0.5, "at the end")

    return write


def _optunas(storage: BaseStorage, epochs: int) -> Callable[[int], None]:
    study = storage.create_new_study([StudyDirection.MAXIMIZE], "bench")

    def write(number: int) -> None:
        trial = storage.create_new_trial(study, template_trial=_trial(number))
        for epoch in range(epochs):
            storage.set_trial_intermediate_value(trial, epoch, 0.5)
        storage.set_trial_user_attr(trial, REASON, "at the end")
        storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.5])

    return write
