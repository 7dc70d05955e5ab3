"""Dataframe of trials -> the rows and columns asked for, and text of them that fits a terminal or a page.

What is asked for comes from command lines and web forms: conditions are parsed, never executed, and what is shown is
stripped of anything a terminal would obey.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from tune_app.results.study import Studies, Study

SMALLER_IS_BETTER = (
    "loss",
    "brier",
    "ece",
    "tied",
    "nonfinite",
    "grad_norm",
    "_s",
    "memory",
    "skipped",
    "failures",
)


class QueryError(ValueError):
    """A filter, column or sort order that cannot be understood."""


def column_of(table: pd.DataFrame, name: str) -> str:
    """Return the column that `name` means: itself, or the `best_` column of a metric. Raises QueryError with a guess."""
    name = name.strip()
    if name in table.columns:
        return name
    if f"best_{name}" in table.columns:
        return f"best_{name}"
    require_column(name, table.columns)
    raise AssertionError(name)


def require_column(name: str, columns: Iterable[str]) -> None:
    """Raise QueryError, with the nearest names, unless `name` is one of `columns`."""
    known = list(dict.fromkeys(columns))
    if name in known:
        return
    bare = [column.removeprefix("best_") for column in known if column.startswith("best_")]
    guesses = get_close_matches(name, [*bare, *known], n=2, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(map(repr, guesses))}?"
        if guesses
        else "`--columns all` shows them all"
    )
    raise QueryError(f"unknown column {name!r}; {hint}")


def smaller_is_better(column: str) -> bool:
    """Whether a small value of `column` is a good one: losses, errors, times, memory."""
    return any(column.endswith(end) or f"{end}_" in column for end in SMALLER_IS_BETTER)


def select(table: pd.DataFrame, where: str | Sequence[str] = ()) -> pd.DataFrame:
    """Return the rows of `table` that every condition lets through. Nothing in a condition is executed.

    Conditions: `val_auc > 0.8`, `0.7 < val_auc < 0.9`, `state == stopped`, `verdict ~ collapsed` (contains),
    `val_auc_raw > val_auc_ema`, `not (head == linear or s > 20)`, `error != none`. Text needs quotes only when it
    holds blanks or signs or is a column's name. What is missing passes `== none` and no other comparison.

    Raises QueryError saying what was not understood, and where.
    """
    for condition in [where] if isinstance(where, str) else where:
        if condition.strip():
            table = table[_Condition(table, condition).mask()]
    return table


_TOKEN = re.compile(r"""\s*(?:(<=|>=|==|!=|[<>=~(),])|"([^"]*)"|'([^']*)'|([^\s<>=!~(),'"]+))""")
_OPERATORS = ("<", "<=", ">", ">=", "==", "=", "!=", "~")


class _Condition:
    """Recursive descent over one condition: or, and, not, comparisons. Small enough to be safe by reading it."""

    def __init__(self, table: pd.DataFrame, text: str) -> None:
        self.table, self.text = table, text
        self.tokens: list[tuple[str, str]] = []  # ("sign" | "text" | "word" | "end", what)
        place = 0
        if len(text) > 2000:
            raise QueryError(f"condition of {len(text)} characters, at most 2000 are read")
        while text[place:].strip():
            match = _TOKEN.match(text, place)
            if match is None:
                raise QueryError(
                    f"condition {text!r}: {text[place:].strip()[:20]!r} cannot be read"
                )
            sign, double, single, word = match.groups()
            if sign is not None:
                self.tokens.append(("sign", sign))
            elif word is not None:
                self.tokens.append(("word", word))
            else:
                self.tokens.append(("text", double if double is not None else single))
            place = match.end()
        if sum(token == ("sign", "(") for token in self.tokens) > 50:
            raise QueryError(f"condition {text[:40]!r}...: more than 50 parentheses")
        self.tokens.append(("end", "its end"))
        self.at = 0

    def mask(self) -> pd.Series:
        found = self._either()
        if self.tokens[self.at][0] != "end":
            raise self._unexpected("and, or, or the end")
        return found

    def _next(self, *wanted: tuple[str, str]) -> bool:
        kind, what = self.tokens[self.at]
        if (kind, what.lower()) in wanted:
            self.at += 1
            return True
        return False

    def _unexpected(self, expected: str) -> QueryError:
        return QueryError(
            f"condition {self.text!r}: {expected} expected, found {self.tokens[self.at][1]!r}"
        )

    def _either(self) -> pd.Series:
        found = self._both()
        while self._next(("word", "or")):
            found = found | self._both()
        return found

    def _both(self) -> pd.Series:
        found = self._maybe_not()
        while self._next(("word", "and"), ("sign", ",")):
            found = found & self._maybe_not()
        return found

    def _maybe_not(self) -> pd.Series:
        negated = False
        while self._next(("word", "not")):
            negated = not negated
        if self._next(("sign", "(")):
            found = self._either()
            if not self._next(("sign", ")")):
                raise self._unexpected(")")
        else:
            found = self._comparison()
        return ~found if negated else found

    def _comparison(self) -> pd.Series:
        left = self._operand()
        found = pd.Series(True, index=self.table.index)
        compared = False
        while self.tokens[self.at][0] == "sign" and self.tokens[self.at][1] in _OPERATORS:
            sign = self.tokens[self.at][1]
            self.at += 1
            right = self._operand()
            found &= self._compare(left, "==" if sign == "=" else sign, right)
            left, compared = right, True
        if not compared:
            column = left[1]
            if left[0] == "column" and self.table[column].dtype == "boolean":
                return self.table[column].fillna(False).astype(bool)  # `drw_active` by itself
            raise self._unexpected(f"one of {' '.join(_OPERATORS)}")
        return found

    def _operand(self) -> tuple[str, str]:
        kind, what = self.tokens[self.at]
        if kind not in ("word", "text") or (
            kind == "word" and what.lower() in ("and", "or", "not")
        ):
            raise self._unexpected("a column or a value")
        self.at += 1
        if kind == "word":
            for name in (what, f"best_{what}"):
                if name in self.table.columns:
                    return "column", name
        return kind, what

    def _compare(self, left: tuple[str, str], sign: str, right: tuple[str, str]) -> pd.Series:
        if left[0] != "column":
            if right[0] != "column":
                require_column(left[1], self.table.columns)
            turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
            left, sign, right = right, turned.get(sign, sign), left
        column = self.table[left[1]]
        if (
            right[0] == "word"
            and right[1].lower() in ("none", "null", "missing")
            and sign in ("==", "!=")
        ):
            return column.isna() if sign == "==" else column.notna()
        other = (
            self.table[right[1]] if right[0] == "column" else self._value(left[1], column, right[1])
        )
        if sign == "~":
            return (
                column.astype("string")
                .str.contains(str(right[1]), case=False, regex=False)
                .fillna(False)
                .astype(bool)
            )
        compare: dict[str, Callable[[Any, Any], Any]] = {
            "<": lambda a, b: a < b,
            "<=": lambda a, b: a <= b,
            ">": lambda a, b: a > b,
            ">=": lambda a, b: a >= b,
            "==": lambda a, b: a == b,
            "!=": lambda a, b: a != b,
        }
        try:
            result = compare[sign](column, other)
        except TypeError:
            raise QueryError(
                f"condition {self.text!r}: {left[1]} and {right[1]} do not compare"
            ) from None
        missing = column.isna() | (other.isna() if isinstance(other, pd.Series) else False)
        found: pd.Series = result.fillna(False).astype(bool) & ~missing
        return found

    def _value(self, name: str, column: pd.Series, text: str) -> Any:
        """`text` as the column's type, so that 00007 is a trial's id beside `trial` and a number beside `number`."""
        wanted = "a number"
        try:
            if column.dtype == "boolean":
                wanted = "true or false"
                return {
                    "true": True,
                    "yes": True,
                    "1": True,
                    "false": False,
                    "no": False,
                    "0": False,
                }[text.lower()]
            if isinstance(column.dtype, pd.DatetimeTZDtype):
                wanted = "a time like 2026-01-31T12:00"
                moment = pd.Timestamp(text)
                return moment.tz_localize("UTC") if moment.tzinfo is None else moment
            if pd.api.types.is_numeric_dtype(column.dtype):
                return float(text)
        except (KeyError, ValueError):
            raise QueryError(
                f"condition {self.text!r}: {name} is compared with {text!r}, must be {wanted}"
            ) from None
        return text


def results_table(
    study: "Study | Studies",
    *,
    columns: str | Sequence[str] | None = None,
    sort: str | Sequence[str] = ("-objective", "number"),
    where: str | Sequence[str] = (),
    limit: int | None = None,
) -> pd.DataFrame:
    """Return the trials as `medtune results` shows them: best first, the columns that tell the trials apart.

    `columns` are names, bare metrics, or patterns (`best_val_auc*`); "all" is all. `sort` holds names, with a leading
    minus for the largest first; missing values come last. `where` as in `select`. Raises QueryError.
    """
    table = select(study.trials, where)
    keys = [sort] if isinstance(sort, str) else list(sort)
    keys = [key.strip() for key in keys for key in key.split(",") if key.strip()]
    for key in reversed(keys):  # stable sorts from the last key to the first
        column = column_of(table, key.removeprefix("-"))
        table = table.sort_values(
            column, ascending=not key.startswith("-"), kind="stable", na_position="last"
        )
    chosen = _chosen_columns(study, table, columns)
    return table[chosen].iloc[:limit].reset_index(drop=True)


def came_back(trials: pd.DataFrame) -> "pd.Series[bool]":
    """Return which trials spent epochs in a collapse that healed, of which their verdicts no longer tell."""
    return (trials["healed_epochs"] > 0).fillna(False).astype(bool)


def _chosen_columns(
    study: "Study | Studies", table: pd.DataFrame, columns: str | Sequence[str] | None
) -> list[str]:
    from tune_app.results.study import Studies

    if columns is None:
        names = [
            "trial",
            "variant",
            "state",
            "verdict",
            "since_epoch",
            "healed_epochs",
            "objective",
        ]
        names += [
            "best_val_auc",
            "best_val_auc_low",
            "best_val_auc_high",
            "best_epoch",
            "epochs_run",
            "work_s",
        ]
        names = ["study", *names] if isinstance(study, Studies) else names
        names += [] if "variant" in names and table["variant"].notna().any() else study.searched
        empty = [name for name in ("variant", "verdict", "since_epoch") if table[name].isna().all()]
        empty += [] if came_back(table).any() else ["healed_epochs"]
        return [name for name in names if name not in empty]
    asked = [columns] if isinstance(columns, str) else list(columns)
    chosen: list[str] = []
    for name in (name.strip() for part in asked for name in part.split(",")):
        if name == "all":
            chosen.extend(table.columns)  # += would add element by element
        elif any(sign in name for sign in "*?["):
            matching = fnmatch.filter(table.columns, name)
            if not matching:
                raise QueryError(f"no column matches {name!r}; `--columns all` shows them all")
            chosen += matching
        elif name:
            chosen.append(column_of(table, name))
    return list(dict.fromkeys(chosen))


def matching(meanings: pd.DataFrame, columns: str | Sequence[str] | None) -> pd.DataFrame:
    """Return the rows of `column_meanings` whose column is named, or fits a pattern; all without any. Raises QueryError."""
    asked = [columns] if isinstance(columns, str) else list(columns or ())
    names = [name.strip() for part in asked for name in part.split(",") if name.strip()]
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


def meanings_table(meanings: pd.DataFrame) -> Table:
    """Return the rows of `column_meanings` as a Rich table; names are never cut, meanings wrap."""
    rendered = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", collapse_padding=True
    )
    for heading in ("column", "type", "meaning"):
        rendered.add_column(heading, no_wrap=heading != "meaning")
    for table, rows in meanings.groupby("table", sort=False):
        rendered.add_row(Text(f"{table}:", style="bold"))
        for row in rows.to_dict("records"):
            rendered.add_row(
                Text(f"  {row['column']}"), Text(row["dtype"].split("[")[0]), Text(row["meaning"])
            )
    return rendered


def formatted(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as text: scores with three decimals, rates as 1e-4, durations in s, min or h, "-" for missing."""
    return pd.DataFrame(
        {
            str(name): [format_value(str(name), value) for value in table[name]]
            for name in table.columns
        },
        dtype="object",
    )


