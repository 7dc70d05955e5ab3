"""Learning curves to replay: read from studies and from files, or generated with known truth.

**Curve files** are tables, CSV, Parquet or JSON lines (`.csv`, `.parquet`, `.jsonl`), a row a trial and epoch:

- `epoch` (1, 2, ...) and `val_auc` (empty, null or NaN where it is not finite) are required;
- `trial` names the run; without it a file is one run, named like the file;
- `config.<hyperparameter>`: the run's config, the same value in all of its rows; none means that it is not known;
- any further column of a study's epochs.jsonl (`val_auc_raw`, `val_auc_low`, `val_positive`, `train_loss`, `drw_active`,
  `epoch_s`, ...) is used where it is there.

**Generated curves** are not drawn, they are scored: each epoch of each run ranks the same validation volumes by a score
with the binormal AUC that the run has in truth, so that noise has the size, the skew and the ties to class counts that a
real AUC has. Errors go together over runs (a hard volume is hard for all), more so over the epochs of a run, and most over
epochs of averaged weights. What shares there are follows two things measured on real runs with 23 positive and 75 negative
volumes: raw AUCs five epochs apart differ by some .05, averaged ones by some .02.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd

from trainables.checkpoints import without_nonfinite
from trainables.data.json_files import read_json
from trainables.errors import ProblemsError
from tune_app.study.files import StudyFiles
from tune_app.study.rows import json_lines, whole_lines

Kind = Literal[
    "healthy",
    "dipping",
    "noisy",
    "late_bloomer",
    "saturating",
    "lagging",
    "never_learning",
    "collapsing_average",
    "collapsing_after_drw",
    "collapsing",
    "diverging",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

COLLAPSING: frozenset[Kind] = frozenset(
    {"collapsing_average", "collapsing_after_drw", "collapsing", "diverging"}
)
"""Kinds that lose the performance they had reached and should be stopped."""

SOUND: frozenset[Kind] = frozenset({"healthy", "dipping"})
"""Kinds with nothing wrong: a rule for collapses that ends one has made a mistake, whatever halving makes of it."""


Floats = npt.NDArray[np.float64]


class CurveError(ProblemsError):
    """Curves that cannot be replayed; `problems` holds one line a violation, all of them."""


@dataclass(frozen=True)
class Truth:
    """The truth about a generated run, at which its rows only hint."""

    kind: Kind
    onset: int | None
    """First epoch at which the deployed network has lost a tenth of all it will lose (or is not finite); None if it
    does not collapse."""
    auc: tuple[float, ...]
    """AUC of the deployed network by epoch, without noise; NaN where it is not finite."""

    @property
    def collapsing(self) -> bool:
        return self.kind in COLLAPSING


@dataclass(frozen=True)
class Curve:
    """One run's rows, in the order of its epochs."""

    trial: str
    rows: list[dict[str, Any]]
    config: Mapping[str, Any] | None = None
    """Its hyperparameters or those that differ from the defaults; None when they are not known."""
    truth: Truth | None = None
    """Known for generated curves only."""


# Reading ---------------------------------------------------------------------------------------------------------------


def read_curves(path: Path) -> list[Curve]:
    """Return the curves of a study's folder, of a folder of curve files, or of one curve file, ordered by trial.

    Raises CurveError with every problem found: missing or unreadable files, epochs below 1 or twice, two configs for
    one trial.
    """
    if path.is_file():
        return _from_table(path, alone=True)
    if (path / "epochs.jsonl").is_file():
        return _from_study(path)
    files = (
        sorted(file for file in path.glob("*") if file.suffix in READERS) if path.is_dir() else []
    )
    if not files:
        raise CurveError(
            f"{path}: no curves here: name a study's folder, or {', '.join(READERS)} files or a folder of them"
        )
    curves: list[Curve] = []
    problems: list[str] = []
    for file in files:
        try:
            curves += _from_table(file, alone=len(files) == 1)
        except CurveError as error:
            problems += error.problems
    if problems:
        raise CurveError(problems)
    return curves


