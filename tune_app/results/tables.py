"""Dataframe of trials -> the rows and columns asked for, and text of them that fits a terminal or a page.

Requests come from command lines and web forms: conditions are parsed, never executed, and output is
stripped of anything a terminal would obey.
"""

import fnmatch
import re
from collections.abc import Sequence

import pandas as pd
from rich.table import Table
from rich.text import Text

from trainables.diagnosis import WITHOUT_FAULT
from tune_app.results.query import QueryError, column_of, require_column, select
from tune_app.results.text import formatted

MAIN_COLUMNS = (
    "trial",
    "variant",
    "state",
    "verdict",
    "since_epoch",
    "healed_epochs",
    "objective",
    "best_val_auc",
    "best_val_auc_low",
    "best_val_auc_high",
    "best_epoch",
    "epochs_run",
    "work_s",
)
"""Columns shown of each trial before its hyperparameters, unless other columns are asked for."""


def main_columns(
    trials: pd.DataFrame, searched: Sequence[str], variants: Sequence[str] = ()
) -> list[str]:
    """Return the columns of the narrow table of trials: `MAIN_COLUMNS`, `variants` and the searched hyperparameters."""
    first = ["study"] if "study" in trials.columns else []
    return list(dict.fromkeys([*first, *MAIN_COLUMNS, *variants, *searched]))


def results_table(
    trials: pd.DataFrame,
    searched: Sequence[str],
    *,
    columns: str | Sequence[str] | None = None,
    sort: str | Sequence[str] = ("-objective", "number"),
    where: str | Sequence[str] = (),
    limit: int | None = None,
) -> pd.DataFrame:
    """Return the trials as `medtune results` shows them: the columns that distinguish the trials.

    `searched` are the hyperparameters that distinguish them.
    `columns` are names, bare metrics, or patterns (`best_val_auc*`); "all" is all. `sort` holds names, with a leading
    minus for the largest first; missing values come last. An empty `sort` keeps the order of `trials`. `where` as in `select`. Raises QueryError.
    """
    table = select(trials, where)
    for key in reversed(_parts(sort)):  # stable sorts from the last key to the first
        column = column_of(table, key.removeprefix("-"))
        table = table.sort_values(
            column, ascending=not key.startswith("-"), kind="stable", na_position="last"
        )
    chosen = _chosen_columns(table, searched, columns)
    return table[chosen].iloc[:limit].reset_index(drop=True)


def came_back(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Return which trials spent epochs in a collapse that healed, which their verdicts no longer show."""
    return (trials["healed_epochs"] > 0).fillna(False).astype(bool)


def faulty(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Return which trials have a verdict that names a fault."""
    verdicts = trials["verdict"]
    return (verdicts.notna() & ~verdicts.isin(WITHOUT_FAULT)).astype(bool)


def _chosen_columns(
    table: pd.DataFrame, searched: Sequence[str], columns: str | Sequence[str] | None
) -> list[str]:
    if columns is None:
        return _telling_columns(table, searched)
    chosen: list[str] = []
    for name in _parts(columns):
        if name == "all":
            chosen.extend(table.columns)  # += would add element by element
        elif any(sign in name for sign in "*?["):
            matching = fnmatch.filter(table.columns, name)
            if not matching:
                raise QueryError(f"no column matches {name!r}; `--columns all` shows them all")
            chosen += matching
        else:
            chosen.append(column_of(table, name))
    return list(dict.fromkeys(chosen))


def _telling_columns(table: pd.DataFrame, searched: Sequence[str]) -> list[str]:
    """The columns of the narrow table without those that are empty; variants stand for the hyperparameters they set."""
    names = main_columns(table, () if table["variant"].notna().any() else searched)
    empty = [name for name in ("variant", "verdict", "since_epoch") if table[name].isna().all()]
    empty += [] if came_back(table).any() else ["healed_epochs"]
    return [name for name in names if name not in empty]


def _parts(asked: str | Sequence[str]) -> list[str]:
    """The names in one text or in several, each of which may hold several between commas."""
    texts = [asked] if isinstance(asked, str) else asked
    return [name for text in texts for part in text.split(",") if (name := part.strip())]


def matching(meanings: pd.DataFrame, columns: str | Sequence[str] | None) -> pd.DataFrame:
    """Return the rows of `column_meanings` whose column is named, or fits a pattern; all without any. Raises QueryError."""
    names = _parts(columns or ())
    if not names or "all" in names:
        return meanings
    for name in names:
        if not fnmatch.filter(meanings["column"], name):
            require_column(name, meanings["column"])
    fits = meanings["column"].map(
        lambda column: any(fnmatch.fnmatchcase(column, name) for name in names)
    )
    return meanings[fits.astype(bool)].reset_index(drop=True)


# Text ------------------------------------------------------------------------------------------------------------------


def plain_table(*headings: str, text: Sequence[str] = ()) -> Table:
    """Return an empty Rich table without lines, two blanks between columns: the look of every table of ours.

    Columns are numbers, to the right, except those of the headings in `text`.
    """
    table = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", collapse_padding=True
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in text else "right")
    return table


