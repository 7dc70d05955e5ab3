"""Searches of four epochs a trial, and trials played back to a searcher."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from sqlalchemy.pool import NullPool

from search_spaces.space import Space
from search_spaces.written import space_from
from trainables.objective import objective_value
from tune_app.driver.optuna_database import STUDY_NAME, sqlite_url
from tune_app.driver.searcher import OptunaSearcher

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


def left_running(searcher: OptunaSearcher) -> list[int]:
    """The trials that run by a study that has just been opened."""
    return [trial.number for trial in searcher.study.trials if trial.state == TrialState.RUNNING]


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
