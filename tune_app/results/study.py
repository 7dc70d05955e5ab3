"""A study's folder -> dataframes: one row a trial, one row a trial and epoch, one row a decision. No torch, no Ray.

Everything is computed from the files of the study alone, so it works on a laptop, while the study runs, and after its
driver was killed. Names of columns:

* a hyperparameter has its own name (`backbone_lr`), as in FineTuneConfig;
* a metric has its own name in `.epochs` (`val_auc`), and three places in `.trials_full`: `last_val_auc` in the trial's last
  epoch, `best_val_auc` in the epoch whose weights are kept (the best 3-epoch median of val_auc: one lucky epoch does
  not count), and `val_auc_at_4` at the rung in epoch 4. There is no plain `val_auc` there: which of the three
  would be a guess. Where a name is typed (filters, sorting), a bare metric means its `best_` column.
* `column_meanings(study)`, or `medtune results STUDY --meanings`, lists every column with its type and meaning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from search_spaces.space import Space
from trainables.checkpoints import replacing
from trainables.config import FineTuneConfig
from trainables.data.visible import is_unicode, visible
from tune_app.results.effects import effects
from tune_app.results.importance import Axis, axis_of, importance
from tune_app.results.query import column_of, require_column, select, smaller_is_better
from tune_app.results.tables import main_columns, results_table
from tune_app.results.text import formatted
from tune_app.results.ties import ranking
from tune_app.study.files import StudyFiles
from tune_app.study.rows import (
    STATES,
    read_record,
)
from tune_app.study.spec import StudySpec


@dataclass(frozen=True, eq=False)
class Study:
    """A study as dataframes. Build it with `load_study`; load again to see new rows."""

    path: Path
    spec: StudySpec
    info: Mapping[str, Any]
    """study.json: spec, versions, hardware, fingerprint of the data."""
    trials_full: pd.DataFrame = field(repr=False)
    """One row per trial, by number, with every column: `column_meanings`."""
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
    """Remarks about the files: an unfinished last line, parts that were skipped as damaged."""
    url: str | None = None
    """Where in object storage it is, when `path` is a copy of that."""
    damage: tuple[str, ...] = ()
    """Those of the notes that report damage: lines and files that were skipped, epochs that are missing."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def trials(self) -> pd.DataFrame:
        """One row per trial, by number: state, verdict, objective, AUC with interval, epochs, searched hyperparameters.

        `trials_full` has all columns. Studies with planned trials have `fold` and `seed` here, too.
        """
        planned = ("fold", "seed") if self.spec.kind != "search" else ()
        return self.trials_full[main_columns(self.trials_full, self.searched, planned)].copy()

    @property
    def place(self) -> str:
        """The argument by which a command names the study: its folder or URL."""
        return self.url or str(self.path)

    @property
    def scored(self) -> bool:
        """Whether any trial that has not failed has an objective, so that there is a best one."""
        return bool(
            self.trials_full.loc[self.trials_full["state"] != "failed", "objective"].notna().any()
        )

    @cached_property
    def space(self) -> Space | None:
        """The search space; None for a study that is no search."""
        return self.spec.resolved_space() if self.spec.kind == "search" else None

    def axis(self, name: str) -> Axis:
        """Return the axis of a hyperparameter: scale and range of the search space, or of the trials' values."""
        return axis_of(self.trials_full[name], self.space, self.spec.epochs)

    def best(self, metric: str = "objective", where: str | Sequence[str] = ()) -> pd.Series:
        """Return the row of the best trial by `metric` among those `where` lets through (failed ones never).

        `metric` is a column of `.trials_full`, or a metric, which means its `best_` column. Losses, errors and times are
        best when small. `ranking` decides between equal ones. Raises ValueError when no trial has a value.
        """
        rows = select(self.trials_full, where)
        column = column_of(rows, metric)
        rows = rows[(rows["state"] != "failed") & rows[column].notna()]
        if rows.empty:
            raise ValueError(
                f"{self.path}: no trial has a value of {column} yet{' that passes the filter' if where else ''}"
            )
        axes = map(self.axis, self.searched)
        return rows.iloc[ranking(rows, column, axes, smaller=smaller_is_better(column))[0]]

    @cached_property
    def ranked(self) -> pd.DataFrame:
        """`.trials_full` from best to worst objective, as tables list them: the first that has not failed is `best()`."""
        failed = self.trials_full["state"] == "failed"
        parts = [
            part.iloc[ranking(part, "objective", map(self.axis, self.searched), smaller=False)]
            for part in (self.trials_full[~failed], self.trials_full[failed])
        ]
        return (
            pd.concat([part for part in parts if len(part)])
            if len(self.trials_full)
            else self.trials_full
        )

    @property
    def exportable(self) -> pd.DataFrame:
        """The rows of `.ranked` that have kept weights and an objective."""
        return self.ranked[
            self.ranked["best_checkpoint"].notna() & self.ranked["objective"].notna()
        ]

    def leaderboard(
        self,
        n: int | None = 10,
        where: str | Sequence[str] = (),
        columns: str | Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Return the best `n` trials by objective: rank, AUC with interval, epochs, verdict, searched hyperparameters.

        `columns`: names, bare metrics or patterns (`best_val_*`) to show instead; "all" for all.
        """
        table = results_table(
            self.ranked, self.searched, sort=(), where=where, limit=n, columns=columns
        )
        table.insert(0, "rank", np.arange(1, len(table) + 1))
        return table

    def record(self, trial: str) -> dict[str, Any]:
        """Return the driver's record of the trial (trial.json); `overrides` is in it. Raises StudyDamageError."""
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
        about = select(self.trials_full, where)[["trial", "variant", "state", "verdict"]]
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
        over `repeats` random forests, and do not reflect how few trials there are. `.attrs["how"]` states all this in
        a sentence with the numbers. Raises ValueError with fewer than four trials or nothing that varies.
        """
        axes = {name: self.axis(name) for name in self.searched}
        return importance(
            self.trials_full, axes, metric, evaluator=evaluator, repeats=repeats, seed=seed
        )

    def effects(self, metric: str = "objective", *, baseline: str | None = None) -> pd.DataFrame:
        """Return what each variant changes against `baseline`, from differences paired over (seed, fold).

        Columns: variant, pairs, mean (of the differences), low and high (95 %), p, p_holm (adjusted for the number of
        variants), value and baseline_value (means over the pairs), runs, collapsed, healed (collapsed for a time, and
        came back), failed and unscored (ended and in no pair) of them, verdicts, call (better, worse, cannot tell). Over several folds the interval is
        Student's t on the differences of the folds, each the mean of its seeds, their variance raised by
        1 / (num_folds - 1) because the training parts of folds overlap (Nadeau and Bengio 2003, eq. 9; Bouckaert and
        Frank 2004). With one fold it is Student's t on the seeds, of that fold only, and there is no p and no call: seeds
        share the fold's volumes. `call` goes by the interval, and is the last of these when it holds zero, or where there is none:
        of one pair, or of differences that are all the same. A variant of which a run ended without a finite score is not
        called better: the others are its survivors. Raises ValueError without variants.
        """
        return effects(self.trials_full, metric, baseline)

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
        if len(self.trials_full):
            parts.append(
                formatted(self.leaderboard(10)).to_html(
                    index=False, escape=True, border=0, na_rep=""
                )
            )
        return "\n".join(parts)

    def sentence(self) -> str:
        """Return kind, trials by state, epochs and the best objective in a line."""
        states = self.trials_full["state"].value_counts()
        told = (
            ", ".join(f"{states[state]} {state}" for state in STATES if state in states)
            or "none yet"
        )
        best = self.trials_full.loc[self.trials_full["state"] != "failed", "objective"].max()
        value = "" if pd.isna(best) else f", best {self.spec.objective} {best:.3f}"
        now = "running" if self.running else self.spec.kind
        return f"{now}, trials {told}, {len(self.epochs)} epochs{value}"


@dataclass(frozen=True, repr=False)
class Studies:
    """Several studies, one below the other; each dataframe begins with the column `study`."""

    studies: tuple[Study, ...]
    trials_full: pd.DataFrame = field(repr=False)
    epochs: pd.DataFrame = field(repr=False)
    decisions: pd.DataFrame = field(repr=False)

    @property
    def trials(self) -> pd.DataFrame:
        """The trials of all studies with the columns that `Study.trials` has; `trials_full` has all columns."""
        return self.trials_full[main_columns(self.trials_full, self.searched)].copy()

    @property
    def searched(self) -> tuple[str, ...]:
        """Hyperparameters searched in any of them, in column order."""
        found = {name for study in self.studies for name in study.searched}
        return tuple(name for name in FineTuneConfig.model_fields if name in found)

    def __repr__(self) -> str:
        told = "; ".join(f"{study.name}: {study.sentence()}" for study in self.studies)
        return f"<Studies: {len(self.trials_full)} trials, {len(self.epochs)} epochs; {told}>"

    def _repr_html_(self) -> str:
        table = formatted(results_table(self.trials_full, self.searched, limit=10))
        return f"<p>{escape(repr(self)[1:-1])}</p>\n{table.to_html(index=False, escape=True, border=0, na_rep='')}"


# Files and words -------------------------------------------------------------------------------------------------------


def writable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with bytes that are not UTF-8 written out in its texts, which Arrow cannot hold otherwise."""
    return table.assign(
        **{
            str(name): column.map(lambda text: visible(text, keep="\n\t"), na_action="ignore")
            for name, column in table.items()
            if isinstance(column.dtype, pd.StringDtype)
            and not all(map(is_unicode, column.dropna()))
        }
    )


def _write(study: Study, folder: Path, kind: Literal["csv", "parquet"]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in (
        ("trials", study.trials_full),
        ("epochs", study.epochs),
        ("decisions", study.decisions),
    ):
        path = folder / f"{name}.{kind}"
        with replacing(path) as temporary:
            if kind == "csv":
                table.to_csv(temporary, index=False, errors="backslashreplace")
            else:
                with temporary.open("wb") as file:  # Arrow takes no name that is not UTF-8
                    writable(table).to_parquet(file, index=False)
        paths.append(path)
    return paths