def _from_study(folder: Path) -> list[Curve]:
    files = StudyFiles(folder)
    problems: list[str] = []
    by_trial: dict[str, list[dict[str, Any]]] = {}
    for number, row in json_lines(files.epochs, whole_lines(files.epochs, []), problems):
        if "trial" not in row or "epoch" not in row:
            problems.append(
                f"{files.epochs}:{number}: a row needs trial and epoch, this one has {sorted(row)}"
            )
        else:
            by_trial.setdefault(str(row["trial"]), []).append(row)
    curves = []
    for trial, rows in sorted(by_trial.items()):
        config = None
        source = files.trial(trial).config
        if source.is_file():
            try:
                config = read_json(source)
            except (OSError, ValueError) as error:
                problems.append(f"{source}: damaged: {error}")
        first_of = {
            int(row["epoch"]): row for row in reversed(rows)
        }  # the first report of an epoch is the one decided on
        curves.append(Curve(trial, [first_of[epoch] for epoch in sorted(first_of)], config))
    if problems:
        raise CurveError(problems)
    return curves


def _from_table(path: Path, *, alone: bool) -> list[Curve]:
    try:
        table = READERS[_kind(path)](path)
    except (OSError, ValueError) as error:
        raise CurveError(f"{path}: cannot be read: {error}") from None
    missing = [name for name in ("epoch", "val_auc") if name not in table.columns]
    if missing:
        raise CurveError(
            [
                f"{path}: column {name!r} is missing; there are {', '.join(map(str, table.columns))}"
                for name in missing
            ]
        )
    problems = list(_bad_cells(path, table))
    if problems:
        raise CurveError(problems)
    scores = pd.to_numeric(table["val_auc"], errors="coerce")
    table = table.assign(epoch=pd.to_numeric(table["epoch"]).astype(int), val_auc=scores)
    if "trial" not in table.columns:
        table, prefix = table.assign(trial=path.stem), ""
    else:
        prefix = "" if alone else f"{path.stem}/"
    curves = []
    for trial, part in table.groupby(table["trial"].astype(str), sort=True):
        for epoch in sorted(set(part["epoch"][part["epoch"].duplicated()])):
            problems.append(f"{path}: trial {trial} has epoch {epoch} twice; keep one row")
        records = [without_nonfinite(row) for row in part.sort_values("epoch").to_dict("records")]
        config: dict[str, Any] = {}
        for column in (str(name) for name in part.columns if str(name).startswith("config.")):
            values = {json.dumps(record.get(column), default=str) for record in records}
            if len(values) > 1:
                problems.append(
                    f"{path}: trial {trial} has {len(values)} values of {column}; a run has one config"
                )
            if records[0].get(column) is not None:
                config[column.removeprefix("config.")] = records[0][column]
        rows = [
            {name: value for name, value in record.items() if not name.startswith("config.")}
            for record in records
        ]
        curves.append(Curve(f"{prefix}{trial}", rows, config or None))
    if problems:
        raise CurveError(problems)
    return curves


def _bad_cells(path: Path, table: pd.DataFrame) -> Iterator[str]:
    """Epochs and scores that are none, by row."""
    epochs = pd.to_numeric(table["epoch"], errors="coerce")
    for number in table.index[~((epochs >= 1) & (epochs % 1 == 0))]:
        yield (
            f"{path} row {number + 1}: epoch {table.at[number, 'epoch']!r} must be a whole number from 1 on"
        )
    scores = pd.to_numeric(table["val_auc"], errors="coerce")
    given = table["val_auc"].notna() & ~table["val_auc"].astype(str).str.strip().str.lower().isin(
        ["nan", ""]
    )
    for number in table.index[(scores.isna() & given) | (scores.abs() > 1)]:
        yield (
            f"{path} row {number + 1}: val_auc {table.at[number, 'val_auc']!r} must be a number from 0 to 1, or empty"
        )


def _read_json_lines(path: Path) -> pd.DataFrame:
    problems: list[str] = []
    rows = [row for _, row in json_lines(path, path.read_bytes().rstrip() + b"\n", problems)]
    if problems:
        raise ValueError("; ".join(problems))
    return pd.DataFrame(rows)


def _kind(path: Path) -> str:
    """Return the format of a curve file as a suffix, by its content whatever its name, as for tables. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"PAR1"):
        return ".parquet"
    return ".jsonl" if head.startswith(b"{") else ".csv"


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, dtype={"trial": str}),  # 00007 is a name, not a number
    ".parquet": pd.read_parquet,
    ".jsonl": _read_json_lines,
}
