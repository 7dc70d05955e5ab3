"""A study's folder -> dataframes: one row a trial, one row a trial and epoch, one row a decision. No torch, no Ray.

Everything is computed from the files of the study alone, so it works on a laptop, while the study runs, and after its
driver was killed. Names of columns:

* a hyperparameter has its own name (`backbone_lr`), as in FineTuneConfig;
* a metric has its own name in `.epochs` (`val_auc`), and three places in `.trials`: `last_val_auc` in the trial's last
  epoch, `best_val_auc` in the epoch whose weights are kept (the best 3-epoch median of val_auc: one lucky epoch does
  not count), and `val_auc_at_4` at the rung in epoch 4. There is no plain `val_auc` in `.trials`: which of the three
  would be a guess. Where a name is typed (filters, sorting), a bare metric means its `best_` column.
* `column_meanings(study)`, or `medtune results STUDY --meanings`, lists every column with its type and meaning.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from search_spaces.space import Space
from trainables.checkpoints import replacing
from trainables.config import ConfigError, FineTuneConfig, build_config
from trainables.data.storage import url_of
from trainables.diagnosis import diagnose
from tune_app.results.columns import DECISION_COLUMNS, EPOCH_COLUMNS, METRICS, TRIAL_COLUMNS
from tune_app.results.tables import (
    column_of,
    formatted,
    require_column,
    results_table,
    select,
    smaller_is_better,
)
from tune_app.study.mirror import opened
from tune_app.study.objective import OBJECTIVES, RunningValue
from tune_app.study.policy import Policy
from tune_app.study.spec import StudyFiles, StudySpec, build_spec


class StudyDamageError(ValueError):
    """Files of a study that do not hold what they must. `problems` names file and line, one each."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True, eq=False)