def meanings_table(meanings: pd.DataFrame) -> Table:
    """Return the rows of `column_meanings` as a Rich table; names are never cut, meanings wrap."""
    rendered = plain_table()
    for heading in ("column", "type", "meaning"):
        rendered.add_column(heading, no_wrap=heading != "meaning")
    for table, rows in meanings.groupby("table", sort=False):
        rendered.add_row(Text(f"{table}:", style="bold"))
        for row in rows.to_dict("records"):
            rendered.add_row(
                Text(f"  {row['column']}"), Text(row["dtype"].split("[")[0]), Text(row["meaning"])
            )
    return rendered


NAMED_AT_MOST = 20
"""Columns that a table without room for them names."""


def render_table(table: pd.DataFrame, width: int = 80) -> Table:
    """Return a Rich table of trials no wider than `width` characters, from the columns of `results_table`.

    AUC and the ends of its interval share a column, so do verdict and its epoch, best epoch and epochs run. What does
    not fit is left out from the right and named below the table.
    """
    columns = _merged(table)
    rendered = plain_table()
    shown: list[list[str]] = []
    left_out: list[str] = []
    room = width
    for position, (names, name, cells, right) in enumerate(columns):
        longest = min(max(map(len, cells), default=0), 40)
        head = _broken_name(name, max(longest, 6))
        need = max(longest, *map(len, head)) + (2 if shown else 0)
        if need > room and position > 0:
            left_out += names
            continue
        room -= need
        shown.append(cells)
        rendered.add_column(
            Text("\n".join(head)),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
            vertical="bottom",
        )
    for row in zip(*shown, strict=True):
        rendered.add_row(*map(Text, row))
    if left_out:
        named, more = left_out[:NAMED_AT_MOST], len(left_out) - NAMED_AT_MOST
        rest = f" and {more} more (`--meanings` names them)" if more > 0 else ""
        rendered.caption = Text(
            f"not shown: {', '.join(named)}{rest} (--columns NAME,..., or --format csv)"
        )
        rendered.caption_justify = "left"
    return rendered


def _merged(table: pd.DataFrame) -> list[tuple[list[str], str, list[str], bool]]:
    """Names, heading, cells, whether numbers; columns that belong together as one."""
    text = formatted(table)
    merged: list[tuple[list[str], str, list[str], bool]] = []
    done: set[str] = set()
    for name in map(str, table.columns):
        if name in done:
            continue
        alone = "scale s" if name == "s" else name  # a lone s reads as seconds
        others, heading = _TOGETHER.get(name, ((), alone))
        if not set(others) <= set(table.columns):
            others, heading = (), alone
        done |= set(others)
        parts = [text[part].tolist() for part in (name, *others)]
        cells = [
            _joined(name, values) if others else values[0] for values in zip(*parts, strict=True)
        ]
        right = pd.api.types.is_numeric_dtype(table[name].dtype) and table[name].dtype != "boolean"
        merged.append(([name, *others], heading, cells, bool(right)))
    return merged


_TOGETHER: dict[str, tuple[tuple[str, ...], str]] = {
    "verdict": (("since_epoch",), "verdict (since)"),
    "best_val_auc": (("best_val_auc_low", "best_val_auc_high"), "AUC [95 % CI]"),
    "best_epoch": (("epochs_run",), "epoch best/run"),
}
"""Column -> those that join it, and the heading they share."""


def _joined(name: str, values: tuple[str, ...]) -> str:
    if name == "best_epoch":
        return "/".join(values)
    if "-" in values[1:]:
        return values[0]
    return (
        f"{values[0]} [{values[1]}, {values[2]}]"
        if name == "best_val_auc"
        else f"{values[0]} ({values[1]})"
    )


def _broken_name(name: str, width: int) -> list[str]:
    """A heading in lines of about `width`, broken at blanks, or before underscores so that the name stays readable."""
    lines = [""]
    for piece in re.split(r"(?<= )|(?=_)|(?<=/)", name):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return [line.strip() for line in lines]
