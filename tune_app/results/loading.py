"""Study directories -> `Study` objects."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from trainables.config import FineTuneConfig
from trainables.data.storage import url_of
from trainables.data.visible import is_unicode
from trainables.diagnosis import auc_low, diagnose, run_verdict, trial_verdict
from trainables.errors import one_line
from trainables.objective import OBJECTIVES
from tune_app.results.study import Studies, Study
from tune_app.results.trials import trials_table
from tune_app.study.columns import ANY_FLOAT32, DECISION_COLUMNS, EPOCH_BOUNDS, EPOCH_COLUMNS
from tune_app.study.copies import opened
from tune_app.study.errors import SpecError
from tune_app.study.files import KeptBy, StudyFiles, kept_by
from tune_app.study.policy import Policy
from tune_app.study.rows import (
    StudyDamageError,
    is_held,
    is_trial_id,
    json_lines,
    read_epochs_by_line,
    read_object,
    record_problem,
    whole_lines,
)
from tune_app.study.spec import StudySpec, recorded_spec


def load_study(path: str | Path, *, on_damage: Literal["error", "skip"] = "error") -> Study:
    """Return the study in folder `path`, or at a URL such as s3://bucket/study.

    A last line without an end is normal while a driver writes, or after it was killed: it is left out and noted. Any
    other damage (lines that are no rows, a trial's epoch twice, unreadable trial files) raises StudyDamageError with
    every problem, file and line; with `on_damage="skip"` damaged parts are left out, and `.notes` reports them. Of an
    epoch that is there twice the first line counts.

    Raises SpecError when there is no study or it is of another version.
    """
    url = url_of(path)
    path, driven = opened(path)
    files = StudyFiles(path.absolute())
    hold_any_text(str(files.root))
    files.require()
    info = files.read()
    spec = recorded_spec(info["spec"])
    damage: list[str] = []
    notes: list[str] = []

    running = is_held(files.lock) if driven is None else driven
    # Records before rows: a trial that ends in between shows its rows and "running", never an end without its rows.
    records = _read_records(files, damage)
    epochs = _read_epochs(files.epochs, damage, notes)
    decisions = _read_decisions(files.decisions, damage, notes)
    if damage and on_damage == "error":
        raise StudyDamageError(damage)
    damage = [*(f"skipped as damaged: {problem}" for problem in damage), *_gaps(epochs)]
    notes += damage

    rungs = _rungs(spec, decisions)
    kept = kept_by(spec.objective, info["format"])
    trials = trials_table(files, spec, records, epochs, rungs, running, kept)
    trials["stopped_by"] = (
        trials["trial"]
        .map(_stopped_by(decisions))
        .astype("string")
        .where(trials["state"] == "stopped")
    )
    _diagnose_the_rest(trials, epochs)
    trials["verdict"] = _verdicts(trials, kept)
    searched = _searched(spec, records, trials)
    return Study(
        files.root,
        spec,
        info,
        trials,
        epochs,
        decisions,
        running,
        rungs,
        searched,
        tuple(notes),
        url,
        tuple(damage),
    )


def hold_any_text(name: str) -> None:
    """Have pandas hold text as Python does where `name`, of a file, is not UTF-8: Arrow, its usual storage, cannot."""
    if not is_unicode(name):
        pd.set_option("mode.string_storage", "python")


def load_studies(
    paths: Iterable["str | Path | Study"], *, on_damage: Literal["error", "skip"] = "error"
) -> Studies:
    """Return several studies, loaded or to be loaded, with dataframes concatenated below a first column `study`.

    `study` is the folder's name, with as many parent folders as it takes to distinguish them.
    """
    studies = tuple(
        path if isinstance(path, Study) else load_study(path, on_damage=on_damage) for path in paths
    )
    if not studies:
        raise ValueError("no study named")
    names = _distinct_names([study.path for study in studies])

    def stacked(tables: list[pd.DataFrame]) -> pd.DataFrame:
        for name, table in zip(names, tables, strict=True):
            table.insert(0, "study", pd.Series(name, index=table.index, dtype="string"))
        kept = [table for table in tables if len(table)] or tables[:1]
        columns = list(dict.fromkeys(column for table in tables for column in table.columns))
        return pd.concat(kept, ignore_index=True).reindex(columns=columns)

    return Studies(
        studies,
        stacked([study.trials_full.copy() for study in studies]),
        stacked([study.epochs.copy() for study in studies]),
        stacked([study.decisions.copy() for study in studies]),
    )


def _read_records(files: StudyFiles, damage: list[str]) -> dict[str, dict[str, Any]]:
    """trial.json of every trial, with its config under "config", by id; damaged ones are reported and left out."""
    records: dict[str, dict[str, Any]] = {}
    folders = sorted(folder for folder in files.trials.iterdir()) if files.trials.is_dir() else []
    for folder in folders:
        trial = files.trial(folder.name)
        if not trial.record.is_file():
            continue
        record = read_object(trial.record, damage)
        config = read_object(trial.config, damage) if trial.config.is_file() else None
        if record is None:
            continue
        problem = record_problem(folder.name, record)
        if problem:
            damage.append(f"{trial.record}: {problem}")
            continue
        records[folder.name] = {**record, "config": config}
    return records


def _read_epochs(path: Path, damage: list[str], notes: list[str]) -> pd.DataFrame:
    content = whole_lines(path, notes)
    table = _read_epochs_fast(content)
    if table is None:  # something is wrong: read again line by line, to report where
        table = pd.DataFrame(read_epochs_by_line(path, content, damage))
        table["arrival"] = np.arange(len(table))
        table = table.reindex(columns=list(dict.fromkeys([*EPOCH_COLUMNS, *table.columns])))
    unknown = sorted(set(table.columns) - set(EPOCH_COLUMNS))
    table = table[[*EPOCH_COLUMNS, *unknown]]
    table = table.astype({name: dtype for name, (dtype, _) in EPOCH_COLUMNS.items()})
    for name in unknown:  # new metrics of a later version: numbers stay numbers, a column of nulls is one of no scores
        table[name] = (
            table[name].astype("float64")
            if table[name].isna().all()
            else table[name].convert_dtypes()
        )
    return table.sort_values(["trial", "epoch"], kind="stable", ignore_index=True)


def _read_epochs_fast(content: bytes) -> pd.DataFrame | None:
    """All rows at once through Arrow, about ten times as fast as line by line; None when any is not as it must be."""
    import pyarrow as pa
    from pyarrow import json as arrow_json

    kinds = {
        "float64": pa.float64(),
        "Int64": pa.int64(),
        "int64": pa.int64(),
        "boolean": pa.bool_(),
        "string": pa.string(),
    }
    given = {name: kinds[dtype] for name, (dtype, _) in EPOCH_COLUMNS.items() if name != "arrival"}
    if not content.strip():
        return _empty({name: dtype for name, (dtype, _) in EPOCH_COLUMNS.items()})
    try:
        table = arrow_json.read_json(
            pa.BufferReader(content),
            read_options=arrow_json.ReadOptions(block_size=1 << 22),
            parse_options=arrow_json.ParseOptions(explicit_schema=pa.schema(given)),
        )
    except pa.ArrowException:
        return None
    if (
        any(pa.types.is_nested(column.type) for column in table.schema)
        or "arrival" in table.column_names
    ):
        return None
    frame: pd.DataFrame = table.to_pandas(integer_object_nulls=False)
    if not _is_whole(frame, content):
        return None
    frame["arrival"] = np.arange(len(frame))
    return frame


def _empty(columns: Mapping[str, str]) -> pd.DataFrame:
    return pd.DataFrame({name: pd.Series(dtype=dtype) for name, dtype in columns.items()})


def _is_whole(frame: pd.DataFrame, content: bytes) -> bool:
    """Whether each line is one epoch of one trial, with a score and plausible numbers."""
    if len(frame) != content.count(b"\n") or frame[["trial", "epoch"]].isna().any(axis=None):
        return False
    if (frame["epoch"] < 1).any() or frame.duplicated(["trial", "epoch"]).any():
        return False
    named = bool(frame["trial"].drop_duplicates().map(is_trial_id).all())
    return named and content.count(b'"val_auc":') == len(frame) and _is_plausible(frame)


def _is_plausible(frame: pd.DataFrame) -> bool:
    """Whether all numbers are within their bounds, and each trial's epochs in order."""
    others = [str(name) for name in frame.select_dtypes("float") if name not in EPOCH_BOUNDS]
    bounds: dict[str, tuple[float, float]] = EPOCH_BOUNDS | dict.fromkeys(others, ANY_FLOAT32)
    lows, highs = np.array(list(bounds.values())).T
    values = frame[list(bounds)].to_numpy("float64", na_value=np.nan)
    if ((values < lows) | (values > highs)).any():
        return False
    return not frame.groupby("trial", observed=True)["epoch"].diff().lt(0).any()


def _gaps(epochs: pd.DataFrame) -> list[str]:
    """A note for each trial whose epochs are not 1, 2, ... last: nothing to skip, but nothing to pass over either."""
    if epochs.empty:
        return []
    by_trial = epochs.groupby("trial", observed=True)["epoch"].agg(["max", "count"])
    return [
        f"epochs.jsonl: trial {trial} has {row['count']} of its epochs 1 to {row['max']}"
        for trial, row in by_trial[by_trial["max"] != by_trial["count"]].iterrows()
    ]


def _read_decisions(path: Path, damage: list[str], notes: list[str]) -> pd.DataFrame:
    """One row a line; columns in the order they first appear, values of more than one part as JSON text."""
    rows = [row for _, row in json_lines(path, whole_lines(path, notes), damage)]
    try:
        table = pd.DataFrame(rows, columns=list(DECISION_COLUMNS)).astype(DECISION_COLUMNS)
    except (TypeError, ValueError, OverflowError) as error:
        damage.append(f"{path}: a value is not of its kind: {one_line(error)}")
        return _empty(DECISION_COLUMNS)
    table["verdict"] = table["verdict"].map(run_verdict, na_action="ignore").astype("string")
    return table


def _searched(
    spec: StudySpec, records: Mapping[str, Mapping[str, Any]], trials: pd.DataFrame
) -> tuple[str, ...]:
    """Hyperparameters that trials were given by the sampler or the plan and in which they differ."""
    given = {name for record in records.values() for name in record.get("overrides", {})}
    names = [name for name in FineTuneConfig.model_fields if name in given - {"fold", "seed"}]
    return tuple(
        name for name in names if trials[name].nunique(dropna=False) > 1 or len(trials) < 2
    )


def _diagnose_the_rest(trials: pd.DataFrame, epochs: pd.DataFrame) -> None:
    """Fill in the diagnosis so far of running and interrupted trials: the driver writes it only at a trial's end."""
    for index, trial in trials[trials["verdict"].isna() & (trials["epochs_run"] > 0)].iterrows():
        config = {
            name: trial[name] for name in FineTuneConfig.model_fields if pd.notna(trial[name])
        }
        rows = epochs[epochs["trial"] == trial["trial"]].to_dict("records")
        found = diagnose([{k: v for k, v in row.items() if v is not pd.NA} for row in rows], config)
        trials.loc[index, ["verdict", "verdict_summary"]] = [found.verdict, found.summary]
        trials.loc[index, "healed_epochs"] = found.healed_epochs
        trials.loc[index, "advice"] = found.advice or pd.NA
        trials.loc[index, "since_epoch"] = found.epoch if found.epoch is not None else pd.NA


def _verdicts(trials: pd.DataFrame, kept: KeptBy) -> "pd.Series[str]":
    """The verdict on each trial from the fault in its record or its rows, by the rule of this version for all studies."""
    weights = OBJECTIVES[kept.objective].weights
    names = [name for name in trials.columns if name.startswith("best_val_")]
    of_best = trials[names].astype(object).where(trials[names].notna(), None)
    rows = [
        {name.removeprefix("best_"): value for name, value in zip(names, values, strict=True)}
        for values in of_best.itertuples(index=False, name=None)
    ]
    verdicts = [
        None if pd.isna(found) else trial_verdict(str(found), str(state), auc_low(row, weights))
        for found, state, row in zip(trials["verdict"], trials["state"], rows, strict=True)
    ]
    return pd.Series(verdicts, index=trials.index, dtype="string")


def _stopped_by(decisions: pd.DataFrame) -> pd.Series:
    """What ended each stopped trial, by trial: its last stop in the log."""
    stops = decisions[
        (decisions["action"] == "stop")
        & decisions["reason"].isin(["halving", "diagnosis", "requested"])
    ]
    return stops.drop_duplicates("trial", keep="last").set_index("trial")["reason"]


def _rungs(spec: StudySpec, decisions: pd.DataFrame) -> tuple[int, ...]:
    """The rungs the policy has by its settings, and any others in the log (an earlier policy's), ascending.

    Rungs need not fall on whole epochs; a trial is compared in the first epoch that reaches one.
    """
    planned = (
        Policy(spec.policy, spec.epochs).rungs
        if spec.kind == "search" and spec.policy.halving
        else []
    )
    met = [float(rung) for rung in decisions["rung"].dropna().unique()]
    return tuple(sorted({math.ceil(rung) for rung in [*planned, *met]}))


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise SpecError(f"the same study twice: {', '.join(map(str, paths))}: name each once")