class Study:
    """A study as dataframes. Build it with `load_study`; load again to see what has come in since."""

    path: Path
    spec: StudySpec
    info: Mapping[str, Any]
    """study.json: spec, versions, hardware, fingerprint of the data."""
    trials: pd.DataFrame = field(repr=False)
    """One row a trial, by number. Columns: `column_meanings`."""
    epochs: pd.DataFrame = field(repr=False)
    """One row a trial and epoch, by trial and epoch. Columns: EPOCH_COLUMNS, then unknown ones by name."""
    decisions: pd.DataFrame = field(repr=False)
    """One row a decision of the stopping policy, in the order they were taken."""
    running: bool
    """Whether a driver holds the study at this moment."""
    rungs: tuple[int, ...]
    """Epochs at which the halving compared trials."""
    searched: tuple[str, ...]
    """Hyperparameters in which trials differ by design, in column order; fold and seed are not among them."""
    notes: tuple[str, ...] = ()
    """What is remarkable about the files: an unfinished last line, what was skipped as damaged."""
    url: str | None = None
    """Where in object storage it is, when `path` is a copy of that."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def place(self) -> str:
        """What a command takes to name the study: its folder or URL."""
        return self.url or str(self.path)

    @property
    def scored(self) -> bool:
        """Whether any trial that has not failed has an objective, so that there is a best one."""
        return bool(self.trials.loc[self.trials["state"] != "failed", "objective"].notna().any())

    @cached_property
    def space(self) -> Space | None:
        """The search space; None for what is no search."""
        return self.spec.resolved_space() if self.spec.kind == "search" else None

    def best(self, metric: str = "objective", where: str | Sequence[str] = ()) -> pd.Series:
        """Return the row of the best trial by `metric` among those `where` lets through (failed ones never).

        `metric` is a column of `.trials`, or a metric, which means its `best_` column. Losses, errors and times are
        best when small. Raises ValueError when no trial has a value.
        """
        rows = select(self.trials, where)
        column = column_of(rows, metric)
        rows = rows[(rows["state"] != "failed") & rows[column].notna()]
        if rows.empty:
            raise ValueError(
                f"{self.path}: no trial has a {column} yet{' that passes the filter' if where else ''}"
            )
        values = rows[column].to_numpy("float64")
        return rows.iloc[int(values.argmin() if smaller_is_better(column) else values.argmax())]

    def leaderboard(self, n: int | None = 10, where: str | Sequence[str] = ()) -> pd.DataFrame:
        """Return the best `n` trials by objective: rank, AUC with interval, epochs, verdict and what was searched."""
        table = results_table(self, where=where, limit=n)
        table.insert(0, "rank", np.arange(1, len(table) + 1))
        return table

    def record(self, trial: str) -> dict[str, Any]:
        """Return what the driver wrote of the trial (trial.json); `overrides` is in it. Raises StudyDamageError."""
        return read_record(StudyFiles(self.path).trial(trial).record)

    def curves(
        self,
        metric: str | Sequence[str] = ("val_auc_raw", "val_auc_ema"),
        where: str | Sequence[str] = (),
    ) -> pd.DataFrame:
        """Return long form: trial, variant, state, verdict, epoch, metric, value; NaN where there is no score."""
        metrics = [metric] if isinstance(metric, str) else list(metric)
        for name in metrics:
            require_column(name, self.epochs.columns)
        about = select(self.trials, where)[["trial", "variant", "state", "verdict"]]
        rows = self.epochs[["trial", "epoch", *metrics]].merge(about, on="trial", how="inner")
        long = rows.melt(
            ["trial", "variant", "state", "verdict", "epoch"], metrics, "metric", "value"
        )
        long["metric"] = long["metric"].astype("string")
        long["value"] = long["value"].astype("float64")
        return long.sort_values(["trial", "metric", "epoch"], kind="stable", ignore_index=True)

    def importance(
        self,
        metric: str = "objective",
        *,
        evaluator: Literal["fanova", "mdi", "ped-anova"] = "fanova",
        repeats: int = 5,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return how much each searched hyperparameter accounts for `metric`: parameter, importance, low, high.

        Optuna's evaluators count completed trials only, and a search stops most of its trials: they are given to a
        temporary study in memory as completed with their value so far, which makes a hyperparameter that gets trials
        stopped count as important. Failed trials are left out. Importances sum to 1; low and high are the extremes
        over `repeats` random forests, and say nothing of how few trials there are. `.attrs["how"]` tells all this in
        a sentence with the numbers. Raises ValueError with fewer than four trials or nothing that varies.
        """
        from tune_app.results.effects import importance

        return importance(self, metric, evaluator, repeats, seed)

    def effects(self, metric: str = "objective", *, baseline: str | None = None) -> pd.DataFrame:
        """Return what each variant changes against `baseline`, from differences paired over (seed, fold).

        Columns: variant, pairs, mean (of the differences), low and high (95 %), p, p_holm (adjusted for the number of
        variants), value and baseline_value (means over the pairs), runs, collapsed, healed (collapsed for a time, and
        came back) and failed (of them), verdicts, call (better, worse, cannot tell). Over several folds the interval is
        Student's t on the differences of the folds, each the mean of its seeds, their variance raised by
        1 / (num_folds - 1) because the training parts of folds overlap (Nadeau and Bengio 2003, eq. 9; Bouckaert and
        Frank 2004). With one fold it is Student's t on the seeds, and speaks of that fold only. `call` goes by the
        interval, and is "cannot tell" when it holds zero, or where there is none: of one pair, or of differences that are
        all the same. Raises ValueError without variants.
        """
        from tune_app.results.effects import effects

        return effects(self, metric, baseline)

    def to_csv(self, folder: str | Path) -> list[Path]:
        """Write trials.csv, epochs.csv and decisions.csv to `folder`; returns their paths."""
        return _write(self, Path(folder), "csv")

    def to_parquet(self, folder: str | Path) -> list[Path]:
        """Write trials.parquet, epochs.parquet and decisions.parquet to `folder`, types kept; returns their paths."""
        return _write(self, Path(folder), "parquet")

    def __repr__(self) -> str:
        return f"<Study {self.name}: {self.sentence()}>"

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{escape(self.name)}</b>: {escape(self.sentence())}</p>"]
        if len(self.trials):
            parts.append(
                formatted(self.leaderboard(10)).to_html(
                    index=False, escape=True, border=0, na_rep=""
                )
            )
        return "\n".join(parts)

    def sentence(self) -> str:
        """Return kind, trials by state, epochs and the best objective in a line."""
        states = self.trials["state"].value_counts()
        told = (
            ", ".join(f"{states[state]} {state}" for state in STATES if state in states)
            or "none yet"
        )
        best = self.trials.loc[self.trials["state"] != "failed", "objective"].max()
        value = "" if pd.isna(best) else f", best {self.spec.objective} {best:.3f}"
        now = "running" if self.running else self.spec.kind
        return f"{now}, trials {told}, {len(self.epochs)} epochs{value}"