def format_value(column: str, value: Any) -> str:
    """Return one value of `column` as short text without control characters."""
    if (
        value is None
        or value is pd.NA
        or value is pd.NaT
        or (isinstance(value, float) and math.isnan(value))
    ):
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, str):
        return printable(value)
    number = float(value)
    if column.endswith("_lr") or "lr_" in column or column == "weight_decay":
        return compact(number)
    if column.endswith("_s"):
        return duration(number)
    if number == int(number) and not _is_score(column) and abs(number) < 1e15:
        return str(int(number))
    return f"{number:.3f}" if _is_score(column) else f"{number:.4g}"


def _is_score(column: str) -> bool:
    scores = (
        "auc",
        "auprc",
        "accuracy",
        "sensitivity",
        "brier",
        "ece",
        "objective",
        "share",
        "tied",
    )
    return any(score in column for score in scores) and not column.endswith("_epoch")


def compact(number: float) -> str:
    """Return two significant digits, in the form people write rates: 0.0002 -> 2e-4, 0.05 -> 0.05."""
    if number == 0 or 0.01 <= abs(number) < 10_000:
        return f"{number:.3g}"
    mantissa, exponent = f"{number:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Return seconds as `42 s`, `3.5 min`, `2.1 h` or `3.2 d`."""
    if not math.isfinite(seconds):
        return "-"
    for limit, unit, size in ((100, "s", 1), (100 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if abs(seconds) < limit:
            return f"{seconds / size:.{0 if abs(seconds) >= 10 * size else 1}f} {unit}"
    return f"{seconds / 86400:.1f} d"


def printable(text: str) -> str:
    """Return `text` on one line without control characters: an error's text must not recolour or move a terminal."""
    plain = _ESCAPES.sub("", text)
    return "".join(sign for sign in " ".join(plain.split()) if sign.isprintable())


_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[@-Z\\^_]")


NAMED_AT_MOST = 20
"""Columns that a table without room for them names."""


def render_table(table: pd.DataFrame, width: int = 80) -> Table:
    """Return a Rich table of trials no wider than `width` characters, from the columns of `results_table`.

    AUC and the ends of its interval share a column, so do verdict and its epoch, best epoch and epochs run. What does
    not fit is left out from the right and named below the table.
    """
    columns = _merged(table)
    shown: list[tuple[list[str], list[str], bool]] = []
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
        shown.append((head, cells, right))
    rendered = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", collapse_padding=True
    )
    for head, _, right in shown:
        rendered.add_column(
            Text("\n".join(head)),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
            vertical="bottom",
        )
    for row in range(len(table)):
        rendered.add_row(*(Text(cells[row]) for _, cells, _ in shown))
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
