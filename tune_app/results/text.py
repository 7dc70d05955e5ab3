"""Values as text."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from trainables.checkpoints import without_nonfinite
from trainables.config import as_scalar


def plain(value: Any) -> Any:
    """Return cells as JSON has them, at any depth: Python's own scalars, None for values that are missing or not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is pd.NA or value is pd.NaT:
        return None
    return value.isoformat() if isinstance(value, pd.Timestamp) else without_nonfinite(value)


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
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d %H:%M")
    value = as_scalar(column, value)
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list | tuple):
        return ", ".join(format_value(column, one) for one in value)
    return _number_text(column, float(value))


def _number_text(column: str, number: float) -> str:
    if column.endswith("_lr") or "lr_" in column or column == "weight_decay":
        return compact(number)
    if column.endswith("_s"):
        return duration(number)
    if _is_score(column):
        return f"{number:.3f}"
    return str(int(number)) if number.is_integer() and abs(number) < 1e15 else f"{number:.4g}"


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
