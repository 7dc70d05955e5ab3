"""Columns, filters and sort orders that users write."""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import pandas as pd

from trainables.config import as_scalar

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
    holds blanks or signs or is a column's name. A missing value passes `== none` and no other comparison.

    Raises QueryError that names the part that was not understood, and where it is.
    """
    for condition in [where] if isinstance(where, str) else where:
        if condition.strip():
            table = table[_Condition(table, condition).mask()]
    return table


_TOKEN = re.compile(r"""\s*(?:(<=|>=|==|!=|[<>=~(),])|"([^"]*)"|'([^']*)'|([^\s<>=!~(),'"]+))""")


_OPERATORS = ("<", "<=", ">", ">=", "==", "=", "!=", "~")
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


class _Condition:
    """Recursive descent over one condition: or, and, not, comparisons. Small enough to be safe by reading it."""

    def __init__(self, table: pd.DataFrame, text: str) -> None:
        self.table, self.text = table, text
        self.tokens: list[tuple[str, str]] = []  # ("sign" | "text" | "word" | "end", content)
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
                return self.table[column].fillna(False).astype(bool)  # `drw_active` alone
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
        if sign in ("==", "!=") and _is_none(right):
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
        try:
            result = _COMPARE[sign](column, other)
        except TypeError:
            raise QueryError(
                f"condition {self.text!r}: {left[1]} and {right[1]} do not compare"
            ) from None
        missing = column.isna() | (other.isna() if isinstance(other, pd.Series) else False)
        found: pd.Series = result.fillna(False).astype(bool) & ~missing
        return found

    def _value(self, name: str, column: pd.Series, text: str) -> Any:
        """`text` as the column's type, so that 00007 is an id for the column `trial` and a number for `number`."""
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
        return as_scalar(name, text)


def _is_none(operand: tuple[str, str]) -> bool:
    kind, what = operand
    return kind == "word" and what.lower() in ("none", "null", "missing")
