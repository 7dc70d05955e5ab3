"""One row per trial, from records and rows."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from trainables.config import ConfigError, FineTuneConfig, as_scalar
from trainables.objective import OBJECTIVES, BestEpoch, RunningValue
from tune_app.results.study import Study
from tune_app.study.columns import EPOCH_COLUMNS, METRICS, TRIAL_COLUMNS
from tune_app.study.files import KeptBy, StudyFiles
from tune_app.study.spec import StudySpec


def column_meanings(study: Study | None = None) -> pd.DataFrame:
    """Return every documented column: table (trials or epochs), column, dtype, meaning, in column order.

    With a study its at-rung columns are there too.
    """
    rows = [("trials", name, *what) for name, what in TRIAL_COLUMNS.items()]
    for name, hyperparameter in FineTuneConfig.model_fields.items():
        rows.append(
            ("trials", name, _config_dtype(name), (hyperparameter.description or "").split(". ")[0])
        )
    for place, when in (("last", "in its last epoch"), ("best", "in its best epoch")):
        rows += [
            ("trials", f"{place}_{name}", dtype, f"{meaning}; {when}")
            for name, (dtype, meaning) in METRICS.items()
        ]
    for rung in study.rungs if study else ():
        rows.append(
            (
                "trials",
                f"val_auc_at_{rung}",
                "float64",
                f"val_auc in epoch {rung}, where trials are compared",
            )
        )
    rows += [("epochs", name, *what) for name, what in EPOCH_COLUMNS.items()]
    return pd.DataFrame(rows, columns=["table", "column", "dtype", "meaning"]).astype("string")


def trials_table(
    files: StudyFiles,
    spec: StudySpec,
    records: Mapping[str, Mapping[str, Any]],
    epochs: pd.DataFrame,
    rungs: tuple[int, ...],
    running: bool,
    kept: KeptBy,
) -> pd.DataFrame:
    ids = sorted({*records, *epochs["trial"].unique()}, key=lambda trial: (len(trial), trial))
    column = OBJECTIVES[spec.objective].column
    values = {trial: list(rows) for trial, rows in epochs.groupby("trial", observed=True)[column]}
    rows = [
        _trial_row(files, spec, trial, records.get(trial), values.get(trial, []), running)
        for trial in ids
    ]
    names = [*TRIAL_COLUMNS, *FineTuneConfig.model_fields]
    table = pd.DataFrame(rows, columns=names, index=pd.Index(ids, name="trial"))

    by_trial = epochs.groupby("trial", observed=True)
    table["epochs_run"] = by_trial.size().reindex(table.index).fillna(0)
    table["work_s"] = by_trial["epoch_s"].sum().reindex(table.index)
    table["gpu_s"] = table["gpus"] * table["work_s"]
    last_time = by_trial["time"].max().reindex(table.index)
    end = pd.to_numeric(table["ended"]).fillna(last_time)
    table["wall_s"] = (end - pd.to_numeric(table["started"])).clip(lower=0)
    for name in ("started", "ended"):
        table[name] = pd.to_datetime(pd.to_numeric(table[name]), unit="s", utc=True)

    best, peak, last = (
        _best_rows(epochs, kept),
        _peak_rows(epochs),
        epochs.drop_duplicates("trial", keep="last"),
    )
    table["best_epoch"] = best.set_index("trial")["epoch"].reindex(table.index)
    table["peak_epoch"] = peak.set_index("trial")["epoch"].reindex(table.index)
    table["peak_val_auc"] = peak.set_index("trial")["val_auc"].reindex(table.index)
    places = [
        chosen.set_index("trial")[list(METRICS)].reindex(table.index).add_prefix(f"{place}_")
        for place, chosen in (("last", last), ("best", best))
    ]
    at_rungs = pd.DataFrame(
        {
            f"val_auc_at_{rung}": epochs[epochs["epoch"] == rung].set_index("trial")["val_auc"]
            for rung in rungs
        },
        index=table.index,
    )
    dtypes = {name: dtype for name, (dtype, _) in TRIAL_COLUMNS.items()}
    dtypes |= {name: _config_dtype(name) for name in FineTuneConfig.model_fields}
    whole = pd.concat(
        [table.astype(dtypes), *places, at_rungs.astype("float64")], axis=1
    ).reset_index(drop=True)
    # in one piece: a frame of a hundred blocks is slow, and pandas complains at each new column
    return whole.copy()


def _trial_row(
    files: StudyFiles,
    spec: StudySpec,
    trial: str,
    record: Mapping[str, Any] | None,
    values: list[float],
    running: bool,
) -> dict[str, Any]:
    """The facts known of one trial without its epochs' table; a record is missing when its driver was killed early."""
    given = record or {}
    state = given.get("state") or "running"
    objective = given.get("objective")
    paths = files.trial(trial)
    row: dict[str, Any] = {
        "trial": trial,
        "number": given.get("number", int(trial) if trial.isdigit() else None),
        "state": "interrupted" if state == "running" and not running else state,
        "since_epoch": given.get("verdict_epoch"),
        "verdict_summary": given.get("verdict_summary"),
        "healed_epochs": given.get("healed_epochs"),
        "objective": _reduced(spec, values) if objective is None else objective,
        "gpus": given.get("gpus"),
        "failures": given.get("failures", 0),
        "checkpoint": _there(paths.checkpoint),
        "best_checkpoint": _there(paths.best),
    }
    row |= {
        name: given.get(name)
        for name in ("variant", "verdict", "reason", "advice", "error", "started", "ended", "node")
    }
    config = given.get("config") or _config_of(spec, given.get("overrides", {}))
    return row | {name: as_scalar(name, config.get(name)) for name in FineTuneConfig.model_fields}


def _there(path: Path) -> str | None:
    return str(path) if path.is_file() else None


def _config_of(spec: StudySpec, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The config a trial will have, before it has written it; empty when it cannot have one."""
    try:
        return spec.config_of(overrides).model_dump(mode="json")
    except ConfigError:
        return {}


def _config_dtype(name: str) -> str:
    annotation = FineTuneConfig.model_fields[name].annotation
    return {int: "Int64", float: "float64", bool: "boolean"}.get(annotation, "string")  # type: ignore[arg-type]


def _reduced(spec: StudySpec, values: list[float]) -> float:
    running = RunningValue(OBJECTIVES[spec.objective].reduction)
    worth = math.nan
    for value in values:
        worth = running.update(value)
    return worth


def _best_rows(epochs: pd.DataFrame, kept: KeptBy) -> pd.DataFrame:
    """The row of each trial whose weights are in best.pt."""
    column = OBJECTIVES[kept.objective].column
    places: list[Any] = []
    for _, rows in epochs[["trial", "epoch", column]].groupby("trial", observed=True):
        best = BestEpoch(kept.objective, window_end=kept.window_end)
        numbers, values = rows["epoch"].tolist(), rows[column].tolist()
        for epoch, value in zip(numbers, values, strict=True):
            best.update({"epoch": epoch, column: value})
        if best.epoch is not None:
            places.append(rows.index[numbers.index(best.epoch)])
    return epochs.loc[places]


def _peak_rows(epochs: pd.DataFrame) -> pd.DataFrame:
    values = epochs["val_auc"].dropna()
    return epochs.loc[values.groupby(epochs["trial"], observed=True).idxmax()]