STATES = ("completed", "stopped", "running", "interrupted", "failed")
ENDED = ("completed", "stopped", "failed")


@dataclass(frozen=True, repr=False)
class Studies:
    """Several studies, one below the other; each dataframe begins with the column `study`."""

    studies: tuple[Study, ...]
    trials: pd.DataFrame = field(repr=False)
    epochs: pd.DataFrame = field(repr=False)
    decisions: pd.DataFrame = field(repr=False)

    @property
    def searched(self) -> tuple[str, ...]:
        """Hyperparameters searched in any of them, in column order."""
        found = {name for study in self.studies for name in study.searched}
        return tuple(name for name in FineTuneConfig.model_fields if name in found)

    def __repr__(self) -> str:
        told = "; ".join(f"{study.name}: {study.sentence()}" for study in self.studies)
        return f"<Studies: {len(self.trials)} trials, {len(self.epochs)} epochs; {told}>"

    def _repr_html_(self) -> str:
        table = formatted(results_table(self, limit=10))
        return f"<p>{escape(repr(self)[1:-1])}</p>\n{table.to_html(index=False, escape=True, border=0, na_rep='')}"


# Loading ---------------------------------------------------------------------------------------------------------------


def load_study(path: str | Path, *, on_damage: Literal["error", "skip"] = "error") -> Study:
    """Return the study in folder `path`, or at a URL such as s3://bucket/study.

    A last line without an end is normal while a driver writes, or after it was killed: it is left out and noted. Any
    other damage (lines that are no rows, a trial's epoch twice, unreadable trial files) raises StudyDamageError with
    every problem, file and line; with `on_damage="skip"` what is damaged is left out, and `.notes` tells it. Of an
    epoch that is there twice the first line counts.

    Raises SpecError when there is no study or it is of another version.
    """
    url = url_of(path)
    path, driven = opened(path)
    files = StudyFiles(path.absolute())
    files.require()
    info = files.read()
    spec = build_spec(info["spec"])
    damage: list[str] = []
    notes: list[str] = []

    running = is_held(files.lock) if driven is None else driven
    # Records before rows: a trial that ends in between shows its rows and "running", never an end without its rows.
    records = _read_records(files, damage)
    epochs = _read_epochs(files.epochs, damage, notes)
    decisions = _read_decisions(files.decisions, damage, notes)
    if damage and on_damage == "error":
        raise StudyDamageError(damage)
    notes += [f"skipped as damaged: {problem}" for problem in damage]
    notes += _gaps(epochs)

    rungs = _rungs(spec, decisions)
    trials = _trials_table(files, spec, records, epochs, rungs, running)
    trials["stopped_by"] = (
        trials["trial"]
        .map(_stopped_by(decisions))
        .astype("string")
        .where(trials["state"] == "stopped")
    )
    _diagnose_the_rest(trials, epochs)
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
    )


def load_studies(
    paths: Iterable["str | Path | Study"], *, on_damage: Literal["error", "skip"] = "error"
) -> Studies:
    """Return several studies, loaded or to be loaded, with dataframes concatenated below a first column `study`.

    `study` is the folder's name, with as many parent folders as it takes to tell them apart.
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
        stacked([study.trials.copy() for study in studies]),
        stacked([study.epochs.copy() for study in studies]),
        stacked([study.decisions.copy() for study in studies]),
    )


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


def is_held(lock: Path) -> bool:
    """Return whether a driver holds `lock` (a filelock); asks without taking it, writes nothing.

    On systems without flock the answer is yes when the file is there, which calls no trial interrupted by mistake.
    """
    if not lock.is_file():
        return False
    try:
        import fcntl
    except ImportError:
        return True
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file closes
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _read_records(files: StudyFiles, damage: list[str]) -> dict[str, dict[str, Any]]:
    """trial.json of every trial, with its config under "config", by id; damaged ones are told and left out."""
    records: dict[str, dict[str, Any]] = {}
    folders = sorted(folder for folder in files.trials.iterdir()) if files.trials.is_dir() else []
    for folder in folders:
        trial = files.trial(folder.name)
        if not trial.record.is_file():
            continue
        record = _read_object(trial.record, damage)
        config = _read_object(trial.config, damage) if trial.config.is_file() else None
        if record is None:
            continue
        problem = _record_problem(folder.name, record)
        if problem:
            damage.append(f"{trial.record}: {problem}")
            continue
        records[folder.name] = {**record, "config": config}
    return records


def _record_problem(folder: str, record: Mapping[str, Any]) -> str | None:
    if record.get("trial", folder) != folder:
        return f"says it is trial {record['trial']!r}: a folder was renamed or copied"
    if record.get("state") not in ("running", *ENDED):
        return f"state {record.get('state')!r}: one of running, completed, stopped, failed"
    if not isinstance(record.get("overrides", {}), dict):
        return f"overrides are a {type(record['overrides']).__name__}, must be an object"
    for name in ("number", "started", "ended", "gpus", "failures", "objective", "verdict_epoch"):
        value = record.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{name} is {value!r}, must be a number or null"
    for name in ("variant", "reason", "verdict", "advice", "error", "node"):
        if not isinstance(record.get(name), str | None):
            return f"{name} is {record[name]!r}, must be text or null"
    return None


def _read_object(path: Path, damage: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes(), parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        damage.append(f"{path}: not JSON: {_one_line(error)}")
        return None
    if not isinstance(value, dict):
        damage.append(f"{path}: a {type(value).__name__}, must be an object")
        return None
    return value


def _constant(word: str) -> float:
    """NaN is read as the null it should have been; an infinity would win every comparison."""
    if word == "NaN":
        return math.nan
    raise ValueError(f"{word} is no score")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _whole_lines(path: Path, notes: list[str]) -> bytes:
    """Content of `path` up to its last line end; what comes after is a line being written, or one cut by a kill."""
    if not path.is_file():
        return b""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        notes.append(f"{path.name}: last line unfinished ({len(content) - end} bytes), left out")
    return content[:end]


def _read_epochs(path: Path, damage: list[str], notes: list[str]) -> pd.DataFrame:
    content = _whole_lines(path, notes)
    table = _read_epochs_fast(content)
    if table is None:  # something is wrong: read again line by line, to say where
        table = pd.DataFrame(_read_epochs_by_line(path, content, damage))
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
        return pd.DataFrame(
            {name: pd.Series(dtype=dtype) for name, (dtype, _) in EPOCH_COLUMNS.items()}
        )
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
    if len(frame) != content.count(b"\n") or frame[["trial", "epoch"]].isna().any(axis=None):
        return None
    if (frame["epoch"] < 1).any() or frame.duplicated(["trial", "epoch"]).any():
        return None
    if not frame["trial"].drop_duplicates().map(_is_trial_id).all():
        return None
    if np.isinf(frame.select_dtypes("float").to_numpy()).any():
        return None
    frame["arrival"] = np.arange(len(frame))
    return frame


def _is_trial_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9A-Za-z_-]{1,64}", value) is not None


def _read_epochs_by_line(path: Path, content: bytes, damage: list[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[str, int], int] = {}
    for line, row in _json_lines(path, content, damage):
        problem = _row_problem(row)
        if problem is None:
            key = (row["trial"], int(row["epoch"]))
            first = seen.setdefault(key, line)
            if first != line:
                problem = f"trial {key[0]} epoch {key[1]} again, first in line {first}"
        if problem is None:
            rows.append({**row, "epoch": int(row["epoch"])})
        else:
            damage.append(f"{path}:{line}: {problem}")
    return rows


def _row_problem(row: Mapping[str, Any]) -> str | None:
    if not _is_trial_id(row.get("trial")):
        return f"trial {row.get('trial')!r}: must be the id of a trial"
    epoch = row.get("epoch")
    if (
        isinstance(epoch, bool)
        or not isinstance(epoch, int | float)
        or epoch % 1
        or not 1 <= epoch < LARGEST_WHOLE
    ):
        return f"epoch {epoch!r}: must be a whole number from 1"
    for name, value in row.items():
        dtype = EPOCH_COLUMNS.get(name, ("", ""))[0]
        if isinstance(value, dict | list) or name == "arrival":
            return f"{name} is a {type(value).__name__}, must be one value"
        wrong = {
            "float64": isinstance(value, bool | str) or value in (math.inf, -math.inf),
            "Int64": isinstance(value, bool | str)
            or (isinstance(value, float) and not value.is_integer())
            or (isinstance(value, int | float) and abs(value) >= LARGEST_WHOLE),
            "boolean": not isinstance(value, bool),
            "string": not isinstance(value, str),
        }
        if value is not None and wrong.get(dtype, False):
            return f"{name} is {value!r}, must be {_DTYPE_WORDS[dtype]}"
    return None


LARGEST_WHOLE = 2**53
"""No count in a study comes near; from here on a float is not the number that was written."""

_DTYPE_WORDS = {
    "float64": "a number",
    "Int64": "a whole number",
    "boolean": "true or false",
    "string": "text",
}


def _json_lines(
    path: Path, content: bytes, damage: list[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(text, parse_constant=_constant)
        except (ValueError, RecursionError) as error:
            damage.append(f"{path}:{line}: not a JSON row: {_one_line(error)}")
            continue
        if isinstance(row, dict):
            yield line, row
        else:
            damage.append(f"{path}:{line}: a {type(row).__name__}, must be an object")


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
    rows = [row for _, row in _json_lines(path, _whole_lines(path, notes), damage)]
    try:
        return pd.DataFrame(rows, columns=list(DECISION_COLUMNS)).astype(DECISION_COLUMNS)
    except (TypeError, ValueError, OverflowError) as error:
        damage.append(f"{path}: a value is not of its kind: {_one_line(error)}")
        return pd.DataFrame(
            {name: pd.Series(dtype=dtype) for name, dtype in DECISION_COLUMNS.items()}
        )


# One row a trial -------------------------------------------------------------------------------------------------------


def _trials_table(
    files: StudyFiles,
    spec: StudySpec,
    records: Mapping[str, Mapping[str, Any]],
    epochs: pd.DataFrame,
    rungs: tuple[int, ...],
    running: bool,
) -> pd.DataFrame:
    ids = sorted({*records, *epochs["trial"].unique()}, key=lambda trial: (len(trial), trial))
    values = {
        trial: list(rows)
        for trial, rows in epochs.groupby("trial", observed=True)[_objective_column(spec)]
    }
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
        _best_rows(epochs),
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
    return (
        whole.copy()
    )  # in one piece: a frame of a hundred blocks is slow, and pandas complains at each new column


def _trial_row(
    files: StudyFiles,
    spec: StudySpec,
    trial: str,
    record: Mapping[str, Any] | None,
    values: list[float],
    running: bool,
) -> dict[str, Any]:
    """What is known of one trial without its epochs' table; a record is missing when its driver was killed early."""
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
        "checkpoint": str(paths.checkpoint) if paths.checkpoint.is_file() else None,
        "best_checkpoint": str(paths.best) if paths.best.is_file() else None,
    }
    row |= {
        name: given.get(name)
        for name in ("variant", "verdict", "reason", "advice", "error", "started", "ended", "node")
    }
    config = given.get("config") or _config_of(spec, given.get("overrides", {}))
    return row | {name: _cell(config.get(name)) for name in FineTuneConfig.model_fields}


def _config_of(spec: StudySpec, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The config a trial will have, before it has written it; empty when it cannot have one."""
    try:
        return build_config({**spec.config, **overrides}).model_dump(mode="json")
    except ConfigError:
        return {}


def _cell(value: Any) -> Any:
    """A hyperparameter as one cell: a shape or spacing becomes `96x96x64`, which a study file and `--set` read back."""
    if isinstance(value, list | tuple):
        return "x".join(f"{part:g}" for part in value)
    return value


def _config_dtype(name: str) -> str:
    annotation = FineTuneConfig.model_fields[name].annotation
    return {int: "Int64", float: "float64", bool: "boolean"}.get(annotation, "string")  # type: ignore[arg-type]


def _objective_column(spec: StudySpec) -> str:
    return OBJECTIVES[spec.objective].column


def _reduced(spec: StudySpec, values: list[float]) -> float:
    running = RunningValue(OBJECTIVES[spec.objective].reduction)
    worth = math.nan
    for value in values:
        worth = running.update(value)
    return worth


def _best_rows(epochs: pd.DataFrame) -> pd.DataFrame:
    """The row of each trial whose averaged weights are in best.pt: `trainables.saved_run.BestEpoch`, all trials at once."""
    value = epochs["val_auc"].fillna(-math.inf)
    by_trial = value.groupby(epochs["trial"], observed=True)
    one, two = by_trial.shift(1), by_trial.shift(2)
    median = pd.concat([value, one, two], axis=1).median(axis=1, skipna=True)
    place, length = by_trial.cumcount(), by_trial.transform("size")
    median = median.where(place != 1, np.minimum(value, one))
    median = median.where(
        (place >= 2) | (length < 3), -math.inf
    )  # what stood in for a median is forgotten
    found = median[median > -math.inf]
    return epochs.loc[found.groupby(epochs["trial"], observed=True).idxmax()]


def _peak_rows(epochs: pd.DataFrame) -> pd.DataFrame:
    values = epochs["val_auc"].dropna()
    return epochs.loc[values.groupby(epochs["trial"], observed=True).idxmax()]


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
    """Fill in what the curves of running and interrupted trials say by now: the driver says it at a trial's end."""
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


def _stopped_by(decisions: pd.DataFrame) -> pd.Series:
    """What ended each stopped trial, by trial: its last stop in the log."""
    stops = decisions[
        (decisions["action"] == "stop")
        & decisions["reason"].isin(["halving", "diagnosis", "requested"])
    ]
    return stops.drop_duplicates("trial", keep="last").set_index("trial")["reason"]


def _rungs(spec: StudySpec, decisions: pd.DataFrame) -> tuple[int, ...]:
    """The rungs the policy has by its settings, and any the log holds beside them (an earlier policy's), ascending.

    Rungs need not fall on whole epochs; a trial is compared in the first epoch that reaches one.
    """
    planned = (
        Policy(spec.policy, spec.epochs).rungs
        if spec.kind == "search" and spec.policy.halving
        else []
    )
    met = [float(rung) for rung in decisions["rung"].dropna().unique()]
    return tuple(sorted({math.ceil(rung) for rung in [*planned, *met]}))


# Files and words -------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file of a study in the order of the file; none when it does not exist.

    For those who replay rows. An unfinished last line is left out; NaN is None. Raises StudyDamageError naming each
    line that is not a row, and in epochs.jsonl each that is not one of a trial's epoch, or is there twice.
    """
    damage: list[str] = []
    content = _whole_lines(path, [])
    rows = (
        _read_epochs_by_line(path, content, damage)
        if path.name == "epochs.jsonl"
        else [row for _, row in _json_lines(path, content, damage)]
    )
    if damage:
        raise StudyDamageError(damage)
    return rows


def read_record(path: Path) -> dict[str, Any]:
    """Return a trial's trial.json. Raises StudyDamageError when it is unreadable or does not hold what it must."""
    damage: list[str] = []
    record = _read_object(path, damage)
    problem = _record_problem(path.parent.name, record) if record is not None else None
    if record is None or problem:
        raise StudyDamageError(damage or [f"{path}: {problem}"])
    return record


def _write(study: Study, folder: Path, kind: Literal["csv", "parquet"]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in (
        ("trials", study.trials),
        ("epochs", study.epochs),
        ("decisions", study.decisions),
    ):
        path = folder / f"{name}.{kind}"
        with replacing(path) as temporary:
            if kind == "csv":
                table.to_csv(temporary, index=False)
            else:
                table.to_parquet(temporary, index=False)
        paths.append(path)
    return paths


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same study twice: {', '.join(map(str, paths))}")
